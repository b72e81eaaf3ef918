"""Several answers are judged at a time: each gets its own verdict, and programs do not get in one another's way."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from ladir.config import Config, EvaluateSettings
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks.code import CodeTask
from ladir.tasks.sandbox import Limits, run_program
from ladir.tasks.verdict import Verdict
from tests.toy_task import Judge
from training.evaluation import gold
from training.evaluation.answerers import Sampled
from training.evaluation.judging import judge_samples, judges_of
from training.runtime.preemption import BrokenOff

RECORDS = [
    Record(question, ("a step",), answer, f"y:{line}") for line, (question, answer) in enumerate([("p", "1"), ("q", "2")], 1)
]


class Meeting(Judge):
    """A checker whose verdicts wait for one another; right is what the record says."""

    def __init__(self, together: int) -> None:
        self.asked: list[tuple[str, str]] = []
        self._barrier = threading.Barrier(together)

    def verdict(self, answer: str, record: Record) -> Verdict:
        self.asked.append((record.question, answer))
        self._barrier.wait(timeout=60)
        return Verdict(answer == record.answer)


def samples(*answers: str) -> list[Sampled]:
    return [Sampled(answer, ("a thought",)) for answer in answers]


def test_answers_are_judged_together_each_once_and_keep_their_order() -> None:
    task = Meeting(together=4)
    judged = judge_samples(task, 4, RECORDS, [samples("1", "2", "1"), samples("1", "2")])
    assert [[trajectory.correct for trajectory in group] for group in judged] == [[True, False, True], [False, True]]
    assert sorted(task.asked) == [("p", "1"), ("p", "2"), ("q", "1"), ("q", "2")]


def test_what_a_checker_raises_is_raised_and_ends_the_rest() -> None:
    calls: list[str] = []

    class Refusing(Meeting):
        def verdict(self, answer: str, record: Record) -> Verdict:
            calls.append(answer)
            raise ValueError(f"{record.source}: no tests")

    with pytest.raises(ValueError, match="y:1: no tests"):
        judge_samples(Refusing(1), 1, RECORDS, [samples(*map(str, range(50))), []])
    assert len(calls) < 50


@pytest.mark.parametrize("judges", [1, 2])
def test_judging_ends_between_two_answers_where_a_stop_comes(judges: int) -> None:
    task = Asked()
    with pytest.raises(BrokenOff):
        judge_samples(task, judges, RECORDS, [samples(*map(str, range(50))), []], task.give_way)
    assert 2 <= task.asked <= 2 + judges - 1


def test_programs_that_run_together_have_their_processes_to_themselves() -> None:
    limits = Limits(seconds=30.0)
    try:
        run_program("", limits)
    except UnusableError as error:
        pytest.skip(f"NOT TESTED: {error}")
    threads = "import threading, time\nall = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(10)]\n"
    answer = threads + "[thread.start() for thread in all]\n[thread.join() for thread in all]\nnumber = "
    records = [Record(f"q{n}", ("a step",), "", f"y:{n}", {"tests": f"assert number == {n}"}) for n in range(4)]
    judged = judge_samples(CodeTask(limits), 8, records, [samples(f"{answer}{n}", f"{answer}{n + 1}") for n in range(4)])
    assert [[trajectory.correct for trajectory in group] for group in judged] == [[True, False]] * 4


def test_programs_take_a_rank_s_threads_where_each_is_alone() -> None:
    asked = [("code", "namespaces", None), ("code", "limits", None), ("maths", "namespaces", None), ("code", "limits", 3)]
    found = [
        judges_of(Config(evaluate=EvaluateSettings(task=task, isolation=isolation, judges=judges)), ranks=1)
        for task, isolation, judges in asked
    ]
    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    assert found == [threads, 1, 1, 3]
    assert judges_of(Config(evaluate=EvaluateSettings(task="code")), ranks=1000) == 1


class Asked(Judge):
    """Accepts every answer, and asks to stop at the second."""

    def __init__(self) -> None:
        self.stopping, self.asked = False, 0

    def give_way(self) -> None:
        if self.stopping:
            raise BrokenOff

    def verdict(self, answer: str, record: Record) -> Verdict:
        self.asked += 1
        self.stopping = self.asked == 2
        return Verdict(True)


def test_what_another_evaluation_has_accepted_meanwhile_is_kept(tmp_path: Path) -> None:
    records = [Record(str(i), (), str(i), f"y:{i}") for i in range(4)]

    def judge(task: Asked, asked: list[Record]) -> None:
        gold._judged(tmp_path / "gold.json", EvaluateSettings(), task, asked, 1, lambda: None)

    class Slow(Asked):
        def verdict(self, answer: str, record: Record) -> Verdict:
            judge(Asked(), records[1:])
            return super().verdict(answer, record)

    judge(Slow(), records[:1])
    again = Asked()
    judge(again, records)
    assert again.asked == 0


def test_judging_of_own_answers_stops_when_asked_to_and_keeps_what_was_accepted(tmp_path: Path) -> None:
    records = [Record(str(i), (), str(i), f"y:{i}") for i in range(5)]
    first, second = Asked(), Asked()
    assert gold._judged(tmp_path / "gold.json", EvaluateSettings(), first, records, 1, first.give_way) is None
    assert first.asked == 2
    second.asked = 2
    check = gold._judged(tmp_path / "gold.json", EvaluateSettings(), second, records, 1, second.give_way)
    assert check is not None and (check.records, check.refused, second.asked) == (5, {}, 5)


class Reading(Judge):
    """Accepts every answer; cannot read those that are odd."""

    def verdict(self, answer: str, record: Record) -> Verdict:
        return Verdict(True)

    def unread(self, record: Record) -> bool:
        return int(record.answer) % 2 == 1


def test_own_answers_that_cannot_be_read_are_told_and_counted_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    records = [Record(str(i), (), str(i), f"y:{i}") for i in range(9)]

    def unread(task: Judge, asked: list[Record]) -> int:
        check = gold._judged(tmp_path / "gold.json", EvaluateSettings(), task, asked, 1, lambda: None)
        assert check is not None and not check.refused
        return check.unread

    assert unread(Reading(), records[:1]) == 0 and not caplog.records
    assert unread(Reading(), records) == 4
    assert caplog.messages == [
        "4 of 9 own answers cannot be read by evaluate.task=none: only the same text is right there, other answers are undecided "
        "(y:1: '1'; y:3: '3'; y:5: '5'; ...)"
    ]
    assert unread(Judge(), records[2:6]) == 2  # known from before: nothing is judged
