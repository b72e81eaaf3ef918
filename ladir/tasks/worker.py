"""A process that answers questions one at a time and is killed where one takes too long."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ladir.tasks.signals import held_signals

_START_SECONDS = 300.0
_MAX_REPLY = 1 << 20  # bytes


class Worker:
    """A script kept running: a JSON object a line in, one a line out.  Started at the first question, and again after it
    was killed.  Threads take turns.

    Nothing but JSON of strings passes between the processes.
    """

    def __init__(self, script: Path, arguments: Sequence[str], seconds: float) -> None:
        """``script`` says ``ready`` when it is; ``seconds`` is the wall time of a question, its own limits apart."""
        self._command = [sys.executable, "-I", str(script), *arguments]
        self._seconds = seconds
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, str]) -> dict[str, Any] | None:
        """The reply; None where the process ended or was killed over it.  Raises RuntimeError where it cannot be started."""
        with self._turn:
            process = self._running()
            assert process.stdin is not None  # a pipe, by _start
            try:
                process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                line = None
            else:
                line = _read_line(process, self._seconds)
            if line is None:
                self._end()
                return None
            reply: dict[str, Any] = json.loads(line)
            return reply

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._turn:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        with tempfile.TemporaryFile() as errors:
            with held_signals():
                process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={}, start_new_session=True
                )
            weakref.finalize(self, _kill, process)
            if _read_line(process, _START_SECONDS) != b"ready\n":
                _kill(process)
                errors.seek(0)
                raise RuntimeError(f"{' '.join(self._command)} did not start: {errors.read(4000).decode(errors='replace')}")
        return process

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what was still to be written to the dead
                stream.close()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the process's output; None where it ended, said too much, or the time is over."""
    assert process.stdout is not None  # a pipe, by Worker
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > _MAX_REPLY or not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = process.stdout.read1(_MAX_REPLY)  # type: ignore[attr-defined]
        if not part:
            return None
        line += part
    return line
