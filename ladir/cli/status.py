"""python -m ladir status RUN: what the run's job is doing, how far it is and when it will be done, or how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ladir.arguments import LineParser
from ladir.report.status import RunStatus, lines, one_line, read_status

_SECONDS = 2.0


def run(argv: Sequence[str]) -> int:
    """Show it; status 1 where a job has failed, crashed or gives no sign of life."""
    parser = LineParser(prog="python -m ladir status", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, runs/<name>")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_SECONDS,
        metavar="SECONDS",
        help=f"go on until Ctrl-C, looking every so many seconds ({_SECONDS:g}); in a file or pipe: a line for all that is new",
    )
    arguments = parser.parse_args(argv)
    if arguments.watch is not None and arguments.watch <= 0:
        raise ValueError(f"--watch {arguments.watch:g}: must be above 0")
    status = read_status(arguments.run)
    if arguments.watch is None:
        sys.stdout.write("".join(f"{line}\n" for line in lines(status)))
        return int(any(job.is_bad for job in status.jobs))
    if sys.stdout.isatty():
        _redraw(status, arguments.watch)
    else:
        _follow(status, arguments.watch)
    return 0


def _redraw(status: RunStatus, every: float) -> None:
    """All of it in place, on a terminal, until Ctrl-C."""
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(lines(status)), overflow="fold"), refresh=True)
            time.sleep(every)
            status = read_status(status.folder)


def _follow(status: RunStatus, every: float) -> None:
    """A line whenever it is another one, until Ctrl-C or until nobody reads it any more."""
    shown = ""
    while True:
        if (line := one_line(status)) != shown:
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            sys.stdout.flush()
            shown = line
        time.sleep(every)
        status = read_status(status.folder)
