"""Questions of an evaluation: every line with a question and something to judge by is asked, whatever its reasoning is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import DataSettings
from ladir.data import tokenizing
from ladir.data.columns import digest_of_ids
from ladir.data.question_store import Questions, QuestionStore, answered_of, contents_of, write_questions
from ladir.data.records import BadRecords, Record, read_records
from ladir.data.rows import data_files
from ladir.data.token_store import Store
from ladir.errors import UnusableError
from ladir.tasks import get_task
from ladir.tokens import build_word_tokenizer, encode_text

TOKENIZER = build_word_tokenizer(["q", "\n"])
TESTS = "def check(candidate):\n    assert candidate(1) == 2\n"


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def stored(
    folder: Path,
    named: str | Sequence[str],
    settings: DataSettings,
    check: Callable[[Record], None] = lambda record: None,
    processes: int = 1,
) -> Questions:
    files = data_files(named)
    write_questions(folder, files, settings, TOKENIZER, processes, check=check)
    store = QuestionStore(Store(folder, files))
    store.refuse(settings)
    return Questions.of(store)


def read(path: Path, *rows: Any, task: str = "maths", most: int | None = None, **settings: Any) -> Questions:
    named = write(path, *rows)
    return stored(path.with_suffix(".store"), named, DataSettings(**settings), get_task(task).check).first(most)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"input": "q", "output": "One. #### 7"}, "7"),
        ({"input": "q", "output": "#### 7"}, "7"),
        ({"input": "q", "output": "word " * 2000 + "#### 7"}, "7"),
        ({"input": "q", "output": "One. Two.", "answer": "7"}, "7"),
        ({"input": "q", "answer": "7"}, "7"),
        ({"input": "q", "answer": 7}, "7"),
        ({"input": "q", "answer": 0.5, "output": None}, "0.5"),
        ({"input": "q", "output": "So it is $\\boxed{7}$."}, "7"),
        ({"input": "q", "output": "No mark. None at all.", "final_answer": ["7"]}, "7"),
        ({"question": "q", "answer": "One. Two.\n#### 7"}, "7"),
        ({"question": "q", "answer": "#### 7"}, "7"),
        ({"question": "q", "answer": "7"}, "7"),
        ({"question": "b'q\\n'", "answer": "b'-2*(x - 1)**2\\n'"}, "-2*(x - 1)**2"),  # DeepMind's mathematics on the Hub
        ({"question": "q", "answer": "x = 3.5 or x = 7"}, "x = 3.5 or x = 7"),
        ({"question": "q", "answer": "One. Two. It is $\\boxed{7}$."}, "7"),
        ({"question": "q", "solution": ["One.", "Two."], "final_answer": ["$7$", "8"], "answer_type": "Numerical"}, "$7$, 8"),
        ({"Question": "q", "Answer": "True", "Answer_type": "bool"}, "True"),
        ({"Question": "q", "Answer": [1, 2], "Picture": None}, "1, 2"),
        # College-Math: what it calls an answer is none but the answer, however many sentences it has.
        (
            {"data_source": "college_math.A", "question_number": "1", "question": "q", "answer": "It rises. It has no limit."},
            "It rises. It has no limit.",
        ),
        ({"problem": "q", "solution": "One. It is $\\boxed{7}$.", "level": "Level 5"}, "7"),
        ({"problem": "q", "solution": "", "answer": "7"}, "7"),
        ({"problem": "q", "answer": "7", "subject": "Algebra"}, "7"),
        ({"problem": "q", "solution": None, "answer": 7}, "7"),
    ],
)
def test_a_question_with_an_answer_is_asked_in_every_form(row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", row)
    assert (record.question, record.answer, record.blocks, record.source) == ("q", answer, (), f"{tmp_path}/a.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "b'q'", "answer": "7"},
        {"question": "b'q'", "answer": "b'7' + b'1'"},
        {"question": "b'q'", "answer": r"b'\xff'"},
    ],
)
def test_what_is_not_all_bytes_written_out_stays_as_it_is(row: dict[str, Any], tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", row)
    assert (record.question, record.answer) == ("b'q'", row["answer"])


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "tests": "assert True"},
        {"input": "q", "tests": "assert True", "output": "A chain without a program."},
        {"prompt": "q", "test": TESTS, "entry_point": "f"},
        {"prompt": "q", "test": TESTS, "entry_point": "f", "canonical_solution": "    return 1\n" * 1000},
        {"text": "q", "test_list": ["assert True"]},
        {"prompt": "q", "test_list": ["assert True"], "code": "", "test_imports": []},
    ],
)
def test_a_program_is_asked_for_where_there_are_tests(row: dict[str, Any], tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", row, task="code")
    assert record.question.startswith("q") and (record.answer != "") == (row.get("canonical_solution") is not None)
    assert "assert" in record.reference["tests"]


def test_other_trainings_names_leave_a_set_readable(tmp_path: Path) -> None:
    """The settings of a training set whose names the test set does not have, and one that calls its chain an answer."""
    names = {
        "input_field": "query",
        "output_field": "response",
        "answer_field": "final_answer",
        "answer_prefixes": ["The answer is"],
    }
    rows = ({"question": "q", "answer": "7"}, {"query": "q", "answer": "7"}, {"query": "q", "response": "The answer is: 7"})
    assert [record.answer for record in read(tmp_path / "a.jsonl", *rows, **names)] == ["7", "7", "7"]
    chain = read(tmp_path / "b.jsonl", {"question": "q", "answer": "7"}, input_field="question", output_field="answer")
    assert [record.answer for record in chain] == ["7"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "invalid JSON"),
        ("[]", "a JSON array, not an object"),
        ({"output": "One. #### 7"}, "no field 'input'"),
        ({"input": " ", "answer": "7"}, "field 'input' is empty"),
        ({"input": "q", "output": "No mark. None at all."}, "it has no final answer to compare with; give it"),
        ({"question": "q", "answer": "Two sentences. None of them boxed."}, "it has no final answer to compare with; give it"),
        ({"question": "q"}, 'it has no final answer to compare with; give it a field "answer", name the one that has it'),
        ({"problem": 3, "answer": "7"}, "field 'question' is of type number"),
        ({"input": "q " * 9, "answer": "7"}, "its question has 9 tokens, more than data.max_question_tokens=8; shorten it"),
        ({"text": "q", "test_list": 3}, "field 'test_list' is neither"),
    ],
)
def test_what_cannot_be_asked_is_refused_or_left_out_and_counted(
    row: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, limit = ({"input": "q", "answer": "1"}, row, {"input": "q", "answer": "2"}), {"max_question_tokens": 8}
    with pytest.raises(BadRecords, match=rf"1 of 3 records cannot be used:\n  .*a\.jsonl:2: {reason}"):
        read(tmp_path / "a.jsonl", *rows, **limit)
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path / "a.jsonl", *rows, on_bad_record="skip", **limit)
    assert [record.answer for record in found] == ["1", "2"]
    assert len(found.passed_over) == 1 and f"a.jsonl:2: {reason}" in caplog.text
    first = read(tmp_path / "a.jsonl", *rows, most=1, on_bad_record="skip", **limit)
    assert ([record.answer for record in first], first.passed_over) == (["1"], [])


def test_a_file_of_another_task_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"^\S*a\.jsonl:1: not a record of the task code[^\n]*$"):
        read(tmp_path / "a.jsonl", {"input": "q", "answer": "7"}, {"input": "q", "answer": "8"}, task="code")
    with pytest.raises(UnusableError, match="no records in it"):
        read(tmp_path / "b.jsonl")


WORDS = st.text("ab1 .#\n", max_size=12)
FIELDS = st.sampled_from(["input", "output", "answer", "question", "problem", "solution", "final_answer", "prompt", "test_list"])


@given(st.lists(st.dictionaries(FIELDS, st.one_of(WORDS, st.none(), st.integers(), st.lists(WORDS, max_size=2))), max_size=4))
def test_no_line_is_lost_and_what_is_trained_on_is_asked_with_the_same_answer(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path, settings = write(tmp_path_factory.getbasetemp() / "any.jsonl", {"input": "q", "answer": "1"}, *rows), DataSettings()
    settings.on_bad_record = "skip"
    found = stored(Path(path).with_suffix(".store"), path, settings)
    assert len(found) + len(found.passed_over) == len(found.store) == 1 + len(rows)
    asked = {record.source: record for record in found}

    def bare(record: Record) -> tuple[Any, ...]:
        return record.question, record.answer, record.reference

    for record in read_records(path, settings).records:
        if record.question.split():
            assert bare(asked[record.source]) == bare(record)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "output": "Six. #### 6\n\nQuestion: r\nSeven. #### 7"},
        {"question": "q", "answer": "Six. #### 6\n\nQuestion: r\nSeven. #### 7"},
        {"input": "q", "output": "Five. The answer is 5. But wait, it is 6."},
    ],
)
def test_a_question_with_two_answers_is_not_judged_by_the_last(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadRecords, match=r"two marked answers, '6' and '7'|it goes on: 'But wait, it is 6.'"):
        read(tmp_path / "a.jsonl", row)


def test_an_instruction_without_a_marked_answer_is_asked_whole(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "3, 4", "output": "7.", "final_answer": 7})
    assert (record.question, record.answer) == ("Add.\n3, 4", "7")


def test_questions_of_several_files_are_asked_as_data_train_names_them(tmp_path: Path) -> None:
    """Stage 3 and the verifier ask those of data.train, which may be a list or a pattern."""
    files = [tmp_path / f"part-{number}.jsonl" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text(json.dumps({"input": f"a {number}", "output": "b. #### c"}) + "\n")
    for named in ([str(file) for file in files], str(tmp_path / "part-*.jsonl")):
        assert [record.question for record in stored(tmp_path / "store", named, DataSettings())] == ["a 0", "a 1"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        stored(tmp_path / "store", str(tmp_path / "other-*.jsonl"), DataSettings())


def test_a_store_of_questions_is_the_same_by_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_ROWS", 3)
    rows = [
        {"input": f"q {i % 4}", "answer": str(i), "more": [i, None, {"x": 0.5}]} if i % 5 else {"input": 7} for i in range(20)
    ]
    file, settings = write(tmp_path / "a.jsonl", *rows), DataSettings(on_bad_record="skip", max_question_tokens=3)
    stores = [stored(tmp_path / f"by-{n}", file, settings, get_task("maths").check, n) for n in (1, 2)]
    for name in ("tokens.arrow", "index.json", "bad.jsonl"):
        assert (tmp_path / "by-1" / name).read_bytes() == (tmp_path / "by-2" / name).read_bytes()
    found = stores[0]
    assert [record.reference["more"] for record in found] == [[i, None, {"x": 0.5}] for i in range(20) if i % 5]
    assert [bad.source for bad in found.passed_over] == [f"{file}:{i + 1}" for i in range(0, 20, 5)]
    assert [bad.source for bad in found.first(5).passed_over] == [f"{file}:1", f"{file}:6"]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9))
def test_of_a_question_that_stands_there_again_the_last_line_is_asked(
    tmp_path_factory: pytest.TempPathFactory, questions: list[str]
) -> None:
    rows = [{"input": question, "answer": str(place)} for place, question in enumerate(questions)]
    file = write(tmp_path_factory.getbasetemp() / "again.jsonl", *rows)
    found = stored(Path(file).with_suffix(".store"), file, DataSettings())
    assert list(found.distinct()) == list({record.question: record for record in found}.values())
    assert [record.answer for record in found.distinct().chosen([0])] == [
        str(len(questions) - 1 - questions[::-1].index(questions[0]))
    ]


def test_what_is_no_json_is_judged_as_it_is_kept(tmp_path: Path) -> None:
    """A Parquet file has dates and decimals; the task looks at what a store gives back."""
    table = pa.table({"input": ["q"], "answer": ["7"], "day": [date(2026, 1, 2)], "size": [Decimal("1.50")], "raw": [b"\xff"]})
    pq.write_table(table, tmp_path / "a.parquet")
    looked_at: list[Record] = []
    (record,) = stored(tmp_path / "store", str(tmp_path / "a.parquet"), DataSettings(), looked_at.append)
    assert looked_at == [record] and record.reference["day"] == "2026-01-02" and record.reference["size"] == "1.50"


def test_what_is_known_of_all_questions_without_reading_is_what_reading_gives(tmp_path: Path) -> None:
    rows = [
        {"input": f"q {i % 3}", "more": {"b": i % 2, "a": [i % 4]}, **({"answer": str(i % 2)} if i % 5 else {})}
        for i in range(12)
    ]
    rows[4:4] = [{"input": 7}]
    again = {"more": {"a": [1], "b": 1}, "answer": "1", "input": "q 1"}
    found = stored(tmp_path / "store", write(tmp_path / "a.jsonl", *rows, again), DataSettings(on_bad_record="skip"))
    assert contents_of(found).tolist() == contents_of(list(found)).tolist()
    assert answered_of(found).tolist() == answered_of(list(found)).tolist() == [i for i in range(13) if i in (12,) or i % 5]
    assert contents_of(found)[12] == contents_of(found)[1] and len(set(contents_of(found).tolist())) == 12
    some = found.chosen([3, 0, 7])
    assert contents_of(some).tolist() == contents_of(found)[[3, 0, 7]].tolist() and answered_of(some).tolist() == [0, 2]


def test_a_question_is_known_again_by_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the records that were trained on know theirs; of a line that is not asked nothing is taken for a question's."""
    monkeypatch.setattr(tokenizing, "_ROWS", 3)
    texts = ["q", "q q", "q \n q", "q", "q q q"]
    rows: list[Any] = [{"input": text, "answer": "7"} for text in texts]
    rows.insert(2, "no JSON")
    questions = read(tmp_path / "test.jsonl", *rows, on_bad_record="skip")
    wanted = [digest_of_ids(np.array(encode_text(TOKENIZER, text), np.int32)) for text in texts]
    assert questions.ids.tolist() == wanted and len(set(wanted)) == 4
    assert questions.store.ids()[2] == b""
    assert questions.chosen([4, 0]).ids.tolist() == [wanted[4], wanted[0]]
