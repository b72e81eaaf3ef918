"""Countdown: the solver against brute force, disjoint splits, and a checker that any text can be given to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ladir.config import BackboneSettings, CountdownSettings
from ladir.data.records import Record, read_sentences
from ladir.tasks import countdown, get_task
from ladir.tasks.countdown import Solver, canonical, check_answer, check_chain, generate, sentences, vocabulary, write
from ladir.tokens import encode_text, load_tokenizer

SMALL = CountdownSettings(train=200, validation=30, test=40, max_number=10, max_value=50)


def all_trees(numbers: tuple[int, ...]) -> Iterator[tuple[str, Fraction, bool]]:
    """Every expression over ``numbers`` in this order: text, value, whether all results are integers from 1 to 50."""
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0]), True
        return
    for cut in range(1, len(numbers)):
        for (a, x, good_a), (b, y, good_b) in itertools.product(all_trees(numbers[:cut]), all_trees(numbers[cut:])):
            for operator in "+-*/":
                if operator == "/" and y == 0:
                    continue
                value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[operator]
                inside = value.denominator == 1 and 1 <= value <= 50
                yield f"({a}{operator}{b})", value, good_a and good_b and inside


@pytest.mark.parametrize("numbers", [(3, 7), (5, 5), (1, 2, 3), (4, 4, 9), (6, 6, 6), (10, 8, 1), (2, 3, 4, 6), (2, 2, 5, 5)])
def test_solver_finds_exactly_what_brute_force_finds(numbers: tuple[int, ...]) -> None:
    expected: dict[int, set[str]] = {}
    for order in set(itertools.permutations(numbers)):
        for text, value, allowed in all_trees(order):
            if allowed:
                expected.setdefault(int(value), set()).add(canonical(text))
    solver = Solver(max_value=50)
    found = {target: solver.solutions(numbers, target) for target in solver.targets(numbers)}
    assert {target: {canonical(s.expression()) for s in solutions} for target, solutions in found.items()} == expected
    for target, solutions in found.items():
        assert len({canonical(s.expression()) for s in solutions}) == len(solutions)  # each once
        for solution in solutions:
            assert check_answer(solution.expression(), numbers, target)
            assert check_chain(solution.equations(), numbers, target)
    assert all(not solver.solutions(numbers, target) for target in {0, 1, 2, 51, *range(3, 50, 7)} - expected.keys())


@pytest.mark.parametrize("numbers", [(3, 7), (4, 4, 9), (6, 6, 6), (2, 3, 4), (2, 2, 5, 5)])
def test_every_order_of_a_solution_is_found_where_asked_for(numbers: tuple[int, ...]) -> None:
    expected: dict[int, set[str]] = {}
    for order in set(itertools.permutations(numbers)):
        for text, value, allowed in all_trees(order):
            if allowed:
                expected.setdefault(int(value), set()).add(text)
    solver, distinct = Solver(max_value=50, every_order=True), Solver(max_value=50)
    for target in solver.targets(numbers):
        found = solver.solutions(numbers, target)
        texts = {f"({solution.expression()})".replace(" ", "") for solution in found}
        assert len(texts) == len(found)
        assert texts <= expected[target]
        assert {solution.form for solution in found} == {solution.form for solution in distinct.solutions(numbers, target)}


def test_a_sum_of_three_has_three_orders() -> None:
    found = Solver(max_value=50, every_order=True).solutions((2, 3, 4), 9)
    assert {"( 4 + 3 ) + 2", "( 4 + 2 ) + 3", "( 3 + 2 ) + 4"} <= {solution.expression() for solution in found}
    puzzles = [generate(SMALL, 3), generate(dataclasses.replace(SMALL, orders="all", solutions_per_puzzle=9), 3)]
    assert len(puzzles[0].train) < len(puzzles[1].train)
    first, second = ([record["input"] for record in splits.test] for splits in puzzles)
    assert first == second


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=4, max_size=5), st.data())
def test_solver_agrees_with_brute_force_on_random_puzzles(numbers: list[int], data: st.DataObject) -> None:
    solver = Solver(max_value=60)
    reached = brute_force(tuple(sorted(numbers)), 60)
    assert solver.targets(numbers) == sorted(reached)
    target = data.draw(st.sampled_from([1, 60, *sorted(reached)]))
    solutions = solver.solutions(numbers, target)
    assert bool(solutions) == (target in reached)
    forms = {canonical(solution.expression()) for solution in solutions}
    assert len(forms) == len(solutions)
    for solution in solutions:
        assert check_answer(solution.expression(), numbers, target) and check_chain(solution.equations(), numbers, target)


def brute_force(numbers: tuple[int, ...], most: int) -> set[int]:
    """Integers from 1 to ``most`` that are made of all the numbers by way of such integers, two at a time."""
    if len(numbers) == 1:
        return {numbers[0]} if numbers[0] <= most else set()
    found = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        x, y = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        for value in {x + y, x - y, x * y, *([x // y] if x % y == 0 else [])}:
            if 1 <= value <= most:
                found |= brute_force((*rest, value), most)
    return found


@st.composite
def written_expressions(draw: st.DrawFn) -> tuple[str, list[int], Fraction | None]:
    """A random expression in random spelling, its numbers, and its exact value (None: divides by zero)."""
    numbers = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    parts: list[tuple[str, Fraction | None]] = [(str(n), Fraction(n)) for n in numbers]
    space = st.sampled_from(["", " ", "  ", "\t", "\n"])
    while len(parts) > 1:
        i = draw(st.integers(0, len(parts) - 2))
        (a, x), (b, y) = parts[i : i + 2]
        operator = draw(st.sampled_from("+-*/"))
        if x is None or y is None or (operator == "/" and y == 0):
            value = None
        else:
            value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[operator]
        parts[i : i + 2] = [(f"({a}{draw(space)}{operator}{draw(space)}{b}{draw(space)})", value)]
    text, value = parts[0]
    return draw(space) + "(" * (extra := draw(st.integers(0, 3))) + text + ")" * extra + draw(space), numbers, value


@given(written_expressions(), st.randoms())
def test_checker_agrees_with_exact_evaluation(case: tuple[str, list[int], Fraction | None], rng: random.Random) -> None:
    text, numbers, value = case
    shuffled = rng.sample(numbers, len(numbers))
    if value is not None and value.denominator == 1:
        assert check_answer(text, shuffled, int(value))
        assert not check_answer(text, shuffled, int(value) + 1)
        assert not check_answer(text, [*shuffled, 1], int(value))
        assert not check_answer(text, shuffled[1:], int(value))
    else:
        target = round(value) if value is not None else 0
        assert not check_answer(text, shuffled, target)


@given(written_expressions())
def test_canonical_is_stable_and_keeps_value_and_numbers(case: tuple[str, list[int], Fraction | None]) -> None:
    text, numbers, value = case
    form = canonical(text)
    assert canonical(form) == form
    assert sorted(map(int, re.findall(r"\d+", form))) == sorted(numbers)
    if value is not None and value.denominator == 1:
        assert check_answer(form, numbers, int(value))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("(12+3)*4", "4 * ( 3 + 12 )", True),
        ("1+(2+3)", "(3+1)+2", True),
        ("9-(4-2)", "(9+2)-4", True),
        ("8/(4/2)", "8*2/4", True),
        ("2*3+4", "2*(3+4)", False),
        ("9-4", "4-9", False),
        ("6*1", "6/1", False),
        ("no  expression", "no expression", True),
    ],
)
def test_canonical_distinguishes_solutions_not_spellings(one: str, other: str, same: bool) -> None:
    assert (canonical(one) == canonical(other)) is same


HOSTILE = [
    "",
    " ",
    "()",
    "(" * 100_000 + "3" + ")" * 100_000,
    "3" + "+3" * 100_000,
    "-" * 1_900 + "3",
    "- 3 + 7 * 12",
    "9" * 1_000_000,
    "9**9**9**9**9",
    "3 ** 7 ** 12",
    "3 // 7 // 12",
    "3 7 12",
    "3(7)(12)",
    "3, 7, 12",
    "__import__('os').system('exit 3')",
    "3 + 7 + 12 # comment",
    "[3, 7, 12][0]",
    "３ ＋ ７ ＋ １２",
    "٣ + ٧ + ١٢",
    "3 + 7 + 1_2",
    "0x3 + 7 + 12",
    "03 + 7 + 12",
    "3. + 7 + 12",
    "3e0 + 7 + 12",
    "3j + 7 + 12",
    "True + 3 + 7 + 12",
    "3 / 0 + 7 + 12",
    "7 / (3 - 3) + 12",
    "3 + 7 + 12\0",
    "3 + 7 + 12 = 22",
    "3 + 7 + 12)",
    "(3 + 7 + 12",
    "3 +\\\n 7 + 12",
    "\ud800",
    "3 + 7 + 12; 1",
    "lambda: 3 + 7 + 12",
    "f'{3 + 7 + 12}'",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_answers_are_wrong_and_never_raise(text: str) -> None:
    assert not check_answer(text, [3, 7, 12], 22)
    assert not check_chain([text], [3, 7, 12], 22)
    assert isinstance(canonical(text), str)


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*/() =\n.", max_size=60)), st.lists(st.integers(0, 99), max_size=4))
def test_any_text_is_judged(text: str, numbers: list[int]) -> None:
    assume(not re.search(r"\d", text))
    assert not check_answer(text, numbers, 1)
    assert not check_chain([text], numbers, -1)
    canonical(text)


@settings(max_examples=300)
@given(st.text(alphabet="123+-*/() =\n.", max_size=40))
def test_what_is_accepted_evaluates_to_the_target(text: str) -> None:
    digits = [int(d) for d in re.findall(r"\d+", text)]
    for target in range(7):
        if check_answer(text, digits, target):
            as_fractions = re.sub(r"(\d+)", r"Fraction(\1)", " ".join(text.split()))
            assert eval(as_fractions, {"Fraction": Fraction}) == target  # noqa: S307 (digits and operators only)
    canonical(text)


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        (["12 + 3 = 15", "15 * 7 = 105"], True),
        (["12+3=15\n15*7=105"], True),
        (["", "12 + 3 = 15", " 15 * 7 = 105 "], True),
        (["3 - 12 = -9", "7 - -9 = 16"], False),
        (["12 + 3 = 15"], False),
        (["12 + 3 = 16", "16 * 7 = 112"], False),
        (["12 + 3 = 15", "15 * 7 = 104"], False),
        (["12 + 12 = 24", "24 * 7 = 168"], False),
        (["12 + 3 = 15", "12 * 7 = 84"], False),
        (["12 + 3 = 15", "15 * 7 = 105", "105 + 0 = 105"], False),
        (["12 / 0 = 12", "12 * 7 = 84"], False),
        (["so 12 + 3 = 15", "15 * 7 = 105"], False),
    ],
)
def test_chain(lines: list[str], right: bool) -> None:
    assert check_chain(lines, [3, 7, 12], 105) is right


def test_chain_may_pass_through_negative_and_decimal_results() -> None:
    assert check_chain(["3 - 12 = -9", "7 - -9 = 16"], [3, 7, 12], 16)
    assert check_chain(["3 / 2 = 1.5", "1.5 * 4 = 6"], [2, 3, 4], 6)


def test_splits_are_disjoint_exact_and_reproducible() -> None:
    splits = generate(SMALL, seed=3)
    puzzles = [
        {(tuple(sorted(r["numbers"])), r["target"]) for r in part} for part in (splits.train, splits.validation, splits.test)
    ]
    assert [len(p) for p in puzzles] == [200, 30, 40]
    assert not (puzzles[0] & puzzles[1] or puzzles[0] & puzzles[2] or puzzles[1] & puzzles[2])
    for row in [*splits.train, *splits.validation, *splits.test]:
        *lines, last = row["output"].split("\n")
        assert check_chain(lines, row["numbers"], row["target"])
        assert last.startswith("#### ") and check_answer(last.removeprefix("#### "), row["numbers"], row["target"])
        assert row["input"] == f"{' '.join(map(str, row['numbers']))} -> {row['target']}"
    assert generate(SMALL, seed=3) == splits
    assert generate(SMALL, seed=4) != splits


def test_training_puzzles_get_several_distinct_solutions() -> None:
    rows = generate(SMALL, seed=0).train
    by_puzzle: dict[str, list[str]] = {}
    for row in rows:
        by_puzzle.setdefault(row["input"], []).append(canonical(row["output"].split("#### ")[1]))
        assert len(by_puzzle[row["input"]]) <= min(2, row["num_solutions"])
    assert all(len(set(forms)) == len(forms) for forms in by_puzzle.values())
    assert max(map(len, by_puzzle.values())) == 2


def test_too_many_puzzles_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"1000270 puzzles are asked for .* gave only \d+; .*countdown.max_number"):
        generate(CountdownSettings(train=1_000_000, validation=100, test=170, max_number=4, max_value=20), seed=0)
    with pytest.raises(ValueError, match="numbers must be at least 2"):
        generate(CountdownSettings(numbers=1), seed=0)


@pytest.mark.parametrize("numbers", [4, 5])
def test_larger_puzzles_are_sampled_and_share_no_numbers(numbers: int) -> None:
    ranges = CountdownSettings(
        numbers=numbers, max_number=100, max_value=1000, min_target=10, max_target=100, train=60, validation=5, test=15
    )
    splits = generate(ranges, seed=0)
    rows = [*splits.train, *splits.validation, *splits.test]
    for row in rows:
        *lines, last = row["output"].split("\n")
        assert len(row["numbers"]) == numbers and 10 <= row["target"] <= 100 and row["num_solutions"] >= 1
        assert check_chain(lines, row["numbers"], row["target"])
        assert check_answer(last.removeprefix("#### "), row["numbers"], row["target"])
    puzzles = {row["input"] for row in rows}
    assert len(puzzles) == 80 and len({tuple(row["numbers"]) for row in rows}) == 80
    assert generate(ranges, seed=0) == splits
    assert max(row["num_solutions"] for row in rows) > 1 and len(splits.train) > 60  # several solutions of some


def test_multisets_that_were_not_drawn_are_looked_through_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all multisets are drawn; without the others they would not do, and a multiset has one puzzle only."""
    wanted = CountdownSettings(numbers=3, max_number=12, max_value=100, max_target=40, train=58, validation=1, test=1)
    monkeypatch.setattr(countdown, "_ENUMERABLE", 10)
    monkeypatch.setattr(countdown, "_LISTED", 10)
    with pytest.raises(ValueError, match="gave only"):
        generate(wanted, seed=0)
    monkeypatch.setattr(countdown, "_LISTED", 1000)
    splits = generate(wanted, seed=0)
    rows = [*splits.train, *splits.validation, *splits.test]
    assert len({tuple(sorted(row["numbers"])) for row in rows}) == len({row["input"] for row in rows}) == 60
    assert generate(wanted, seed=0) == splits


