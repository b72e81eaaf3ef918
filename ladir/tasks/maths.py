"""Maths word problems (GSM8K and the like): an answer is right if its final number equals the gold one exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ladir.data.records import Record

_MAX_LENGTH = 10_000  # characters of an answer that are looked at, from its end
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,100})\}\{([^{}]{1,100})\}")
_NUMBER = re.compile(
    r"(?<![0-9.])(-\s?)?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,100})(?:\.[0-9]{1,100})?|\.[0-9]{1,100})(?![0-9])"
    r"(?:\s?/\s?([0-9]{1,100})(?![0-9.]))?",
    re.ASCII,
)


def final_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; thousands separators, ``$``, ``%``, ``a/b`` and ``\\frac`` are understood."""
    text = text[-_MAX_LENGTH:].replace("\\$", "$").replace("\\%", "%").replace("\N{MINUS SIGN}", "-")
    text = _FRACTION.sub(lambda match: f"{match[1].strip()}/{match[2].strip()}", text).replace("-$", "$-")
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = Fraction(last[2].replace(",", ""))
    # A minus after a digit or letter is a subtraction or a hyphen, not a sign.
    if last[1] and not text[: last.start()].rstrip()[-1:].isalnum():
        value = -value
    if last[3]:
        if int(last[3]) == 0:
            return None
        value /= int(last[3])
    return value


class MathsTask:
    """Compares final numbers; answers without a number are compared as text."""

    name = "maths"

    def correct(self, answer: str, record: Record) -> bool:
        """Whether the answer's final number equals that of the record's answer."""
        return self.canonical(answer) == self.canonical(record.answer)

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: free-form steps are not judged."""
        return None

    def canonical(self, answer: str) -> str:
        """The final number as a reduced fraction, else the text in lower case with its white space normalised."""
        number = final_number(answer)
        if number is not None:
            return str(number)
        return " ".join(answer[-_MAX_LENGTH:].lower().rstrip(". \n").split())
