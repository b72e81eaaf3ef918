"""The results of a suite: every benchmark's figures beside one another, and their average."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ladir.evaluation.results import SECONDS

#: figures of a row that are averaged over benchmarks, with their titles
FIGURES = {"pass@1": "pass@1", "pass@10": "pass@10", "pass@100": "pass@100", "majority": "majority"}
AVERAGE = "average"
#: what a question costs, averaged likewise
COSTS = ("seconds_per_question", "forward_passes_per_question", "flops_per_question")


def summarise_suite(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What ``suite.json`` holds, from the content of each benchmark's ``results.json`` by name.

    ``sets``: per benchmark the questions in its file, asked and left out, and what the checker said of their own answers.
    ``rows``: per method and figure the rate of each benchmark and their mean, each benchmark counting the same (as published
    averages do), null where a benchmark lacks it; ``standard_errors`` likewise, the mean's from independent benchmarks; a
    question's costs likewise.  ``seconds_by_process``: of every one, over all benchmarks; ``wall_seconds``: of the slowest.
    """
    methods = list(dict.fromkeys(row["method"] for content in results.values() for row in content["rows"]))
    return {
        "sets": [_facts(name, content) for name, content in results.items()],
        "rows": [_row(method, results) for method in methods],
    }


def _facts(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    gold, left_out = content["gold"], content["left_out"]
    return {
        "name": name,
        "task": content["task"],
        "in_file": content["in_file"],
        "asked": content["num_questions"],
        "left_out": left_out["number"],
        "left_out_counted": left_out["counted"],
        "gold_judged": gold["judged"],
        "gold_accepted": gold["judged"] - gold["refused"],
        "gold_unread": gold.get("unread", 0),
        "num_trajectories": content["num_trajectories"],
    }


def _row(method: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = {name: next(row for row in content["rows"] if row["method"] == method) for name, content in results.items()}
    errors = {name: row["standard_errors"] for name, row in rows.items()}
    figures = {figure: _averaged({name: row.get(figure) for name, row in rows.items()}) for figure in FIGURES}
    spreads = {figure: _spread({name: error.get(figure) for name, error in errors.items()}) for figure in FIGURES}
    costs = {cost: _averaged({name: row.get(cost) for name, row in rows.items()}) for cost in COSTS}
    spent: Counter[str] = Counter()
    for row in rows.values():
        spent.update(row.get(SECONDS, {}))
    time = {SECONDS: dict(spent), "wall_seconds": max(spent.values(), default=0.0)}
    return {"method": method, **figures, "standard_errors": spreads, **costs, **time}


def _averaged(values: Mapping[str, float | None]) -> dict[str, float | None]:
    known = [value for value in values.values() if value is not None]
    return {**values, AVERAGE: math.fsum(known) / len(known) if len(known) == len(values) else None}


def _spread(errors: Mapping[str, float | None]) -> dict[str, float | None]:
    known = [error for error in errors.values() if error is not None]
    whole = math.sqrt(math.fsum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None
    return {**errors, AVERAGE: whole}


def suite_columns(suite: Mapping[str, Any]) -> list[str]:
    """The columns of :func:`suite_table` behind the method: every benchmark and the average."""
    return [*(entry["name"] for entry in suite["sets"]), AVERAGE]


def suite_table(suite: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """Percent by row and figure, for the benchmarks in ``columns``."""
    table = Table(title="pass@k and majority, percent", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in suite["rows"]:
        shown = row["method"]
        for figure, title in FIGURES.items():
            if any(value is not None for value in row[figure].values()):
                table.add_row(shown, f" {title} ", *(_cell(row, figure, name) for name in columns))
                shown = ""
    return table


def _cell(row: Mapping[str, Any], figure: str, name: str) -> str:
    value, error = row[figure].get(name), row["standard_errors"][figure].get(name)
    if value is None:
        return " -"
    return f" {100 * value:.1f}" + (f" ± {100 * error:.1f}" if figure == "pass@1" and error is not None else "")


def set_lines(suite: Mapping[str, Any]) -> Iterator[str]:
    """What was asked of each benchmark, a line each."""
    for entry in suite["sets"]:
        left = f"{entry['left_out']} left out" + (", counted as not solved" if entry["left_out_counted"] else "")
        limited = entry["in_file"] - entry["asked"] - entry["left_out"]
        told = [left if entry["left_out"] else "none left out", *([f"{limited} not asked for"] if limited > 0 else [])]
        unread = f", {entry['gold_unread']} of them without being read" if entry["gold_unread"] else ""
        yield (
            f"{entry['name']} ({entry['task']}): {entry['in_file']} questions in the file, {entry['asked']} asked, "
            f"{', '.join(told)}; own answers accepted {entry['gold_accepted']} of {entry['gold_judged']}{unread}"
        )


def suite_markdown(suite: Mapping[str, Any]) -> str:
    """The table for a paper or a log, as Markdown, and what was asked."""
    columns = suite_columns(suite)
    lines = [["method", "figure", *columns], ["---", "---", *["---:"] * len(columns)]]
    for row in suite["rows"]:
        for figure, title in FIGURES.items():
            if any(value is not None for value in row[figure].values()):
                lines.append([row["method"], title, *(_cell(row, figure, name).strip() for name in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, "", *(f"- {line}" for line in set_lines(suite)), ""])
