"""Work handed to forks of this process, whose results come in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

R = TypeVar("R")

#: results that each fork makes in advance
_AHEAD = 2


def forked(
    work: Dataset[R],
    places: Iterable[Any],
    processes: int,
    at_start: Callable[[int], None],
    generator: torch.Generator | None = None,
) -> Iterator[R]:
    """``work[place]`` for every place, in order, each made by one of ``processes`` forks; they end with the iterator.

    ``work`` is inherited; places and results are handed over.  ``at_start`` is called with its number in every fork.
    ``generator``: what the forks' seed is drawn from; not given: PyTorch's own.
    """
    loader = DataLoader(
        work,
        batch_size=None,
        sampler=places,
        num_workers=processes,
        collate_fn=_unchanged,
        worker_init_fn=at_start,
        prefetch_factor=_AHEAD,
        multiprocessing_context="fork",
        generator=generator,
    )
    made: Any = iter(loader)
    try:
        yield from made
    finally:
        made._shutdown_workers()  # there is no public way, and the interpreter's end would wait for them


def _unchanged(made: R) -> R:
    return made
