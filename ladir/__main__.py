"""``python -m ladir COMMAND ...``, also installed as the program ``ladir``; the commands: :mod:`ladir.cli.commands`."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence

from ladir.cli.commands import run
from ladir.installation import missing_package

INTERRUPTED = 128 + signal.SIGINT
#: what keeps files from being read or written where nothing is wrong with the program, and what helps
_ACCESS, _ROOM = "give yourself access to it", "make room there"
_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ACCESS),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
}


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
        return run(argv)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"ladir: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if (remedy := _REMEDIES.get(error.errno or 0)) is None:
            raise
        sys.stderr.write(f"ladir: {error.filename or 'a file'}: {error.strerror}; {remedy}, or name another place (--out)\n")
        return 1


def program() -> int:
    """Run the command line of this process; returns the exit status."""
    status = main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop, and taking the interpreter apart takes a while
    return status


if __name__ == "__main__":
    sys.exit(program())
