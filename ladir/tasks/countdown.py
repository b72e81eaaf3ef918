"""Countdown: make a target from given numbers, each used once, with + - * /.  Solver, generator and checker.

Every intermediate result of a gold solution is an integer in 1..max_value (differences positive, divisions exact) and
the larger operand is written first; the checker accepts any correct expression or chain.  Numbers of a question ascend.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ladir.config import CountdownSettings
from ladir.data.records import Record
from ladir.tasks.arithmetic import (
    OPERATORS,
    Form,
    canonical_expression,
    check_expression,
    check_steps,
    combine_forms,
    number_form,
)
from ladir.tokens import build_word_tokenizer

logger = logging.getLogger(__name__)

# Puzzles are drawn from a pool this many times larger than asked for (or all there are), so that large ranges, which
# cannot be enumerated, still give a varied sample.
_POOL_FACTOR = 4


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
    """All solutions of all targets for a multiset of numbers, each once up to commutativity and associativity."""

    def __init__(self, max_value: int) -> None:
        self.max_value = max_value
        # Sub-multisets recur in many puzzles: solving each once is what makes the enumeration cheap.
        self._solve = cache(self._solve_uncached)

    def solve(self, numbers: Sequence[int]) -> dict[int, list[Solution]]:
        """Target -> its distinct solutions, for every target in 1..max_value that ``numbers`` reach."""
        targets: dict[int, list[Solution]] = {}
        for solution in self._solve(tuple(sorted(numbers))):
            if solution.value <= self.max_value:
                targets.setdefault(solution.value, []).append(solution)
        return targets

    def _solve_uncached(self, numbers: tuple[int, ...]) -> tuple[Solution, ...]:
        if len(numbers) == 1:
            return (Solution(numbers[0], number_form(numbers[0])),)
        found: dict[Form, Solution] = {}
        for first, second in _partitions(numbers):
            for one, other in itertools.product(self._solve(first), self._solve(second)):
                # Of equal operands either may be divided by the other; otherwise the larger one comes first.
                for larger, smaller in ((one, other), (other, one)):
                    if larger.value >= smaller.value:
                        self._combine(larger, smaller, found)
        return tuple(found.values())

    def _combine(self, larger: Solution, smaller: Solution, found: dict[Form, Solution]) -> None:
        for operator, value in _results(larger.value, smaller.value, self.max_value):
            form = combine_forms(operator, larger.form, smaller.form)
            if form not in found:
                found[form] = Solution(value, form, operator, larger, smaller)


def _partitions(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ways to part a sorted multiset in two non-empty ones, each once whatever the order."""
    seen = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in itertools.combinations(range(len(numbers)), size):
            first = tuple(numbers[i] for i in chosen)
            second = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            key = (first, second) if size * 2 < len(numbers) else (min(first, second), max(first, second))
            if key not in seen:
                seen.add(key)
                yield key


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
    """Draw puzzles and their gold solutions; the same settings and seed give the same splits.

    Training puzzles get up to ``solutions_per_puzzle`` records, the others one.  Raises ValueError where the ranges do
    not hold as many puzzles as asked for.
    """
    rng = random.Random(seed)
    wanted = settings.train + settings.validation + settings.test
    pool = _draw_pool(settings, wanted, rng)
    if len(pool) < wanted:
        raise ValueError(
            f"countdown: {wanted} puzzles are asked for (train + validation + test) but numbers={settings.numbers}, "
            f"max_number={settings.max_number}, max_value={settings.max_value} allow only {len(pool)}; ask for fewer "
            "or raise countdown.max_number or countdown.max_value"
        )
    puzzles = rng.sample(pool, wanted)
    held_out = settings.validation + settings.test
    return Splits(
        train=list(_records(puzzles[held_out:], settings.solutions_per_puzzle, rng)),
        validation=list(_records(puzzles[: settings.validation], 1, rng)),
        test=list(_records(puzzles[settings.validation : held_out], 1, rng)),
    )


_Puzzle = tuple[tuple[int, ...], int, list[Solution]]


def _draw_pool(settings: CountdownSettings, wanted: int, rng: random.Random) -> list[_Puzzle]:
    """Puzzles of randomly drawn multisets, about ``_POOL_FACTOR * wanted`` of them or all there are."""
    solver = Solver(settings.max_value)
    pool: list[_Puzzle] = []
    for numbers in _draw_multisets(settings, rng):
        pool += [(numbers, target, solutions) for target, solutions in sorted(solver.solve(numbers).items())]
        if len(pool) >= _POOL_FACTOR * wanted:
            break
    return pool


def _draw_multisets(settings: CountdownSettings, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Sorted multisets of numbers without repetition, in random order."""
    if settings.numbers < 2 or settings.max_number < 1 or settings.max_value < 1:
        raise ValueError(
            f"countdown: numbers={settings.numbers}, max_number={settings.max_number}, max_value={settings.max_value} "
            "make no puzzle; numbers must be at least 2, the others at least 1"
        )
    everything = itertools.combinations_with_replacement(range(1, settings.max_number + 1), settings.numbers)
    enumerable = list(itertools.islice(everything, 200_001))
    if len(enumerable) <= 200_000:
        yield from rng.sample(enumerable, len(enumerable))
        return
    seen: set[tuple[int, ...]] = set()
    while len(seen) < 200_000:
        numbers = tuple(sorted(rng.choices(range(1, settings.max_number + 1), k=settings.numbers)))
        if numbers not in seen:
            seen.add(numbers)
            yield numbers


def _records(puzzles: Iterable[_Puzzle], most: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for numbers, target, solutions in puzzles:
        for solution in rng.sample(solutions, min(most, len(solutions))):
            yield {
                "input": f"{' '.join(map(str, numbers))} -> {target}",
                "output": "\n".join([*solution.equations(), f"#### {solution.expression()}"]),
                "numbers": list(numbers),
                "target": target,
                "num_solutions": len(solutions),
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

    def correct(self, answer: str, record: Record) -> bool:
        """Whether the answer solves the record's puzzle.  Raises ValueError on a record that is no puzzle."""
        return check_answer(answer, *_puzzle_of(record))

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the decoded thoughts alone solve the record's puzzle."""
        return check_chain(thoughts, *_puzzle_of(record))

    def canonical(self, answer: str) -> str:
        """Normal form of an answer."""
        return canonical(answer)


def _puzzle_of(record: Record) -> tuple[list[int], int]:
    numbers, target = record.reference.get("numbers"), record.reference.get("target")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or type(target) is not int:
        raise ValueError(
            f'{record.source}: not a Countdown record: it needs "numbers" (a list of integers) and "target" (an '
            "integer); write such files with `python -m ladir countdown`, or choose evaluate.task=maths"
        )
    return numbers, target
