"""A stopped evaluation: what is answered stays answered, and never mixes with other settings or models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ladir.config import Config
from ladir.config_loader import load_config
from ladir.data.records import Record
from ladir.evaluation.results import QuestionResult, Trajectory
from training.answers import AnswerLog
from training.evaluate import ask
from training.runtime.distributed import World
from training.runtime.run import Run

RECORDS = [Record(f"question {i}", ("thought",), "answer", f"test.jsonl:{i + 1}", {}) for i in range(7)]


def configure(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.folder={folder}", "evaluate.questions_per_batch=2", *overrides])


def open_run(config: Config) -> Run:
    return Run(config, "evaluate", World(0, 1, 0, torch.device("cpu")))


class Model:
    """Answers in a way that tells questions apart; asks the run to stop during its ``stop_in``-th batch."""

    def __init__(self, run: Run, stop_in: int = 0) -> None:
        self.run, self.stop_in = run, stop_in
        self.asked: list[str] = []

    def __call__(self, records: Sequence[Record]) -> list[QuestionResult]:
        self.stop_in -= 1
        if self.stop_in == 0:
            self.run.stop.requested = True
        self.asked += [record.question for record in records]
        return [QuestionResult(r.question, (Trajectory(f"é {r.question}", False, "c", ("a", "b"), None, True),)) for r in records]


def results(answered: dict[int, Any] | None) -> dict[int, QuestionResult]:
    assert answered is not None
    return {i: answer.result for i, answer in sorted(answered.items())}


def test_a_stopped_evaluation_asks_only_what_is_left(tmp_path: Path) -> None:
    whole = open_run(configure(tmp_path / "whole"))
    expected = results(ask(whole, AnswerLog(whole), "ladir", RECORDS, Model(whole)))
    assert list(expected) == list(range(7))

    config = configure(tmp_path / "stopped")
    first = open_run(config)
    assert ask(first, AnswerLog(first), "ladir", RECORDS, Model(first, stop_in=2)) is None
    second = open_run(config)
    model = Model(second)
    log = AnswerLog(second)
    assert results(ask(second, log, "ladir", RECORDS, model)) == expected
    assert model.asked == [f"question {i}" for i in range(4, 7)]
    log.remove()
    assert not (second.folder.path / "evaluation").exists()


def test_a_line_torn_by_a_kill_costs_only_its_question(tmp_path: Path) -> None:
    config = configure(tmp_path)
    first = open_run(config)
    assert ask(first, AnswerLog(first), "ladir", RECORDS, Model(first, stop_in=1)) is None
    file = next((first.folder.path / "evaluation").rglob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-20])
    second = open_run(config)
    model = Model(second)
    assert list(results(ask(second, AnswerLog(second), "ladir", RECORDS, model))) == list(range(7))
    assert model.asked[0] == "question 1"
    assert list(AnswerLog(second).read("ladir")) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", ["method", "settings", "model"])
def test_answers_of_other_settings_models_and_methods_are_not_used(change: str, tmp_path: Path) -> None:
    first = open_run(configure(tmp_path))
    assert ask(first, AnswerLog(first), "ladir", RECORDS, Model(first, stop_in=2)) is None
    overrides = ["sample.num_steps=3"] if change == "settings" else []
    second = open_run(configure(tmp_path, *overrides))
    if change == "model":
        second.folder.export.mkdir()
        (second.folder.export / "model.safetensors").write_text("new")
    model = Model(second)
    ask(second, AnswerLog(second), "ar" if change == "method" else "ladir", RECORDS, model)
    assert len(model.asked) == 7
