"""Numbers that are right within a share of the gold ones, as the authors of some benchmarks judge them.

The rule is that of TheoremQA's own script (Chen et al. 2023, arXiv 2305.12524): a decimal gold number accepts what is within
4 % of it, a whole one what rounds to it, a list of numbers the same of each, whatever their order.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from typing import Any

#: a longer gold answer is no number, nor a list of some
_LONGEST = 1000


def gold_numbers(text: str) -> list[int | float]:
    """The number, or the numbers of a list, that a gold answer is, as they are written: ``3.0`` is decimal, ``3`` is not.

    Empty where it is anything else.
    """
    try:
        found: Any = ast.literal_eval(text.strip()) if len(text) <= _LONGEST else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    numbers = list(found) if isinstance(found, list | tuple) else [found]
    return numbers if all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in numbers) else []


def within(gold: Sequence[int | float], given: Sequence[float], share: float) -> bool:
    """Whether the finite numbers ``given`` are the gold ones in any order, decimal ones within a ``share`` of these."""
    pairs = zip(sorted(gold), sorted(given), strict=False)
    return len(given) == len(gold) > 0 and all(_near(one, other, share) for one, other in pairs)


def _near(gold: int | float, given: float, share: float) -> bool:
    apart = share * abs(gold)
    return gold - apart <= given <= gold + apart if isinstance(gold, float) else round(given) == gold
