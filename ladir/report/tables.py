"""Tables of a report, as HTML and as Markdown: of an evaluation's methods, and of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ladir.report.text import escaped, one_line

#: figure of a row, what it is multiplied with, decimals, title
_COLUMNS = (
    ("pass@1", 100.0, 1, "pass@1 (%)"),
    ("pass@10", 100.0, 1, "pass@10 (%)"),
    ("pass@100", 100.0, 1, "pass@100 (%)"),
    ("chain", 100.0, 1, "chain (%)"),
    ("lenient", 100.0, 1, "lenient (%)"),
    ("distinct_correct", 1.0, 2, "distinct right"),
    ("seconds_per_question", 1.0, 3, "seconds per question"),
    ("forward_passes_per_question", 1.0, 0, "forward passes per question"),
    ("flops_per_question", 1e-9, 1, "GFLOP per question"),
    ("training_seconds", 1.0, 0, "training seconds"),
    ("training_steps", 1.0, 0, "training steps"),
)

_METHOD_CHARACTERS = 40
_WORDS_CHARACTERS = 200


@dataclass(frozen=True)
class Grid:
    """A table of words; ``texts``: they are whole texts, whose lines stay lines and are wrapped."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: bool = False

    def html(self) -> str:
        """As HTML, without the title."""
        head = "".join(f"<th>{escaped(cell)}</th>" for cell in self.head)
        rows = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        kind = "words texts" if self.texts else "words"
        return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'

    def markdown(self) -> str:
        """As Markdown, without the title."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = ([one_line(cell, _WORDS_CHARACTERS).replace("|", "¦") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a ``results.json``; figures that none of them has are left out."""
    columns = _columns(rows)
    head = "".join(f"<th>{escaped(title)}</th>" for *_, title in columns)
    body = "".join(f"<tr><td>{escaped(row['method'])}</td>{_html_cells(row, columns)}</tr>" for row in rows)
    return f"<table><thead><tr><th>method</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for a README or a log."""
    columns = _columns(rows)
    lines = [["method", *(title for *_, title in columns)], ["---", *["---:"] * len(columns)]]
    for row in rows:
        figures = (figure(row, name, scale, digits) for name, scale, digits, _ in columns)
        method = one_line(row["method"], _METHOD_CHARACTERS).replace("|", "¦")
        lines.append([method, *(value + (f" ± {error}" if error else "") for value, error in figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, int, str]]:
    return [column for column in _COLUMNS if any(row.get(column[0]) is not None for row in rows)]


def _html_cells(row: Mapping[str, Any], columns: Sequence[tuple[str, float, int, str]]) -> str:
    figures = (figure(row, name, scale, digits) for name, scale, digits, _ in columns)
    return "".join(f"<td>{value}{f' <small>± {error}</small>' if error else ''}</td>" for value, error in figures)


def figure(row: Mapping[str, Any], name: str, scale: float, digits: int) -> tuple[str, str]:
    """A figure and its standard error; "" where there is none."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return "–", ""
    errors = row.get("standard_errors")
    error = errors.get(name) if isinstance(errors, Mapping) else None
    return f"{scale * value:.{digits}f}", f"{scale * error:.{digits}f}" if isinstance(error, int | float) else ""
