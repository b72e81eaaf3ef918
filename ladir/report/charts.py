"""Which pictures a report shows, made of what the runs hold; a section without data says which command fills it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ladir.evaluation.metrics import scores_of
from ladir.evaluation.voting import RULES
from ladir.report.figures import Curve, line_figure
from ladir.report.latents import latents
from ladir.report.reinforcement import reinforcement
from ladir.report.runs import Results, RunData
from ladir.report.sections import Picture, Section

#: methods that answer once, without sampling
_SINGLE = ("greedy", "zero-noise")
_SHOWN_PASSES = ("pass@1", "pass@10", "pass@100")
#: what is followed over the training, of the two that sample as they were trained
_SAMPLED = ("ar", "ladir")
_TIMED_PASSES = ("pass@1", "pass@100")
_DISTINCT, _DISTINCT_Y = ("distinct_correct",), "right answers per question"


def chart_sections(runs: Sequence[RunData]) -> list[Section]:
    """All sections with curves, in the order of the page."""
    sections = (_pass_curves, _trade_off, _training_time, _diversity, _granularity, reinforcement, _verifier, latents, _training)
    return [section(runs) for section in sections]


def _section(title: str, text: str, pictures: Iterator[Picture], missing: tuple[str, str]) -> Section:
    found = list(pictures)
    return Section(title, text, found, None if found else missing)


def _evaluate(run: RunData, *settings: str) -> str:
    return shlex.join(["python", "training/evaluate.py", "--config", str(run.path / "config.yaml"), *settings])


def _sweep(run: RunData, setting: str, values: Sequence[object]) -> str:
    """Commands that evaluate with several values of a control, each into a table of its own."""
    short = setting.rsplit(".", 1)[-1]
    return "\n".join(_evaluate(run, f"{setting}={value}", f"evaluate.name={short}-{value}") for value in values)


def _pass_curves(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        for run in runs:
            curves = {}
            for row in run.results[0].rows if run.results else []:
                points = sorted((int(k), float(value)) for k, value in (row.get("pass_curve") or {}).items())
                if points:
                    curves[row["method"]] = ([k for k, _ in points], [value for _, value in points], None)
            if curves:
                figure = line_figure(f"{run.name}: solved", "samples per question (k)", "pass@k (%)", curves, "x", rates=True)
                yield Picture(f"pass-at-k-{run.name}", figure, f"pass@k of {', '.join(curves)} in run {run.name}")

    text = "Share of questions with a right answer among k samples: LaDiR beside the autoregressive (AR) baseline."
    return _section("pass@k", text, pictures(), ("There are no results yet.", _evaluate(runs[0])))


def _trade_off(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        for run in runs:
            curves = _by_control(run, "num_steps", _SHOWN_PASSES[:2])
            if curves:
                figure = line_figure(
                    f"{run.name}: accuracy by steps", "denoising steps per block", "solved (%)", curves, "x", True
                )
                yield Picture(f"accuracy-by-steps-{run.name}", figure, f"accuracy against denoising steps in run {run.name}")
        found = _by_cost(runs)
        if found:
            figure = line_figure("accuracy by cost", "seconds per question, all samples", "pass@1 (%)", found, "x", True)
            yield Picture("accuracy-by-seconds", figure, "pass@1 against seconds per question of every method")

    text = "What more computation buys: more denoising steps, more seconds per question."
    missing = ("Needs results with different numbers of steps.", _sweep(runs[0], "sample.num_steps", (2, 5, 10, 30)))
    section = _section("Accuracy and compute", text, pictures(), missing)
    several = any("steps" in picture.name for picture in section.pictures)
    return section if several else Section(section.title, section.text, section.pictures, missing)


def _training_time(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        for run in runs:
            for figures, what, y, rates in (
                (_TIMED_PASSES, "solved", "solved (%)", True),
                (_DISTINCT, "distinct", _DISTINCT_Y, False),
            ):
                curves = _by_training(run, figures)
                if curves:
                    figure = line_figure(f"{run.name}: {what}", "minutes of training, all phases", y, curves, "x", rates)
                    yield Picture(
                        f"{what}-by-training-{run.name}", figure, f"{what} against minutes of training in run {run.name}"
                    )

    text = "What longer training brings, LaDiR beside the autoregressive (AR) baseline."
    commands = [
        "# train with denoiser.train.snapshot_every=500 ar.train.snapshot_every=500, then",
        *(_evaluate(runs[0], f"evaluate.snapshot={step}", "evaluate.methods=[ar,ladir]") for step in (500, 1000)),
    ]
    return _section("Accuracy and training", text, pictures(), ("Needs results of snapshots.", "\n".join(commands)))


def _by_training(run: RunData, figures: Sequence[str]) -> dict[str, Curve]:
    """Curves "method figure" of sampled answers over minutes of training, where there are several; the first results count."""
    points: dict[str, dict[float, tuple[float, float]]] = {}
    for results in _alike(run):
        for row in results.rows:
            for name in figures if row["method"] in _SAMPLED else ():
                if row.get(name) is not None and row.get("training_seconds"):
                    error = float((row.get("standard_errors") or {}).get(name) or 0.0)
                    curve = points.setdefault(f"{row['method']} {name.replace('_', ' ')}", {})
                    curve.setdefault(float(row["training_seconds"]) / 60, (float(row[name]), error))
    return {label: _curve(found) for label, found in points.items() if len(found) > 1}


def _by_control(run: RunData, control: str, figures: Sequence[str]) -> dict[str, Curve]:
    """Curves "method figure" over the values of a control, where results with several values are there."""
    points: dict[str, dict[float, tuple[float, float]]] = {}
    for value, results in _varying(run, control):
        for row in _ladir_rows(results):
            for name in figures:
                if row.get(name) is not None:
                    errors = row.get("standard_errors") or {}
                    label = f"{row['method']} {name.replace('_', ' ')}"
                    points.setdefault(label, {})[value] = (float(row[name]), float(errors.get(name) or 0.0))
    return {label: _curve(found) for label, found in points.items() if len(found) > 1}


def _varying(run: RunData, control: str) -> Iterator[tuple[float, Results]]:
    """A control's value in every result of the finished models that has the first one's other controls."""
    for results in _alike(run, control):
        if control in results.sample and results.content.get("snapshot") is None:
            yield float(results.sample[control]), results


def _alike(run: RunData, control: str | None = None) -> Iterator[Results]:
    """The results that answer the first ones' questions under the same controls, all but one: what a curve may join."""

    def facts(results: Results) -> tuple[Any, ...]:
        controls = {name: value for name, value in results.sample.items() if name != control}
        asked = (results.content.get(name) for name in ("task", "split", "num_questions", "num_trajectories", "seed"))
        return controls, results.content.get("benchmark") or "", *asked

    return (results for results in run.results if facts(results) == facts(run.results[0]))


