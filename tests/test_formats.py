"""Public data sets in their own formats: recognised, read without loss, and their gold answers pass their own checkers."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import DataSettings, EvaluateSettings
from ladir.data.blocks import last_boxed, strip_calculator
from ladir.data.questions import question_of
from ladir.data.records import Record, RecordSet, read_records
from ladir.data.rows import file_rows
from ladir.errors import UnusableError
from ladir.tasks import get_task, sandbox
from ladir.tasks.code import CodeTask
from ladir.tasks.isolated.plus_tests import plus_near
from ladir.tasks.maths import MathsTask
from ladir.tasks.verdict import Verdict

DATA = Path(__file__).parents[2] / "shared" / "data"
GSM8K = Path(os.environ.get("LADIR_GSM8K", DATA / "gsm8k_train.jsonl"))
HUMAN_EVAL = Path(os.environ.get("LADIR_HUMANEVAL", DATA / "HumanEval.jsonl.gz"))
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_file(), reason=f"NOT TESTED on real data: {GSM8K} is not there; name GSM8K's train file in LADIR_GSM8K"
)
needs_human_eval = pytest.mark.skipif(
    not HUMAN_EVAL.is_file(), reason=f"NOT TESTED on real data: {HUMAN_EVAL} is not there; name the file in LADIR_HUMANEVAL"
)
PATIENT = EvaluateSettings(check_seconds=60.0)

MATH = {
    "problem": "What is $\\frac{1}{2} + \\frac{1}{6}$?",
    "level": "Level 2",
    "solution": "We write $\\frac{3}{6} + \\frac{1}{6}$. The answer is simple: it is $\\boxed{\\frac{2}{3}}$.",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements of two lists.",
    "code": "import re\r\ndef shared(a, b):\r\n  found = set(a) & set(b)\r\n  return tuple(found)",
    "test_setup_code": "import math",
    "test_list": ["assert set(shared((3, 4), (4, 5))) == {4}", "assert math.floor(1.5) == 1"],
    "challenge_test_list": [],
}
SANITIZED = {
    **{name: MBPP[name] for name in ("task_id", "code", "test_list")},
    "prompt": MBPP["text"],
    "test_imports": ["import math"],
}
COMPLETION = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ Sum. #### The answer is no mark here. """\n',
    "entry_point": "add",
    "canonical_solution": "    c = a  # see 1.5\n    c += b\n    return c\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
}
# The form of the sets that EvalPlus publishes; the rows are our own.
PLUS = """

import numpy as np


def is_floats(x) -> bool:
    return isinstance(x, float) or isinstance(x, (list, tuple)) and all(isinstance(i, float) for i in x)


def assertion(out, exp, atol):
    if out != exp:
        assert atol != 0 or is_floats(exp)
        np.testing.assert_allclose(out, exp, atol=atol or 1e-6)


"""
COMPLETION_PLUS = {
    **COMPLETION,
    "test": PLUS
    + "def check(candidate):\n    inputs = [[1, 2], [0.1, 0.2]]\n    results = [3, 0.3]\n"
    + "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
}
COMPLETION_PLUS_BY_REFERENCE = {
    **COMPLETION,
    "test": PLUS
    + "def ref_func(a, b):\n    return a + b\n\n\ndef check(candidate):\n    inputs = [[1, 2], [0.1, 0.2]]\n"
    + "    for i, inp in enumerate(inputs):\n        assertion(candidate(*inp), ref_func(*inp), 0)\n",
}
# EvalPlus' own release.
RELEASED = {
    "task_id": "HumanEval/900",
    "prompt": COMPLETION["prompt"],
    "entry_point": "add",
    "canonical_solution": '\n    text = "\\n\\"\\\\"\n    return a + b if text else 0\n\n',
    "contract": "\n    assert True\n",
    "base_input": [[1, 2]],
    "plus_input": [[0.1, 0.2], [1e300, 1e300], [[1.5, 2.5], [3.5]]],
    "atol": 0,
}
DOUBLE = {
    **RELEASED,
    "prompt": "import math\n\n\ndef double(items: list) -> list:\n",
    "entry_point": "double",
    "canonical_solution": "    for i, item in enumerate(items):\n        items[i] = math.prod((item, 2))\n    return items",
    "base_input": [[[1, 2]], [["a", "\u2028\n"]]],
    "plus_input": [[[math.inf, -math.inf]], [list(range(30_000))]],
}
FIND_ZERO = {
    **RELEASED,
    "prompt": "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef find_zero(xs):\n",
    "entry_point": "find_zero",
    "canonical_solution": "    return next(x for x in range(-9, 9) if poly(xs, x) == 0)\n",
    "base_input": [[[-1, 0, 1]]],
    "plus_input": [[[-4, 0, 1]]],
    "atol": 1e-4,
}
RELEASED_FIELDS = ("prompt", "canonical_solution", "entry_point", "base_input", "plus_input", "atol")
MBPP_RELEASED = {**RELEASED, "task_id": "Mbpp/1", "prompt": '"""\nAdd.\nassert add(1, 2) == 3\n"""\n'}
MBPP_PLUS = {
    **SANITIZED,
    "source_file": "a notebook.ipynb",
    "test": PLUS.lstrip()
    + "inputs = [[(3, 4), (4, 5)], [(1,), (1,)]]\nresults = [(4,), (1,)]\n"
    + "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(shared(*inp), exp, 0)\n",
}


