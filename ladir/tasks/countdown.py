"""Countdown: make a target from given numbers, each used once, with + - * /.  Solver, generator and checker.

Every intermediate result of a gold solution is an integer in 1..max_value (differences positive, divisions exact) and
the larger operand is written first; the checker accepts any correct expression or chain.  Numbers of a question ascend.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ladir.config import CountdownSettings
from ladir.data.puzzles import question_text
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks.arithmetic import (
    OPERATORS,
    Form,
    canonical_expression,
    check_expression,
    check_steps,
    combine_forms,
    ends_in,
    number_form,
    steps_agree,
)
from ladir.tasks.verdict import Verdict
from ladir.tokens import build_word_tokenizer

# Puzzles are drawn from a pool this many times larger than asked for (or all there are), so that large ranges, which
# cannot be enumerated, still give a varied sample.
_POOL_FACTOR = 4
_TRIES = 100  # drawn multisets per wanted puzzle before giving up
_ENUMERABLE = 1_000_000  # multisets all of whose puzzles are listed where one of each is too few
_LISTED = 10_000_000  # multisets that are listed, to go through those that were not drawn
_KEPT = 1 << 17  # results of sub-multisets that a solver remembers


class Solution(NamedTuple):
    """One way to make ``value``: a number, or ``left operator right`` with ``left.value >= right.value``."""

    value: int
    form: Form
    operator: str = ""
    left: Solution | None = None
    right: Solution | None = None

    def equations(self) -> list[str]:
        """The steps ``a op b = c`` in the order they are computed."""
        if self.left is None or self.right is None:
            return []
        step = f"{self.left.value} {self.operator} {self.right.value} = {self.value}"
        return [*self.left.equations(), *self.right.equations(), step]

    def expression(self, outermost: bool = True) -> str:
        """The whole expression, every inner operation in parentheses, tokens separated by single spaces."""
        if self.left is None or self.right is None:
            return str(self.value)
        text = f"{self.left.expression(False)} {self.operator} {self.right.expression(False)}"
        return text if outermost else f"( {text} )"


@dataclass(frozen=True)
class Splits:
    """Generated records; no two splits share a puzzle (multiset of numbers and target)."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]


class Solver:
    """Values and solutions of multisets of numbers, each solution once up to commutativity and associativity, or in every
    order of its steps (``every_order``; the larger operand still comes first).

    A solution is searched from the target down: one operand and the target leave at most six values for the other one,
    and the values of small multisets, which recur, are kept.  Without a target's solutions being picked out of all
    solutions of all targets, five numbers cost milliseconds.
    """

    def __init__(self, max_value: int, every_order: bool = False) -> None:
        self.max_value, self.every_order = max_value, every_order
        self._values = lru_cache(maxsize=_KEPT)(self._values_uncached)
        self._solve = lru_cache(maxsize=_KEPT)(self._solve_uncached)

    def targets(self, numbers: Sequence[int]) -> list[int]:
        """Every value in 1..max_value that ``numbers`` reach, ascending."""
        return sorted(value for value in self._values(tuple(sorted(numbers))) if value <= self.max_value)

    def solutions(self, numbers: Sequence[int], target: int) -> list[Solution]:
        """Every distinct solution; none where ``target`` is out of reach or not in 1..max_value."""
        return list(self._solve(tuple(sorted(numbers)), target)) if 1 <= target <= self.max_value else []

    def _values_uncached(self, numbers: tuple[int, ...]) -> frozenset[int]:
        if len(numbers) == 1:
            return frozenset(numbers)
        found: set[int] = set()
        for first, second in _partitions(numbers):
            for one, other in itertools.product(self._values(first), self._values(second)):
                larger, smaller = (one, other) if one >= other else (other, one)
                found.update(value for _, value in _results(larger, smaller, self.max_value))
        return frozenset(found)

    def _solve_uncached(self, numbers: tuple[int, ...], target: int) -> tuple[Solution, ...]:
        if len(numbers) == 1:
            return (Solution(target, number_form(target)),) if numbers[0] == target else ()
        found: dict[Form | str, Solution] = {}
        for first, second in _partitions(numbers):
            for value in sorted(self._values(first)):
                for operator, other, swapped in _other_operands(value, target):
                    if self._may_reach(second, other):
                        for pair in itertools.product(self._solve(first, value), self._solve(second, other)):
                            larger, smaller = reversed(pair) if swapped else pair
                            form = combine_forms(operator, larger.form, smaller.form)
                            solution = Solution(target, form, operator, larger, smaller)
                            found.setdefault(solution.expression() if self.every_order else form, solution)
        return tuple(found.values())

    def _may_reach(self, numbers: tuple[int, ...], value: int) -> bool:
        """False only where ``numbers`` do not make ``value``; more than three are not enumerated to tell."""
        return value in self._values(numbers) if len(numbers) <= 3 else value <= self.max_value