def _curve(points: Mapping[float, tuple[float, float]]) -> Curve:
    ordered = sorted(points.items())
    return [x for x, _ in ordered], [y for _, (y, _) in ordered], [error for _, (_, error) in ordered]


def _by_cost(runs: Sequence[RunData]) -> dict[str, Curve]:
    """pass@1 over seconds per question: a curve for a method of a run, over its numbers of steps (a point where there is one)."""
    points: dict[str, dict[float, tuple[float, float]]] = {}
    for results in (results for run in runs for _, results in _varying(run, "num_steps")):
        for row in results.rows:
            if row.get("seconds_per_question") and row.get("pass@1") is not None:
                label = row["method"] if len(runs) == 1 else f"{results.run}: {row['method']}"
                error = (row.get("standard_errors") or {}).get("pass@1") or 0.0
                points.setdefault(label, {})[float(row["seconds_per_question"])] = (float(row["pass@1"]), float(error))
    return {label: _curve(found) for label, found in points.items()}


def _diversity(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        for control, name in (("diversity_scale", "diversity guidance"), ("guidance_scale", "classifier-free guidance")):
            for run in runs:
                counts = _by_control(run, control, ("distinct_correct",))
                rates = _by_control(run, control, _SHOWN_PASSES)
                if counts:
                    title = f"{run.name}: distinct right answers"
                    yield Picture(f"distinct-by-{control}-{run.name}", line_figure(title, name, "per question", counts), title)
                if rates:
                    figure = line_figure(f"{run.name}: solved", name, "solved (%)", rates, rates=True)
                    yield Picture(f"solved-by-{control}-{run.name}", figure, f"pass@k against {name} in run {run.name}")

    text = "Diversity guidance pushes the trajectories of one question apart: more distinct solutions, perhaps fewer right ones."
    missing = ("Needs results with different guidance.", _sweep(runs[0], "sample.diversity_scale", (0.0, 3.0, 30.0)))
    return _section("Diversity and guidance", text, pictures(), missing)


def _granularity(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        points: dict[str, dict[float, tuple[float, float]]] = {}
        for run in runs:
            per_block = run.sentences_per_block
            for row in _ladir_rows(run.results[0]) if run.results and per_block is not None else ():
                for name in _SHOWN_PASSES:
                    if row.get(name) is not None and row["method"] == "ladir":
                        error = (row.get("standard_errors") or {}).get(name) or 0.0
                        points.setdefault(name, {})[float(per_block or 0)] = (float(row[name]), float(error))
        curves = {name: _curve(found) for name, found in points.items() if len(found) > 1}
        if curves:
            x = "sentences per block (0: the whole chain)"
            figure = line_figure("block granularity", x, "solved (%)", curves, rates=True)
            yield Picture("block-granularity", figure, "pass@k against sentences per block")

    text = "One sentence, several, or the whole chain as one block of thought tokens."
    folder = runs[0].path if runs[0].path.name else runs[0].path.resolve()  # "." has no name
    other = folder.with_name(f"{folder.name}-whole-chain")
    command = (
        f"# train a second run with data.sentences_per_block=0 {shlex.quote(f'run.name={other.name}')}, evaluate it, then\n"
        + shlex.join(["python", "-m", "ladir", "report", str(runs[0].path), str(other)])
    )
    missing = ("Needs runs that differ in data.sentences_per_block.", command)
    return _section("Block granularity", text, pictures(), missing)


def _verifier(runs: Sequence[RunData]) -> Section:
    def pictures() -> Iterator[Picture]:
        for run in runs:
            curves: dict[str, Curve] = {"as foretold": ([0.0, 100.0], [0.0, 1.0], None)}
            for method, questions in run.questions.items():
                found = scores_of([trajectory for question in questions for trajectory in question.trajectories])
                if found is not None:
                    errors = [(rate * (1 - rate) / count) ** 0.5 for rate, count in zip(found.rates, found.counts, strict=True)]
                    curves[method] = ([100 * score for score in found.scores], found.rates, errors)
            if len(curves) > 1:
                title, methods = f"{run.name}: are scores to be believed?", ", ".join(list(curves)[1:])
                figure = line_figure(title, "the verifier's score (%)", "right (%)", curves, rates=True)
                yield Picture(f"calibration-{run.name}", figure, f"share of right answers against their score: {methods}")

    text = (
        "How the verifier's scores lie beside the truth: answers in ten bins by their score, and what share of each is right. On "
        "the diagonal a score is the probability that the answer is right."
    )
    config = ["--config", str(runs[0].path / "config.yaml")]
    programs = ("train_verifier.py", "export.py", "evaluate.py")
    command = "\n".join(shlex.join(["python", f"training/{program}", *config]) for program in programs)
    return _section("Verifier", text, pictures(), ("Needs results of a model with a verifier.", command))


def _training(runs: Sequence[RunData]) -> Section:
    panels: tuple[tuple[Callable[[RunData], Any], str, str, bool], ...] = (
        (lambda run: run.losses, "losses", "y", False),
        (lambda run: run.rates, "accuracies", "", True),
    )

    def pictures() -> Iterator[Picture]:
        for run in runs:
            for phase in dict.fromkeys([*run.losses, *run.rates]):
                for curves_of, what, logarithmic, rates in panels:
                    curves = {label: (xs, ys, None) for label, (xs, ys) in curves_of(run).get(phase, {}).items()}
                    if curves:
                        positive = all(y > 0 for _, ys, _ in curves.values() for y in ys)
                        title, y = f"{run.name}, {phase}: {what}", "percent" if rates else "loss per label"
                        figure = line_figure(title, "optimizer step", y, curves, logarithmic if positive else "", rates)
                        yield Picture(f"training-{run.name}-{phase}-{what}", figure, f"{what} of phase {phase} of run {run.name}")

    config = runs[0].path / "config.yaml"
    missing = ("Nothing has been trained yet.", shlex.join(["deepspeed", "training/train_vae.py", "--config", str(config)]))
    text = "Losses of each phase, and on held-out samples (dashed, hollow). Everything else is in TensorBoard."
    return _section("Training", text, pictures(), missing)


def _ladir_rows(results: Results) -> list[dict[str, Any]]:
    """Rows whose trajectories are sampled latents."""
    rows = [row for row in results.rows if row["method"].startswith("ladir")]
    return [row for row in rows if not row["method"].endswith((*RULES, *_SINGLE))]
