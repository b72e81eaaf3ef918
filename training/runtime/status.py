"""What a job is doing, in one small file that rank 0 replaces as a whole: ``python -m ladir status`` reads it.

It is written by a thread every few seconds: a step costs nothing for it, and a reader sees that the process lives even where one
takes hours.  How a phase ended is written at once.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from pathlib import Path
from typing import Any

from ladir.report.status import FAILED, FINISHED, RUNNING, STOPPED
from training.runtime.files import read_json, write_json
from training.runtime.preemption import BrokenOff

logger = logging.getLogger(__name__)

_MESSAGE_CHARACTERS = 2000


class Pace:
    """When work will be done, judged by how fast it went since this start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._origin: tuple[float, float] | None = None

    def seconds_left(self, fraction: float) -> float | None:
        """Seconds until all is done, now that ``fraction`` of it is.

        None at the first call, from which time is taken: what came before it compiles and warms up.
        """
        now = self._clock()
        if self._origin is None:
            self._origin = now, fraction
        start, before = self._origin
        if fraction >= 1:
            return 0.0
        return (1 - fraction) * (now - start) / (fraction - before) if fraction > before else None


class Status:
    """The file of one phase under way.  Use as a context manager; without a file (on other ranks than 0) nothing happens."""

    def __init__(self, phase: str, ranks: int, file: Path | None = None, every_seconds: float = 5.0) -> None:
        """``file``: what an earlier start of the phase wrote there says how many there were."""
        self._file, self._every, self._ended = file, every_seconds, threading.Event()
        self._lock = threading.Lock()
        self._before: Token[Status | None] | None = None
        self._thread = threading.Thread(target=self._write_regularly, daemon=True)
        now = time.time()
        self._facts: dict[str, Any] = {
            "phase": phase,
            "state": RUNNING,
            "doing": "starting",
            "since": now,
            "started": now,
            "starts": 1 + _starts_before(file, phase),
            "process": os.getpid(),
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "ranks": ranks,
            "every_seconds": every_seconds,
        }

    def say(self, doing: str | None = None, /, **facts: Any) -> None:
        """From now on the file says this: what is being done, and figures by name."""
        if self._file is None:
            return
        with self._lock:
            if doing is not None and doing != self._facts["doing"]:
                self._facts |= {"doing": doing, "since": time.time()}
            self._facts |= facts

    def stopped(self) -> None:
        """The phase was asked to stop, has saved, and continues when it is started again."""
        self.say(state=STOPPED)

    def __enter__(self) -> Status:
        self._before = _of_run.set(self)
        if self._file is not None:
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._before is not None:
            _of_run.reset(self._before)
        if self._file is None:
            return
        self._ended.set()
        self._thread.join()
        if isinstance(error, BrokenOff):
            self.stopped()
        elif error is not None:
            self.say(state=FAILED, message=f"{type(error).__name__}: {error}"[:_MESSAGE_CHARACTERS])
        elif self._facts["state"] == RUNNING:
            self.say(state=FINISHED)
        self.say("", ended=time.time())
        self._write()

    def _write_regularly(self) -> None:
        while not self._ended.wait(self._every):
            self._write()

    def _write(self) -> None:
        """Whatever keeps the file from being written costs nothing but the file."""
        assert self._file is not None
        with self._lock:
            content = {**self._facts, "written": time.time()}
        try:
            write_json(self._file, content)
        except OSError as error:
            logger.warning("%s cannot be written: %s; python -m ladir status shows what it last said", self._file, error)


#: that of the run around the work, for work that is handed no run; who opened the run sets it, and takes it back
_of_run: ContextVar[Status | None] = ContextVar("status of the run", default=None)


def say(doing: str) -> None:
    """From now on the status of the run around this, where there is one, says this."""
    if (status := _of_run.get()) is not None:
        status.say(doing)


def _starts_before(file: Path | None, phase: str) -> int:
    """Starts of the phase that have not finished it."""
    try:
        before = {} if file is None else read_json(file)
    except (OSError, ValueError):
        return 0
    return int(before.get("starts", 0)) if before.get("phase") == phase and before.get("state") != FINISHED else 0
