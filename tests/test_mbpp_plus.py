"""MBPP+ as EvalPlus releases it: inputs are read by the task's number, outputs compared by the function's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import DataSettings, EvaluateSettings
from ladir.data.mbpp_plus import arguments, task_number
from ladir.data.records import BadRecord, Record, read_records
from ladir.tasks import get_task
from ladir.tasks.isolated.plus_tests import plus_digits, plus_equal, plus_pyramid

PATIENT = EvaluateSettings(check_seconds=60.0)


def released(number: int, name: str, body: str, *inputs: list[Any], **others: Any) -> dict[str, Any]:
    """A row of the release's fields; the function is ``def name(*given): body``."""
    return {
        "task_id": f"Mbpp/{number}",
        "prompt": f'"""\nWrite a function.\nassert {name}() == "\\d"\n"""\n',
        "entry_point": name,
        "canonical_solution": f"\nimport re, math\ndef {name}(*given):\n    {body}\n",
        "base_input": list(inputs),
        "atol": 0,
        "plus_input": [],
        "contract": "\n    assert True # $_CONTRACT_$\n",
        "assertion": f'\nassert {name}() == "\\d"\nassert {name}(1) == 2\n',
        **others,
    }


def read(folder: Path, row: dict[str, Any]) -> Record | BadRecord:
    path = folder / "MbppPlus.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = read_records(str(path), DataSettings())
    (found,) = [*result.records, *result.bad]
    return found


def reason(folder: Path, row: dict[str, Any], body: str) -> str:
    """Why the attempt ``def name(*given): body`` is wrong; empty where it is right."""
    record = read(folder, row)
    assert isinstance(record, Record), record
    task = get_task("code", PATIENT)
    own = task.verdict(record.answer, record)
    assert own.right, own
    verdict = task.verdict(f"import re, math, cmath\ndef {row['entry_point']}(*given):\n    {body}\n", record)
    assert verdict.right == (not verdict.reason)
    return verdict.reason


def test_the_question_shows_the_task_with_the_assertion_of_its_prompt(tmp_path: Path) -> None:
    row = released(3, "is_not_prime", "n = given[0]\n    return n == 1 or any(n % i == 0 for i in range(2, n))", [2], [9])
    for quotes in ('"""', "'''"):
        record = read(tmp_path, {**row, "prompt": row["prompt"].replace('"""', quotes)})
        assert isinstance(record, Record)
        assert record.question == 'Write a function.\nYour code should pass these tests:\n\nassert is_not_prime() == "\\d"'
        assert record.answer == row["canonical_solution"].strip()
        assert record.blocks == tuple(line.strip() for line in row["canonical_solution"].strip().split("\n"))
    assert reason(tmp_path, row, "return given[0] != 2") == ""
    assert reason(tmp_path, row, "return False").startswith("AssertionError: input 2 of base_input")


# What the function gets, as Python writes it.
KINDS: list[tuple[int, list[Any], str]] = [
    (3, [[1, [2]], "ab", {"a": [None, True]}, math.inf], "([1, [2]], 'ab', {'a': [None, True]}, inf)"),
    (2, [[1, [2]], []], "((1, [2]), ())"),
    (809, [[1]], "((1,),)"),
    (63, [[[1, 2], [3]]], "([(1, 2), (3,)],)"),
    (780, [[[1, [2]]], []], "([(1, [2])], [])"),
    (445, [[[1, [2]], []], [[3]]], "(((1, [2]), ()), ((3,),))"),
    (580, [[4, [5, [6, []]]], [7]], "((4, (5, (6, ()))), (7,))"),
    (75, [[[6, [24]], []], [6]], "([(6, [24]), ()], [6])"),
    (250, [[1, [2]], [3]], "((1, [2]), [3])"),
    (106, [[5], [9, [10]]], "([5], (9, [10]))"),
    (278, [[1, [4, [6]], "ab"]], "((1, (4, [6]), 'ab'),)"),
    (722, [{"a": [6.2, [70]], "b": []}, 6.0, [70]], "({'a': (6.2, [70]), 'b': ()}, 6.0, [70])"),
    (124, ["1e-100", "(-0-1j)"], "(1e-100, (-0-1j))"),
    (124, ["inf", "nanj"], "(inf, nanj)"),
    (252, ["(-0-infj)"], "((-0-infj),)"),
    (252, [4], "((4+0j),)"),
]


