"""The real lm-evaluation-harness, offline, on a task of GSM8K's form that lies in a folder, with a tiny export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from ladir.__main__ import main
from ladir.config import DataSettings
from ladir.data.records import read_records
from ladir.errors import UnusableError
from ladir.evaluation.harness import HarnessModel
from ladir.evaluation.metrics import summarise
from ladir.evaluation.results import QuestionResult, judge
from ladir.reasoner import Reasoner
from ladir.tasks import get_task
from tests.test_reasoner import LETTERS, tiny_reasoner

QUESTIONS = ["a b c", "d", "e f g h i", "j k", "l m n o"]
SEED = 5


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    tiny_reasoner(dtype=torch.float32).save_pretrained(folder)
    return folder


def generated(export: Path, trajectories: int = 1, **controls: Any) -> list[list[Any]]:
    """What Python gets."""
    return Reasoner.from_pretrained(export, "cpu").generate(QUESTIONS, trajectories, seed=SEED, **controls)


def write_task(folder: Path, answers: list[str], repeats: int = 1, **generation: Any) -> Path:
    """GSM8K's fields and its answers behind ####."""
    rows = [{"question": q, "answer": f"so it is\n#### {a}"} for q, a in zip(QUESTIONS, answers, strict=True)]
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:"], **generation},
        "repeats": repeats,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))
    return data


def test_the_harness_gets_our_evaluators_figures(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    given = [group[0].answer for group in generated(export, num_steps=2)]
    assert len(set(given)) > 1
    data = write_task(tmp_path, [answer if number % 2 else "9" for number, answer in enumerate(given)], top_k=3)
    records = read_records(str(data), DataSettings()).records
    task = get_task("maths")
    ours = [
        QuestionResult(record.question, (judge(task, record, group[0].answer),))
        for record, group in zip(records, generated(export, num_steps=2), strict=True)
    ]
    arguments = f"pretrained={export},num_steps=2,seed={SEED},question_field=question"
    command = ["harness", "--model", "ladir", "--model_args", arguments, "--tasks", "letters", "--include_path", str(tmp_path)]
    assert main([*command, "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples"]) == 0
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["letters"]["exact_match,none"]
    assert theirs == summarise(ours)["pass@1"] == 0.4
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"] for row in rows] == [[[answer]] for answer in given]
    assert caplog.text.count("top_k of the task's generation_kwargs is left out") == 1


def requests(*contexts: str, **given: Any) -> list[Instance]:
    return [Instance("generate_until", {"question": text}, (text, dict(given)), 0) for text in contexts]


def test_a_request_again_is_the_next_trajectory_and_batches_change_nothing(export: Path) -> None:
    expected = [t.answer for group in generated(export, 3) for t in group]
    repeated = [question for question in QUESTIONS for _ in range(3)]
    for size in (1, 4, "auto:2", None):
        model = HarnessModel(str(export), device="cpu", seed=SEED, batch_size=size)
        assert model.generate_until(requests(*repeated), disable_tqdm=True) == expected
    assert HarnessModel(str(export), device="cpu", batch_size="auto", max_batch_size=3)._batch_size == 3


def test_thoughts_stand_before_the_answer_which_alone_is_cut(export: Path) -> None:
    whole = [group[0] for group in generated(export, answer_temperature=0.0)]
    longest = max(whole, key=lambda t: len(t.answer.split()))
    stop = longest.answer.split()[1]
    model = HarnessModel(str(export), device="cpu", seed=SEED, thoughts=True, answer_prefix="#### ")
    found = model.generate_until(requests(*QUESTIONS, until=[stop], do_sample=False), disable_tqdm=True)
    assert found == ["\n".join([*t.thoughts, f"#### {t.answer.partition(stop)[0]}"]) for t in whole]


def test_what_a_task_says_of_generating_yields_to_the_models_arguments(export: Path) -> None:
    model = HarnessModel(str(export), device="cpu", num_steps=2)
    assert dict(model._controls({"max_gen_toks": 7, "temperature": 0.5})) == {
        "max_answer_tokens": 7,
        "answer_temperature": 0.5,
        "num_steps": 2,
    }
    own = HarnessModel(str(export), device="cpu", max_answer_tokens=3, answer_temperature=0.25)
    told = own._controls({"max_gen_toks": 7, "do_sample": False})
    assert dict(told) == {"max_answer_tokens": 3, "answer_temperature": 0.25}


def test_what_cannot_be_is_refused_with_its_reason(
    export: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    model = HarnessModel(str(export), device="cpu", question_field="problem")
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UnusableError, match=r"no likelihood of a text.*output_type: generate_until"):
            ask(requests("a"))
    with pytest.raises(UnusableError, match="no such field; they have question"):
        model.generate_until(requests("a"), disable_tqdm=True)
    with pytest.raises(UnusableError, match=r"unknown num_stepz \(did you mean num_steps\?\), x; known: pretrained"):
        HarnessModel(str(export), num_stepz=3, x=1)
    with pytest.raises(UnusableError, match="num_steps"):
        HarnessModel(str(export), device="cpu", num_steps=0)
    assert set(LETTERS) and main(["harness", "--model", "ladir", "--model_args", "pretrained=nowhere", "--tasks", "gsm8k"]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
