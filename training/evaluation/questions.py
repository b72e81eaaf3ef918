"""Which questions are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ladir.data.question_store import Questions
from ladir.data.records import BadRecord, Record
from ladir.errors import UnusableError
from ladir.tasks import Task
from ladir.tokens import load_tokenizer
from training.evaluation.gold import GoldCheck, check_gold
from training.evaluation.readiness import question_file
from training.evaluation.seen import count_seen
from training.phases.tokens import Tokens
from training.runtime.preemption import BrokenOff
from training.runtime.run import Run


@dataclass(frozen=True)
class Asked:
    """The questions of an evaluation, and what became of the others."""

    records: Sequence[Record]
    """Each is read when it is asked."""
    left_out: list[BadRecord]
    """Lines that are not asked, as far as the last question that is."""
    gold: GoldCheck
    in_file: int
    """Lines of the file, whether they are asked or not."""
    trained_on: int = 0
    """How many of the questions were trained on."""


def choose_questions(run: Run, task: Task) -> Asked | None:
    """Those of the split that ``task`` can judge, as many as are asked; what is wrong with the others is told or raised.

    None where a signal asked to stop.
    """
    try:
        found = read_split(run, task)
    except BrokenOff:
        return None
    gold = check_gold(run, task, found)
    if gold is None:
        return None
    skipped = list(gold.refused) if run.config.evaluate.on_bad_gold == "skip" else []
    records = found.chosen(np.delete(np.arange(len(found)), skipped))
    if not records:
        raise UnusableError(f"{question_file(run.config)}: no question is left whose own answer is right; nothing can be asked")
    if (seen := run.alone(lambda give_way: count_seen(run, records))) is None:
        return None
    return Asked(records, found.passed_over, gold, len(found.store), seen)


def read_split(run: Run, task: Task) -> Questions:
    """The questions of the split that ``task`` can judge, as many as are asked."""
    named = question_file(run.config)
    assert named is not None  # else the run was not ready
    tokens = Tokens(run.config, run.world, load_tokenizer(run.config.backbone), run.stop)
    return tokens.questions(named, task).first(run.config.evaluate.num_questions)
