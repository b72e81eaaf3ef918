"""The micro batches of one optimizer step, collated in the background while the step before it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from training.runtime.distributed import World
from training.runtime.phase import Batch, SampleSource
from training.runtime.sampler import DataOrder


@dataclass(frozen=True)
class Window:
    """This rank's part of a global batch."""

    batches: list[Batch]
    numbers: list[int]
    """Number of each micro batch's first sample in the whole run."""
    wait: float
    """Seconds the loop waited for it."""

    def count(self, term: str) -> float:
        """Labels of a loss term."""
        return float(sum(batch.counts.get(term, 0) for batch in self.batches))

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(batch.num_tokens for batch in self.batches)


class Windows:
    """Endless iterator over a rank's windows, one collated ahead.  Use as a context manager."""

    def __init__(self, source: SampleSource, order: DataOrder, consumed: int, world: World, micro: int) -> None:
        """``consumed``: samples of the run already used, by all ranks together."""
        self._source, self._order, self._world, self._micro = source, order, world, micro
        self._consumed = consumed
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate")
        self._next: Future[tuple[list[Batch], list[int]]] = self._worker.submit(self._collate, consumed)

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        start = time.perf_counter()
        batches, numbers = self._next.result()
        wait = time.perf_counter() - start
        self._consumed += self._order.global_batch
        self._next = self._worker.submit(self._collate, self._consumed)
        return Window(batches, numbers, wait)

    def _collate(self, consumed: int) -> tuple[list[Batch], list[int]]:
        parts = self._order.window(consumed, self._world.rank, self._world.size, self._micro)
        return [self._micro_batch(*part) for part in parts], [part[1][0] for part in parts]

    def _micro_batch(self, indices: list[int], numbers: list[int]) -> Batch:
        try:
            return self._source.collate(indices, numbers)
        except Exception as error:
            error.add_note(f"This happened while samples {indices} were made into a batch.")
            raise