def write(path: Path, *rows: dict[str, Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def read(path: Path, *rows: dict[str, Any], **settings: Any) -> RecordSet:
    return read_records(write(path, *rows), DataSettings(**settings))


def test_math_takes_the_boxed_answer_and_keeps_the_whole_solution(tmp_path: Path) -> None:
    given_answer = {**MATH, "answer": "2/3"}
    boxed, explicit = read(tmp_path / "math.jsonl", MATH, given_answer).records
    assert (boxed.question, boxed.answer, explicit.answer) == (MATH["problem"], "\\frac{2}{3}", "2/3")
    assert boxed.blocks == explicit.blocks and " ".join(boxed.blocks) == MATH["solution"]
    assert boxed.reference["level"] == "Level 2"
    assert get_task("maths", PATIENT).verdict(explicit.answer, boxed).right


@pytest.mark.parametrize("row", [MBPP, SANITIZED])
def test_mbpp_shows_its_tests_and_is_judged_by_them(tmp_path: Path, row: dict[str, Any]) -> None:
    (record,) = read(tmp_path / "mbpp.jsonl", row).records
    assert record.question.startswith(row.get("text", row.get("prompt")))
    assert all(test in record.question for test in row["test_list"])
    assert record.answer == row["code"] and record.blocks[1] == "def shared(a, b):" and len(record.blocks) == 4
    task = get_task("code", PATIENT)
    assert task.verdict(record.answer, record).right
    assert not task.verdict(record.answer.replace("&", "|"), record).right


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_human_eval_is_judged_by_its_check_function(tmp_path: Path, name: str) -> None:
    (record,) = read(tmp_path / name, COMPLETION).records
    assert record.question == COMPLETION["prompt"]
    assert record.blocks == ("c = a  # see 1.5", "c += b", "return c")
    task = get_task("code", PATIENT)
    for answer in (record.answer, COMPLETION["canonical_solution"], COMPLETION["canonical_solution"].strip()):
        assert task.verdict(answer, record).right
    assert not task.verdict("    return a - b", record).right


@pytest.mark.parametrize("row", [COMPLETION_PLUS, COMPLETION_PLUS_BY_REFERENCE])
def test_human_eval_plus_is_judged_with_numpy(tmp_path: Path, row: dict[str, Any]) -> None:
    (record,) = read(tmp_path / "plus.jsonl", row).records
    task = get_task("code", PATIENT)
    for answer in (
        record.answer,
        COMPLETION["canonical_solution"],
        "import numpy\ndef add(a, b): return float(numpy.sum([a, b]))",
    ):
        assert task.verdict(answer, record) == Verdict(True)
    reason = task.verdict("    return a + b + 1e-3", record).reason
    assert reason.startswith("AssertionError") and "(tests, line" in reason


@pytest.mark.parametrize(
    ("row", "answer", "reason"),
    [
        (RELEASED, RELEASED["canonical_solution"], ""),
        (RELEASED, RELEASED["prompt"] + RELEASED["canonical_solution"], ""),
        (RELEASED, "def add(a, b):\n    return a + b if isinstance(a, list) else a + b + 1e-7 * isinstance(a, float)", ""),
        (RELEASED, "    return a + b + 1e-7", "AssertionError: input 1 of base_input"),  # nothing is near a whole number
        (RELEASED, "    return a + b + 1e-3 * isinstance(a, float)", "AssertionError: input 1 of plus_input"),
        (RELEASED, "    return [4.0] if isinstance(a, list) else a + b", "AssertionError: input 3 of plus_input"),
        (RELEASED, "    return tuple(a + b) if isinstance(a, list) else a + b", "AssertionError: input 3 of plus_input"),
        (RELEASED, "    return [x + 1e-8 for x in a + b] if isinstance(a, list) else a + b", ""),
        (RELEASED, "    return str(a + b) if a == 0.1 else a + b", "AssertionError: input 1 of plus_input"),
        (RELEASED, "    return a + b if a == 1 else a / 0", "ZeroDivisionError: "),
        (RELEASED, "    raise SystemExit", "SystemExit"),
        ({**RELEASED, "atol": 0.01}, "    return a + b + 1e-3 if isinstance(a, float) else a + b", ""),
        (DOUBLE, DOUBLE["canonical_solution"], ""),  # which changes its input
        (DOUBLE, "    found = [item * 2 for item in items]\n    items.clear()\n    return found", ""),
        (DOUBLE, "    items.clear()\n    return items", "AssertionError: input 1 of base_input"),
        (DOUBLE, "    return [item * 2 for item in items][:20_000]", "AssertionError: input 2 of plus_input"),
        (DOUBLE, "import math\nmath.prod = sum\ndef double(items): return items", "changed what its tests use: math.prod"),
        (FIND_ZERO, FIND_ZERO["canonical_solution"], ""),
        (FIND_ZERO, "    return max(x for x in range(-9, 9) if poly(xs, x) == 0) + 1e-6", ""),
        (FIND_ZERO, "    return 1.0", "AssertionError: input 1 of plus_input"),
        (FIND_ZERO, "    xs[:] = [0]\n    return 5.0", "AssertionError: input 1 of base_input"),
        (FIND_ZERO, "    return float('nan')", "AssertionError: input 1 of base_input"),
    ],
)
def test_human_eval_plus_as_evalplus_releases_it_is_judged_by_its_inputs(
    tmp_path: Path, row: dict[str, Any], answer: str, reason: str
) -> None:
    rows = [{**row, "test": COMPLETION["test"]}, {name: row[name] for name in row if name not in ("contract", "task_id")}]
    records = read(tmp_path / "HumanEvalPlus.jsonl", *rows).records
    assert records[0].reference["tests"] == records[1].reference["tests"]  # whatever else the row has
    assert records[0].question == row["prompt"] and records[0].answer == (row["prompt"] + row["canonical_solution"]).strip()
    verdict = get_task("code", PATIENT).verdict(answer, records[0])
    assert verdict.right == (not reason) and verdict.reason.startswith(reason), verdict


def test_a_released_row_has_a_time_limit_for_its_inputs_together(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "HumanEvalPlus.jsonl", RELEASED).records
    task = get_task("code", EvaluateSettings(check_seconds=1.0))
    assert task.verdict("    while True: pass", record).reason.startswith("timeout: ")


NUMBERS = st.one_of(st.floats(), st.sampled_from([1.0, 1.0 + 1e-7, 1.0 + 2e-6, 1e9, 1e9 + 100.0]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3), st.sampled_from([1e-6, 1e-4]))
def test_outputs_are_near_where_numpy_says_so(pairs: list[tuple[float, float]], tolerance: float) -> None:
    found, expected = [one for one, _ in pairs], [other for _, other in pairs]
    with np.errstate(all="ignore"):
        assert plus_near(found, expected, tolerance) == bool(np.allclose(found, expected, rtol=1e-7, atol=tolerance))
    assert not plus_near([*found, 1.0], expected, tolerance) and not plus_near("1", 1.0, tolerance)


def test_mbpp_plus_is_judged_by_its_own_tests_and_shows_the_others(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "plus.jsonl", MBPP_PLUS).records
    assert all(test in record.question for test in MBPP_PLUS["test_list"]) and "assertion" not in record.question
    task = get_task("code", PATIENT)
    assert task.verdict(record.answer, record) == Verdict(True)
    only_what_is_shown = "def shared(a, b): return (4,)"
    reason = task.verdict(only_what_is_shown, record).reason
    assert reason == "AssertionError: assert atol != 0 or is_floats(exp) (tests, line 10)"


def test_where_numpy_is_not_its_absence_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_packages", lambda: ())
    (record,) = read(tmp_path / "plus.jsonl", MBPP_PLUS).records
    reason = get_task("code", PATIENT).verdict(record.answer, record).reason
    assert reason == "ModuleNotFoundError: No module named 'numpy' (tests, line 1)"


def test_gsm8k_needs_no_settings_and_its_own_names_come_first(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "He has 2 * 3 = <<2*3=6>>6. Then 7.\n#### 7"}
    (record,) = read(tmp_path / "a.jsonl", row).records
    assert (record.blocks, record.answer) == (("He has 2 * 3 = 6.", "Then 7."), "7")
    fields = {
        "input_field": "query",
        "output_field": "answer",
        "answer_field": "final_answer",
        "answer_prefixes": ["The answer is"],
    }
    assert read(tmp_path / "a.jsonl", row, **fields).records == [record]  # a test set beside other training data
    (named,) = read(tmp_path / "a.jsonl", {**row, "input": "Q", "output": "One. #### 1", "answer": "2"}).records
    assert (named.question, named.answer) == ("Q", "2")


CHAIN = "Five and two. That is 7.\nThe answer is: 7"
TURNS = [("user", "human", "How many?"), ("assistant", "gpt", CHAIN)]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "How many?", "response": "Five and two. That is 7.\n#### 7\nThe answer is: 7", "type": "GSM_Rephrased"},
        {"prompt": "How many?", "completion": CHAIN},
        {"instruction": "How many?", "output": CHAIN},
        {"instruction": "How many?", "input": " ", "output": CHAIN},
        {"messages": [{"role": role, "content": text} for role, _, text in TURNS]},
        {"conversations": [{"from": role, "value": text} for _, role, text in TURNS]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_marked_chains_of_other_sets_are_read(tmp_path: Path, row: dict[str, Any]) -> None:
    (record,) = read(tmp_path / "a.jsonl", row).records
    assert (record.question, record.blocks, record.answer) == ("How many?", ("Five and two.", "That is 7."), "7")
    (record,) = read(tmp_path / "a.jsonl", {**row, "answer": 7}).records
    assert (record.blocks, record.answer) == (("Five and two.", "That is 7."), "7")


def test_an_instruction_is_part_of_the_question_unless_a_field_is_named(tmp_path: Path) -> None:
    row = {"instruction": "Add them.", "input": "5 and 2", "output": CHAIN}
    (record,) = read(tmp_path / "a.jsonl", row).records
    assert record.question == "Add them.\n5 and 2"
    (record,) = read(tmp_path / "a.jsonl", row, input_field="instruction").records
    assert record.question == "Add them."


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"question": "q", "cot": "<<3*5=15>>", "answer": "15"}, ("question", "cot", "answer")),
        ({"question": "q", "steps": ["<<3*5=15>>"], "answer": "15"}, ("question", "steps", "answer")),
        ({"question": "q", "rationale": "Add.", "answer": 15}, ("question", "rationale", "answer")),
        ({"Problem": "q", "Solution": "Add.", "Final_Answer": "15"}, ("Problem", "Solution", "Final_Answer")),
        ({"question": "q", "label": "Add. #### 3", "id": 1}, ("question", "label", "...")),
        ({"id": 1, "x": "q"}, ("...", "...", "...")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_fields_are_refused_with_the_settings_that_name_them(
    tmp_path: Path, row: dict[str, Any], fields: tuple[str, str, str]
) -> None:
    (bad,) = read(tmp_path / "a.jsonl", row).bad
    assert all(repr(name) in str(bad) for name in row)
    names = zip(("input_field", "output_field", "answer_field"), fields, strict=True)
    assert " ".join(f"data.{setting}={name}" for setting, name in names) in bad.remedy


def test_named_fields_hold_a_chain_of_annotations_or_a_list_of_steps(tmp_path: Path) -> None:
    codi = {"question": "q", "cot": "<<3*5=15>> <<15+1=16>>", "answer": "16"}
    names = {"input_field": "question", "output_field": "cot"}
    (bad,) = read(tmp_path / "a.jsonl", codi, **names).bad
    assert "data.strip_calculator=false" in bad.remedy
    (record,) = read(tmp_path / "a.jsonl", codi, strip_calculator=False, **names).records
    assert (record.blocks, record.answer) == (("<<3*5=15>> <<15+1=16>>",), "16")
    coconut = {"question": "q", "cot": ["<<3*5=15>>", "Add one: <<15+1=16>>16."], "answer": "16"}
    (record,) = read(tmp_path / "a.jsonl", coconut, **names).records
    assert record.blocks == ("3*5=15", "Add one: 16.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**MATH, "solution": "It is two thirds."}, "no final answer in it; .*boxed"),
        ({**MATH, "solution": "It is $\\boxed{\\frac{2}{3}$."}, "no final answer in it"),
        ({**MATH, "solution": None}, "no reasoning to learn from"),
        ({"question": "q", "answer": "7", "data_source": "college_math.a", "question_number": "1"}, "no reasoning to learn from"),
        ({"nums": [3, 4], "target": 12}, "no reasoning to learn from"),
        ({"input": "3,4,12", "output": "3*4=13"}, "no final answer in it"),
        ({"input": "3,4,13", "output": "3*4=13"}, "no final answer in it"),
        ({"input": "8,2,5", "output": "8/2=5"}, "no final answer in it"),
        ({**MATH, "solution": [["x"]], "answer": "1"}, "'reasoning' is of type array and holds array"),
        ({**MATH, "problem": 3}, "'question' is of type number"),
        ({**MATH, "solution": "$\\boxed{1}$", "answer": " "}, "'answer' is empty"),
        ({"question": "q", "answer": "It is 7."}, "no final answer in it; .*####"),
        ({"question": "q", "answer": "#### 7"}, "'reasoning' is empty"),
        ({"question": "q", "answer": 7}, "'reasoning' is of type number"),
        ({**MBPP, "text": None}, "'question' is of type null"),
        ({**MBPP, "test_list": 1}, "'test_list' is neither a program text"),
        ({**MBPP, "test_list": [None]}, "'test_list' is neither a program text"),
        ({**COMPLETION, "test": 3}, "'test' is neither a program text"),
        *(({**RELEASED, name: None}, f"release form, and lacks '{name}'; .*as the Hub has it") for name in RELEASED_FIELDS),
        ({"plus_input": [[1]], "prompt": "p"}, "lacks 'canonical_solution', 'entry_point', 'base_input', 'atol'"),
        ({**RELEASED, "canonical_solution": " "}, "'canonical_solution' is no text, or empty"),
        ({**RELEASED, "prompt": 3}, "'prompt' is no text"),
        ({**RELEASED, "entry_point": "add or 1"}, "'entry_point' is no function's name"),
        ({**RELEASED, "atol": True}, "'atol' is no tolerance"),
        ({**RELEASED, "atol": math.nan}, "'atol' is no tolerance"),
        ({**RELEASED, "plus_input": [1]}, "'plus_input' is no list of inputs"),
        ({**RELEASED, "base_input": "[[1, 2]]"}, "'base_input' is no list of inputs"),
        ({**RELEASED, "base_input": [], "plus_input": []}, "has no inputs"),
        (MBPP_RELEASED, "of MBPP\\+ in EvalPlus' release form, and Mbpp/1 is none of .*take it as EvalPlus releases it"),
        ({**MBPP, "code": 1}, "'reasoning' is of type number"),
        ({**COMPLETION, "canonical_solution": ""}, "'reasoning' is empty"),
        ({**COMPLETION, "prompt": None}, "'question' is of type null"),
        ({"prompt": "p", "code": "c"}, "no field 'input'"),
        ({"messages": "x"}, "'messages' is no list of messages.*data.input_field"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no single question with its reply .* of: user"),
        ({"conversations": [{"from": r, "value": "x"} for r in ("system", "human", "gpt")]}, "of: system, human, gpt"),
        (
            {"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": "r"}]},
            "'question' is of type array",
        ),
        ({"query": "q", "response": "It is 7."}, "no final answer in it; .*'The answer is ANSWER'.*data.answer_field"),
        ({"question": "q", "answer": "Six. #### 6\nQuestion: r\nSeven. #### 7"}, "two marked answers, '6' and '7'"),
        ({"a": {"input": "q", "output": "One. #### 1"}}, "the objects in it one per line"),
        ({"data": [{"input": "q", "output": "One. #### 1"}]}, "its list 'data' one per line"),
    ],
)
def test_rows_that_lack_something_are_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (bad,) = read(tmp_path / "a.jsonl", row).bad
    with pytest.raises(ValueError, match=reason):
        raise ValueError(str(bad))


