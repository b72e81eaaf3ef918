"""Records of reasoning-gym: disjoint, readable, with the templates that are held out in no other file; refusals."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ladir.__main__ import main
from ladir.config import DataSettings, GymSettings
from ladir.config.loader import load_config
from ladir.data.records import read_records
from ladir.errors import UnusableError
from ladir.tasks import get_task, gym
from ladir.tokens import load_tokenizer

SMALL = ["--train", "60", "--validation", "8", "--test", "12", "--vocabulary", "300"]
SPLITS = ("train", "validation", "test", "test_held_out")


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in SPLITS
        if (folder / f"{split}.jsonl").is_file()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gym")
    assert main(["gym", "gsm_symbolic", "--out", str(folder), "--held-out-templates", "5", "--seed", "3", *SMALL]) == 0
    return folder


def test_files_share_no_question_and_the_held_out_no_template(folder: Path) -> None:
    rows = rows_of(folder)
    assert {split: len(found) for split, found in rows.items()} == {"train": 60, "validation": 8, "test": 12, "test_held_out": 12}
    questions = [row["input"] for found in rows.values() for row in found]
    assert len(set(questions)) == len(questions)
    held_out = {row["template"] for row in rows["test_held_out"]}
    assert 1 <= len(held_out) <= 5
    assert not held_out & {row["template"] for split in SPLITS[:3] for row in rows[split]}


def test_every_record_is_read_and_its_own_answer_is_right(folder: Path) -> None:
    maths = get_task("maths")
    for split in SPLITS:
        found = read_records(str(folder / f"{split}.jsonl"), DataSettings())
        assert not found.bad
        assert all(record.blocks and "####" not in record.blocks[-1] for record in found.records)
        assert all("Do not include units" not in record.question for record in found.records)
        assert all(maths.verdict(record.answer, record).right for record in found.records)
    tokenizer = load_tokenizer(load_config(None, [f"backbone.tokenizer={folder}/tokenizer"]).backbone)
    assert len(tokenizer) == 300


def test_a_seed_is_a_set_and_test_records_do_not_depend_on_how_many_are_trained_on(tmp_path: Path) -> None:
    few = GymSettings(train=5, validation=3, test=4, held_out_templates=4)
    more = GymSettings(train=20, validation=3, test=4, held_out_templates=4)
    first, again, larger, other = gym.generate(few, 0), gym.generate(few, 0), gym.generate(more, 0), gym.generate(few, 1)
    assert first == again and first["test"] != other["test"]
    assert larger["train"][:5] == first["train"]
    assert all(larger[split] == first[split] for split in SPLITS[1:])


def test_templates_can_be_chosen() -> None:
    made = gym.generate(GymSettings(train=20, validation=2, test=2, templates=[1, 5, 0], held_out_templates=1), 0)
    kept, held_out = ({row["template"] for row in made[split]} for split in ("train", "test_held_out"))
    assert len(held_out) == 1 and kept | held_out == {0, 1, 5} and not kept & held_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm_symbolc"], "has no such set; did you mean gsm_symbolic?"),
        (["chain_sum"], "no chain of thought"),
        (["gsm_symbolic", "--templates", "1", "32"], "gsm_symbolic has no template 32"),
        (["gsm_symbolic", "--templates", "1", "2", "--held-out-templates", "2"], "of 2 templates none"),
        (["gsm_symbolic", "--templates", "1", "--train", "x"], "must be a whole number"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gym", *arguments, "--out", str(tmp_path / "out")]) in (1, 2)
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


class Sums:
    """A set whose ``metadata`` holds what a test says, with ``different`` questions."""

    def __init__(self, metadata: Callable[[int], dict[str, Any]], different: int = 10**6) -> None:
        self.metadata, self.different = metadata, different

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = place % self.different
        return {"question": f"What is {number} + 1?", "answer": str(number + 1), "metadata": self.metadata(number)}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a set ``sums`` into reasoning-gym."""

    def put(dataset: Any) -> None:
        class Package:
            DATASETS = {"sums": None}  # noqa: RUF012

            @staticmethod
            def create_dataset(name: str, seed: int, size: int) -> Any:
                return dataset

        monkeypatch.setattr(gym, "_package", lambda: Package)

    return put


def test_any_set_with_chains_works_whether_they_mark_their_answer_or_not(use: Callable[[Any], None]) -> None:
    use(Sums(lambda number: {"cot": f"I count on from {number}." + (f"\n#### {number + 1}.0" if number % 2 else "")}))
    made = gym.generate(GymSettings(dataset="sums", train=4, validation=1, test=1), 0)
    assert made["validation"] == [{"input": "What is 0 + 1?", "output": "I count on from 0.\n#### 1"}]
    assert made["test"][0]["output"] == "I count on from 1.\n#### 2" and "test_held_out" not in made


def test_chains_that_end_with_another_answer_are_left_out_and_told(
    use: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    use(Sums(lambda number: {"cot": f"I guess.\n#### {number + 1 + number % 2}"}))
    made = gym.generate(GymSettings(dataset="sums", train=4, validation=1, test=1), 0)
    assert [row["input"] for row in made["train"]] == [f"What is {number} + 1?" for number in (4, 6, 8, 10)]
    assert "5 items whose chain ends with another answer" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out_templates": 1}, "gym.held_out_templates: sums is not made of templates"),
        ({"templates": [1]}, "gym.templates: sums is not made of templates"),
        ({"train": 10}, "gave only 9 different questions"),
    ],
)
def test_a_set_without_templates_and_one_with_too_few_questions(
    settings: dict[str, Any], message: str, use: Callable[[Any], None]
) -> None:
    use(Sums(lambda number: {"cot": "I count."}, different=9))
    with pytest.raises(UnusableError, match=message):
        gym.generate(GymSettings(**{"dataset": "sums", "train": 4, "validation": 1, "test": 1, **settings}), 0)


def test_a_missing_package_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="reasoning_gym")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["gym", "gsm_symbolic", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "reasoning_gym is not installed" in line and "-m pip install -r requirements-examples.txt" in line
