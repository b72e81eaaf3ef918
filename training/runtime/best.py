"""The best model of a training by a figure of its validations, and whether waiting for a better one is worth while."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladir.config import TrainSettings
from ladir.errors import UnusableError


class Best:
    """The best validation so far.  A checkpoint holds it, so that a training that goes on chooses as an undisturbed one."""

    def __init__(self, settings: TrainSettings) -> None:
        """``settings.best`` names the figure, with ``+`` before it where more is better."""
        self._name = (settings.best or "").removeprefix("+")
        self._sign = -1.0 if (settings.best or "").startswith("+") else 1.0
        self._patience = settings.patience
        self.step: int | None = None
        """Of the best model so far."""
        self._value = math.inf
        self._worse = 0
        self.figures: dict[str, float] = {}
        """All figures of that validation."""

    def __bool__(self) -> bool:
        """Whether the best model is wanted."""
        return bool(self._name)

    @property
    def exhausted(self) -> bool:
        """Whether as many validations in a row as ``patience`` brought nothing better."""
        return self._patience is not None and self._worse >= self._patience

    def limit(self) -> str:
        """What has ended the training, where that was the case, with the best step."""
        return f"patience={self._patience} (the best model is that of step {self.step})"

    def check(self, figures: Mapping[str, float]) -> None:
        """Raise UnusableError where validations have no such figure."""
        if self._name not in figures:
            raise UnusableError(
                f"train.best={self._name}: validations have no such figure; name one of {', '.join(sorted(figures)) or 'none'}"
            )

    def better(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether the validation of ``step`` is better than all before it; it is the best one then."""
        self.check(figures)
        value = self._sign * figures[self._name]
        if not value < self._value:  # nor is what is no number
            self._worse += 1
            return False
        self.step, self._value, self._worse, self.figures = step, value, 0, dict(figures)
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        value = self._value if math.isfinite(self._value) else None
        return {"step": self.step, "value": value, "worse": self._worse, "figures": self.figures}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; one of before holds nothing."""
        if state:
            self.step, self._worse, self.figures = state["step"], state["worse"], dict(state["figures"])
            self._value = math.inf if state["value"] is None else state["value"]


def keep_as_finished(best: Path, folder: Path) -> None:
    """Bring the files of the best model into the empty folder of the finished one, without a copy where the disk can do that.

    Raises UnusableError where the best model is gone.
    """
    if not best.is_dir():
        raise UnusableError(
            f"{best} is gone, the best model of the training: put it back; or say train.best=null with another run.name"
        )
    for file in sorted(best.rglob("*")):
        target = folder / file.relative_to(best)
        if file.is_dir():
            target.mkdir()
            continue
        try:
            os.link(file, target)
        except OSError:  # a file system without links
            shutil.copy2(file, target)


def remove_others(models: Path, phase: str, steps: set[int]) -> None:
    """Remove best models of ``phase`` but those of ``steps``: no checkpoint chooses them any more."""
    for folder in models.glob(f"{phase}-best-*"):
        if folder.name.rsplit("-", 1)[1] not in map(str, steps):
            shutil.rmtree(folder, ignore_errors=True)