@pytest.mark.parametrize(("number", "inputs", "seen"), KINDS, ids=[f"{number}-{seen}" for number, _, seen in KINDS])
def test_each_task_gets_its_inputs_as_the_values_that_json_does_not_hold(
    tmp_path: Path, number: int, inputs: list[Any], seen: str
) -> None:
    assert repr(tuple(complex(value) if isinstance(value, complex) else value for value in arguments(number, inputs))) == seen
    row = released(number, "f", "return repr(given)", plus_input=[inputs])
    assert reason(tmp_path, row, f"return {seen!r}") == ""
    as_in_json = reason(tmp_path, row, f"return {repr(tuple(inputs))!r}")
    assert as_in_json.startswith("AssertionError: input 1 of plus_input") if number != 3 else not as_in_json


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


@given(st.sampled_from([number for number, *_ in KINDS if number not in (124, 252)]), st.lists(JSON, max_size=3))
def test_reading_an_input_changes_nothing_but_lists_to_tuples(number: int, inputs: list[Any]) -> None:
    try:
        read_as = arguments(number, inputs)
    except ValueError as error:
        assert f"has not the form of Mbpp/{number}'s" in str(error)
    else:
        assert json.dumps(read_as) == json.dumps(inputs)
        assert repr(eval(repr(read_as), {"inf": math.inf})) == repr(read_as)  # noqa: S307


@given(st.complex_numbers())
def test_complex_numbers_keep_the_signs_of_their_zeros(number: complex) -> None:
    (found,) = arguments(252, [str(number)])
    (written,) = eval(repr([found]), {"inf": math.inf, "nan": math.nan})  # noqa: S307
    assert repr(complex(found)) == repr(written) == repr(complex(str(number)))


@pytest.mark.parametrize(
    ("number", "inputs"),
    [
        (2, ["ab"]),  # which would be its letters
        (2, [3]),
        (63, [[1]]),
        (445, [[[1], 2]]),
        (75, [[[1]]]),
        (75, [[[1]], 1, 2]),
        (106, [[1], 2]),
        (106, [[1]]),
        (250, [{"a": 1}, 1]),
        (278, [1]),
        (722, [[["a", 1]], 1, 1]),
        (722, [{"a": 3}, 1, 1]),
        (124, ["x", "1j"]),
        (252, [None]),
        (252, ["(1+2j"]),
    ],
)
def test_an_input_of_another_form_is_refused(tmp_path: Path, number: int, inputs: list[Any]) -> None:
    bad = read(tmp_path, released(number, "f", "return 1", inputs))
    assert isinstance(bad, BadRecord)
    assert bad.reason == (
        f"it is of MBPP+ in EvalPlus' release form, and an input, {inputs!r}, has not the form of Mbpp/{number}'s"
    )
    assert "EvalPlus releases it (v0.2.0), or with a field 'test'" in bad.remedy


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task_id": "Mbpp/1"}, "Mbpp/1 is none of the 378 tasks of v0.2.0"),
        ({"task_id": "Mbpp/164"}, "Mbpp/164 is none of the 378"),  # of v0.1.0
        ({"task_id": "Mbpp/02/3"}, "'task_id' is not like Mbpp/2"),
        ({"task_id": 2}, "'task_id' is not like Mbpp/2"),
        ({"task_id": None}, "'task_id' is not like Mbpp/2"),
        ({"task_id": None, "assertion": None}, "'task_id' is not like Mbpp/2"),
        ({"prompt": "Write a function."}, "'prompt' is no text with an assertion"),
        ({"prompt": '"""\nWrite a function that asserts.\n"""\n'}, "'prompt' is no text with an assertion"),
        ({"prompt": '"""\nassert f() == 1\n"""\n'}, "'prompt' is no text with an assertion"),
        ({"prompt": '"""\nWrite a function.\nassert f() == 1\n"""\ndef f():\n'}, "'prompt' is no text with an assertion"),
        ({"atol": None}, "lacks 'atol'"),
        ({"base_input": {}}, "has no inputs"),
        ({"plus_input": {"a": 1}}, "'plus_input' is no list of inputs"),
    ],
)
def test_a_row_that_is_not_known_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    bad = read(tmp_path, {**released(2, "f", "return 1", [[1]]), **change})
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith("it is of MBPP+ in EvalPlus' release form, and ") and told in bad.reason


