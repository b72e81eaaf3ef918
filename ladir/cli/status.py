"""python -m ladir status RUN: what the run's job is doing, how far it is and when it will be done, or how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ladir.arguments import LineParser
from ladir.report.status import Queue, RunStatus, lines, news, read_status

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
        help=f"look every so many seconds ({_SECONDS:g}) until nothing runs, waits or can go on; in a file or pipe: a line "
        "for another phase, state, checkpoint or percent",
    )
    arguments = parser.parse_args(argv)
    if arguments.watch is not None and arguments.watch <= 0:
        raise ValueError(f"--watch {arguments.watch:g}: must be above 0")
    if arguments.watch is None:
        status = read_status(arguments.run)
        sys.stdout.write("".join(f"{line}\n" for line in lines(status)))
    else:
        status = (_redraw if sys.stdout.isatty() else _follow)(arguments.run, arguments.watch)
    return int(any(job.is_bad for job in status.jobs))


def _redraw(folder: str, every: float) -> RunStatus:
    """All of it in place, on a terminal, until nothing goes on any more: what it says then."""
    queue = Queue()
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            status = read_status(folder, queue)
            live.update(Text("\n".join(lines(status)), overflow="fold"), refresh=True)
            if status.is_over:
                return status
            time.sleep(every)


def _follow(folder: str, every: float) -> RunStatus:
    """A line for what is new, until nothing goes on any more, what it says then; or until nobody reads it."""
    queue, told = Queue(), dict[str, Hashable]()
    while True:
        status = read_status(folder, queue)
        for name, key, line in news(status):
            if told.get(name) != key:
                sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
                sys.stdout.flush()
                told[name] = key
        if status.is_over:
            return status
        time.sleep(every)
