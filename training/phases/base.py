"""What a training is, as the train loop sees it: a model of :mod:`ladir.models`, samples and a collator.

Loop, ranks and checkpoints are the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ladir.data.token_lists import Measured
from training.phases.samples import Show
from training.runtime.telemetry import Telemetry


class Items(Protocol):
    """What samples are taken from: a list, or a store on disk."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """One sample."""


@dataclass
class Samples:
    """Samples with their collator: what the loop draws micro batches from."""

    items: Items
    collator: Callable[[Sequence[Any], Sequence[int], bool], Any]

    @property
    def num_samples(self) -> int:
        return len(self.items)

    def length(self, index: int) -> int:
        """About how much work a sample is; 0 where the items do not know."""
        return self.items.length(index) if isinstance(self.items, Measured) else 0

    def collate(self, indices: list[int], numbers: list[int], training: bool = True) -> Any:
        """One micro batch of the samples at ``indices``, whose places in the run are ``numbers``."""
        return self.collator([self.items[i] for i in indices], numbers, training)


@dataclass
class TrainingPhase(Samples):
    """A model with its losses and samples; ``write(folder, state)`` stores the finished model."""

    name: str
    model: nn.Module
    weights: Mapping[str, float]
    validation: Samples | None
    write: Callable[[Path, Iterator[tuple[str, Tensor]]], None]
    show: Show | None = None

    def on_validate(self, model: nn.Module, telemetry: Telemetry, step: int) -> None:
        """Show samples, where any are wanted."""
        if self.show is not None:
            self.show(model, telemetry, step)

    def save(self, folder: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        """Write the model whose full tensors ``state`` yields (rank 0)."""
        self.write(folder, state)
