"""Judges an attempt at a task of HumanEval+ or MBPP+ by the task's own solution, input by input, as EvalPlus 0.3.1 does.

This text is a part of such a record's tests (:func:`ladir.data.formats.read_published`): it runs in the sandbox, behind the
attempt and in its module.  Hence the long names, which an attempt will not use, and no import but in functions.

======= ====================================================================================================
rule    an output is right, if it is not near the expected one, where
======= ====================================================================================================
equal   it equals the expected one
set     both have the same entries, in whatever order and number
found   both are None, or neither is; a truth value is compared with whether the solution found something
pyramid it equals the expected one, or is the surface for a height that is that of the pyramid, not of a side
digits  it equals the expected one, or that of numbers filled with zeros to one length
root    the polynomial is within the tolerance of 0 there
======= ====================================================================================================
"""

from __future__ import annotations

TYPE_CHECKING = False  # an attempt may have a Callable of its own
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def plus_judge(attempt: Callable, task: tuple[str, str, str, float], inputs: list[Callable[[], list[list]]]) -> None:
    """Raise AssertionError at the first output that is wrong, and whatever the attempt raises.

    ``task``: the program of its solution, the function's name, the rule, the tolerance; ``inputs``: functions that make lists of
    arguments, anew for each call, since either side may change what it is given.
    """
    solution, name, rule, tolerance = task
    names: dict[str, Callable] = {}
    exec(solution, names)  # noqa: S102 (in the sandbox)
    for make in inputs:
        near = tolerance
        for place, (given, others) in enumerate(zip(make(), make(), strict=True), start=1):
            if rule == "root":  # any is right
                right = abs(plus_polynomial(others[0], attempt(*given))) <= tolerance
            else:
                expected = names[name](*others)
                if rule == "found":
                    expected = expected is not None
                found = attempt(*given)
                right = plus_equal(rule, found, expected, others, near)
                # As in EvalPlus, the tolerance of floats then holds for the list's other inputs, too.
                near = near or (1e-6 if plus_is_floats(expected) else 0.0)
                right = right or (near != 0 and type(found) is type(expected) and plus_near(found, expected, near))
            assert right, f"input {place} of {make.__name__}"


def plus_equal(rule: str, found: Any, expected: Any, given: list, tolerance: float) -> bool:
    """Whether an output for the arguments ``given`` is right by the rule."""
    if rule == "set":
        return set(found) == set(expected)
    if rule == "found" and not isinstance(found, bool):
        found = found is not None
    if found == expected:
        return True
    if rule == "pyramid":
        return bool(abs(found - plus_pyramid(*given)) <= tolerance)
    return rule == "digits" and bool(found == plus_digits(*given))


def plus_is_floats(value: object) -> bool:
    """Whether an output is a float, or a list of nothing else."""
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(entry, float) for entry in value)
    return isinstance(value, float)


def plus_near(found: object, expected: object, near: float) -> bool:
    """``numpy.allclose(found, expected, rtol=1e-7, atol=near)`` of numbers and of lists of one shape; False of all else."""
    from math import isfinite

    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return False
        return all(plus_near(one, other, near) for one, other in zip(found, expected, strict=True))
    if not isinstance(found, (int, float)) or not isinstance(expected, (int, float)):
        return False
    return found == expected or (isfinite(expected) and abs(found - expected) <= near + 1e-7 * abs(expected))


def plus_polynomial(coefficients: list[float], point: float) -> float:
    """The value at ``point``; the first coefficient is the constant."""
    from math import pow

    return sum(factor * pow(point, power) for power, factor in enumerate(coefficients))


def plus_pyramid(base: float, height: float) -> int:
    """The surface of a square pyramid of that height, to the next whole number."""
    from math import sqrt

    return round(base**2 + 2 * (base * sqrt((base / 2) ** 2 + height**2)))


def plus_digits(one: int, other: int) -> int:
    """The sum of the differences of two numbers' digits, place by place."""
    length = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(length), str(other).zfill(length), strict=True)
    return sum(abs(int(first) - int(second)) for first, second in pairs)
