"""A stopped evaluation: what is answered stays answered, and never mixes with other settings or models."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from ladir.config import Config, DataSettings
from ladir.config.loader import load_config
from ladir.data.question_store import Questions, QuestionStore, write_questions
from ladir.data.records import Record
from ladir.data.token_store import Store
from ladir.errors import UnusableError
from ladir.evaluation.results import QuestionResult
from ladir.inference.cost import Cost
from ladir.tasks import Task
from ladir.tasks.verdict import Verdict
from ladir.tokens import build_word_tokenizer
from tests.distributed import ProcessGroup
from tests.toy_task import Judge
from training.evaluation import asking
from training.evaluation.answerers import Answerer, Answers, Sampled
from training.evaluation.answers import AnswerLog
from training.evaluation.benchmarks import Benchmark
from training.evaluation.gold import GoldCheck
from training.evaluation.questions import Asked, choose_questions
from training.runtime.distributed import World
from training.runtime.run import Run
from training.runtime.status import Status

#: of a question of mean length, for a stand-in that sleeps
SECONDS = 0.005

RECORDS = [Record(f"question {i}", ("thought",), "answer", f"test.jsonl:{i + 1}", {}) for i in range(7)]


def configure(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.folder={folder}", "evaluate.questions_per_batch=2", *overrides])


def open_run(config: Config) -> Run:
    return Run(config, "evaluate", World(0, 1, 0, torch.device("cpu")))


class Model:
    """Answers in a way that tells questions apart; asks the run to stop during its ``stop_in``-th batch, which is then lost."""

    def __init__(self, run: Run, stop_in: int = 0) -> None:
        self.run, self.stop_in = run, stop_in
        self.asked: list[str] = []

    def __call__(self, records: Sequence[Record]) -> Answers:
        self.stop_in -= 1
        if self.stop_in == 0:
            self.run.stop.requested = True
        self.asked += [record.question for record in records]
        return Answers([[Sampled(f"é {record.question}", ("a", "b"))] for record in records], Cost(2.0, 4, 6))


TASK: Task = Judge()


def ask(run: Run, log: AnswerLog, task: Task, sampling: str, records: Sequence[Record], model: Model) -> bool:
    """Ask one model in one way; False where it was stopped."""
    benchmark = Benchmark("", run, task, Asked(records, [], GoldCheck(0, {}, 0.0), len(records)), log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "load_answerers", lambda *about: [{sampling: model}])
        return asking.ask(run, [benchmark], [sampling]) is not None


class Slow(Model):
    """Takes as long for a question as its length says, which differs a hundredfold."""

    def __call__(self, records: Sequence[Record]) -> Answers:
        places = [(len(record.question) % 37 + 1) / 38 for record in records]
        time.sleep(SECONDS * sum(math.exp(1.2 * NormalDist().inv_cdf(place)) for place in places))  # lognormal
        return super().__call__(records)


def slow_answers(world: World, folder: Path, count: int) -> tuple[dict[int, QuestionResult], asking.Busy, int]:
    """What a queue of ``count`` questions ends with, how busy the ranks were, and how many this one answered."""
    run = Run(configure(folder, "evaluate.questions_per_batch=4"), "evaluate", world)
    records = [Record("x" * (7 * i + 1), (), "answer", f"test.jsonl:{i + 1}", {}) for i in range(count)]
    log, model = AnswerLog(run, records), Slow(run)
    benchmark = Benchmark("", run, TASK, Asked(records, [], GoldCheck(0, {}, 0.0), count), log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "load_answerers", lambda *about: [{"ladir": model}])
        busy = asking.ask(run, [benchmark], ["ladir"])
    assert busy is not None
    return results(log), busy, len(model.asked)


@pytest.mark.distributed
def test_ranks_that_take_from_the_queue_answer_as_one_does_and_say_how_busy_they_were(
    one_process: ProcessGroup, two_processes: ProcessGroup, tmp_path: Path
) -> None:
    ((expected, alone, asked),) = one_process.run(slow_answers, tmp_path / "one", 40)
    (first, busy, mine), (second, same, theirs) = two_processes.run(slow_answers, tmp_path / "two", 40)
    assert first == second == expected and mine + theirs == asked == 40
    assert len(alone.ranks) == 1 and busy.ranks == same.ranks and len(busy.ranks) == 2


def test_the_end_is_foreseen_by_samples_not_by_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred trajectories of a question, then a greedy answer."""
    run = open_run(configure(tmp_path, "evaluate.num_trajectories=100"))
    log = AnswerLog(run, RECORDS[:1])
    benchmarks = [Benchmark("", run, TASK, Asked(RECORDS[:1], [], GoldCheck(0, {}, 0.0), 1), log)]
    done: list[Any] = []
    monkeypatch.setattr(Status, "say", lambda status, doing, **facts: done.append(facts["fraction"]))
    left = [asking.Portion(0, sampling, range(1)) for sampling in ("ladir", "ladir-zero-noise")]
    progress = asking._Progress(run, benchmarks, left)
    for number in range(2):
        progress.taken(number)
    assert done == [0.0, pytest.approx(100 / 101)]