def _other_operands(value: int, target: int) -> Iterator[tuple[str, int, bool]]:
    """(operator, other operand, whether that comes first) of the operations that make ``target`` from ``value`` and another
    positive integer; the larger operand comes first."""
    if target > value:
        yield "+", target - value, target > 2 * value
    if target < value:
        yield "-", value - target, False
    yield "-", value + target, True
    if target % value == 0:
        yield "*", target // value, target > value * value
    if value % target == 0:
        yield "/", value // target, False
    yield "/", value * target, True


@lru_cache(maxsize=1 << 16)
def _partitions(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Ways to part a sorted multiset in two non-empty ones, the first not the longer, each once whatever the order."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in itertools.combinations(range(len(numbers)), size):
            first = tuple(numbers[i] for i in chosen)
            second = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            found[(first, second) if size * 2 < len(numbers) else (min(first, second), max(first, second))] = None
    return tuple(found)


def _results(larger: int, smaller: int, max_value: int) -> Iterator[tuple[str, int]]:
    """(operator, result) of the operations whose result is an integer in 1..max_value; ``larger >= smaller >= 1``."""
    if larger + smaller <= max_value:
        yield "+", larger + smaller
    if smaller < larger <= max_value + smaller:
        yield "-", larger - smaller
    if larger * smaller <= max_value:
        yield "*", larger * smaller
    if larger % smaller == 0 and larger // smaller <= max_value:
        yield "/", larger // smaller


def generate(settings: CountdownSettings, seed: int) -> Splits:
    """Draw puzzles and their gold solutions; the same settings and seed give the same splits, whatever solutions are written.

    Training puzzles get up to ``solutions_per_puzzle`` records, the others one.  Raises ValueError where the ranges do
    not hold as many puzzles as asked for.
    """
    rng = random.Random(seed)
    solver = Solver(settings.max_value, every_order=settings.orders == "all")
    wanted = settings.train + settings.validation + settings.test
    pool = _draw_pool(settings, solver, wanted, rng)
    if len(pool) < wanted:
        raise UnusableError(
            f"countdown: {wanted} puzzles are asked for (train + validation + test) but numbers={settings.numbers}, "
            f"max_number={settings.max_number}, max_value={settings.max_value} gave only {len(pool)}; ask for fewer "
            "or raise countdown.max_number or countdown.max_value"
        )
    puzzles = rng.sample(pool, wanted)
    held_out = settings.validation + settings.test
    return Splits(
        train=list(_records(puzzles[held_out:], solver, settings.solutions_per_puzzle, rng)),
        validation=list(_records(puzzles[: settings.validation], solver, 1, rng)),
        test=list(_records(puzzles[settings.validation : held_out], solver, 1, rng)),
    )


_Puzzle = tuple[tuple[int, ...], int]


def _draw_pool(settings: CountdownSettings, solver: Solver, wanted: int, rng: random.Random) -> list[_Puzzle]:
    """Different solvable puzzles to draw from.

    Where there are many more multisets than wanted puzzles, each gets one target, drawn first and uniformly (as Gandhi et
    al. 2024 do): then no two splits share their numbers.  Else they are all puzzles of randomly drawn multisets, about
    ``_POOL_FACTOR * wanted`` of them or all there are.
    """
    if settings.numbers < 2 or settings.max_number < 1 or settings.max_value < 1:
        raise UnusableError(
            f"countdown: numbers={settings.numbers}, max_number={settings.max_number}, max_value={settings.max_value} "
            "make no puzzle; numbers must be at least 2, the others at least 1"
        )
    targets = range(settings.min_target, (settings.max_target or settings.max_value) + 1)
    multisets = math.comb(settings.max_number + settings.numbers - 1, settings.numbers)
    if multisets >= _POOL_FACTOR * wanted:
        drawn = list(itertools.islice(_draw_puzzles(settings, solver, targets, wanted, multisets, rng), wanted))
        if len(drawn) == wanted or multisets > _ENUMERABLE:
            return drawn
    everything = list(_multisets(settings))
    pool: list[_Puzzle] = []
    for numbers in rng.sample(everything, len(everything)):
        pool += [(numbers, target) for target in solver.targets(numbers) if target in targets]
        if len(pool) >= _POOL_FACTOR * wanted:
            break
    return pool


def _draw_puzzles(
    settings: CountdownSettings, solver: Solver, targets: range, wanted: int, multisets: int, rng: random.Random
) -> Iterator[_Puzzle]:
    """Solvable puzzles of different multisets, one of each."""
    drawn = _draw_numbers(settings, targets, wanted, multisets, rng)
    return ((numbers, target) for numbers, target in drawn if solver.solutions(numbers, target))


def _draw_numbers(
    settings: CountdownSettings, targets: range, wanted: int, multisets: int, rng: random.Random
) -> Iterator[_Puzzle]:
    """Different multisets, each with a target that may be out of reach: numbers drawn independently until half of all
    ``multisets`` were, then the others in random order, where there are not too many to list and not few enough to list their
    puzzles."""
    seen: set[tuple[int, ...]] = set()
    most = min(multisets // 2, _TRIES * wanted)
    while len(seen) < most:
        numbers = tuple(sorted(rng.choices(range(1, settings.max_number + 1), k=settings.numbers)))
        target = rng.choice(targets)
        if numbers not in seen:
            seen.add(numbers)
            yield numbers, target
    if _ENUMERABLE < multisets <= _LISTED:
        others = [numbers for numbers in _multisets(settings) if numbers not in seen]
        rng.shuffle(others)
        for numbers in others:
            yield numbers, rng.choice(targets)


def _multisets(settings: CountdownSettings) -> Iterator[tuple[int, ...]]:
    """All numbers that a puzzle can have."""
    return itertools.combinations_with_replacement(range(1, settings.max_number + 1), settings.numbers)


def _records(puzzles: Iterable[_Puzzle], solver: Solver, most: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for numbers, target in puzzles:
        solutions = solver.solutions(numbers, target)
        for solution in rng.sample(solutions, min(most, len(solutions))):
            yield {
                "input": question_text(numbers, target),
                "output": "\n".join([*solution.equations(), f"#### {solution.expression()}"]),
                "numbers": list(numbers),
                "target": target,
                "num_solutions": len({found.form for found in solutions}),
            }


def sentences(settings: CountdownSettings) -> list[str]:
    """Every equation ``a op b = c`` a gold chain of these ranges can hold."""
    largest = max(settings.max_value, settings.max_number)
    return [
        f"{larger} {operator} {smaller} = {value}"
        for larger in range(1, largest + 1)
        for smaller in range(1, larger + 1)
        for operator, value in _results(larger, smaller, settings.max_value)
    ]


def vocabulary(settings: CountdownSettings) -> list[str]:
    """Every word of the task's texts, the newline among them."""
    numbers = range(1, max(settings.max_value, settings.max_number) + 1)
    return [*OPERATORS, "(", ")", "=", "->", "####", "\n", *map(str, numbers)]


def write(settings: CountdownSettings, seed: int, folder: str | os.PathLike[str]) -> dict[str, int]:
    """Generate and write ``{train,validation,test,sentences}.jsonl`` and ``tokenizer/`` into ``folder``.

    Returns the number of lines per file.  Each file appears whole or not at all.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    splits = generate(settings, seed)
    contents: dict[str, list[dict[str, Any]]] = {
        "train.jsonl": splits.train,
        "validation.jsonl": splits.validation,
        "test.jsonl": splits.test,
        "sentences.jsonl": [{"text": text} for text in sentences(settings)],
    }
    for name, rows in contents.items():
        aside = target / f".{name}.{os.getpid()}"
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        aside.replace(target / name)
    build_word_tokenizer(vocabulary(settings)).save_pretrained(target / "tokenizer")
    return {name: len(rows) for name, rows in contents.items()}


def check_answer(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``expression`` makes ``target`` from all ``numbers``, each used once.  Never raises."""
    return check_expression(expression, numbers, target)


def check_chain(lines: Sequence[str], numbers: Sequence[int], target: int) -> bool:
    """Whether the steps ``a op b = c`` alone solve the puzzle.  Never raises."""
    return check_steps(lines, numbers, target)


def canonical(expression: str) -> str:
    """Normal form of an answer: equal for solutions that differ in order only."""
    return canonical_expression(expression)


class CountdownTask:
    """The Countdown checker behind the interface of :class:`ladir.tasks.Task`."""

    name = "countdown"

    def check(self, record: Record) -> None:
        """Raise UnusableError where the record is no puzzle."""
        _puzzle_of(record)

    def verdict(self, answer: str, record: Record) -> Verdict:
        """Whether the answer solves the record's puzzle.  Raises UnusableError on a record that is none."""
        return Verdict(check_answer(answer, *_puzzle_of(record)))

    def unread(self, record: Record) -> bool:
        """Never: answers are computed."""
        return False

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the decoded thoughts alone solve the record's puzzle."""
        return check_chain(thoughts, *_puzzle_of(record))

    def lenient(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the steps are exact and end in the target; which numbers they start from is not asked.

        So the published figures of discrete diffusion on Countdown are judged (Ye et al. 2024, "Beyond autoregression: discrete
        diffusion for complex reasoning and planning", arXiv 2410.14157, and its code).
        """
        return ends_in(thoughts, _puzzle_of(record)[1])

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        """Whether the steps are exact and compute the answer's expression, up to order."""
        return steps_agree(thoughts, answer)

    def canonical(self, answer: str) -> str:
        """Normal form of an answer."""
        return canonical(answer)


def _puzzle_of(record: Record) -> tuple[list[int], int]:
    numbers, target = record.reference.get("numbers"), record.reference.get("target")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or type(target) is not int:
        raise UnusableError(
            f'{record.source}: not a Countdown record: it needs "numbers" (a list of integers) and "target" (an '
            "integer); write such files with `python -m ladir countdown`, or choose evaluate.task=maths"
        )
    return numbers, target
