"""``python -m ladir inspect`` without a tokenizer: how many blocks the records have needs none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ladir.__main__ import main
from ladir.tokens import build_word_tokenizer


def cells(line: str) -> list[str]:
    """What stands between a table's vertical lines."""
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_the_blocks_per_record_need_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.jsonl"
    rows = [{"input": "How many?", "output": "\n".join(["It is so."] * count + ["#### 7"])} for count in (1, 2, 2, 2, 9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    assert main(["inspect", str(file), "--show", "0", "data.on_bad_record=skip"]) == 0
    out = capsys.readouterr().out
    (titles,) = [cells(line) for line in out.splitlines() if "50 %" in line]
    (row,) = [cells(line) for line in out.splitlines() if "blocks per record" in line]
    assert dict(zip(titles, row, strict=True)) == {
        "": "blocks per record",
        "mean": "3.2",
        "50 %": "2",
        "95 %": "9",
        "99 %": "9",
        "longest": "9",
        "total": "16",
        "limit": "32",
    }
    build_word_tokenizer(["How", "many?", "It", "is", "so.", "7"]).save_pretrained(str(tmp_path / "words"))
    command = ["inspect", str(file), "--show", "0", "--tokenizer", str(tmp_path / "words"), "data.on_bad_record=skip"]
    assert main(command) == 0
    table = [cells(line) for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert row in table and [line[0] for line in table] == ["question", "block", "answer", "blocks per record"]


def test_a_file_without_a_readable_record_has_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.jsonl").write_text("{}\n")
    assert main(["inspect", str(tmp_path / "my.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "blocks per record" not in out and "1 records: 0 usable, 1 bad" in out


@pytest.mark.parametrize("terminal", [False, True])
def test_a_narrow_place_takes_no_word_of_the_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({"input": "How many?", "output": "It is so.\n#### 7"}) + "\n")
    build_word_tokenizer(["How", "many?", "It", "is", "so.", "7"]).save_pretrained(str(tmp_path / "words"))
    assert main(["inspect", str(file), "--show", "0", "--tokenizer", str(tmp_path / "words")]) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line for line in out.splitlines() if "┃" in line or "│" in line]
    assert "…" not in out and (max(map(len, lines)) <= 44) == terminal
    names = "question", "blocks per record", "mean", "50 %", "95 %", "99 %", "longest", "total", "limit"
    assert all(name in "\n".join(lines) for name in names)


def test_too_many_blocks_are_bad_without_a_tokenizer_as_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training refuses them whatever the tokenizer is; what needs one is said not to have been looked at."""
    file = tmp_path / "my.jsonl"
    rows = [{"input": "How many?", "output": "\n".join(["It is so."] * count + ["#### 7"])} for count in (2, 33)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_word_tokenizer(["How", "many?", "It", "is", "so.", "7"]).save_pretrained(str(tmp_path / "words"))
    for arguments, unchecked in ([], " (token lengths not checked)"), (["--tokenizer", str(tmp_path / "words")], ""):
        assert main(["inspect", str(file), "--show", "0", *arguments]) == 1
        out = capsys.readouterr().out
        assert f"2 records: 1 usable, 1 bad{unchecked}\n" in out
        assert f"{file}:2: it has 33 blocks, more than data.max_blocks=32; raise data.max_blocks" in out
        (row,) = [cells(line) for line in out.splitlines() if "blocks per record" in line]
        assert row[5] == "2", "the longest of the usable ones"
        assert main(["inspect", str(file), "--show", "0", *arguments, "data.max_blocks=33"]) == 0
        assert f"2 records: 2 usable, 0 bad{unchecked}\n" in capsys.readouterr().out


def test_records_that_repeat_others_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, row = tmp_path / "my.jsonl", {"input": "How many?", "output": "It is so.\n#### 7"}
    others = [{**row, "input": "How much?"}, {**row, "output": "So it is.\n#### 7"}]
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, *others, row, row, others[1])))
    assert main(["inspect", str(file), "--show", "0"]) == 0
    assert f"Warning: 3 records repeat an earlier one word for word, the first at {file}:4 ({file}:1)." in capsys.readouterr().out
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, *others)))
    assert main(["inspect", str(file), "--show", "0"]) == 0
    assert "repeat" not in capsys.readouterr().out
