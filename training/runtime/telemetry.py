"""What people look at: metrics.jsonl, TensorBoard, and a progress bar on a terminal or lines in a log.

Rank 0 writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ladir.config import TelemetrySettings
from training.runtime import dashboard
from training.runtime.files import locked, write_text
from training.runtime.run import Run, relevant_settings

logger = logging.getLogger(__name__)


class Telemetry:
    """The records of one phase.  Use as a context manager; call with agreed (all-reduced) values."""

    def __init__(self, run: Run, resumed_step: int, validated: bool = True) -> None:
        """``resumed_step``: last step of the checkpoint continued from (0: none); later records are withdrawn, and that of its
        validation unless it was ``validated`` before it was saved."""
        self._settings: TelemetrySettings = run.config.telemetry
        self._phase, self._device = run.phase, run.world.device
        self._active = run.world.is_main
        self._writer: Any = None
        self._bar: tqdm[Any] | None = None
        self._last_line = -math.inf
        if not self._active:
            return
        self._file = run.folder.metrics
        withdraw(self._file, run.phase, resumed_step, validated)
        if self._settings.tensorboard:
            self._open_tensorboard(run, resumed_step + validated)
            if not validated:
                self._draw_again(resumed_step)
        bar = self._settings.progress == "bar" or (self._settings.progress == "auto" and sys.stderr.isatty())
        if bar:
            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}"
            self._bar = tqdm(total=1.0, desc=run.phase, bar_format=layout, file=sys.stderr, leave=True)

    @property
    def shows_samples(self) -> bool:
        """Whether texts, histograms and pictures go anywhere: to TensorBoard, from rank 0."""
        return self._writer is not None

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(lambda writer: writer.file_writer.add_summary(self._ended))
        self._draw(lambda writer: writer.close())
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """Where TensorBoard's files have none there are no more charts, and the training goes on."""
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning("TensorBoard's files cannot be written (%s): make room; charts end here until the next start", error)

    def _draw(self, write: Callable[[Any], None]) -> None:
        """Let TensorBoard's writer write, where there is one."""
        if self._writer is not None:
            with self._while_there_is_room():
                write(self._writer)

    def _open_tensorboard(self, run: Run, purge_step: int) -> None:
        """Start TensorBoard's files with the charts' layout, and the settings for its HPARAMS; what earlier files hold of
        ``purge_step`` and later is withdrawn."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        settings = dashboard.hyperparameters(relevant_settings(dataclasses.asdict(run.config), run.phase))
        # Not the writer's add_hparams, which makes a folder, and thus a run of its own, at every start.
        columns, started, self._ended = hparams(settings, dict.fromkeys(dashboard.RESULT_METRICS))
        with self._while_there_is_room():
            self._writer = SummaryWriter(str(run.folder.tensorboard(run.phase)), purge_step=purge_step)
            for summary in (columns, started):
                self._writer.file_writer.add_summary(summary)
            self._writer.add_custom_scalars(dashboard.layout())

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
        self._scalars(kind, step, values)

    def _scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        def scalars(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(dashboard.tag(kind, name), value, step)

        self._draw(scalars)

    def _draw_again(self, step: int) -> None:
        """The training scalars of a step whose validation is withdrawn: TensorBoard withdraws whole steps."""
        if not self._file.is_file():
            return
        with locked(self._file):
            rows = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            phase, kind, made = row.pop("phase"), row.pop("kind"), row.pop("step")
            if (phase, kind, made) == (self._phase, "train", step):
                self._scalars(kind, step, {name: math.nan if value is None else value for name, value in row.items()})

    def progress(self, fraction: float, step: int, values: Mapping[str, float]) -> None:
        """Move the bar, or write a line where the last one is old enough (or the training is at its end)."""
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
            logger.info("%s %3.0f%% step %d %s", self._phase, 100 * min(fraction, 1.0), step, text)

    def text(self, name: str, text: str, step: int) -> None:
        """A text sample (Markdown) for TensorBoard."""
        self._draw(lambda writer: writer.add_text(name, text, step))

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """The distribution of ``values`` for TensorBoard."""
        if self._writer is None:
            return
        values = values.detach().float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._draw(lambda writer: writer.add_histogram(name, values, step))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture for TensorBoard: uint8 [height, width, channels]."""
        self._draw(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

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
