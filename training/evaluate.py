"""Ask the held-out questions and judge the answers: LaDiR beside the autoregressive baseline, in one table.

Reads runs/<name>/export and models/ar, writes runs/<name>/results.json and generations.jsonl.  Questions are split over the
ranks; answers are kept as they come, so that a stopped evaluation continues where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from ladir.config import Config
from ladir.data.prompts import parse_completion, prompt_ids
from ladir.data.records import Record
from ladir.evaluation.metrics import summarise
from ladir.evaluation.report import examples, results_table
from ladir.evaluation.results import MethodResult, QuestionResult, judge, read_results, write_questions, write_results
from ladir.inference.ar import complete
from ladir.models.folders import load_backbone
from ladir.reasoner import Reasoner
from ladir.tasks import Task, get_task
from ladir.tokens import decode_text, load_tokenizer
from training.answers import Answered, AnswerLog
from training.phases import read_encoded
from training.runtime.job import job
from training.runtime.run import Run, RunFolder

logger = logging.getLogger(__name__)

#: answers a batch of records: a list of judged trajectories per record
Answerer = Callable[[Sequence[Record]], list[QuestionResult]]


def ladir_answerer(config: Config, reasoner: Reasoner, task: Task, method: str) -> Answerer:
    """LaDiR in one of its variants: ``ladir``, ``ladir-zero-noise`` (one trajectory), ``ladir-sde``."""
    zero = method == "ladir-zero-noise"
    controls: dict[str, Any] = {
        "num_trajectories": 1 if zero else config.evaluate.num_trajectories,
        "initial_noise": 0.0 if zero else config.sample.initial_noise,
        "answer_temperature": 0.0 if zero else config.sample.answer_temperature,
        "sampler": "sde" if method == "ladir-sde" else config.sample.sampler,
    }

    def answer(records: Sequence[Record]) -> list[QuestionResult]:
        generated = reasoner.generate([record.question for record in records], seed=config.run.seed, **controls)
        return [
            QuestionResult(record.question, tuple(judge(task, record, t.answer, t.thoughts, t.stopped) for t in trajectories))
            for record, trajectories in zip(records, generated, strict=True)
        ]

    return answer


def ar_answerer(config: Config, device: torch.device, task: Task, method: str) -> Answerer:
    """The autoregressive baseline: samples (``ar``) or one greedy answer (``ar-greedy``)."""
    tokenizer = load_tokenizer(config.backbone)
    backbone = load_backbone(RunFolder(config).model("ar"), config.backbone, device).to(device).eval()
    greedy = method == "ar-greedy"
    samples = 1 if greedy else config.evaluate.num_trajectories
    temperature = 0.0 if greedy else config.evaluate.ar_temperature

    def answer(records: Sequence[Record]) -> list[QuestionResult]:
        texts = complete(
            backbone,
            [prompt_ids(tokenizer, record.question) for record in records],
            [record.question for record in records],
            samples,
            int(tokenizer.pad_token_id),
            int(tokenizer.eos_token_id),
            config.evaluate.ar_max_tokens,
            temperature,
            config.run.seed,
        )
        judged = []
        for record, completions in zip(records, texts, strict=True):
            chains = [parse_completion(decode_text(tokenizer, ids), config.data.answer_prefixes) for ids in completions]
            judged.append(QuestionResult(record.question, tuple(judge(task, record, c.answer, c.thoughts) for c in chains)))
        return judged

    return answer


def ask(run: Run, log: AnswerLog, method: str, records: Sequence[Record], answerer: Answerer) -> dict[int, Answered] | None:
    """A method's answers to all questions, by index; None when a signal asked to stop (what is answered is kept)."""
    done = log.read(method)
    mine = [i for i in range(len(records)) if i not in done][run.world.rank :: run.world.size]
    size = run.config.evaluate.questions_per_batch
    answered: dict[int, Answered] = {}
    for first in range(0, len(mine), size):
        if run.stop.requested:  # the others see it at the end of their shares
            break
        batch = mine[first : first + size]
        start = time.perf_counter()
        results = answerer([records[i] for i in batch])
        seconds = (time.perf_counter() - start) / len(batch)
        new = {i: Answered(result, seconds) for i, result in zip(batch, results, strict=True)}
        log.add(method, new)
        answered.update(new)
    if run.stop_agreed():
        return None
    return done | {i: answer for part in run.world.gather(answered) for i, answer in part.items()}


def training_seconds(folder: RunFolder, method: str) -> float:
    """Seconds of training behind a method, the base LM's included where this run trained it."""
    phases = ("base", "ar") if method.startswith("ar") else ("base", "vae", "latents", "denoiser")
    outcomes = [folder.outcome(phase) for phase in phases]
    return sum(outcome.seconds for outcome in outcomes if outcome is not None)


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question; rank 0 writes and shows the results."""
    config, task = run.config, get_task(run.config.evaluate.task, run.config.evaluate)
    path = config.data.test if config.evaluate.split == "test" else config.data.validation
    if path is None:
        raise FileNotFoundError(f"data.{config.evaluate.split} is not set: name the records to evaluate on")
    encoded = read_encoded(config, path, load_tokenizer(config.backbone))[: config.evaluate.num_questions]
    records = [entry.record for entry in encoded]
    reasoner = Reasoner.from_pretrained(run.folder.export, run.world.device, config.backbone.attention)
    log = AnswerLog(run)
    rows: list[MethodResult] = []
    judged: dict[str, list[QuestionResult]] = {}
    for method in config.evaluate.methods:
        if method.startswith("ar"):
            answerer = ar_answerer(config, run.world.device, task, method)
        else:
            answerer = ladir_answerer(config, reasoner, task, method)
        answered = ask(run, log, method, records, answerer)
        if answered is None:
            run.interrupt()
            logger.info("evaluation interrupted: the same command continues")
            return
        judged[method] = [answered[i].result for i in range(len(records))]
        seconds = sum(answer.seconds for answer in answered.values()) / len(records)
        rows.append(MethodResult(method, summarise(judged[method]), seconds, training_seconds(run.folder, method)))
        logger.info("%s: pass@1 %.3f", method, rows[-1].summary["pass@1"])
    if run.world.is_main:
        _report(run, records, rows, judged)
    log.remove()


def _report(run: Run, records: Sequence[Record], rows: list[MethodResult], judged: dict[str, list[QuestionResult]]) -> None:
    settings = run.config.evaluate
    results = run.folder.path / "results.json"
    write_questions(run.folder.path / "generations.jsonl", judged)
    write_results(
        results,
        rows,
        task=settings.task,
        num_questions=len(records),
        num_trajectories=settings.num_trajectories,
        seed=run.config.run.seed,
        split=settings.split,
    )
    console = Console()
    console.print(results_table(read_results(results)))
    shown = next((method for method in judged if method.startswith("ladir")), next(iter(judged)))
    console.print(examples(judged[shown], settings.examples))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "evaluate") as run:
        evaluate(run)


if __name__ == "__main__":
    main()
