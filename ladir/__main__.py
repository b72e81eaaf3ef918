"""``python -m ladir "question" --model DIR``, and the commands inspect, countdown and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ladir.config.loader import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status (0 good, 1 the input has faults, 2 the command line has)."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    # Each command imports what it needs: help and small commands stay quick.
    try:
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
    except (ConfigError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"ladir: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has gone; nothing is wrong
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
