"""Answers get their verdicts, several at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from ladir.config import Config
from ladir.data.records import Record
from ladir.evaluation.results import Trajectory, judge
from ladir.tasks import Task
from training.evaluation.answerers import Sampled
from training.runtime.alone import GiveWay


def judges_of(config: Config, ranks: int) -> int:
    """Answers that each of a node's ``ranks`` judges at a time: programs run in processes of their own, the other tasks'
    checkers do not gain.

    Without namespaces programs share one user's limit on processes: they run one after another unless the setting says else.
    """
    settings = config.evaluate
    alone = settings.task == "code" and settings.isolation == "namespaces"
    return settings.judges or (max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks)) if alone else 1)


def judge_samples(
    task: Task,
    judges: int,
    records: Sequence[Record],
    samples: Sequence[Sequence[Sampled]],
    give_way: GiveWay | None = None,
) -> list[tuple[Trajectory, ...]]:
    """Verdicts on every record's samples, ``judges`` at a time; a record's same sample twice is judged once.

    ``give_way`` is called, by every judge, before each verdict: what it raises ends the rest.
    """

    def facts(number: int, sample: Sampled) -> tuple[int, str, tuple[str, ...], bool]:
        return number, sample.answer, sample.thoughts, sample.stopped

    asked = list(dict.fromkeys(facts(number, sample) for number, group in enumerate(samples) for sample in group))

    def verdict(key: tuple[int, str, tuple[str, ...], bool]) -> Trajectory:
        if give_way is not None:
            give_way()
        number, answer, thoughts, stopped = key
        return judge(task, records[number], answer, thoughts, stopped)

    with ThreadPoolExecutor(judges) as judging:
        verdicts = dict(zip(asked, judging.map(verdict, asked), strict=True))
    return [
        tuple(replace(verdicts[facts(number, sample)], score=sample.score, drift=sample.drift) for sample in group)
        for number, group in enumerate(samples)
    ]