def results(log: AnswerLog) -> dict[int, QuestionResult]:
    return {i: answer.result for i, answer in log.read("ladir").items()}


def test_a_stopped_evaluation_asks_only_what_is_left(tmp_path: Path) -> None:
    whole = open_run(configure(tmp_path / "whole"))
    log = AnswerLog(whole, RECORDS)
    assert ask(whole, log, TASK, "ladir", RECORDS, Model(whole))
    expected = results(log)
    assert list(expected) == list(range(7))
    assert expected[3] == QuestionResult("question 3", expected[3].trajectories, "answer")
    assert log.read("ladir")[6].cost == Cost(1.0, 2, 3)  # half of its batch's

    config = configure(tmp_path / "stopped")
    first = open_run(config)
    assert not ask(first, AnswerLog(first, RECORDS), TASK, "ladir", RECORDS, Model(first, stop_in=3))
    second = open_run(config)
    model = Model(second)
    log = AnswerLog(second, RECORDS)
    assert log.done("ladir") == {0, 1, 2}
    assert ask(second, log, TASK, "ladir", RECORDS, model)
    assert results(log) == expected
    assert model.asked == [f"question {i}" for i in range(3, 7)]
    log.remove()
    assert not (second.folder.path / "evaluation").exists()


class Stopping(Judge):
    """Accepts every answer; at the ``last``-th the run is asked to stop."""

    def __init__(self, run: Run, last: int) -> None:
        self.run, self.last, self.judged = run, last, 0

    def verdict(self, answer: str, record: Record) -> Verdict:
        self.judged += 1
        if self.judged == self.last:
            self.run.stop.requested = True
        return super().verdict(answer, record)


def test_a_stop_is_obeyed_between_two_verdicts(tmp_path: Path) -> None:
    run = open_run(configure(tmp_path))
    log, task = AnswerLog(run, RECORDS), Stopping(run, last=2)  # the first of the second batch
    assert not ask(run, log, task, "ladir", RECORDS, Model(run))
    assert task.judged == 2 and log.done("ladir") == {0}


