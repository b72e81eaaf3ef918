"""Averages over the steps between two log lines; part of a checkpoint, so that a resumed run logs the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from training.runtime.distributed import World

METRIC = "metric/"


class Meters:
    """Sums and counts of loss terms (already global) and of the phase's metrics (still of this rank)."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._global: dict[str, list[float]] = {}
        self._local: dict[str, Tensor] = {}

    def add_losses(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """Add one step's loss sums and label counts over all ranks; returns the step's weighted loss."""
        loss = 0.0
        for term, weight in self._weights.items():
            self._add(term, sums[term], counts[term])
            loss += weight * sums[term] / max(counts[term], 1.0)
        self._add("loss", loss, 1.0)
        return loss

    def add_metrics(self, outputs: Mapping[str, Tensor]) -> None:
        """Add the ``metric/...`` entries of a model's output, without waiting for the device."""
        for name, value in outputs.items():
            if name.startswith(METRIC):
                name = name.removeprefix(METRIC)
                value = value.detach().double()
                self._local[name] = self._local[name] + value if name in self._local else value

    def _add(self, name: str, total: float, count: float) -> None:
        pair = self._global.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += count

    def collect(self, world: World) -> None:
        """Bring the metrics of all ranks together (collective)."""
        local = {name: value.tolist() for name, value in self._local.items()}
        self._local = {}
        for row in world.gather(local):
            for name, (total, count) in row.items():
                self._add(name, total, count)

    def averages(self) -> dict[str, float]:
        """Mean per name, where anything was counted."""
        return {name: total / count for name, (total, count) in self._global.items() if count > 0}

    def clear(self) -> None:
        """Start the next interval."""
        self._global, self._local = {}, {}

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint, after :meth:`collect`."""
        return {name: list(pair) for name, pair in self._global.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Take over a checkpoint's."""
        self._global = {name: list(pair) for name, pair in state.items()}


class LossSums:
    """Loss sums of several micro batches, on the device."""

    def __init__(self, terms: Iterable[str], device: torch.device) -> None:
        self._zero = torch.zeros((), device=device)
        self._sums: dict[str, Tensor] = dict.fromkeys(terms, self._zero)

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Add one micro batch's; a term it lacks counts as zero."""
        for term in self._sums:
            if term in outputs:
                self._sums[term] = self._sums[term] + outputs[term].detach().float()

    def stacked(self) -> Tensor:
        """``[terms]``, float64."""
        return torch.stack(list(self._sums.values())).double()
