"""Every record's own answer is judged before anything is asked: a checker that refuses it would refuse right answers, too."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ladir.tasks
from ladir.config import EvaluateSettings
from ladir.data.question_store import answered_of, contents_of
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks import Task
from training.evaluation.judging import judges_of
from training.runtime.alone import GiveWay
from training.runtime.files import code_digest, locked, read_json, write_json
from training.runtime.preemption import BrokenOff
from training.runtime.run import Run

logger = logging.getLogger(__name__)

_LISTED = 20  # refused ones that are named in a message
_SHOWN = 60  # characters of a question by which it is recognised
_UNREAD_LISTED = 3  # unread ones that are named in a line of the log
_WAITING = 10_000  # records that wait for their judges at a time: each takes a kilobyte while it does

#: why an answer is refused (None: it is not), and whether it cannot be read; None: not judged, for a stop was asked for
_Said = tuple[str | None, bool] | None


@dataclass(frozen=True)
class GoldCheck:
    """What the task's checker said of the records' own answers."""

    records: int
    """Records that have one."""
    refused: Mapping[int, str]
    """By the record's index: where it is, how its question begins, and why its answer is refused."""
    seconds: float
    """That judging took, without those known from before."""
    unread: int = 0
    """How many of those accepted the checker cannot read: only their very text is right."""

    def listed(self) -> str:
        """The first refused ones, one a line, and how many more there are."""
        lines = [f"  {text}" for text in list(self.refused.values())[:_LISTED]]
        return "\n".join([*lines, *([f"  ... and {len(self.refused) - _LISTED} more"] if len(self.refused) > _LISTED else [])])


def check_gold(run: Run, task: Task, records: Sequence[Record]) -> GoldCheck | None:
    """Judge the own answers of all records (rank 0, in as many judges as the node's ranks have together).

    Those accepted before are not judged again: they are kept in the run folder, by content and checker.  None where a signal
    asked to stop.  Raises UnusableError where some are refused and ``evaluate.on_bad_gold=error``; else they are told.
    """
    judges = judges_of(run.config, ranks := run.world.largest([run.world.local_rank])[0] + 1) * ranks
    check = run.alone(lambda give_way: _judged(run.folder.gold, run.config.evaluate, task, records, judges, give_way))
    if check is not None and check.refused:
        counted = f"{len(check.refused)} of {check.records} records have an own answer that evaluate.task={task.name} refuses"
        if run.config.evaluate.on_bad_gold == "error":
            raise UnusableError(
                f"{counted}: right answers might be refused as well\n{check.listed()}\nCorrect them, or set "
                "evaluate.on_bad_gold=skip to leave them out or =ignore to ask them all the same (counted and listed)"
            )
        done = "left out" if run.config.evaluate.on_bad_gold == "skip" else "asked all the same"
        if run.world.is_main:
            logger.warning("%s; they are %s (evaluate.on_bad_gold):\n%s", counted, done, check.listed())
    return check


def _judged(
    file: Path, settings: EvaluateSettings, task: Task, records: Sequence[Record], judges: int, give_way: GiveWay
) -> GoldCheck | None:
    """None where a stop came in between: what was accepted until then is kept."""
    start, checker = time.perf_counter(), _checker(settings)
    kept, contents, asked = read_json(file), contents_of(records), answered_of(records)
    new = asked[~np.isin(contents[asked], _contents(kept, checker))].tolist()
    found = _judge_all(judges, lambda place: _unless_stopped(give_way, lambda: _said(task, records[place])), new)
    said = {place: one for place, one in zip(new, found, strict=True) if one is not None}
    refused = {place: _named(records[place], reason) for place, (reason, _) in said.items() if reason is not None}
    if right := [place for place, (reason, _) in said.items() if reason is None]:
        added = {checker: right, _unread(checker): [place for place in right if said[place][1]]}
        with locked(file):  # several evaluations of a run may write it
            kept = read_json(file)
            kept |= {name: _written(np.union1d(_contents(kept, name), contents[places])) for name, places in added.items()}
            write_json(file, kept)
    if len(said) < len(new):
        return None
    seconds, unread = time.perf_counter() - start, asked[np.isin(contents[asked], _contents(kept, _unread(checker)))]
    logger.info("own answers of %d records: %d judged in %.1f s, %d refused", len(asked), len(new), seconds, len(refused))
    _tell_of_unread(task, [records[place] for place in unread[:_UNREAD_LISTED].tolist()], len(unread), len(asked))
    return GoldCheck(len(asked), refused, seconds, len(unread))


def _tell_of_unread(task: Task, first: Sequence[Record], unread: int, judged: int) -> None:
    if unread:
        named = "; ".join(f"{record.source}: {_start(record.answer)!r}" for record in first)
        logger.warning(
            "%d of %d own answers cannot be read by evaluate.task=%s: only the same text is right there, other answers are "
            "undecided (%s%s)", unread, judged, task.name, named, "; ..." if unread > len(first) else ""
        )  # fmt: skip


def _unread(checker: str) -> str:
    """Under which what ``checker`` has accepted without reading it is kept."""
    return f"{checker}-unread"


def _contents(kept: Mapping[str, Sequence[str]], name: str) -> np.ndarray[Any, Any]:
    """What is kept under a name, uint64 [n], as :func:`~ladir.data.question_store.content_of` says it."""
    return np.array([int(content, 16) for content in kept.get(name, [])], np.uint64)


def _written(contents: np.ndarray[Any, Any]) -> list[str]:
    return [f"{content:016x}" for content in contents.tolist()]


def _judge_all(judges: int, judge: Callable[[int], _Said], places: Sequence[int]) -> Iterator[_Said]:
    with ThreadPoolExecutor(judges) as judging:
        for first in range(0, len(places), _WAITING):
            yield from judging.map(judge, places[first : first + _WAITING])


def _unless_stopped(give_way: GiveWay, judge: Callable[[], _Said]) -> _Said:
    """What ``judge`` says, where no stop was asked for."""
    try:
        give_way()
    except BrokenOff:
        return None
    return judge()


def _said(task: Task, record: Record) -> _Said:
    """Why the record's own answer is refused, or whether it was accepted without being read."""
    verdict = task.verdict(record.answer, record)
    if verdict.right:
        return None, task.unread(record)
    return f"{verdict.reason or 'judged wrong'} ({_start(record.answer)!r})", False


def _named(record: Record, reason: str) -> str:
    return f"{record.source} ({_start(record.question)!r}): {reason}"


def _start(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 3]}..."


def _checker(settings: EvaluateSettings) -> str:
    """What a verdict depends on beside the record: the task, its limits and its program."""
    limits = [settings.task, settings.check_seconds, settings.check_memory_mb, settings.isolation, settings.tolerance]
    digest = hashlib.sha256(json.dumps([*limits, code_digest(ladir.tasks)]).encode())
    return f"{settings.task}-{digest.hexdigest()[:16]}"
