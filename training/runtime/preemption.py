"""Signals that ask for a checkpoint and a clean stop: they only set a flag, which the ranks agree on once per step."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

#: status of a program that was asked to stop, has saved, and continues when it is started again ("temporary failure")
INTERRUPTED_STATUS = os.EX_TEMPFAIL

#: who has pressed Ctrl-C is answered at once, however long a step takes
_TOLD = b"\nstopping as soon as all is saved; Ctrl-C once more ends at once, without saving\n"


class BrokenOff(Exception):
    """A piece of work was left undone because a stop was asked for; raised by all who share it."""


class StopRequest:
    """Context manager: inside it TERM, INT (Ctrl-C) and one chosen signal set :attr:`requested` instead of ending the process.

    A second INT ends it at once.  A launcher may start the process with the others blocked: one that came while the process was
    starting is then obeyed on entry, and one that comes after the end no longer disturbs.
    """

    def __init__(self, stop_signal: str) -> None:
        """``stop_signal``: name without SIG, e.g. ``USR2``; raises ValueError for an unknown one."""
        try:
            chosen = signal.Signals["SIG" + stop_signal.upper().removeprefix("SIG")]
        except KeyError:
            raise ValueError(f"deepspeed.stop_signal={stop_signal}: no such signal; use USR1 or USR2") from None
        self.requested = False
        self._received: signal.Signals | None = None
        self._signals = {chosen, signal.SIGTERM}
        self._previous: dict[signal.Signals, Any] = {}
        self._blocked: set[int] = set()

    def __enter__(self) -> StopRequest:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell starts what shall run in the background
        for number in self._signals if ignored else self._signals | {signal.SIGINT}:
            self._previous[number] = signal.signal(number, self._handle)
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        return self

    def __exit__(self, *error: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: the signal may have come in the middle of writing to the same stream.
        self.requested, self._received = True, signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0":  # a terminal's Ctrl-C reaches all ranks of this machine
                os.write(2, _TOLD)

    def announce(self) -> None:
        """Log, once, which signal has come; to be called where the flag is looked at."""
        received, self._received = self._received, None  # at once: two threads may look
        if received is not None:
            logger.info("%s received: stopping after this step", received.name)

    def give_way(self) -> None:
        """Raise BrokenOff where this process was asked to stop: within work that no other rank waits for step by step."""
        self.announce()
        if self.requested:
            raise BrokenOff
