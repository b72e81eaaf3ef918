"""Which questions are asked."""

from __future__ import annotations

from dataclasses import dataclass

from ladir.config import Config
from ladir.data.questions import QuestionSet, read_questions
from ladir.data.records import BadRecord, Record
from ladir.errors import UnusableError
from ladir.tasks import Task
from ladir.tokens import load_tokenizer
from training.evaluation.gold import GoldCheck, check_gold
from training.evaluation.readiness import question_file
from training.runtime.hub import fetched_once
from training.runtime.run import Run


@dataclass(frozen=True)
class Asked:
    """The questions of an evaluation, and what became of the others."""

    records: list[Record]
    left_out: list[BadRecord]
    """Lines that are not asked, as far as the last question that is."""
    gold: GoldCheck
    in_file: int
    """Lines of the file, whether they are asked or not."""


def choose_questions(run: Run, task: Task) -> Asked | None:
    """Those of the split that ``task`` can judge, as many as are asked; what is wrong with the others is told or raised.

    None where a signal asked to stop.
    """
    found = fetched_once(run.world, question_file(run.config), lambda: read_split(run.config, task))
    gold = check_gold(run, task, found.asked)
    if gold is None:
        return None
    skipped = gold.refused.keys() if run.config.evaluate.on_bad_gold == "skip" else ()
    records = [record for place, record in enumerate(found.asked) if place not in skipped]
    if not records:
        raise UnusableError(f"{question_file(run.config)}: no question is left whose own answer is right; nothing can be asked")
    return Asked(records, found.left_out, gold, found.in_file)


def read_split(config: Config, task: Task) -> QuestionSet:
    """The questions in the file of the split, and the lines of it that are none."""
    path = question_file(config)
    assert path is not None  # else the run was not ready
    tokenizer = load_tokenizer(config.backbone)
    return read_questions(path, config.data, tokenizer, task.check, config.evaluate.num_questions)
