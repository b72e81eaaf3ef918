"""How far a training is, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ladir.config import TrainSettings


@dataclass
class Progress:
    """Where a training stands; a checkpoint holds exactly this."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def fraction(self, settings: TrainSettings, num_samples: int) -> float:
        """Part of the training done, in [0, inf): the furthest of steps, epochs and seconds.

        Raises ValueError when no limit is set.
        """
        parts = self._parts(settings, num_samples)
        if not parts:
            raise ValueError("the training has no end: set max_steps, max_epochs or max_seconds")
        return max(parts.values())

    def limit(self, settings: TrainSettings, num_samples: int) -> str:
        """The setting that ends the training, with its value: the one that is reached furthest."""
        parts = self._parts(settings, num_samples)
        name = max(parts, key=lambda name: parts[name])
        return f"{name}={getattr(settings, name):g}"

    def _parts(self, settings: TrainSettings, num_samples: int) -> dict[str, float]:
        """Part of the training done by each limit that is set."""
        parts = {}
        if settings.max_steps is not None:
            parts["max_steps"] = self.step / max(settings.max_steps, 1)
        if settings.max_epochs is not None:
            parts["max_epochs"] = self.samples / max(settings.max_epochs * num_samples, 1)
        if settings.max_seconds is not None:
            parts["max_seconds"] = self.seconds / max(settings.max_seconds, 1e-9)
        return parts

    def after(self, samples: int) -> Progress:
        """The state after one more step of ``samples`` samples, at the same second."""
        return Progress(self.step + 1, self.samples + samples, self.seconds)


def learning_rate(settings: TrainSettings, fraction: float) -> float:
    """Learning rate at ``fraction`` of the training: linear warm-up, then the chosen schedule down to min_lr_ratio."""
    fraction = min(fraction, 1.0)
    if fraction < settings.warmup_fraction:
        return settings.lr * fraction / settings.warmup_fraction
    rest = (fraction - settings.warmup_fraction) / max(1.0 - settings.warmup_fraction, 1e-9)
    floor = settings.min_lr_ratio
    if settings.schedule == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))
    elif settings.schedule == "linear":
        factor = 1 - (1 - floor) * rest
    elif settings.schedule == "wsd":
        decayed = max(0.0, fraction - (1 - settings.decay_fraction)) / max(settings.decay_fraction, 1e-9)
        factor = 1 - (1 - floor) * decayed
    else:
        factor = 1.0
    return settings.lr * factor
