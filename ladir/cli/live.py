"""Blocks becoming text on a terminal, while they do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ladir.report.text import one_line

_BAR = 24  # characters
_MOST_CHARACTERS = 400  # of a text; the terminal cuts what is longer than its line
_SPARE_LINES = 4
_SECONDS = 0.07  # between two pictures


class LiveTrace:
    """A line per trajectory with its present block, and a bar for the steps of the block; gone when it is closed.

    It is drawn on stderr, so that what is written to stdout stays clean.
    """

    def __init__(self, names: Sequence[str], num_steps: int, console: Console | None = None) -> None:
        """``names`` of the trajectories; ``num_steps`` per block."""
        self._names, self._num_steps = names, num_steps
        self._console = console or Console(stderr=True)
        self._shown: dict[int, tuple[int, int, str]] = {}
        self._drawn = -math.inf
        self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def __enter__(self) -> LiveTrace:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def step(self, trajectory: int, block: int, step: int, text: str) -> None:
        """What a trajectory's ``block`` reads as after denoising ``step`` (both counted from 0)."""
        self._shown[trajectory] = (block, step, text)
        now = time.monotonic()
        if now - self._drawn >= _SECONDS:
            self._drawn = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> RenderableType:
        """The trajectories that there is room for, and how far the one that is furthest has come."""
        table = Table.grid(padding=(0, 1))
        room = max(self._console.height - _SPARE_LINES, 1)
        for place, (block, _, text) in sorted(self._shown.items())[:room]:
            label = Text(f"trajectory {self._names[place]}, block {block + 1}", style="dim")
            table.add_row(label, Text(one_line(text, _MOST_CHARACTERS), no_wrap=True, overflow="ellipsis"))
        block, step, _ = max(self._shown.values())
        progress = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._num_steps, completed=step + 1, width=_BAR)
        progress.add_row(Text(f"block {block + 1}"), bar, Text(f"step {step + 1} of {self._num_steps}"))
        return Group(table, progress)