def test_what_sets_mbpp_tests_up_uses_the_answers_own_classes(tmp_path: Path) -> None:
    """As in its tasks 367 and 927."""
    row = {
        **MBPP,
        "code": "class Node:\r\n  def __init__(self, data):\r\n    self.data = data\r\ndef read(node):\r\n  return node.data",
        "test_setup_code": "root = Node(1) \r\nroot1 = Node(math.floor(2.5)) ",
        "test_list": ["assert read(root) == 1", "assert read(root1) == 2"],
        "test_imports": ["import math"],
    }
    (record,) = read(tmp_path / "a.jsonl", row).records
    task = get_task("code", PATIENT)
    assert task.verdict(record.answer, record).right
    wrong = record.answer.replace("node.data", "3")
    assert not task.verdict(wrong, record).right


PUZZLE = {"numbers": [3, 4, 4], "target": 16}


@pytest.mark.parametrize(
    ("row", "steps", "answer"),
    [
        ({"input": "4,3,4,16", "output": "4*4=16,3+16=19"}, ("4 * 4 = 16", "3 + 16 = 19"), ""),
        ({"input": "4,3,4,16", "output": "4*3=12,12+4=16"}, ("4 * 3 = 12", "12 + 4 = 16"), "( 4 * 3 ) + 4"),
        ({"nums": [4, 4, 3], "target": 16, "solution": ["4*3=12", "4+12=16"]}, ("4 * 3 = 12", "4 + 12 = 16"), "4 + ( 4 * 3 )"),
        ({"input": "4,3,4,16", "output": "4*3=11,11+4=16"}, ("4 * 3 = 11", "11 + 4 = 16"), ""),
        ({"input": "4,3,4,16", "output": "4/3=1,1+4=16"}, ("4 / 3 = 1", "1 + 4 = 16"), ""),
        ({"nums": [4, 4, 3], "target": 16, "solution": ["as one sees"]}, (), ""),
        ({"nums": [4, 4, 3], "target": 16}, (), ""),
    ],
)
def test_countdown_as_others_publish_it_is_asked_as_our_own_puzzles_are(
    tmp_path: Path, row: dict[str, Any], steps: tuple[str, ...], answer: str
) -> None:
    found = read(tmp_path / "a.jsonl", row)
    ((source, load),) = file_rows(str(tmp_path / "a.jsonl"))
    record = question_of(source, load, DataSettings())
    assert isinstance(record, Record)
    assert (record.question, record.answer) == ("3 4 4 -> 16", answer)
    assert {name: record.reference[name] for name in PUZZLE} == PUZZLE
    task = get_task("countdown")
    task.check(record)
    assert task.verdict("4 * (4 - 3) * 4", record).right is False and task.verdict("3 * 4 + 4", record).right
    assert not answer or task.verdict(answer, record).right
    assert [trained.blocks for trained in found.records] == ([steps] if answer else [])


