"""Tables that lose no word: as wide as they are in a file or a pipe, in parts where a terminal is narrower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

T = TypeVar("T")

_ENOUGH = 100_000  # columns of characters


def print_whole(console: Console, table_of: Callable[[Sequence[T]], Table], columns: Sequence[T]) -> None:
    """Print ``table_of(columns)``; on a terminal of too few columns several tables, each of as many ``columns`` as fit.

    A single one that is wider than the terminal is folded, not cut; titles and captions are wrapped.
    """
    room = console.width if console.is_terminal else _ENOUGH
    rest = list(columns)
    while rest:
        count = next((n for n in range(len(rest), 1, -1) if _width(table_of(rest[:n])) <= room), 1)
        _print(console, table_of(rest[:count]), room)
        rest = rest[count:]


def print_text(console: Console, text: RenderableType) -> None:
    """Print texts; their lines are wrapped between words on a terminal, and whole in a file or a pipe."""
    console.print(text, soft_wrap=not console.is_terminal)


def _print(console: Console, table: Table, room: int) -> None:
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", False  # a column that is not to be wrapped would be cut
    texts = [str(text) for text in (table.title, table.caption) if text]
    lines = [len(line) for text in texts for line in text.splitlines()]
    width = min(max(_width(table), *lines, 1), room)
    wide = Console(file=console.file, width=width) if width > console.width else console
    wide.print(table)


def _width(table: Table) -> int:
    """Characters that the table takes where nothing is wrapped."""
    console = Console(width=_ENOUGH)
    return Measurement.get(console, console.options, table).maximum
