"""``python -m ladir "question" --model DIR``, and the commands inspect, countdown and report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from ladir.installation import missing_package

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status (0 good, 1 the input has faults, 2 the command line has, 130 Ctrl-C)."""
    try:
        return _told(argv)
    except KeyboardInterrupt:
        sys.stderr.write("\n" if sys.stderr.isatty() else "")  # behind ^C
        sys.stderr.write("ladir: stopped by Ctrl-C\n")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (line := missing_package(error)) is None:
            raise
        sys.stderr.write(f"ladir: {line}\n")
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has gone; nothing is wrong
        return 0


def _told(argv: Sequence[str]) -> int:
    """Run one command; what is the user's to mend is one message."""
    from ladir.config.loader import ConfigError

    try:
        return _run(argv)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"ladir: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def _run(argv: Sequence[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    # Each command imports what it needs: help and small commands stay quick.
    if command == "inspect":
        from ladir.cli.inspect import run
    elif command == "countdown":
        from ladir.cli.countdown import run
    elif command == "report":
        from ladir.cli.report import run
    else:
        from ladir.cli.ask import run

        rest = argv
    return run(rest)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop, and taking the interpreter apart takes a while
    sys.exit(status)
