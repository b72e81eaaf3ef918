"""``python -m ladir answer``: a file of questions by one process or several, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ladir.__main__ import main
from ladir.cli import answer
from ladir.cli.answer_file import AnswerFile
from ladir.cli.processes import Process, this_process
from ladir.errors import UnusableError
from ladir.reasoner import Reasoner
from tests.test_reasoner import tiny_reasoner

#: question, or None for a line that cannot be asked
QUESTIONS = ["a b c", None, "d", "e f g", None, "h", "i j"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, and a file whose second line has no question and whose fifth is torn."""
    folder = tmp_path_factory.mktemp("answer")
    tiny_reasoner().save_pretrained(folder / "export")
    lines = [json.dumps({"input": question}) for question in QUESTIONS if question]
    lines.insert(1, '{"id": 7}')
    lines.insert(4, '{"input": "f')
    (folder / "questions.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "answer",
        str(folder / "questions.jsonl"),
        "--model",
        str(folder / "export"),
        "--out",
        str(out),
        "--device",
        "cpu",
        *more,
    ]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_question_gets_a_line_and_so_does_what_cannot_be_asked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "answers.jsonl"
    assert main(command(folder, out, "--trajectories", "3", "--seed", "4", "--batch", "2", "--choose", "first")) == 1
    found = rows(out)
    assert [row["place"] for row in found] == list(range(7))
    assert [row.get("question") for row in found] == QUESTIONS
    file = folder / "questions.jsonl"
    assert found[1]["source"] == f"{file}:2" and "no field 'input' for the question (--field)" in found[1]["error"]
    assert found[4]["source"] == f"{file}:6" and "JSON" in found[4]["error"]  # a blank line before it
    told = "\n".join(caplog.messages)
    assert f"{file}:2: no field" in told and f"{file}:6:" in told and "5 questions answered, 2 lines cannot be asked" in told
    reasoner = Reasoner.from_pretrained(folder / "export", "cpu")
    asked = [question for question in QUESTIONS if question]
    for row, group in zip([row for row in found if "answer" in row], reasoner.generate(asked, 3, seed=4), strict=True):
        assert (row["answer"], row["thoughts"], row["stopped"]) == (group[0].answer, group[0].thoughts, group[0].stopped)


def test_stopped_anywhere_it_continues_and_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main(command(folder, whole, "--batch", "2")) == 1
    real, calls = answer._ask, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answer, "_ask", dying)
    assert main(command(folder, out, "--batch", "2")) == 128 + signal.SIGINT
    before = out.read_bytes()
    out.write_bytes(before + b'{"place": 4, "que')  # a process that was killed while it wrote
    assert main(command(folder, out, "--batch", "2")) == 1
    assert len(calls) == 3 + 2 and "4 of 7 questions are answered already" in caplog.text
    assert rows(out) == rows(whole)
    assert main(command(folder, out)) == 1 and len(calls) == 5 and rows(out) == rows(whole)


def test_answers_of_other_questions_models_or_controls_are_not_mixed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    main(command(folder, out))
    kept = out.read_bytes()
    for change, named in ((["--seed", "1"], "seed: 0 -> 1"), (["--num-steps", "2"], "num_steps: None -> 2")):
        assert main(command(folder, out, *change)) == 1
        assert f"was begun with other questions, model or controls ({named})" in capsys.readouterr().err
    assert out.read_bytes() == kept
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("mine\n")
    assert main(command(folder, foreign)) == 1 and foreign.read_text() == "mine\n"
    assert "was not begun by this command" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "nowhere" / "x.jsonl")) == 1
    assert main(command(folder, out, "--batch", "0")) == 1 and "--batch 0: must be at least 1" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "best.jsonl", "--choose", "best")) == 1
    assert "came without a verifier" in capsys.readouterr().err and not (tmp_path / "best.jsonl").exists()


def test_processes_of_any_launcher_take_their_shares(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    main(command(folder, whole))
    environment = {**os.environ, "WORLD_SIZE": "2"}
    arguments = [sys.executable, "-m", "ladir", *command(folder, out)]
    both = [
        subprocess.Popen(arguments, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1].decode() for process in both]
    assert [process.returncode for process in both] == [1, 1]  # each has one of the lines that cannot be asked
    assert rows(out) == rows(whole)
    for count, told in zip((3, 2), errors, strict=True):
        assert f"{count} questions answered, 1 lines cannot be asked" in told


def test_a_process_knows_its_number() -> None:
    assert this_process({}) == Process(0, 1, 0) and Process().share(3) == range(3)
    assert this_process({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}) == Process(1, 3, 1)
    assert list(Process(1, 3).share(8)) == [1, 4, 7]
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert this_process(slurm) == Process() and this_process({**slurm, "SLURM_STEP_ID": "0"}) == Process(2, 4, 0)
    for wrong in ({"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}):
        with pytest.raises(UnusableError, match="must be set to numbers together"):
            this_process(wrong)
    with pytest.raises(UnusableError, match="RANK=2 is not one of WORLD_SIZE=2 processes"):
        this_process({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_a_line_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "x.jsonl", {"seed": 0})
    file.add([{"place": 0}])
    (tmp_path / "x.jsonl").write_text('{"place": 0}\nnonsense\n')
    with pytest.raises(UnusableError, match="a line is not JSON"):
        file.rows()
