"""Processes that judge answers must not hear what asks a job to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@contextmanager
def held_signals() -> Iterator[None]:
    """A process that is started inside never receives a signal to stop (some clusters send it to all processes of a job).

    A verdict that was cut short would be taken for a wrong answer.  Such processes are ended by SIGKILL.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