def test_a_row_without_the_fields_that_name_mbpp_is_not_taken_for_human_eval(tmp_path: Path) -> None:
    row = released(2, "f", "return 1", [[1]])
    bad = read(tmp_path, {name: row[name] for name in row if name not in ("task_id", "assertion", "contract")})
    assert isinstance(bad, BadRecord) and "MBPP+" in bad.reason


def test_the_tasks_are_the_378_of_the_release() -> None:
    known = []
    for number in range(1000):
        try:
            known.append(task_number(f"Mbpp/{number}"))
        except ValueError:
            continue
    # Positions of which EvalPlus' own scripts are sure (tools/mbpp/fix_v020.py), and the ends.
    assert (len(known), known[0], known[55], known[215], known[236], known[-1]) == (378, 2, 102, 459, 559, 809)


SHARED = released(
    2, "similar_elements", "return tuple(set(given[0]) & set(given[1]))", [[3, 4, 5], [5, 4, 7]], plus_input=[[[], []]]
)
NEAR = released(2, "similar_elements", "return tuple(given[0])", [[1.0], []], [["a", 2.0], []])
SEARCH = released(787, "text_match_three", "return re.search('ab{3}', given[0])", ["xabbb"], plus_input=[["ab"]])
SURFACE = released(581, "surface_Area", "return 2 * given[0] * given[1] + given[0] ** 2", [3, 4], [4, 5])
DIGITS = released(
    558, "digit_distance_nums", "return sum(abs(int(a) - int(b)) for a, b in zip(*map(str, given)))", [15, 5], [23, 56]
)
FLOATS = released(82, "volume_sphere", "return 4 / 3 * math.pi * given[0] ** 3", [10], atol=1e-4)
ANGLE = released(124, "angle_complex", "import cmath\n    return cmath.phase(given[0] + given[1])", ["-1", "-0j"], ["0", "1j"])
DOUBLED = released(3, "doubled", "given[0].extend(given[0])\n    return given[0]", [[1, 2]])
FIRST = "AssertionError: input 1 of base_input"
SECOND = "AssertionError: input 2 of base_input"
PLUS = "AssertionError: input 1 of plus_input"


