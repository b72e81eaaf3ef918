"""To look into a training: steps under PyTorch's profiler, named ranges for Nsight Systems, memory when it has run out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.runtime.distributed import World

logger = logging.getLogger(__name__)


_NOTHING = nullcontext()
#: says of an error that somebody has named a remedy
_REMEDIED = "remedied"


class Ranges:
    """Names the parts of a step for Nsight Systems (NVTX); nothing where that is off or there is no CUDA."""

    def __init__(self, wanted: bool) -> None:
        self._on = wanted and torch.cuda.is_available()

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """What happens inside goes by that name."""
        return torch.cuda.nvtx.range(name) if self._on else _NOTHING


class MemorySnapshot:
    """Which tensors lie in a GPU's memory, for pytorch.org/memory_viz, where it has run out.

    ``events``: how many allocations and frees before that are told with the code that made them; 0: none is recorded.
    """

    def __init__(self, events: int, file: Path, device: torch.device) -> None:
        self._file, self._on_cuda = file, device.type == "cuda"
        if events and self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=events)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Where memory runs out inside, the error says what lay in it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            for note in self.dumped():
                error.add_note(note)
            raise

    def dumped(self) -> Iterator[str]:
        """Write the file; what to say of it, if anything."""
        if not self._on_cuda:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._file))
        except (OSError, RuntimeError) as error:  # what ran out of memory is what matters
            yield f"There is no snapshot of the memory: {self._file} cannot be written ({error})."
            return
        yield (
            f"What lay in memory: {self._file} (open it at pytorch.org/memory_viz; telemetry.memory_events=100000 also tells "
            "which code allocated it)."
        )


@contextmanager
def when_full(remedy: str) -> Iterator[None]:
    """What is to be done where memory runs out inside, unless something further in has said so."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not getattr(error, _REMEDIED, False):
            error.add_note(remedy)
            setattr(error, _REMEDIED, True)
        raise


class StepProfiler:
    """Traces the steps ``window`` = [first, last] of a phase into ``<folder>/rank-<n>.json.gz``; nothing where it is empty."""

    def __init__(self, window: list[int], folder: Path, world: World) -> None:
        self._window, self._folder, self._world = window, folder, world
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Step ``step`` is about to begin (a training that goes on within the window traces the rest of it)."""
        if self._window and self._running is None and self._window[0] <= step <= self._window[1]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> None:
        """Step ``step`` is done."""
        if self._running is not None and step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, where one is under way."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        file = self._folder / f"rank-{self._world.rank:05d}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(file))
        except OSError as error:  # the training is worth more than its trace
            logger.warning("%s cannot be written (%s): make room; there is no trace of these steps", file, error)
            return
        logger.info("traced steps %d to %d: %s, one file per rank (ui.perfetto.dev opens them)", *self._window, self._folder)
