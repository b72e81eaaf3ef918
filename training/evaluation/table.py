"""From answers to the table: figures and costs of every row, results.json, generations.jsonl, and what is shown."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ladir.evaluation.metrics import summarise
from ladir.evaluation.report import examples, results_table, shown_figures
from ladir.evaluation.results import MethodResult, QuestionResult, read_questions, read_results, write_questions, write_results
from ladir.evaluation.voting import elections
from ladir.report.fitting import print_text, print_whole
from training.evaluation.answers import Answered
from training.evaluation.asking import Busy
from training.evaluation.gold import GoldCheck
from training.evaluation.questions import Asked
from training.evaluation.rows import PHASES, SCORED, TRAINED, model_of, sampling_of
from training.runtime.ending import tell_end
from training.runtime.files import read_json
from training.runtime.run import Run, RunFolder, evaluation_label

logger = logging.getLogger(__name__)

_LISTED = 20  # questions that are not asked, or whose own answer is refused, in results.json


def training_seconds(folder: RunFolder, method: str, snapshot: int | None = None) -> float:
    """Seconds of training behind a method, the base LM's included where this run trained it; of a snapshot, until then."""
    sampling, rule = sampling_of(method)
    *before, last = PHASES[model_of(sampling)]
    judged = folder.outcome("verifier") if rule in SCORED else None
    outcomes = [*(folder.outcome(phase) for phase in ("base", *before, folder.snapshot(last, snapshot))), judged]
    sampled = sum(read_json(folder.judged / "seconds.json").values()) if judged is not None else 0.0
    return sampled + sum(outcome.seconds for outcome in outcomes if outcome is not None)


def training_steps(folder: RunFolder, method: str, snapshot: int | None = None) -> int | None:
    """Optimizer steps of the model that answers, over its stages, with those of a base LM that this run trained.

    None where the run's folder does not tell them.
    """
    sampling = sampling_of(method)[0]
    *before, last = [phase for phase in PHASES[model_of(sampling)] if phase in TRAINED]
    own = [folder.outcome(phase) for phase in (*before, folder.snapshot(last, snapshot))]
    if own[0] is None or own[-1] is None:  # stages between them may have been left out
        return None
    outcomes = [*own, folder.outcome("base")]
    return sum(outcome.steps for outcome in outcomes if outcome is not None)


def result_row(run: Run, method: str, answers: Mapping[str, Mapping[int, Answered]], unasked: int = 0) -> MethodResult:
    """A row of the table: a method's samples, or those elected among them at the voters' cost; ``unasked`` questions count."""
    sampling, rule = sampling_of(method)
    entries = list(answers[sampling].values())
    questions, samples, share = [entry.result for entry in entries], None, 1.0
    if rule is not None:
        voters, count = run.config.evaluate.voters, len(questions[0].trajectories)
        questions, samples, share = [elections(question, rule, voters) for question in questions], 1, (voters or count) / count
    costs = [entry.cost for entry in entries] + [entry.reading for entry in entries if rule == "consistent"]
    costs += [entry.drifting for entry in entries if rule == "stable"]
    costs += [entry.scoring for entry in entries if rule in SCORED]
    spent: dict[int, float] = {}
    for entry in entries:
        spent[entry.rank] = spent.get(entry.rank, 0.0) + entry.elapsed
    return MethodResult(
        method,
        summarise(questions, samples=samples, unasked=unasked),
        seconds_per_question=share * sum(cost.seconds for cost in costs) / len(entries),
        training_seconds=training_seconds(run.folder, method, run.config.evaluate.snapshot),
        training_steps=training_steps(run.folder, method, run.config.evaluate.snapshot),
        wall_seconds=max(spent.values()),
        seconds_by_process=spent,
        forward_passes_per_question=share * sum(cost.passes for cost in costs) / len(entries),
        flops_per_question=share * sum(cost.flops for cost in costs) / len(entries),
    )


