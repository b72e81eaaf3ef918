"""MBPP+ as EvalPlus releases it: how a task's inputs are read, which JSON cannot hold, and how its outputs are compared.

The facts are those of EvalPlus (https://github.com/evalplus/evalplus, 0.3.1; unchanged in October 2025, commit 26d6d00):
``evalplus/data/mbpp.py`` reads inputs by the task's number, ``evalplus/eval`` compares outputs by the function's name.  Its
``MBPP_PLUS_VERSION`` is v0.2.0, of 378 tasks.  The 21 more of v0.1.0 were taken out because their own tests are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

VERSION = "v0.2.0"

_TASKS = """
2-4 6-9 11-12 14 16-20 56-59 61-72 74-75 77 79-80 82 84-106 108-109 111 113 116 118-120 123-133 135 137-142 145 160-162 165-168
170-172 222-224 226-227 230 232-235 237-240 242 244-245 247 250-253 255-257 259-262 264-274 276-287 290 292-294 296-297 299-301
305-306 308-312 388-392 394-395 397-398 404-406 409-410 412-415 418-422 424-430 432-433 435-437 439-441 445-448 450-451 453-460
462-463 465 468 470-479 554-560 562-569 572-573 576-581 583 585-594 596-600 602-608 610-612 614-616 618-620 622-624 626 628-633
635 637-639 641 643-644 720-726 728 730-737 739-745 748-755 757-760 762-767 769-773 775 777-778 780-782 784-788 790-794 796-801
803-809
"""


def task_number(task_id: Any) -> int:
    """The number in ``Mbpp/NUMBER``.  Raises ValueError where there is none, or none of the release."""
    match = re.fullmatch(r"Mbpp/(\d+)", str(task_id))
    if match is None:
        raise ValueError("its 'task_id' is not like Mbpp/2: the number says how inputs are read")
    number = int(match[1])
    if number not in _NUMBERS:
        raise ValueError(f"Mbpp/{number} is none of the {len(_NUMBERS)} tasks of {VERSION}, whose rules are known")
    return number


def arguments(number: int, given: list[Any]) -> list[Any]:
    """What a task's function is called with.  Raises ValueError where an input has not the form of that task's.

    Parsing ``repr`` of it gives the same values, with ``inf`` and ``nan`` defined.
    """
    try:
        return _READERS.get(number, list)(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an input, {repr(given)[:60]}, has not the form of Mbpp/{number}'s") from error


def rule_of(name: str) -> str:
    """How the outputs of the function of that name are compared (:mod:`ladir.tasks.isolated.plus_tests`)."""
    return _RULES.get(name, "equal")


class _Complex(complex):
    """Writes itself so that Python reads it again: its own form loses the sign of a zero, and has no literal of infinity."""

    def __repr__(self) -> str:
        return f"complex({self.real!r}, {self.imag!r})"


def _same(value: Any) -> Any:
    return value


def _tuple(value: Any, entry: Callable[[Any], Any] = _same) -> tuple[Any, ...]:
    return tuple(_list(value, entry))


def _list(value: Any, entry: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(value, list):  # a text would become its letters
        raise TypeError(f"{value!r} is no list")
    return [entry(one) for one in value]


def _tuples(value: Any) -> list[Any]:
    return _list(value, _tuple)


def _tuple_of_tuples(value: Any) -> tuple[Any, ...]:
    return _tuple(value, _tuple)


def _tuple_of_some(value: Any) -> tuple[Any, ...]:
    return _tuple(value, lambda entry: _tuple(entry) if isinstance(entry, list) else entry)


def _tuples_throughout(value: Any) -> Any:
    return _tuple(value, _tuples_throughout) if isinstance(value, list) else value


def _dict_of_tuples(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no dict")
    return {name: _tuple(entry) for name, entry in value.items()}


_Reader = Callable[[list[Any]], list[Any]]


def _each(*readers: Callable[[Any], Any]) -> _Reader:
    """One reader for each argument."""
    return lambda given: [read(argument) for read, argument in zip(readers, given, strict=True)]


def _every(read: Callable[[Any], Any]) -> _Reader:
    return lambda given: [read(argument) for argument in given]


def _numbers(text: str) -> list[int]:
    """The numbers of a text of numbers and ranges."""
    ends = [[int(end) for end in part.split("-")] for part in text.split()]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


_NUMBERS = frozenset(_numbers(_TASKS))

# Of all other tasks the inputs are what JSON holds.
_KINDS = (
    ("2 116 132 222 261 273 394 421 424 429 470 560 579 596 616 630 726 740 744 809", _every(_tuple)),
    ("63 64 70 94 120 237 272 299 409 473 614 780", _every(_tuples)),
    ("259 445", _every(_tuple_of_tuples)),
    ("580 615 791", _every(_tuples_throughout)),
    ("75 413 753", _each(_tuples, _same)),
    ("250 405 446 720 763 808", _each(_tuple, _same)),
    ("106 750", _each(_same, _tuple)),
    ("278", _each(_tuple_of_some)),
    ("722", _each(_dict_of_tuples, _same, _same)),
    ("124", _each(float, _Complex)),
    ("252", _each(_Complex)),
)
_READERS = {number: read for numbers, read in _KINDS for number in _numbers(numbers)}

_RULES = {
    "similar_elements": "set",
    "find_char_long": "set",
    "common_in_nested_lists": "set",
    "extract_singly": "set",
    "larg_nnum": "set",
    "find_dissimilar": "set",
    "Diff": "set",
    "check_str": "found",
    "text_match_three": "found",
    "text_starta_endb": "found",
    "surface_Area": "pyramid",
    "digit_distance_nums": "digits",
}