def test_a_stop_is_obeyed_while_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has no end here."""
    run, released = open_run(configure(tmp_path)), threading.Event()

    def load(*about: object) -> None:
        run.stop.requested = True
        released.wait()

    monkeypatch.setattr(asking, "load_answerers", load)
    benchmark = Benchmark("", run, TASK, Asked(RECORDS, [], GoldCheck(0, {}, 0.0), len(RECORDS)), AnswerLog(run, RECORDS))
    assert asking.ask(run, [benchmark], ["ladir"]) is None
    released.set()


def stop_by_another(world: World, folder: Path) -> tuple[bool, set[int]]:
    """The second rank is asked to stop while the first is in the middle of a batch that has no end; what is kept then."""
    run, begun = Run(configure(folder), "evaluate", world), folder / "begun"
    log = AnswerLog(run, RECORDS[:2])

    def load(*about: Any) -> list[dict[str, Answerer]]:
        give_way: Callable[[], None] = about[-1]

        def endless(records: Sequence[Record]) -> Answers:
            for _ in range(6000):
                give_way()
                time.sleep(0.01)
            raise AssertionError("nobody said that the other one was asked to stop")

        def answer(records: Sequence[Record]) -> Answers:
            if world.is_main:
                begun.touch()
            while not begun.exists():
                time.sleep(0.01)
            run.stop.requested = not world.is_main
            return endless(records)

        return [{"ladir": answer}]

    benchmark = Benchmark("", run, TASK, Asked(RECORDS[:2], [], GoldCheck(0, {}, 0.0), 2), log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "load_answerers", load)
        return asking.ask(run, [benchmark], ["ladir"]) is None, log.done("ladir")


@pytest.mark.distributed
def test_a_rank_in_the_middle_of_a_batch_hears_that_another_was_asked_to_stop(
    two_processes: ProcessGroup, tmp_path: Path
) -> None:
    assert two_processes.run(stop_by_another, tmp_path) == [(True, set())] * 2


def test_a_line_torn_by_a_kill_costs_only_its_batch(tmp_path: Path) -> None:
    config = configure(tmp_path)
    first = open_run(config)
    assert not ask(first, AnswerLog(first, RECORDS), TASK, "ladir", RECORDS, Model(first, stop_in=3))
    file = next((first.folder.path / "evaluation").rglob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-20])
    second = open_run(config)
    model = Model(second)
    assert ask(second, AnswerLog(second, RECORDS), TASK, "ladir", RECORDS, model)
    assert model.asked[:2] == ["question 1", "question 2"]  # in the company they had
    assert list(AnswerLog(second, RECORDS).read("ladir")) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", ["method", "settings", "model", "questions"])
def test_answers_of_other_settings_models_and_methods_are_not_used(change: str, tmp_path: Path) -> None:
    first = open_run(configure(tmp_path))
    assert not ask(first, AnswerLog(first, RECORDS), TASK, "ladir", RECORDS, Model(first, stop_in=3))
    overrides = ["sample.num_steps=3"] if change == "settings" else []
    second = open_run(configure(tmp_path, *overrides))
    if change == "model":
        second.folder.export.mkdir()
        (second.folder.export / "model.safetensors").write_text("new")
    model = Model(second)
    records = [replace(record, answer="another") for record in RECORDS] if change == "questions" else RECORDS
    ask(second, AnswerLog(second, records), TASK, "ar" if change == "method" else "ladir", records, model)
    assert len(model.asked) == 7


def test_a_later_start_reads_no_question_but_those_that_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "test.jsonl", list[int]()
    file.write_text("".join(json.dumps({"input": f"q {i}", **({"answer": "answer"} if i % 4 else {})}) + "\n" for i in range(40)))
    write_questions(tmp_path / "store", [str(file)], DataSettings(), build_word_tokenizer(["q"]), 1, check=lambda record: None)
    at = QuestionStore._at
    monkeypatch.setattr(QuestionStore, "_at", lambda store, place: read.append(place) or at(store, place))
    monkeypatch.setattr(Judge, "verdict", lambda *about: Verdict(True))
    split = Questions.of(QuestionStore(Store(tmp_path / "store", [str(file)])))
    monkeypatch.setattr("training.evaluation.questions.read_split", lambda run, task: split)
    for asked in ([*(i for i in range(40) if i % 4), 0, 1, 2, 3], [2, 3, 4, 5]):  # own answers are judged once
        run = open_run(configure(tmp_path))
        found = choose_questions(run, TASK)
        assert found is not None and (len(found.records), found.gold.records) == (40, 30)
        log = AnswerLog(run, found.records)
        assert not ask(run, log, TASK, "ladir", found.records, Model(run, stop_in=2)) and read == asked
        read.clear()


def test_other_rows_of_the_table_need_no_new_answers(tmp_path: Path) -> None:
    first = open_run(configure(tmp_path))
    assert not ask(first, AnswerLog(first, RECORDS), TASK, "ladir", RECORDS, Model(first, stop_in=3))
    second = open_run(configure(tmp_path, "evaluate.methods=[ladir,ladir-majority]", "evaluate.voters=10", "evaluate.judges=2"))
    assert AnswerLog(second, RECORDS).done("ladir") == {0, 1, 2}


def test_a_table_is_not_made_of_a_part_of_the_answers(tmp_path: Path) -> None:
    run = open_run(configure(tmp_path))
    log = AnswerLog(run, RECORDS)
    assert not ask(run, log, TASK, "ladir", RECORDS, Model(run, stop_in=3))
    with pytest.raises(UnusableError, match=r"3 of 7 answers of ladir .* start the same command again"):
        log.read("ladir")


@pytest.mark.parametrize("other", ["evaluate.name=more-steps", "evaluate.snapshot=100"])
def test_an_evaluation_by_another_name_leaves_the_answers_of_a_stopped_one(other: str, tmp_path: Path) -> None:
    first = open_run(configure(tmp_path))
    assert not ask(first, AnswerLog(first, RECORDS), TASK, "ladir", RECORDS, Model(first, stop_in=3))
    second = open_run(configure(tmp_path, other, "sample.num_steps=3"))
    log = AnswerLog(second, RECORDS)
    assert ask(second, log, TASK, "ladir", RECORDS, Model(second))
    log.remove()
    assert AnswerLog(first, RECORDS).done("ladir") == {0, 1, 2}