def test_what_only_looks_like_a_puzzle_is_read_by_the_settings(tmp_path: Path) -> None:
    rows = (
        {"input": "3,4,12", "output": "Three fours. #### 12"},
        {"input": "3, 4", "output": "3*4=12 #### 12"},
        {"input": "a", "output": "3*4=12 #### 12", "nums": [3, 4.5], "target": 12},
    )
    found = read(tmp_path / "a.jsonl", *rows)
    assert [(record.question, record.answer) for record in found.records] == [(row["input"], "12") for row in rows]


@pytest.mark.parametrize("row", [{**RELEASED, "atol": None}, {**RELEASED, "canonical_solution": None}, MBPP_RELEASED])
def test_released_rows_that_cannot_be_judged_are_not_asked_either(tmp_path: Path, row: dict[str, Any]) -> None:
    trained = read(tmp_path / "a.jsonl", row).bad
    assert [question_of(source, load, DataSettings()) for source, load in file_rows(str(tmp_path / "a.jsonl"))] == trained


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.text(max_size=20), st.integers(), st.lists(st.one_of(st.none(), st.text(max_size=9)), max_size=3)
)
FIELDS = [
    "problem",
    "solution",
    "answer",
    "question",
    "prompt",
    "text",
    "code",
    "test_list",
    "test",
    "entry_point",
    "canonical_solution",
    "base_input",
    "plus_input",
    "atol",
    "task_id",
    "assertion",
]


