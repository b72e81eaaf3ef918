"""The queue of questions: batch by batch over the ranks, each batch kept as soon as it is judged."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ladir.data.records import Record
from ladir.evaluation.results import QuestionResult
from ladir.tasks import Task
from training.evaluation.answerers import Answerer, load_answerers
from training.evaluation.answers import Answered, AnswerLog, cut
from training.evaluation.judging import judge_samples, judges_of
from training.runtime.run import Run

logger = logging.getLogger(__name__)

#: a batch of programs that never end takes its rank so much longer than the others theirs
_BATCH_MINUTES = 24 * 60


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
