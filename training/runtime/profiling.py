"""A window of training steps under PyTorch's profiler: one trace per rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.runtime.distributed import World

logger = logging.getLogger(__name__)


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