@pytest.mark.parametrize(
    ("row", "body", "told"),
    [
        (SHARED, "return [x for x in given[1] if x in given[0]] * 2", ""),
        (SHARED, "return set(given[0]) & set(given[1])", ""),
        (SHARED, "return [5]", FIRST),
        (SHARED, "return [4, 5]", PLUS),
        (SHARED, "return [[4], [5]]", "TypeError: "),
        (SHARED, "return None", "TypeError: "),
        (SHARED, "return (4.0 + 1e-9, 5.0) if given[0] else ()", FIRST),
        (NEAR, "return tuple(x + 1e-9 if x == 1 else x for x in given[0])", ""),
        (NEAR, "return [x + 1e-9 if x == 1 else x for x in given[0]]", FIRST),  # of another type, and not equal
        (NEAR, "return given[0][::-1]", ""),
        (NEAR, "return tuple(x + 1e-9 if x == 2 else x for x in given[0])", SECOND),  # texts are near nothing
        (SEARCH, "return re.search('ab{3}', given[0])", ""),
        (SEARCH, "return 'abbb' in given[0]", ""),
        (SEARCH, "return [] if 'abbb' in given[0] else None", ""),
        (SEARCH, "return 'abbb' not in given[0]", FIRST),
        (SEARCH, "return 'yes' if 'abbb' in given[0] else 'no'", PLUS),
        (SEARCH, "return None", FIRST),
        (SEARCH, "return True", PLUS),
        (SURFACE, "return round(given[0] ** 2 + 2 * given[0] * math.hypot(given[0] / 2, given[1]))", ""),
        (SURFACE, "return given[0] ** 2 + 2 * given[0] * math.hypot(given[0] / 2, given[1])", FIRST),
        (SURFACE, "return 33 if given[0] == 3 else 59", ""),
        (SURFACE, "return 34", FIRST),
        (SURFACE, "return '33'", "TypeError: "),
        (DIGITS, "return 4 if given[0] == 15 else 6", ""),
        (DIGITS, "return 1 if given[0] == 15 else 6", ""),
        (DIGITS, "return 1 if given[0] == 15 else 7", SECOND),
        (DIGITS, "a, b = (str(n).zfill(2) for n in given)\n    return sum(abs(int(x) - int(y)) for x, y in zip(a, b))", ""),
        (DIGITS, "return 7", FIRST),
        (FLOATS, "return 4 / 3 * math.pi * 1000 + 1e-5", ""),
        (FLOATS, "return 4 / 3 * math.pi * 1000 + 1e-2", FIRST),
        (FLOATS, "return 4189", FIRST),
        (ANGLE, "return math.atan2((given[0] + given[1]).imag, (given[0] + given[1]).real)", ""),
        (ANGLE, "return cmath.phase(given[0] + given[1]) + 1e-3", FIRST),
        (DOUBLED, "return given[0] + given[0]", ""),
        (DOUBLED, "return tuple(given[0] + given[0])", FIRST),
        (DOUBLED, "return 1 / 0", "ZeroDivisionError: "),
    ],
)
def test_outputs_are_compared_as_evalplus_compares_those_of_the_task(
    tmp_path: Path, row: dict[str, Any], body: str, told: str
) -> None:
    found = reason(tmp_path, row, body)
    assert found.startswith(told) if told else not found


@pytest.mark.parametrize(("number", "name"), [(56, "check"), (126, "sum"), (793, "last")])
def test_names_and_fields_that_the_release_has(tmp_path: Path, number: int, name: str) -> None:
    """Functions may be called as the tests' own or as Python's; Mbpp/793 has an empty object for its further inputs."""
    row = released(number, name, "return max(given)", [3, 4], [6, 5], plus_input={})
    assert reason(tmp_path, row, "return given[0] if given[0] > given[1] else given[1]") == ""
    assert reason(tmp_path, row, "return given[1]").startswith(SECOND)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_sets_of_outputs_have_no_order_and_no_number(found: list[int], expected: list[int]) -> None:
    assert plus_equal("set", found, tuple(expected), [], 0) == all((n in found) == (n in expected) for n in range(4))


@given(st.integers(0, 10**20), st.integers(0, 10**20))
def test_digits_differ_place_by_place(one: int, other: int) -> None:
    assert plus_digits(one, other) == sum(abs(one // 10**place % 10 - other // 10**place % 10) for place in range(21))


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_a_pyramid_has_a_square_and_four_triangles(base: int, height: int) -> None:
    corners = (base / 2, base / 2, 0), (base / 2, -base / 2, 0), (0, 0, height)
    one, other = ([a - b for a, b in zip(corners[0], corner, strict=True)] for corner in corners[1:])
    normal = one[1] * other[2] - one[2] * other[1], one[2] * other[0] - one[0] * other[2], one[0] * other[1] - one[1] * other[0]
    assert abs(plus_pyramid(base, height) - (base**2 + 4 * math.hypot(*normal) / 2)) <= 0.5 + 1e-6
