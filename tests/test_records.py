"""Reading and encoding records: every line of a file is a record or a reported fault, whatever its bytes."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladir.config import DataSettings
from ladir.data.encode import encode_records
from ladir.data.records import BadRecords, Record, list_bad_records, read_records, read_sentences
from ladir.errors import UnusableError
from ladir.tokens import build_word_tokenizer

GSM8K = Path(os.environ.get("LADIR_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"))
GOOD = {"input": "What is 1 + 2?", "output": "Add them. That is <<1+2=3>>3.\n#### 3", "level": 1}


def write_lines(path: Path, lines: list[bytes]) -> str:
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_a_record_becomes_question_blocks_answer_and_reference(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", json.dumps(GOOD).encode()]
    )
    result = read_records(path, DataSettings())
    assert (len(result.records), result.bad, result.total) == (2, [], 2)
    record = result.records[1]
    assert record.question == GOOD["input"]
    assert record.blocks == ("Add them.", "That is 3.")
    assert record.answer == "3"
    assert record.source == f"{path}:3"
    assert record.reference == {"level": 1}


def test_explicit_answer_wins_and_the_written_one_leaves_the_reasoning(tmp_path: Path) -> None:
    rows = [{**GOOD, "answer": " three "}, {"input": "q", "output": "One. Two.", "answer": "x"}, {**GOOD, "answer": None}]
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(row).encode() for row in rows])
    records = read_records(path, DataSettings()).records
    assert [r.answer for r in records] == ["three", "x", "3"]
    assert [r.blocks for r in records] == [("Add them.", "That is 3."), ("One.", "Two."), ("Add them.", "That is 3.")]
    assert records[0].reference["answer"] == " three "


@pytest.mark.parametrize(
    ("output", "answer", "blocks"),
    [
        (
            "Outline.\n#### Step 1\nAdd 3 and 4.\n#### Step 2\nDouble: 14.\nDone, so 14.",
            "14",
            ("Outline.", "#### Step 1", "Add 3 and 4.", "#### Step 2", "Double: 14.", "Done, so 14."),
        ),
        (
            "The answer is what we seek. Add 3 and 4: 7. Double it: 14.",
            "14",
            ("The answer is what we seek.", "Add 3 and 4: 7.", "Double it: 14."),
        ),
        ("#### Sum\nAdd 3 and 4: 7.\n#### 7", "7", ("#### Sum", "Add 3 and 4: 7.")),
        ("Double it. The answer is: 14.", "fourteen", ("Double it.",)),
        ("Write it.\n####\ndef f():\n    return 1", "def f():\n    return 1\n", ("Write it.",)),
        ("Write it.\n####", "x", ("Write it.",)),
    ],
)
def test_a_mark_within_the_reasoning_cuts_nothing_off_where_the_answer_is_given(
    tmp_path: Path, output: str, answer: str, blocks: tuple[str, ...]
) -> None:
    row = {"input": "q", "output": output, "answer": answer}
    (record,) = read_records(write_lines(tmp_path / "a.jsonl", [json.dumps(row).encode()]), DataSettings()).records
    assert (record.blocks, record.answer) == (blocks, answer.strip())


def test_a_chain_called_answer_is_a_chain(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "One. Two.\n#### 12", "prompt": "p"}
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(row).encode()])
    (record,) = read_records(path, DataSettings(input_field="question", output_field="answer")).records
    assert (record.blocks, record.answer, record.reference) == (("One.", "Two."), "12", {"prompt": "p"})


@pytest.mark.parametrize(("per_block", "blocks"), [(1, 3), (2, 2), (0, 1)])
def test_sentences_per_block(tmp_path: Path, per_block: int, blocks: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"input": "q", "output": "A.\nB.\nC.\n#### 3"}).encode()])
    (record,) = read_records(path, DataSettings(sentences_per_block=per_block)).records
    assert len(record.blocks) == blocks
    assert "\n".join(record.blocks) == "A.\nB.\nC."


BAD_LINES = {
    b'{"input": "q", "output": "r': "invalid JSON: .* at column 26",
    b"{'input': 'q'}": "invalid JSON.*a Python dict: write it with json.dumps",
    b"": None,
    b"[]": "a JSON array, not an object",
    b"null": "a JSON null, not an object",
    b"NaN": "a JSON number, not an object",
    b"{}": "no field 'input' .* its fields: none",
    b'{"input": "q"}': "no field 'output' .* its fields: 'input'",
    b'{"input": " ", "output": "a. #### 3"}': "field 'input' is empty",
    b'{"input": "q", "output": ""}': "field 'output' is empty",
    b'{"input": 5, "output": "a. #### 3"}': "field 'input' is of type number, not a string",
    b'{"input": "q", "output": ["a"]}': "no final answer in it",
    b'{"input": "q", "output": null}': "field 'output' is of type null, not a string; write the text, or leave the record out",
    b'{"input": "q", "output": "a.", "answer": true}': "field 'answer' is of type boolean.*the word",
    b'{"input": "q", "output": "a.", "answer": NaN}': "field 'answer' is nan, a missing value",
    b'{"input": "q", "output": "a. #### 3", "input": "r"}': "field 'input' stands in it twice",
    b'{"input": "q", "output": "a. #### 3", "more": [{"x": 1, "x": 2}]}': "field 'x' stands in it twice",
    b'{"input": "q", "output": "a. #### 3"},': "invalid JSON: Extra data .*remove the comma at its end",
    b'{"input": "q", "output": "a. #### 3",}': "invalid JSON: .*remove the comma before the closing bracket",
    b'{"input": "q", "output": "a. #### 3"} {"input": "q"}': "invalid JSON: .*a line of its own",
    b'{"input": "q", "output": ["a", 3]}': "field 'output' is of type array and holds number; write its steps as texts",
    b'{"input": "q", "output": []}': "field 'output' is of type array and holds nothing",
    b'{"input": ["q"], "output": "a. #### 3"}': "field 'input' is of type array, not a string; write one text",
    b'{"input": "q", "output": {"a": 1}}': "field 'output' is of type object",
    b'{"input": "q", "output": "a. The answer is 5. But wait, it is 6."}': "behind its answer it goes on: 'But wait, it is 6.'",
    b'{"input": "q", "output": "a. #### 5\\nQuestion: What now?"}': "behind its answer it goes on: 'Question: What now[?]'",
    b'{"input": "q", "output": "Six. #### 6\\nQuestion: Now?\\nSeven. #### 7"}': "two marked answers, '6' and '7'",
    b'{"input": "q", "output": "a. The answer is red. But the answer is blue."}': "two marked answers, 'red' and 'blue'",
    b'{"input": "q", "output": "a.", "answer": " "}': "field 'answer' is empty",
    b'{"input": "q", "output": "a."}': "no final answer in it; .* '####' or 'The answer is'",
    b'{"input": "q", "output": "a. ####"}': "its final answer is empty",
    b'{"input": "q", "output": "a. The answer is ."}': "its final answer is empty",
    b'{"input": "q", "output": "a. **The answer is:**"}': "its final answer is empty",
    b'{"input": "q", "output": "#### 3"}': "no reasoning, only an answer",
    b'{"input": "q", "output": "<<1+2=3>>\\n#### 3"}': "no reasoning beside calculator annotations.*data.strip_calculator=false",
    b'{"input": "\xff", "output": "a. #### 3"}': "not UTF-8 .byte 0xff at position 11",
    b'{"input": "\\ud800", "output": "a. #### 3"}': "field 'input' holds half a surrogate pair",
    b'{"input": "q", "output": ' + b"[" * 100_000: "unreadable JSON",
    b'{"input": ' + b"9" * 5_000 + b"}": "unreadable JSON",
}


def test_each_fault_is_reported_with_its_line_and_none_is_lost(tmp_path: Path) -> None:
    lines = [line for bad in BAD_LINES for line in (json.dumps(GOOD).encode(), bad)]
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_lines(tmp_path / name, lines)
        result = read_records(path, DataSettings())
        assert len(result.records) == len(BAD_LINES)
        faults = {bad.source: bad for bad in result.bad}
        assert len(faults) == len(result.bad) == result.total - len(result.records) == len(BAD_LINES) - 1
        for number, reason in enumerate(BAD_LINES.values(), start=1):
            if reason is not None:
                with pytest.raises(ValueError, match=reason):
                    raise ValueError(str(faults[f"{path}:{2 * number}"]))


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(b"\xef\xbb\xbf")), dict)
    except ValueError:
        return False


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")),
            st.dictionaries(
                st.sampled_from(["input", "output", "answer", "x"]), st.one_of(st.text(), st.integers(), st.none())
            ).map(lambda row: json.dumps(row).encode()),
            st.just(json.dumps(GOOD).encode()),
        ),
        min_size=1,
        max_size=12,
    ),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
)
def test_hostile_bytes(tmp_path: Path, lines: list[bytes], suffix: str) -> None:
    path = write_lines(tmp_path / f"h{suffix}", lines)
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    # A byte order mark before nothing leaves an empty first line.
    filled = [n for n in filled if not (n == 1 and not lines[0].removeprefix(b"\xef\xbb\xbf").strip())]
    if not filled:
        with pytest.raises(ValueError, match="no records in it"):
            read_records(path, DataSettings())
        return
    try:
        result = read_records(path, DataSettings())
    except UnusableError as error:  # as a whole, and only where the first line is no object
        assert str(error).startswith(path) and not is_object(lines[filled[0] - 1])
        return
    sources = [r.source for r in result.records] + [b.source for b in result.bad]
    assert sorted(sources) == sorted(f"{path}:{n}" for n in filled)
    assert result.total == len(filled)
    good = {n for n, line in enumerate(lines, start=1) if line == json.dumps(GOOD).encode()}
    assert {f"{path}:{n}" for n in good} <= {r.source for r in result.records}


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [GOOD, {**GOOD, "output": None}, {**GOOD, "input": "other"}] * 600
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    result = read_records(str(tmp_path / "a.parquet"), DataSettings())
    assert (len(result.records), len(result.bad), result.total) == (1200, 600, 1800)
    assert result.bad[1].source.endswith("a.parquet:row 5")
    assert result.records[-1].question == "other"
    assert result.records[0].reference == {"level": 1}


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    cases = {
        "missing.jsonl": "no such file",
        "empty.jsonl": "no records in it",
        "table.csv": "unknown kind of file",
        "torn.jsonl.gz": r"torn.jsonl.gz:\d+: the compressed data are damaged",
        "plain.jsonl.gz": "is not gzip data, although its name ends so; name it plain.jsonl",
        "text.parquet": "not a readable Parquet file",
    }
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    (tmp_path / "table.csv").write_text("input,output")
    many = b"\n".join(json.dumps({**GOOD, "n": n * 7919 % 1000}).encode() for n in range(500))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(many)[:-200])
    (tmp_path / "plain.jsonl.gz").write_bytes(json.dumps(GOOD).encode())
    (tmp_path / "text.parquet").write_bytes(b"no table")
    for name, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_records(str(tmp_path / name), DataSettings())


def packed(data: bytes) -> bytes:
    return gzip.compress(data)


LINE = json.dumps(GOOD).encode()
OTHER_KINDS = {
    "a.jsonl": (packed(LINE), "is gzip data; name it .jsonl.gz"),
    "b.jsonl.gz": (packed(packed(LINE)), "holds gzip data"),
    "c.jsonl": (b"PK\x03\x04....", "a zip archive; unpack it"),
    "d.jsonl": (b"PAR1....", "a Parquet table; name it .parquet"),
    "e.parquet": (LINE, "it is JSON; name it .jsonl"),
    "f.jsonl": (LINE.decode().encode("utf-16"), "text in UTF-16; convert it: iconv"),
    "g.jsonl.gz": (packed(LINE.decode().encode("utf-16-le")), "holds text in UTF-16"),
    "h.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zeros.jsonl": (bytes(100), "nothing but zero bytes"),
    "i.jsonl": (b"<!DOCTYPE html>\n<html>", "a web page"),
    "j.json": (b"[\n" + LINE + b",\n" + LINE + b",\n]", r"j.json:3: a JSON array ends in a comma"),
    "k.jsonl": (json.dumps([GOOD, GOOD], indent=1).encode()[:-20], r"k.jsonl:9: invalid JSON: Unterminated string"),
    "l.json": (b"[\n" + LINE + b"\n" + LINE + b"\n]", "l.json:3: in a JSON array a comma or ] is missing"),
    "m.json": (b"[1, 2]", "something else than an object"),
    "n.json": (b"[]", "no records in it"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_refused_once_and_named(tmp_path: Path, name: str) -> None:
    data, message = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnusableError, match=message) as raised:
        read_records(str(tmp_path / name), DataSettings())
    assert "\n" not in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("array.json", json.dumps([GOOD, GOOD]).encode()),
        ("array.jsonl", json.dumps([GOOD, GOOD], indent=2).encode()),
        ("array.json.gz", packed(b"\n" + json.dumps([GOOD, GOOD], indent=2).encode())),
        ("objects.json", b"\n".join([json.dumps(GOOD, indent=2).encode()] * 2)),
        ("mac.jsonl", LINE + b"\r" + LINE),
        ("windows.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE + b"\r\n"),
        ("joined.jsonl", b"\n" + LINE + b"\n\xef\xbb\xbf" + LINE),
        ("LINES.JSONL", LINE + b"\n" + LINE),
    ],
)
def test_records_over_several_lines_or_in_an_array_are_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    result = read_records(str(tmp_path / name), DataSettings())
    assert [record.answer for record in result.records] == ["3", "3"] and result.bad == []
    places = [int(record.source.rpartition(":")[2]) for record in result.records]
    assert places == [data_line(data, place) for place in (0, 1)]


def data_line(data: bytes, number: int) -> int:
    """The line on which the record with this number begins."""
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    found = [place for place in range(len(text)) if text[place : place + 1] == b"{"]
    return text.count(b"\n", 0, found[number]) + 1


def test_a_field_that_stands_twice_in_an_array_is_that_records_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + LINE + b',\n{"input": "a", "input": "b"}]')
    result = read_records(str(tmp_path / "a.json"), DataSettings())
    assert (len(result.records), [bad.reason for bad in result.bad]) == (1, ["field 'input' stands in it twice"])


def test_folders_and_files_without_permission_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with pytest.raises(UnusableError, match=r"is a folder; name a file in it, e.g. .*a.jsonl"):
        read_records(str(tmp_path), DataSettings())

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnusableError, match=r"a.jsonl: cannot be read .Permission denied."):
        read_records(str(tmp_path / "a.jsonl"), DataSettings())


ANNOTATED = "<<60*30/100=18>>\n<<60*10/100=6>>. <<18+6=24>>\nSo 60 - 24 = <<60-24=36>>36 are black.\n#### 36"


def read_one(tmp_path: Path, row: dict[str, Any], **fields: Any) -> Record:
    (record,) = read_records(write_lines(tmp_path / "a.jsonl", [json.dumps(row).encode()]), DataSettings(**fields)).records
    return record


def test_steps_that_are_nothing_but_annotations_do_not_vanish(tmp_path: Path) -> None:
    record = read_one(tmp_path, {"input": "q", "output": ANNOTATED})
    assert record.blocks == ("60*30/100=18", "60*10/100=6.", "18+6=24", "So 60 - 24 = 36 are black.")
    kept = read_one(tmp_path, {"input": "q", "output": ANNOTATED}, strip_calculator=False)
    assert len(kept.blocks) == 4 and kept.blocks[0] == "<<60*30/100=18>>"


@pytest.mark.parametrize(
    ("output", "blocks", "answer"),
    [
        ("Ann has 4.\nThat is 20.\n#### 20\nThe answer is: 20", ("Ann has 4.", "That is 20."), "20"),
        ("That is 1,200. So the answer is $1,200$.\n#### 1200", ("That is 1,200.",), "1200"),
        ("That is 20. Therefore, THE ANSWER IS 20.", ("That is 20.",), "20."),
        ("Add them, and so the answer is 20", ("Add them, and so",), "20"),
        ("The answer isn't clear. the answer is: 7", ("The answer isn't clear.",), "7"),
        ("##### Sum\nAdd.\n#### 7", ("##### Sum", "Add."), "7"),
        ("#### Step 1\nAdd.\n#### Step 2\nDouble.\n#### 14", ("#### Step 1", "Add.", "#### Step 2", "Double."), "14"),
        ("The answer is what we seek. It is 14. The answer is 14", ("The answer is what we seek.", "It is 14."), "14"),
        ("We choose. The answer is B. Paris", ("We choose.",), "B. Paris"),
        ("Write it.\n####\ndef f():\n    return 1", ("Write it.",), "def f():\n    return 1"),
        (["Ann has 4.", "That is 20.", "#### 20"], ("Ann has 4.", "That is 20."), "20"),
    ],
)
def test_the_marked_answer_is_found_whatever_stands_around_it(
    tmp_path: Path, output: Any, blocks: tuple[str, ...], answer: str
) -> None:
    record = read_one(tmp_path, {"input": "q", "output": output})
    assert (record.blocks, record.answer) == (blocks, answer)


@pytest.mark.parametrize(
    ("number", "text"), [(42, "42"), (42.0, "42"), (0.5, "0.5"), (-3, "-3"), (1e-7, "0.0000001"), (1e20, "1" + "0" * 20)]
)
def test_a_number_is_an_answer(tmp_path: Path, number: float, text: str) -> None:
    record = read_one(tmp_path, {"input": "q", "output": "One. Two.", "answer": number})
    assert record.answer == text and record.reference["answer"] == number


def test_a_fault_that_all_records_share_is_said_once(tmp_path: Path) -> None:
    row = json.dumps({"question": "q", "steps": ["a", "b"], "answer": "3", "id": 12})
    result = read_records(write_lines(tmp_path / "a.jsonl", [row.encode()] * 10_000), DataSettings())
    (line,) = list_bad_records(result.bad, result.total).splitlines()
    assert "a.jsonl:1: no field 'input'" in line and "(all 10000 records alike)" in line
    assert "data.input_field=question data.output_field=steps data.answer_field=answer" in line
    mixed = read_records(write_lines(tmp_path / "a.jsonl", [row.encode()] * 30 + [b"{}", LINE]), DataSettings())
    lines = list_bad_records(mixed.bad, mixed.total).splitlines()
    assert len(lines) == 5 and "27 more like these" in lines[3] and "a.jsonl:31" in lines[4]


def test_a_file_without_sentences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="no records in it"):
        read_sentences(write_lines(tmp_path / "empty.jsonl", [b""]))


def test_limits_are_checked_in_tokens_and_all_faults_come_together(tmp_path: Path) -> None:
    def row(question: int, blocks: list[int], answer: int) -> bytes:
        output = "\n".join(" ".join("w" * n) for n in blocks) + "\n#### " + " ".join("w" * answer)
        return json.dumps({"input": " ".join("w" * question), "output": output}).encode()

    limits = DataSettings(max_question_tokens=4, max_block_tokens=3, max_blocks=2, max_answer_tokens=2)
    lines = [
        row(4, [3, 3], 2),
        row(5, [3, 3], 2),
        row(4, [3, 4], 2),
        row(4, [1, 1, 1], 2),
        row(4, [3, 3], 3),
        b"{}",
        row(1, [1], 1),
    ]
    record_set = read_records(write_lines(tmp_path / "a.jsonl", lines), limits)
    tokenizer = build_word_tokenizer(["w"])
    with pytest.raises(BadRecords) as raised:
        encode_records(record_set, tokenizer, limits)
    message = str(raised.value)
    for expected in (
        "5 of 7 records cannot be used",
        "a.jsonl:2: its question has 5 tokens, more than data.max_question_tokens=4",
        "a.jsonl:3: its block 2 has 4 tokens, more than data.max_block_tokens=3",
        "a.jsonl:4: it has 3 blocks, more than data.max_blocks=2",
        "a.jsonl:5: its answer has 3 tokens, more than data.max_answer_tokens=2",
        "a.jsonl:6: no field 'input'",
        "data.on_bad_record=skip",
    ):
        assert expected in message


def test_skipping_counts_and_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skip = DataSettings(on_bad_record="skip", max_question_tokens=4)
    lines = [json.dumps({**GOOD, "input": "w"}).encode(), b"{}", json.dumps({**GOOD, "input": "w w w w w"}).encode()] * 15
    record_set = read_records(write_lines(tmp_path / "a.jsonl", lines), skip)
    with caplog.at_level(logging.WARNING):
        usable, bad = encode_records(record_set, build_word_tokenizer(["w"]), skip)
    assert (len(usable), len(bad)) == (15, 30)
    assert usable[3].record.source.endswith(":10")
    (message,) = [r.getMessage() for r in caplog.records]
    assert "30 of 45 records are left out" in message and "and 10 more" in message and message.count("a.jsonl:") == 20


def test_nothing_usable_is_refused_even_when_skipping(tmp_path: Path) -> None:
    skip = DataSettings(on_bad_record="skip")
    record_set = read_records(write_lines(tmp_path / "a.jsonl", [b"{}"]), skip)
    with pytest.raises(BadRecords, match="1 of 1 records"):
        encode_records(record_set, build_word_tokenizer(["w"]), skip)


@pytest.mark.skipif(
    not GSM8K.is_file(), reason=f"NOT TESTED on real data: {GSM8K} is not there; name GSM8K's train file in LADIR_GSM8K"
)
def test_gsm8k_loses_no_record() -> None:
    fields = DataSettings(input_field="question", output_field="answer")
    result = read_records(str(GSM8K), fields)
    lines = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert result.bad == [] and result.total == len(result.records) == len(lines) == 7473
    for record, line in zip(result.records, lines, strict=True):
        reasoning, answer = line["answer"].split("####")
        assert (record.question, record.answer) == (line["question"], answer.strip())
        assert not any("<<" in block or "####" in block for block in record.blocks)
        whole = "".join("".join(record.blocks).split())
        assert len(whole) <= len("".join(reasoning.split()))
        if "<<" not in reasoning:
            assert whole == "".join(reasoning.split())
    words = {word for r in result.records for text in (r.question, *r.blocks, r.answer) for word in text.split()}
    usable, bad = encode_records(result, build_word_tokenizer([*words, "\n"]), fields)
    assert (len(usable), bad) == (7473, [])
    assert max(len(r.blocks) for r in usable) <= fields.max_blocks
