"""Results for people: the table of methods, and questions with their thoughts and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ladir.evaluation.results import QuestionResult

_COLUMNS = {
    "pass@1": "pass@1",
    "pass@10": "pass\n@10",
    "pass@100": "pass\n@100",
    "chain": "chain",
    "distinct_correct": "distinct\nright",
    "seconds_per_question": "seconds\neach",
    "forward_passes_per_question": "passes\neach",
    "training_seconds": "seconds\ntrained",
}
_MEANING = "percent, ± standard error by question"
_CHAIN = "; chain: the thoughts alone are right"
_HELD_OUT = "held out: pass@1 on questions of kinds that no training record has"
_COSTS = {"seconds_per_question": "{:.3f}", "forward_passes_per_question": "{:.0f}", "training_seconds": "{:.0f}"}


def shown_figures(results: Mapping[str, Any]) -> list[str]:
    """The figures that some row of a ``results.json`` has, in the order in which they are shown."""
    return [name for name in _COLUMNS if any(row.get(name) is not None for row in results["rows"])]


def results_table(
    results: Mapping[str, Any], held_out: Mapping[str, Any] | None = None, figures: Sequence[str] | None = None
) -> Table:
    """The rows of a ``results.json`` as a table of 80 columns; rates in percent.

    ``held_out``: results on questions of another kind, whose pass@1 stands in a column of its own; ``figures``: these alone, for
    less room than 80 columns.
    """
    shown = shown_figures(results) if figures is None else figures
    table = Table(
        title=f"{results['task']}: {results['num_questions']} {results.get('split', '')} questions, "
        f"{results['num_trajectories']} trajectories each, seed {results['seed']}",
        caption="\n".join(
            [
                _MEANING + (_CHAIN if "chain" in shown else ""),
                *([_HELD_OUT] if held_out else []),
                *_steps_trained(results["rows"]),
                *remarks(results),
            ]
        ),
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("method", style="bold", no_wrap=True)
    columns = {name: _COLUMNS[name] for name in shown}
    beside = {row["method"]: row for row in held_out["rows"]} if held_out else {}
    for title in [*columns.values(), *(["held\nout"] if held_out else [])]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in results["rows"]:
        other = [_cell(beside.get(row["method"], {}), "pass@1")] if held_out else []
        table.add_row(row["method"], *(_cell(row, name) for name in columns), *other)
    return table


def _steps_trained(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Optimizer steps behind the rows, for which 80 columns have no room; of results that do not say them, nothing."""
    methods: dict[int, list[str]] = {}
    for row in rows:
        if row.get("training_steps") is not None:
            methods.setdefault(row["training_steps"], []).append(row["method"])
    if methods:
        yield "training steps: " + "; ".join(f"{steps:,} {', '.join(names)}" for steps, names in methods.items())


def remarks(results: Mapping[str, Any]) -> Iterator[str]:
    """What the figures of a ``results.json`` do not say by themselves: questions left out, answers not judged."""
    left_out, gold = results.get("left_out") or {}, results.get("gold") or {}
    if number := left_out.get("number"):
        share = f"{number} of {number + results['num_questions']} questions were not asked (see data.on_bad_record)"
        yield f"{share}; {'they count as not solved' if left_out.get('counted') else 'no figure counts them'}"
    if number := results.get("trained_on"):
        yield f"{number} of {results['num_questions']} questions were trained on"
    if refused := gold.get("refused"):
        done = "left out of all figures" if gold.get("on_bad_gold") == "skip" else "asked all the same"
        yield f"{refused} of {gold.get('judged')} own answers are refused by the task's checker: {done}"
    if unread := gold.get("unread"):
        yield f"{unread} of {gold.get('judged')} own answers cannot be read: the same text is right there, the rest undecided"
    if lenient := [f"{row['method']} {100 * row['lenient']:.1f}" for row in results["rows"] if _looser(row)]:
        yield f"lenient, where it differs from chain (exact steps to the target, of any numbers): {', '.join(lenient)}"
    if undecided := [f"{row['method']} {row['undecided']}" for row in results["rows"] if row.get("undecided")]:
        yield f"answers that could not be judged, counted as wrong: {', '.join(undecided)}"


def examples(questions: Sequence[QuestionResult], count: int) -> RenderableType:
    """The first ``count`` questions, each with one trajectory: its thoughts, block by block, and its answer."""
    return Group(*(_example(question) for question in questions[:count]))


def _example(question: QuestionResult) -> Text:
    shown = question.trajectories[0]
    verdict, style = ("right", "green") if shown.correct else ("wrong", "red")
    text = Text()
    text.append(question.question.strip(), style="bold")
    text.append(f"   ({question.num_correct} of {len(question.trajectories)} trajectories right)\n", style="dim")
    for number, thought in enumerate(shown.thoughts, start=1):
        text.append(f"  thought {number}        {' '.join(thought.split())}\n")
    text.append("  answer (").append(verdict, style=style).append(f")   {' '.join(shown.answer.split())}\n")
    return text


def _looser(row: Mapping[str, Any]) -> bool:
    lenient, chain = row.get("lenient"), row.get("chain")
    return lenient is not None and (chain is None or f"{lenient:.3f}" != f"{chain:.3f}")


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name in _COSTS:
        return _COSTS[name].format(value)
    spread = row.get("standard_errors", {}).get(name) if name == "pass@1" else None
    scale, digits = (1, 2) if name == "distinct_correct" else (100, 1)
    return f"{scale * value:.{digits}f}" + ("" if spread is None else f" ± {scale * spread:.{digits}f}")