@given(row=st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_no_row_raises_or_is_lost(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    result = read(tmp_path_factory.getbasetemp() / "any.jsonl", row)
    assert len(result.records) + len(result.bad) == result.total == 1


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} or \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\fbox{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("$\\boxed 5$.", "5"),
        ("\\boxed{1", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@given(st.text(alphabet="\\boxedf{} $1", max_size=60))
def test_last_boxed_of_any_text_is_part_of_it(text: str) -> None:
    found = last_boxed(text)
    assert found is None or found in text


def test_hub_sets_are_read_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        found = datasets.Dataset.from_list([MBPP])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    for stream in (False, True):
        (record,) = read_records("google-research-datasets/mbpp:full:test", DataSettings(stream_hub=stream)).records
        assert asked.pop() == ("google-research-datasets/mbpp", "full", "test", stream)
        assert record.answer == MBPP["code"] and record.source.endswith(":row 1")


def test_a_stream_that_breaks_off_is_told_and_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def torn() -> Iterator[dict[str, Any]]:
        yield MBPP
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: torn())
    with pytest.raises(UnusableError, match=r"mbpp: breaks off behind row 1 \(ConnectionError: reset by peer\)"):
        read_records("google-research-datasets/mbpp", DataSettings(stream_hub=True))


@pytest.fixture(scope="module")
def human_eval() -> list[Record]:
    result = read_records(str(HUMAN_EVAL), DataSettings())
    assert result.bad == [] and result.total == 164
    return result.records


@needs_human_eval
def test_human_eval_loses_nothing(human_eval: list[Record]) -> None:
    with gzip.open(HUMAN_EVAL, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for record, row in zip(human_eval, rows, strict=True):
        assert record.question == row["prompt"] and record.answer == (row["prompt"] + row["canonical_solution"]).strip()
        assert without_space("".join(record.blocks)) == without_space(row["canonical_solution"])


@needs_human_eval
@pytest.mark.parametrize(
    ("program", "passes"),
    [
        (lambda record: record.answer, True),
        (lambda record: record.reference["canonical_solution"].strip(), True),
        (lambda record: "    pass", False),
    ],
    ids=["whole", "body", "empty"],
)
def test_human_eval_every_gold_program_passes_and_an_empty_one_does_not(
    human_eval: list[Record], program: Callable[[Record], str], passes: bool
) -> None:
    task = CodeTask()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outcomes = list(pool.map(lambda record: task.outcome(program(record), record), human_eval))
    found = {record.reference["task_id"]: outcome for record, outcome in zip(human_eval, outcomes, strict=True)}
    assert {name: outcome for name, outcome in found.items() if outcome.passed is not passes} == {}


@pytest.fixture(scope="module")
def gsm8k() -> list[Record]:
    result = read_records(str(GSM8K), DataSettings())
    assert result.bad == [] and result.total == 7473
    return result.records


@needs_gsm8k
def test_gsm8k_without_settings_loses_nothing(gsm8k: list[Record]) -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    for record, row in zip(gsm8k, rows, strict=True):
        reasoning, _, answer = row["answer"].rpartition("####")
        assert (record.question, record.answer) == (row["question"], answer.strip())
        assert without_space("".join(record.blocks)) == without_space(strip_calculator(reasoning))


@needs_gsm8k
def test_gsm8k_gold_answers_are_right_in_every_spelling(gsm8k: list[Record]) -> None:
    task = MathsTask()
    for record in gsm8k:
        gold = record.answer
        for spelling in (
            gold,
            f"The answer is {gold}.",
            f"${gold}",
            f"so it is \\boxed{{{gold}}}",
            f"{float(gold.replace(',', ''))}",
        ):
            assert task.verdict(spelling, record).right, (spelling, record.source)
        assert not task.verdict(f"{gold}1", record).right


def without_space(text: str) -> str:
    return "".join(text.split())
