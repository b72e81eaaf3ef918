"""Maths problems (GSM8K, MATH and the like): an answer is right if it equals the gold one as mathematics.

Plain numbers are compared exactly, here.  Everything else (LaTeX, ``\\boxed``, fractions, sets, intervals, matrices,
equations) is compared by math-verify in a process of its own, which is killed where a text makes it compute or allocate
without end: such an answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from ladir.data.blocks import last_boxed
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks.verdict import Verdict
from ladir.tasks.worker import Worker

_SCRIPT = Path(__file__).with_name("isolated") / "maths_worker.py"
_MAX_LENGTH = 2_000  # characters of an answer that are looked at, from its end
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,100})\}\{([^{}]{1,100})\}")
_NUMBER = re.compile(
    r"(?<![0-9.])(-\s{0,3})?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,100})(?:\.[0-9]{1,100})?|\.[0-9]{1,100})(?![0-9])"
    r"(?:\s?/\s?([0-9]{1,100})(?![0-9]|\.[0-9]))?",
    re.ASCII,
)
# What makes a text more than a number with words around it; so does a letter that touches a digit ("3x"), and a lone one that is
# subtracted ("3 - x") or subtracted from ("x-3").  The number itself is looked at as 0.
_MATHS = re.compile(
    r"[\\^_{}|<>()\[\]*/+~±×÷√π∞!]|[^\W\d_][0-9]|[0-9][^\W\d_]|\b[^\W\d_]\s*-\s*0|0\s*-\s*[^\W\d_]\b|"
    r"\b(?:sqrt|root|pi|square|squared|cubed|power|times|plus|minus|"
    r"negative|over|divided|half|third|thirds|dozen|hundred|thousand|million|billion|log|sin|cos|tan|factorial|choose|mod|percent)\b",
    re.IGNORECASE,
)
# What makes a text with ``=`` more than one equation: "x >= 5", "x = 5 or x = 6", "x = 1, y = 2".
_SEVERAL = re.compile(r"[<>≤≥≠]|\\(?:[lg]eq?|neq?|lt|gt)\b|[0-9]\s{0,3}(?:;|or\b|and\b|,(?![0-9]{3}(?![0-9])))", re.IGNORECASE)
_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm)\s?\{([^{}]{0,200})\}|\\(?:left|right|[,;!])|\$|\\[()\[\]]")
_SPACE = re.compile(r"(?<!\w) | (?!\w)")  # between two words or numbers it counts
_ENDLESS = "took too long or too much memory to compare"
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")


def plain_number(text: str) -> Fraction | None:
    """The number of a text that holds just one, maybe with a currency, unit or words, or behind the last ``=``, exactly;
    else None.  Thousands separators, ``$``, ``%``, ``a/b`` and ``\\frac`` are understood."""
    text = text[-_MAX_LENGTH:].replace("\\$", "$").replace("\\%", "%").replace("\N{MINUS SIGN}", "-")
    text = _FRACTION.sub(lambda match: f" {match[1].strip()}/{match[2].strip()}", text).replace("-$", "$-")
    equations, _, text = text.rpartition("=")
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or _SEVERAL.search(equations):
        return None
    before, number, after = text[: found[0].start()], found[0], text[found[0].end() :]
    rest = f"{before}{number[1] or ''}0{after}"
    if re.search(r"[1-9]", rest) or _MATHS.search(rest) or int(number[3] or 1) == 0:
        return None
    value = Fraction(number[2].replace(",", "")) / int(number[3] or 1)
    return -value if _is_sign(number[1], before) else value


def _is_sign(minus: str | None, before: str) -> bool:
    """Whether a minus before a number is its sign, not a hyphen ("top-7") nor a subtraction ("all - 7")."""
    if not minus or before[-1:].isalnum():
        return False
    return minus == "-" or not before.rstrip()[-1:].isalnum()


def plain_text(text: str) -> str:
    """The text without case, white space, a final full stop, and what only changes its looks in LaTeX."""
    text = _STYLE.sub(lambda match: match[1] or "", text)
    text = _SPACE.sub("", " ".join(text.casefold().split())).rstrip(".")
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def answer_of(text: str) -> str:
    """The answer in a text: what its last ``\\boxed`` holds, or all of it; its end, where it is very long."""
    text = text[-_MAX_LENGTH:].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


class MathsTask:
    """Judges by :mod:`math_verify`; obvious cases are decided without it."""

    name = "maths"

    def __init__(self, seconds: float = 5.0, memory: int = 1 << 30) -> None:
        """``seconds`` of processor time and ``memory`` (bytes) that judging one answer may take."""
        # The process ends itself at its own limit; a wall time above it is for one that waits for other work.
        worker = Worker(_SCRIPT, [str(seconds), str(memory)], seconds=10 * seconds)
        deadly: set[str] = set()  # answers that had to be killed: each costs its time once

        def ask(request: dict[str, str], answer: str) -> dict[str, Any]:
            reply = None if answer in deadly else worker.ask(request)
            if reply is None:
                deadly.add(answer)
            return reply or {}

        # Trajectories of one question often agree: each pair of texts is compared once.
        @lru_cache(maxsize=8192)
        def compare(gold: str, answer: str) -> Verdict:
            reply = ask({"gold": gold, "answer": answer}, answer)
            equal = reply.get("equal")
            return Verdict(equal is True, reply.get("error", _ENDLESS) if equal is None else "", undecided=equal is None)

        @lru_cache(maxsize=8192)
        def form(text: str) -> str | None:
            return ask({"text": text}, text).get("form")

        self._compare, self._form = compare, form

    def check(self, record: Record) -> None:
        """Raise UnusableError where the record has no answer to compare with."""
        if not record.answer:
            raise UnusableError(
                f'{record.source}: it has no final answer to compare with; give it a field "answer", or mark it in the text '
                "(data.answer_prefixes, \\boxed)"
            )

    def verdict(self, answer: str, record: Record) -> Verdict:
        """Whether the answer equals the record's; one that takes too long to judge is undecided."""
        gold, given = answer_of(record.answer), answer_of(answer)
        if not plain_text(given):
            return Verdict(False)
        if plain_text(gold) == plain_text(given):
            return Verdict(True)
        numbers = plain_number(gold), plain_number(given)
        if None not in numbers and "%" not in gold + given:
            return Verdict(numbers[0] == numbers[1])
        return Verdict(True) if numbers[0] == numbers[1] is not None else self._compare(gold, given)

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: free-form steps are not judged."""
        return None

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        """Whether the last thought ends in the answer: in its number or, where it is none, in its text."""
        last, given = answer_of(thoughts[-1]) if thoughts else "", answer_of(answer)
        number = plain_number(given)
        if number is None:
            return bool(plain_text(given)) and plain_text(last).endswith(plain_text(given))
        numbers = _NUMBER.finditer(last.rpartition("=")[2])
        return number in (plain_number(last), *(plain_number(match[0]) for match in list(numbers)[-1:]))

    def canonical(self, answer: str) -> str:
        """A number as a reduced fraction, a formula in the computer algebra's spelling, else :func:`plain_text`."""
        given = answer_of(answer)
        number = plain_number(given)
        if number is not None:
            return str(number)
        if not re.search(r"[0-9\\^_=]", given):
            return plain_text(given)
        return self._form(given) or plain_text(given)
