"""Results for people: the table of methods, and questions with their thoughts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ladir.evaluation.results import QuestionResult, Trajectory

_COLUMNS = {
    "pass@1": "pass@1",
    "pass@10": "pass@10",
    "pass@100": "pass@100",
    "chain": "chain",
    "distinct_correct": "distinct\nsolutions",
    "majority": "majority",
    "seconds_per_question": "s per\nquestion",
    "training_seconds": "training\nseconds",
}
_SECONDS = {"seconds_per_question": "{:.3f}", "training_seconds": "{:.0f}"}


def results_table(results: Mapping[str, Any]) -> Table:
    """The rows of a ``results.json`` as a table; rates in percent with their standard error by question."""
    table = Table(
        title=f"{results['task']}: {results['num_questions']} {results.get('split', '')} questions, "
        f"{results['num_trajectories']} trajectories each, seed {results['seed']}",
        caption="percent ± standard error by question; chain: the thoughts alone solve the question",
    )
    table.add_column("method", style="bold", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(row["method"], *(_cell(row, name) for name in _COLUMNS))
    return table


def markdown_table(results: Mapping[str, Any]) -> str:
    """The same table as Markdown, for a README or a log."""
    lines = [
        "| method | " + " | ".join(title.replace("\n", " ") for title in _COLUMNS.values()) + " |",
        "|---" + "|---:" * len(_COLUMNS) + "|",
    ]
    lines += [f"| {row['method']} | " + " | ".join(_cell(row, name) for name in _COLUMNS) + " |" for row in results["rows"]]
    return "\n".join(lines)


def examples(questions: Sequence[QuestionResult], count: int) -> RenderableType:
    """The first ``count`` questions, each with one trajectory: its thoughts, block by block, and its answer."""
    return Group(*(_example(question) for question in questions[:count]))


def _example(question: QuestionResult) -> Text:
    shown = question.trajectories[0]
    text = Text()
    text.append(f"{question.question}\n", style="bold")
    for number, thought in enumerate(shown.thoughts, start=1):
        text.append(f"  thought {number}   {' '.join(thought.split())}\n")
    text.append(f"  answer      {' '.join(shown.answer.split())}   ")
    text.append(*_verdict(shown))
    text.append(f"   ({question.num_correct} of {len(question.trajectories)} trajectories right)\n", style="dim")
    return text


def _verdict(trajectory: Trajectory) -> tuple[str, str]:
    return ("right", "green") if trajectory.correct else ("wrong", "red")


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name in _SECONDS:
        return _SECONDS[name].format(value)
    error = row.get("standard_errors", {}).get(name)
    scale, digits = (1, 2) if name == "distinct_correct" else (100, 1)
    return f"{scale * value:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")
