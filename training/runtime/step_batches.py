"""The micro batches of an optimizer step, collated while the steps before it run."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from ladir.data.forks import forked
from training.runtime.distributed import World
from training.runtime.phase import Batch, SampleSource
from training.runtime.sampler import DataOrder

T = TypeVar("T")


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch: the micro batches of one optimizer step."""

    first: int
    """Number of the global batch's first sample in the whole run."""
    batches: list[Batch]
    numbers: list[int]
    """Number of each micro batch's first sample in the whole run."""
    wait: float
    """Seconds the loop waited for it."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """``metric/<name>`` of how it was made, as a model's: (sum, count)."""
    made: int = 0
    """So many micro batches, the first ones, the model itself has made: they have no samples that could be left out."""

    def count(self, term: str) -> float:
        """Labels of a loss term."""
        return float(sum(batch.counts.get(term, 0) for batch in self.batches))

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(batch.num_tokens for batch in self.batches)


class StepBatchLoader:
    """Endless iterator over a rank's step batches, collated ahead.  Use as a context manager."""

    def __init__(
        self,
        source: SampleSource,
        order: DataOrder,
        consumed: int,
        world: World,
        micro: int,
        processes: int = 0,
        skipped: Collection[int] = (),
    ) -> None:
        """``consumed``: samples of the run already used, by all ranks together; ``processes`` collate, or one thread (0).

        Global batches that hold one of the samples ``skipped``, by their numbers, are left out.
        """
        collate, size = _Collate(source, order, world.rank, world.size, micro), order.global_batch
        bad = frozenset(skipped)
        starts = (start for start in itertools.count(consumed, size) if bad.isdisjoint(range(start, start + size)))
        self._ahead = _by_processes(collate, starts, processes) if processes else _by_thread(collate, starts)

    def __enter__(self) -> StepBatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.close()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        start = time.perf_counter()
        first, batches, numbers = next(self._ahead)
        return StepBatch(first, batches, numbers, time.perf_counter() - start)


@dataclass(frozen=True)
class _Collate(Dataset[tuple[int, list[Batch], list[int]]]):
    """A rank's micro batches of the global batch after so many samples, so many, and the number of each one's first sample."""

    source: SampleSource
    order: DataOrder
    rank: int
    ranks: int
    micro: int

    def __getitem__(self, consumed: int) -> tuple[int, list[Batch], list[int]]:
        parts = self.order.micro_batches(consumed, self.rank, self.ranks, self.micro)
        return consumed, [self._micro_batch(*part) for part in parts], [part[1][0] for part in parts]

    def _micro_batch(self, indices: list[int], numbers: list[int]) -> Batch:
        try:
            return self.source.collate(indices, numbers)
        except Exception as error:
            error.add_note(f"This happened while samples {indices} were made into a batch.")
            raise


_StepBatches = Generator[tuple[int, list[Batch], list[int]], None, None]


def _by_thread(collate: _Collate, starts: Iterator[int]) -> _StepBatches:
    """One collated ahead by a thread of this process."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate") as worker:
        coming = worker.submit(collate.__getitem__, next(starts))
        while True:
            step_batch = coming.result()
            coming = worker.submit(collate.__getitem__, next(starts))
            yield step_batch


def _by_processes(collate: _Collate, starts: Iterable[int], processes: int) -> _StepBatches:
    """Some collated ahead by each of ``processes`` forks of this one, which share its samples and none of its interpreter."""
    yield from forked(collate, starts, processes, _outlive_signals)


def _outlive_signals(worker: int) -> None:
    """A job's end is announced to all of its processes: the training then makes its last step, for which it needs a batch.

    Its other stop signal is handled as the training itself does, which was forked; for TERM PyTorch has a handler of its own, and
    Ctrl-C reaches every process of a terminal.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
