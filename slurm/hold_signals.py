"""Become another program, with signals held back: ``hold_signals.py TERM USR2 -- program arguments``.

A held signal is not lost: it waits until the program unblocks it.  Launchers never do and so survive a stop signal; training
processes do as soon as they can save, so that a signal that comes while they start is obeyed, too.
"""

from __future__ import annotations

import os
import signal
import sys


def main(arguments: list[str]) -> None:
    """Block the named signals and execute the rest of the command line."""
    split = arguments.index("--")
    names, command = arguments[:split], arguments[split + 1 :]
    numbers = {signal.Signals["SIG" + name.upper().removeprefix("SIG")] for name in names}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)  # the shell before us ignored them
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
