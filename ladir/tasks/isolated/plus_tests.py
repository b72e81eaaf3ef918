"""Judges an attempt at a HumanEval+ task by the task's own solution, input by input, as EvalPlus does.

This text is a part of such a record's tests (:func:`ladir.data.formats.read_published`): it runs in the sandbox, behind the
attempt and in its module.  Hence the long names, which an attempt will not use, and no import but in functions.
"""

from __future__ import annotations

TYPE_CHECKING = False  # an attempt may have a Callable of its own
if TYPE_CHECKING:
    from collections.abc import Callable


def plus_judge(attempt: Callable, task: tuple[str, str, float], inputs: list[Callable[[], list[list]]]) -> None:
    """Raise AssertionError at the first output that is wrong, and whatever the attempt raises.

    ``task``: the program of its solution, the function's name, the tolerance; ``inputs``: functions that make lists of arguments,
    anew for each call, since either side may change what it is given.
    """
    solution, name, tolerance = task
    names: dict[str, Callable] = {}
    exec(solution, names)  # noqa: S102 (in the sandbox)
    for make in inputs:
        near = tolerance
        for place, (given, others) in enumerate(zip(make(), make(), strict=True), start=1):
            if name == "find_zero":  # any root is right
                right = abs(plus_polynomial(others[0], attempt(*given))) <= tolerance
            else:
                expected = names[name](*others)
                # As in EvalPlus, the tolerance of floats then holds for the list's other inputs, too.
                near = near or (1e-6 if plus_is_floats(expected) else 0.0)
                right = plus_equal(attempt(*given), expected, near)
            assert right, f"input {place} of {make.__name__}"


def plus_is_floats(value: object) -> bool:
    """Whether an output is a float, or a list of nothing else."""
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(entry, float) for entry in value)
    return isinstance(value, float)


def plus_equal(found: object, expected: object, near: float) -> bool:
    """Whether two outputs are equal, or of one type and within the tolerance ``near`` (0: none)."""
    return bool(found == expected) or (near != 0 and type(found) is type(expected) and plus_near(found, expected, near))


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
