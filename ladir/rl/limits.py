"""Calls of a user's function, which may never come back, in a limited time."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ladir.tasks.signals import held_signals
from ladir.threads import in_thread

T = TypeVar("T")

_WATCHER = Path(__file__).with_name("watcher.py")


class OverTimeError(RuntimeError):
    """A call did not come back in time."""


class TimeLimit:
    """Calls functions, one at a time, that have ``seconds`` each.

    A call is made in a thread of its own, which is left behind where it does not come back.  One that does not even let other
    threads run (a regular expression, a power of huge numbers) takes the whole process with it: a second process ends it, with
    the same words, ``grace`` seconds later.
    """

    def __init__(self, seconds: float, grace: float = 5.0) -> None:
        self._seconds, self._grace = seconds, grace
        self._watcher: subprocess.Popen[bytes] | None = None

    def __call__(self, function: Callable[[], T], what: str) -> T:
        """What ``function`` returns or raises; OverTimeError, beginning with ``what``, where it does neither in time."""
        message = f"{what} did not return within {self._seconds:g} seconds"
        with self._watched(message):
            found = in_thread(function)
            try:
                return found.result(self._seconds)
            except TimeoutError as error:
                if found.done():  # its own
                    raise
                raise OverTimeError(message) from error

    @contextmanager
    def _watched(self, message: str) -> Iterator[None]:
        """``message`` is said, and this process ended, where the block is not left long after its time."""
        self._say(" ".join(message.split()))
        try:
            yield
        finally:
            self._say("")

    def _say(self, line: str) -> None:
        if self._watcher is None:
            command = [sys.executable, "-I", "-S", str(_WATCHER), str(os.getpid()), str(self._seconds + self._grace)]
            with held_signals():
                self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            weakref.finalize(self, _end, self._watcher)
        assert self._watcher.stdin is not None  # a pipe
        with suppress(BrokenPipeError):  # somebody has ended it: the first limit stays
            self._watcher.stdin.write(line.encode() + b"\n")
            self._watcher.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