def test_ranges_that_hold_too_few_solvable_puzzles_end() -> None:
    few = CountdownSettings(numbers=3, max_number=12, max_value=2000, min_target=1728, train=3, validation=1, test=1)
    with pytest.raises(ValueError, match="gave only"):
        generate(few, seed=0)


def test_files_hold_known_words_and_all_sentences(tmp_path) -> None:
    counts = write(SMALL, 0, tmp_path)
    tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(tmp_path / "tokenizer")))
    known = {text for _, text in read_sentences(str(tmp_path / "sentences.jsonl")).sentences}
    assert len(known) == counts["sentences.jsonl"] == len(sentences(SMALL))
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == counts[name]
        for row in map(json.loads, lines):
            assert set(row["output"].split("\n")[:-1]) <= known
            assert tokenizer.unk_token_id not in encode_text(tokenizer, row["input"] + "\n" + row["output"])
    assert len(tokenizer) == len(vocabulary(SMALL)) + 3
    assert {p.name for p in tmp_path.iterdir()} == {*counts, "tokenizer"}


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        (["12 + 3 = 15", "15 * 7 = 105"], True),
        (["100 + 5 = 105"], True),  # numbers that nobody gave
        (["1 + 1 = 2", "12 + 3 = 15\n15 * 7 = 105"], True),
        (["12 + 3 = 16", "15 * 7 = 105"], False),
        (["15 * 7 = 105", "12 + 3 = 15"], False),
        (["105 / 0 = 105"], False),
        (["210 / 2 = 105", "so it is"], False),
        ([], False),
        (["", " "], False),
    ],
)
def test_the_lenient_rule_asks_for_exact_steps_that_end_in_the_target(lines: list[str], right: bool) -> None:
    record = Record("3 7 12 -> 105", (), "", "x.jsonl:1", {"numbers": [3, 7, 12], "target": 105})
    assert get_task("countdown").lenient(lines, record) is right


def test_task_judges_records_and_names_those_that_are_no_puzzles() -> None:
    task = get_task("countdown")
    record = Record("3 7 12 -> 105", ("12 + 3 = 15",), "( 12 + 3 ) * 7", "x.jsonl:1", {"numbers": [3, 7, 12], "target": 105})
    assert task.verdict("7 * (3 + 12)", record).right and not task.verdict("7 * 15", record).right
    assert task.chain_correct(["12 + 3 = 15", "15 * 7 = 105"], record)
    with pytest.raises(ValueError, match=r"y.jsonl:7: not a Countdown record"):
        task.verdict("1", Record("q", ("b",), "a", "y.jsonl:7", {"numbers": "3 7"}))
    with pytest.raises(ValueError, match="valid: countdown, maths, code"):
        get_task("chess")


@pytest.mark.parametrize("gap", [1, 1970, 1990, 2000, 5000])
def test_what_follows_far_behind_an_answer_counts(gap: int) -> None:
    answer = "3 + 7 + 12" + " " * gap
    assert check_answer(answer, [3, 7, 12], 22)
    assert not check_answer(f"{answer}+ junk 99", [3, 7, 12], 22)
    assert not check_answer(f"{answer}+ 1", [3, 7, 12], 22)
