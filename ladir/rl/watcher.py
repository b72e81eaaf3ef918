"""A process beside another one, which it ends where a call does not come back and keeps the interpreter to itself.

A program of its own, with nothing but the standard library: ``python watcher.py PID SECONDS``.  A line of its input is what to
say of the call that begins, an empty one that it came back; the end of its input is the end of the other process.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def main() -> None:
    """Watch process PID: a call has SECONDS."""
    process, seconds = int(sys.argv[1]), float(sys.argv[2])
    said = b""
    while True:
        ready, _, _ = select.select([0], [], [], seconds if said else None)
        if not ready:
            sys.stderr.write(said.decode(errors="replace") + "\n")
            os.kill(process, signal.SIGKILL)
            return
        lines = os.read(0, 1 << 16)  # those of several calls, where they are short
        if not lines:
            return
        said = lines.splitlines()[-1]


if __name__ == "__main__":
    main()
