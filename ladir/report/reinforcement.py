"""What stage 3 was like: curves of its attempts and of the learning, their first and last figures, a good and a bad attempt."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ladir.report.algorithms import settings_grid
from ladir.report.figures import line_figure
from ladir.report.runs import AttemptsShown, RunData
from ladir.report.sections import Picture, Section
from ladir.report.tables import Grid

#: steps and values
_Curve = tuple[list[float], list[float]]

#: share of the lines at either end of a training whose mean stands in the table
_END = 0.2


@dataclass(frozen=True)
class _Panel:
    """Metrics with one axis, each with its words (empty: its name; of pass@k without k); ``rates``: they are shares."""

    name: str
    y: str
    metrics: Mapping[str, str]
    rates: bool = False
    logarithmic: bool = False


_PANELS = (
    _Panel("rewards", "reward", {"reward": "mean", "reward_spread": "spread in a question"}),
    _Panel(
        "attempts",
        "percent",
        {"signal": "questions that teach", "pass@": "", "chain": "right by thoughts", "stopped": "ended by themselves"},
        rates=True,
    ),
    _Panel("distinct answers", "right answers per question", {"distinct_correct": "different ones"}),
    _Panel("length", "tokens of an answer", {"answer_tokens": "mean"}),
    _Panel(
        "distance",
        "mean square, or KL of a step",
        {"nft_distance": "from the old model", "start_distance": "from the start", "kl": "KL from the start"},
        logarithmic=True,
    ),
    _Panel("ratio to the old model", "new by old", {"token_ratio": "of tokens", "step_ratio": "of steps"}),
    _Panel("clipped", "percent", {"token_clipped": "tokens", "step_clipped": "steps"}, rates=True),
    _Panel(
        "time",
        "seconds of an iteration",
        {"sampling_seconds": "sampling", "judging_seconds": "judging", "learning_seconds": "learning"},
    ),
)


def reinforcement(runs: Sequence[RunData]) -> Section:
    """Curves and tables of every stage 3 that was begun, its algorithms beside their settings."""
    pictures, tables = [], []
    for run in runs:
        for lane in run.reinforced:
            shown = [(panel, found) for panel in _PANELS if (found := _curves(run, lane, panel))]
            pictures += [_picture(run, lane, panel, curves) for panel, curves in shown]
            rows = [row for panel, curves in shown for row in _rows(panel, curves)]
            title = f"{run.name}, {lane}"
            tables += [Grid(f"{title}: attempts and learning", ("figure", "at first", "at last"), rows)] if rows else []
            tables += list(_attempts(title, run.attempts.get(lane)))
            tables.append(settings_grid(title, run.reinforced[lane]))
    text = (
        "What learned from rewards: what its attempts were like, how far it has come, by which algorithm, with which settings. "
        "Losses are drawn under Training; what came of it stands in the rows -rl under Results. Each iteration asks other "
        "questions, so that rewards rise and fall with these."
    )
    command = shlex.join(["deepspeed", "training/train_rl.py", "--config", str(runs[0].path / "config.yaml")])
    missing = None if tables else ("There was no reinforcement learning.", command)
    return Section("Reinforcement learning", text, pictures, missing, tables)


def _curves(run: RunData, lane: str, panel: _Panel) -> dict[str, _Curve]:
    """A panel's curves by their words, where there are any."""
    found = {}
    for label, curve in run.learning.get(lane, {}).items():
        name = label.removesuffix(" (validation)")
        words = panel.metrics.get(re.sub(r"@\d+$", "@", name))
        if words is not None:
            found[words or name] = curve
    return found


def _picture(run: RunData, lane: str, panel: _Panel, curves: Mapping[str, _Curve]) -> Picture:
    log = panel.logarithmic and all(y > 0 for _, ys in curves.values() for y in ys)
    drawn = {words: (xs, ys, None) for words, (xs, ys) in curves.items()}
    title = f"{run.name}, {lane}: {panel.name}"
    figure = line_figure(title, "optimizer step", panel.y, drawn, "y" if log else "", panel.rates, below=True)
    what = f"{panel.name} of {lane} of run {run.name}: {', '.join(curves)}"
    return Picture(f"reinforcement-{run.name}-{lane}-{panel.name.replace(' ', '-')}", figure, what)


def _rows(panel: _Panel, curves: Mapping[str, _Curve]) -> Iterator[tuple[str, str, str]]:
    """A panel's figures at the beginning and at the end of the training: means over a fifth of its lines."""
    for words, (_, heights) in curves.items():
        count = max(1, round(_END * len(heights)))
        ends = fmean(heights[:count]), fmean(heights[-count:])
        first, last = (f"{100 * value:.1f} %" if panel.rates else f"{value:.4g}" for value in ends)
        yield f"{panel.name}: {words}", first, last


def _attempts(title: str, shown: AttemptsShown | None) -> Iterator[Grid]:
    """What was thought and answered, best and worst, to a question of the last validation's iteration."""
    if shown is None:
        return
    rows = [("question", shown.question)]
    for name, attempt in (("good", shown.best), ("bad", shown.worst)):
        rows.append((f"{name}: reward {attempt.reward:g}", "\n".join((*attempt.thoughts, attempt.answer))))
    yield Grid(f"{title}: a good and a bad attempt, step {shown.step}", ("", "thoughts and answer"), rows, texts=True)
