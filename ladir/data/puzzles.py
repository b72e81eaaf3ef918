"""Countdown puzzles as others publish them, read as those that ``python -m ladir countdown`` writes.

==================== ============================================= =========================================
published by         fields                                        solution
==================== ============================================= =========================================
Ye et al. 2024       ``input`` (numbers and, last, the target,     ``output``: steps with commas between them
(arXiv 2410.14157)   with commas between them), ``output``
Gandhi et al. 2024,  ``nums``, ``target`` [, ``solution``]         ``solution``, a list of steps
TinyZero
==================== ============================================= =========================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBERS = re.compile(r"\s*[0-9]{1,18}(?:\s*,\s*[0-9]{1,18}){2,}\s*", re.ASCII)
_STEP = re.compile(r"\s*([0-9]{1,18})\s*([-+*/])\s*([0-9]{1,18})\s*=\s*([0-9]{1,18})\s*", re.ASCII)


@dataclass(frozen=True)
class Puzzle:
    """``numbers``, ascending, of which ``target`` is to be made; ``steps`` ``a op b = c`` of a solution, where there is one."""

    numbers: list[int]
    target: int
    steps: list[str]

    def question(self) -> str:
        """The puzzle as it is asked."""
        return question_text(self.numbers, self.target)

    def expression(self) -> str | None:
        """The steps as one expression; None where one is wrong, or they do not make the target of all numbers."""
        values = [(number, str(number)) for number in self.numbers]
        for step in self.steps:
            left, operator, right, _, value = step.split()
            if not _is_true(int(left), operator, int(right), int(value)):
                return None
            texts = []
            for operand in (left, right):
                place = next((place for place, (found, _) in enumerate(values) if found == int(operand)), None)
                if place is None:
                    return None
                texts.append(values.pop(place)[1])
            values.append((int(value), f"( {texts[0]} {operator} {texts[1]} )"))
        made = len(values) == 1 and values[0][0] == self.target and bool(self.steps)
        return values[0][1][2:-2] if made else None


def _is_true(left: int, operator: str, right: int, value: int) -> bool:
    if operator == "/":
        return right != 0 and left == right * value
    return {"+": left + right, "-": left - right, "*": left * right}[operator] == value


def question_text(numbers: Sequence[int], target: int) -> str:
    """A puzzle's question."""
    return f"{' '.join(map(str, numbers))} -> {target}"


def published_puzzle(row: Mapping[str, Any]) -> Puzzle | None:
    """The puzzle of a published row; None where it is none."""
    asked, solution = row.get("input"), row.get("output")
    if isinstance(asked, str) and isinstance(solution, str) and _NUMBERS.fullmatch(asked):
        *numbers, target = map(int, asked.split(","))
        steps = _steps(solution.split(","))
        return Puzzle(sorted(numbers), target, steps) if steps else None
    given, aim = row.get("nums"), row.get("target")
    if type(aim) is int and isinstance(given, list) and given and all(type(number) is int for number in given):
        written = row.get("solution")
        return Puzzle(sorted(given), aim, _steps(written) if isinstance(written, list) else [])
    return None


def _steps(texts: Sequence[Any]) -> list[str]:
    """Steps in one spelling; none where one of them is no step."""
    found = [_STEP.fullmatch(text) if isinstance(text, str) else None for text in texts]
    return [f"{step[1]} {step[2]} {step[3]} = {step[4]}" for step in found if step] if all(found) else []
