"""Ask the held-out questions and judge the answers: LaDiR beside the autoregressive baseline, in one table.

Reads runs/<name>/export, models/ar and models/rollout, writes runs/<name>/results.json and generations.jsonl; with
evaluate.name=NAME results-NAME.json and generations-NAME.jsonl, for other controls of the same models, with
evaluate.snapshot=STEP results-STEP.json (results-NAME-STEP.json) for models of that training step (train.snapshot_every).
Questions are split over the ranks; answers are kept as they come, so that a stopped evaluation continues where it was.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from rich.console import Console

from ladir.config import Config
from ladir.data.records import Record
from ladir.evaluation.metrics import summarise
from ladir.evaluation.report import examples, results_table
from ladir.evaluation.results import (
    MethodResult,
    QuestionResult,
    Trajectory,
    judge,
    read_results,
    write_questions,
    write_results,
)
from ladir.evaluation.voting import elections
from ladir.tasks import Task, get_task
from ladir.tokens import load_tokenizer
from training.evaluation.answerers import Answerer, Sampled, load_answerers, model_of, sampling_of
from training.evaluation.answers import Answered, AnswerLog, cut
from training.phases.base import read_encoded
from training.runtime.distributed import run_as_program
from training.runtime.job import job
from training.runtime.run import Run, RunFolder, evaluation_label

logger = logging.getLogger(__name__)

#: a batch of programs that never end takes its rank so much longer than the others theirs
_BATCH_MINUTES = 24 * 60

#: phases behind a model's row besides the base LM
PHASES = {"ar": ("ar",), "ladir": ("vae", "latents", "denoiser"), "rollout": ("vae", "latents", "denoiser", "rollout")}


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question; rank 0 writes and shows the results."""
    config, task = run.config, get_task(run.config.evaluate.task, run.config.evaluate)
    _check_snapshot(run)
    methods = [method for method in config.evaluate.methods if _is_trained(run, method)]
    records = read_questions_asked(config)
    for record in records:
        task.check(record)
    if not methods:
        raise FileNotFoundError(f"no model of evaluate.methods={config.evaluate.methods} was trained; name others")
    log = AnswerLog(run, records)
    samplings = dict.fromkeys(sampling_of(method)[0] for method in methods)
    for model in dict.fromkeys(map(model_of, samplings)):
        if not ask_model(run, log, task, model, [name for name in samplings if model_of(name) == model], records):
            run.interrupt()
            logger.info("evaluation interrupted: the same command continues")
            return
    if run.world.is_main:
        answers = {sampling: log.read(sampling) for sampling in samplings}
        _report(run, [result_row(run, method, answers) for method in methods], answers)
    log.remove()


def _check_snapshot(run: Run) -> None:
    """FileNotFoundError where a model of the asked training step, or what its training said of it, is missing."""
    step, folder = run.config.evaluate.snapshot, run.folder
    models = dict.fromkeys(model_of(sampling_of(method)[0]) for method in run.config.evaluate.methods if step is not None)
    for phase in [PHASES[model][-1] for model in models if model != "rollout"]:
        name = folder.snapshot(phase, step)
        if missing := [str(path) for path in (folder.model(name), folder.outcome_file(name)) if not path.exists()]:
            found = [path.name.removeprefix(f"{phase}-") for path in folder.model(phase).parent.glob(f"{phase}-*")]
            kept = sorted(int(number) for number in found if number.isdecimal() and folder.outcome(f"{phase}-{number}"))
            raise FileNotFoundError(
                f"there is no snapshot of step {step}: {' and '.join(missing)} missing; kept are the steps {kept or 'none'}; set "
                f"{phase}.train.snapshot_every in training, or ask for the other model's evaluate.methods only"
            )


def _is_trained(run: Run, method: str) -> bool:
    """False for the one method that is part of the default table and of which a run may have no model."""
    rollout = run.folder.model(run.folder.snapshot("rollout", run.config.evaluate.snapshot))
    trained = model_of(sampling_of(method)[0]) != "rollout" or rollout.is_dir()
    if not run.world.broadcast(trained):
        logger.info("%s: left out, %s was not trained", method, rollout)
        return False
    return True


def read_questions_asked(config: Config) -> list[Record]:
    """The records of the split, as many as are asked."""
    path = config.data.test if config.evaluate.split == "test" else config.data.validation
    if path is None:
        raise FileNotFoundError(f"data.{config.evaluate.split} is not set: name the records to evaluate on")
    encoded = read_encoded(config, path, load_tokenizer(config.backbone))[: config.evaluate.num_questions]
    return [entry.record for entry in encoded]


def ask_model(run: Run, log: AnswerLog, task: Task, model: str, samplings: Sequence[str], records: Sequence[Record]) -> bool:
    """Ask one model in all its ways; it is loaded only where questions are left.  False when a signal asked to stop."""
    left = [sampling for sampling in samplings if len(log.done(sampling)) < len(records)]
    answerers = load_answerers(run.config, model, left, run.world.device) if left else {}
    return all(ask(run, log, task, sampling, records, answerer) for sampling, answerer in answerers.items())


def ask(run: Run, log: AnswerLog, task: Task, sampling: str, records: Sequence[Record], answerer: Answerer) -> bool:
    """Add answers to all questions to the log; False when a signal asked to stop (what is answered is kept)."""
    done, judges = log.done(sampling), judges_of(run.config, run.world.largest([run.world.local_rank])[0] + 1)
    batches = cut(len(records), run.config.evaluate.questions_per_batch, run.world.size)
    left = [batch for batch in batches if not done.issuperset(batch)]
    run.world.wait_at_most(_BATCH_MINUTES)
    for first in range(0, len(left), run.world.size):  # together, so that no rank waits for another one's whole share
        if run.stop_agreed():
            return False
        for batch in left[first + run.world.rank :][:1]:
            answered = _answer(task, judges, [records[i] for i in batch], answerer, run.world.rank)
            log.add(sampling, dict(zip(batch, answered, strict=True)))
    if run.stop_agreed():
        return False
    logger.info("%s: %d questions answered", sampling, len(records))
    return True


