"""Reading and encoding records: every line of a file is a record or a reported fault, whatever its bytes."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ladir.config import DataSettings
from ladir.data.encode import encode_records, encode_sentence_set
from ladir.data.records import BadRecords, read_records, read_sentences
from ladir.tokens import build_word_tokenizer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
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
    b"{'input': 'q'}": "invalid JSON",
    b"": None,
    b"[]": "a JSON array, not an object",
    b"null": "a JSON null, not an object",
    b"NaN": "a JSON number, not an object",
    b"{}": "no field 'input' .* its fields: none",
    b'{"input": "q"}': "no field 'output' .* its fields: 'input'",
    b'{"input": " ", "output": "a. #### 3"}': "field 'input' is empty",
    b'{"input": "q", "output": ""}': "field 'output' is empty",
    b'{"input": 5, "output": "a. #### 3"}': "field 'input' is of type number, not a string",
    b'{"input": "q", "output": ["a"]}': "field 'output' is of type array",
    b'{"input": "q", "output": null}': "field 'output' is of type null",
    b'{"input": "q", "output": "a.", "answer": 3}': "field 'answer' is of type number",
    b'{"input": "q", "output": "a.", "answer": " "}': "field 'answer' is empty",
    b'{"input": "q", "output": "a."}': "no final answer in it; .* '####' or 'The answer is'",
    b'{"input": "q", "output": "a. ####"}': "its final answer is empty",
    b'{"input": "q", "output": "#### 3"}': "no reasoning, only an answer",
    b'{"input": "q", "output": "<<1+2=3>>\\n#### 3"}': "no reasoning, only an answer",
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
    result = read_records(path, DataSettings())
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
        "plain.jsonl.gz": "the compressed data are damaged",
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


def test_sentences_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "s.jsonl", [b'{"text": "a b"}', b'{"text": "c"}'])
    tokenizer, limits = build_word_tokenizer(["a", "b", "c"]), DataSettings(max_block_tokens=2)
    assert list(encode_sentence_set(read_sentences(path), tokenizer, limits)) == [[3, 4], [5]]
    path = write_lines(tmp_path / "s.jsonl", [b'{"text": "a b"}', b'{"txt": "c"}', b"1", b'{"text": "a b c"}'])
    message = (
        r"3 of 4 records(.|\n)*s.jsonl:2: no field 'text'(.|\n)*s.jsonl:3: a JSON number(.|\n)*s.jsonl:4: it has 3 tokens, "
        r"of 1 to data.max_block_tokens=2"
    )
    with pytest.raises(BadRecords, match=message) as raised:
        encode_sentence_set(read_sentences(path), tokenizer, limits)
    assert len(raised.value.records) == 3
    skip = DataSettings(max_block_tokens=2, on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        assert list(encode_sentence_set(read_sentences(path), tokenizer, skip)) == [[3, 4]]
    assert "3 of 4 records are left out" in caplog.text


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


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K's train file is not at {GSM8K}: the reader was NOT tried on real data")
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