def report(
    run: Run,
    methods: Sequence[str],
    answers: Mapping[str, Mapping[int, Answered]],
    asked: Asked,
    busy: Busy,
    benchmark: str = "",
) -> None:
    """Write the results (rank 0); ``busy``: the ranks, over all data sets; ``benchmark``: the data set's name in a suite."""
    settings = run.config.evaluate
    results, generations = result_files(run)
    judged = {sampling: [entry.result for entry in entries.values()] for sampling, entries in answers.items()}
    for sampling, questions in judged.items():
        tell_of_limits(sampling, questions, settings.ar_max_tokens, run.config.sample.max_blocks)
        tell_of_undecided(sampling, questions)
    write_questions(generations, judged)
    counted = settings.left_out == "count"
    write_results(
        results,
        [result_row(run, method, answers, len(asked.left_out) if counted else 0) for method in methods],
        task=settings.task,
        benchmark=benchmark,
        in_file=asked.in_file,
        num_questions=len(asked.records),
        num_trajectories=settings.num_trajectories,
        seed=run.config.run.seed,
        split=settings.split,
        snapshot=settings.snapshot,
        sample=asdict(run.config.sample),
        ar={name: getattr(settings, f"ar_{name}") for name in ("temperature", "top_p", "max_tokens")},
        left_out={"number": len(asked.left_out), "counted": counted, "reasons": list(map(str, asked.left_out[:_LISTED]))},
        gold=gold_facts(asked.gold, settings.on_bad_gold),
        trained_on=asked.trained_on,
        busy=asdict(busy),
    )


def show(run: Run) -> None:
    """The table, and the first questions with their thoughts (rank 0)."""
    results, generations = result_files(run)
    console, content, judged = Console(), read_results(results), read_questions(generations)
    print_whole(console, partial(results_table, content, None), shown_figures(content))
    shown = next((sampling for sampling in judged if sampling.startswith("ladir")), next(iter(judged)))
    print_text(console, examples(judged[shown], run.config.evaluate.examples))


def gold_facts(check: GoldCheck, handling: str) -> dict[str, Any]:
    """What the checker said of the records' own answers, as ``results.json`` has it."""
    reasons = list(check.refused.values())[:_LISTED]
    counts = {"judged": check.records, "refused": len(check.refused), "unread": check.unread}
    return {**counts, "on_bad_gold": handling, "reasons": reasons}


def tell_of_undecided(sampling: str, questions: Sequence[QuestionResult]) -> None:
    """What the checker could not judge counts as wrong, which is said."""
    entries = [trajectory for question in questions for trajectory in question.trajectories]
    reasons = Counter(entry.reason or "no reason given" for entry in entries if entry.undecided)
    if reasons:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        logger.warning(
            "%s: %d of %d answers could not be judged and count as wrong (%s)", sampling, reasons.total(), len(entries), told
        )


def result_files(run: Run) -> tuple[Path, Path]:
    """The table and the judged answers of the run's evaluation under its label."""
    label = evaluation_label(run.config.evaluate)
    return run.folder.path / f"results{label}.json", run.folder.path / f"generations{label}.jsonl"


def tell_results(run: Run) -> None:
    """The evaluation's last line."""
    results, generations = result_files(run)
    content = read_results(results)
    rates = {row["method"]: row["pass@1"] for row in content["rows"]}
    figures = ", ".join(f"{method} {'-' if rate is None else f'{100 * rate:.1f}%'}" for method, rate in rates.items())
    tell_end(run, f"{content['num_questions']} questions, pass@1 {figures}", results, generations)


def tell_of_limits(sampling: str, questions: Sequence[QuestionResult], ar_max_tokens: int, max_blocks: int) -> None:
    """A method that is cut off is judged by less than it would have said."""
    ended = [trajectory.stopped for question in questions for trajectory in question.trajectories]
    limit = (
        f"evaluate.ar_max_tokens={ar_max_tokens}" if model_of(sampling).startswith("ar") else f"sample.max_blocks={max_blocks}"
    )
    if not all(ended):
        logger.warning("%s: %d of %d answers were cut off or forced at %s", sampling, ended.count(False), len(ended), limit)
