"""What people look at: metrics.jsonl, TensorBoard and other loggers, and a progress bar on a terminal or lines in a log.

Rank 0 writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ladir.config import TelemetrySettings
from ladir.report.status import duration
from training.runtime.alone import GiveWay
from training.runtime.cadence import Cadence
from training.runtime.files import locked, write_json, write_text
from training.runtime.loggers import Loggers
from training.runtime.preemption import BrokenOff
from training.runtime.run import Run

logger = logging.getLogger(__name__)


class Telemetry:
    """The records of one phase.  Use as a context manager; call with agreed (all-reduced) values."""

    def __init__(self, run: Run, resumed_step: int, validated: bool = True, cadence: Cadence | None = None) -> None:
        """``resumed_step``: last step of the checkpoint continued from (0: none); later records are withdrawn, and that of its
        validation unless it was ``validated`` before it was saved.  ``cadence``: a training's, which looks at its stop flag."""
        self._settings: TelemetrySettings = run.config.telemetry
        self._run, self._phase, self._device = run, run.phase, run.world.device
        self._stops = cadence or run
        self._active = run.world.is_main
        self._loggers = Loggers(run, run.phase, [])
        self._bar: tqdm[Any] | None = None
        self._last_line = -math.inf
        if not self._active:
            return
        self._file = run.folder.metrics
        withdraw(self._file, run.phase, resumed_step, validated)
        purge_steps = {"train": resumed_step + 1, "validation": resumed_step + validated}
        self._loggers = Loggers(run, run.phase, self._settings.loggers, purge_steps)
        bar = self._settings.progress == "bar" or (self._settings.progress == "auto" and sys.stderr.isatty())
        if bar:
            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=1.0, desc=run.phase, bar_format=layout, file=sys.stderr, leave=True)

    @property
    def shows_samples(self) -> bool:
        """Whether texts, histograms and pictures go anywhere: to the loggers, from rank 0."""
        return bool(self._loggers)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self._run.world.size

    @contextmanager
    def passes(self, gathered: bool) -> Iterator[GiveWay]:
        """Around what all ranks run of a model: a function to call after each pass, which breaks it off where any rank was asked
        to stop.  Behind it all ranks meet, and BrokenOff is raised on all of them (collective).

        ``gathered``: every pass gathers weights from other ranks, which is why all must leave behind the same one: they ask one
        another after each, in one sum beside that pass's many.  Else each goes its own way, and an alarm tells it.
        """
        if gathered:
            yield self._stops.give_way
            return
        alarm = self._stops.alarm()
        with suppress(BrokenOff):
            yield alarm.give_way
        if alarm.meet():
            raise BrokenOff

    def alone(self, work: Callable[[GiveWay], object]) -> None:
        """Have rank 0 do what makes samples readable, unless a stop breaks it off (collective)."""

        def shown(give_way: GiveWay) -> None:
            if self.shows_samples:
                work(give_way)

        self._stops.alone(shown)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: object) -> None:
        self._loggers.close()
        if self._bar is not None:
            self._bar.close()

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write scalars: ``kind`` is ``train`` or ``validation``; non-finite values are written as null."""
        if not self._active:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with locked(self._file), self._file.open("a", encoding="utf-8") as file:  # another phase may replace it meanwhile
                file.write(json.dumps({"phase": self._phase, "kind": kind, "step": step, **row}) + "\n")
        except OSError as error:  # the training is worth more than its record
            logger.warning("%s cannot be written (%s): make room; the record of step %d is lost", self._file, error, step)

        self._loggers.write(lambda one: one.scalars(kind, values, step))

    def progress(self, fraction: float, step: int, values: Mapping[str, float], left: float | None = None) -> None:
        """Move the bar, or write a line where the last one is old enough (or the training is at its end).

        ``left``: seconds until the end, where they are known.
        """
        if not self._active:
            return
        text = " ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is not None:
            self._bar.n = min(fraction, 1.0)
            self._bar.set_postfix_str(f"step {step} {text}")
            return
        now = time.monotonic()
        if fraction >= 1 or now - self._last_line >= self._settings.line_every_seconds:
            self._last_line = now
            end = f" ETA {duration(left)}" if left else ""
            logger.info("%s %3.0f%% step %d%s %s", self._phase, 100 * min(fraction, 1.0), step, end, text)

    def keep(self, name: str, step: int, content: Mapping[str, Any]) -> None:
        """``<name>-<phase>.json`` of the run folder, which has the newest such content and its step alone."""
        if not self._active:
            return
        file = self._run.folder.path / f"{name}-{self._phase}.json"
        try:
            write_json(file, {"step": step, **content})
        except OSError as error:
            logger.warning("%s cannot be written (%s): make room; the report goes without", file, error)

    def text(self, name: str, text: str, step: int) -> None:
        """A text sample (Markdown)."""
        self._loggers.write(lambda one: one.text(name, text, step))

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """The distribution of ``values``, which describe latents."""
        if not self._loggers:
            return
        values = values.detach().float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._loggers.write(lambda one: one.histogram(name, values, step))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [height, width, channels]."""
        self._loggers.write(lambda one: one.image(name, pixels, step))

    def memory_gib(self) -> float:
        """Peak memory of this process so far, in GiB: of the GPU where there is one, else resident."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def withdraw(metrics: Path, phase: str, after: int, validated: bool = True) -> None:
    """Remove a phase's records of steps later than ``after``, which will be made again, and a torn last line.

    ``validated`` False: the validation of step ``after`` will be made again, too.
    """
    if not metrics.is_file():
        return
    with locked(metrics):
        before = metrics.read_text(encoding="utf-8", errors="replace")
        kept = "".join(f"{line}\n" for line in before.splitlines() if _stays(line, phase, after, validated))
        if kept != before:
            write_text(metrics, kept)


def _stays(line: str, phase: str, after: int, validated: bool) -> bool:
    try:
        row = json.loads(line)
        last = after if validated or row["kind"] != "validation" else after - 1
        return bool(row["phase"] != phase or row["step"] <= last)
    except (ValueError, KeyError, TypeError):
        return False


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