def judges_of(config: Config, ranks: int) -> int:
    """Answers that each of a node's ``ranks`` judges at a time: programs run in processes of their own, the other tasks'
    checkers do not gain.

    Without namespaces programs share one user's limit on processes: they run one after another unless the setting says else.
    """
    settings = config.evaluate
    alone = settings.task == "code" and settings.isolation == "namespaces"
    return settings.judges or (max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks)) if alone else 1)


def _answer(task: Task, judges: int, records: Sequence[Record], answerer: Answerer, rank: int) -> list[Answered]:
    """A batch of questions, answered and judged."""
    start, count = time.perf_counter(), len(records)
    answers = answerer(records)
    judged = judge_samples(task, judges, records, answers.samples)
    cost, reading, elapsed = answers.cost.share(count), answers.reading.share(count), (time.perf_counter() - start) / count
    return [
        Answered(QuestionResult(record.question, trajectories, record.answer), cost, reading, elapsed, rank)
        for record, trajectories in zip(records, judged, strict=True)
    ]


def judge_samples(
    task: Task, judges: int, records: Sequence[Record], samples: Sequence[Sequence[Sampled]]
) -> list[tuple[Trajectory, ...]]:
    """Verdicts on every record's samples, ``judges`` at a time; a record's same sample twice is judged once."""
    asked = list(dict.fromkeys((number, sample) for number, group in enumerate(samples) for sample in group))

    def verdict(key: tuple[int, Sampled]) -> Trajectory:
        number, sample = key
        return judge(task, records[number], sample.answer, sample.thoughts, sample.stopped)

    with ThreadPoolExecutor(judges) as judging:
        verdicts = dict(zip(asked, judging.map(verdict, asked), strict=True))
    return [tuple(verdicts[number, sample] for sample in group) for number, group in enumerate(samples)]


def training_seconds(folder: RunFolder, method: str, snapshot: int | None = None) -> float:
    """Seconds of training behind a method, the base LM's included where this run trained it; of a snapshot, until then."""
    *before, last = PHASES[model_of(sampling_of(method)[0])]
    outcomes = [folder.outcome(phase) for phase in ("base", *before, folder.snapshot(last, snapshot))]
    return sum(outcome.seconds for outcome in outcomes if outcome is not None)


def result_row(run: Run, method: str, answers: Mapping[str, Mapping[int, Answered]]) -> MethodResult:
    """A row of the table: a method's samples, or those elected among them at the voters' cost."""
    sampling, rule = sampling_of(method)
    entries = list(answers[sampling].values())
    questions, samples, share = [entry.result for entry in entries], None, 1.0
    if rule is not None:
        voters, count = run.config.evaluate.voters, len(questions[0].trajectories)
        questions, samples, share = [elections(question, rule, voters) for question in questions], 1, (voters or count) / count
    costs = [entry.cost for entry in entries] + [entry.reading for entry in entries if rule == "consistent"]
    spent: dict[int, float] = {}
    for entry in entries:
        spent[entry.rank] = spent.get(entry.rank, 0.0) + entry.elapsed
    return MethodResult(
        method,
        summarise(questions, samples=samples),
        seconds_per_question=share * sum(cost.seconds for cost in costs) / len(entries),
        training_seconds=training_seconds(run.folder, method, run.config.evaluate.snapshot),
        wall_seconds=max(spent.values()),
        forward_passes_per_question=share * sum(cost.passes for cost in costs) / len(entries),
        flops_per_question=share * sum(cost.flops for cost in costs) / len(entries),
    )


def _report(run: Run, rows: Sequence[MethodResult], answers: Mapping[str, Mapping[int, Answered]]) -> None:
    settings, suffix = run.config.evaluate, evaluation_label(run.config.evaluate)
    results = run.folder.path / f"results{suffix}.json"
    judged = {sampling: [entry.result for entry in entries.values()] for sampling, entries in answers.items()}
    for sampling, questions in judged.items():
        _tell_of_limits(sampling, questions, settings.ar_max_tokens, run.config.sample.max_blocks)
    write_questions(run.folder.path / f"generations{suffix}.jsonl", judged)
    write_results(
        results,
        rows,
        task=settings.task,
        num_questions=len(next(iter(judged.values()))),
        num_trajectories=settings.num_trajectories,
        seed=run.config.run.seed,
        split=settings.split,
        snapshot=settings.snapshot,
        sample=asdict(run.config.sample),
    )
    console = Console()
    console.print(results_table(read_results(results)))
    shown = next((sampling for sampling in judged if sampling.startswith("ladir")), next(iter(judged)))
    console.print(examples(judged[shown], settings.examples))


def _tell_of_limits(sampling: str, questions: Sequence[QuestionResult], ar_max_tokens: int, max_blocks: int) -> None:
    """A method that is cut off is judged by less than it would have said."""
    ended = [trajectory.stopped for question in questions for trajectory in question.trajectories]
    limit = f"evaluate.ar_max_tokens={ar_max_tokens}" if model_of(sampling) == "ar" else f"sample.max_blocks={max_blocks}"
    if not all(ended):
        logger.warning("%s: %d of %d answers were cut off or forced at %s", sampling, ended.count(False), len(ended), limit)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "evaluate") as run:
        evaluate(run)


if __name__ == "__main__":
    run_as_program(main)
