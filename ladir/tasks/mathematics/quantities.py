"""Numbers as people write them, exactly, with their unit; times of the day."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from ladir.tasks.mathematics.units import CALCULATING, FILLERS, Unit, is_word, ratio, read_unit, unit_named

_MAX_EXPONENT = 400  # of ten, in scientific notation
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?:'[0-9]{3})+"
_DECIMAL = rf"(?:(?:{_GROUPED}|[0-9]{{1,300}})(?:\.[0-9]{{1,300}})?|\.[0-9]{{1,300}})(?![0-9])"
_TEN = (
    r"\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^\{(?P<ten>[+-]?[0-9]{1,4})\}|\^(?P<power>[+-]?[0-9]{1,4}))"
    r"|[eE](?P<e>[+-]?[0-9]{1,4})(?![0-9A-Za-z])"
)
_FRACTION = r"(?:\\frac\s*\{\s*(-?[0-9]{1,300})\s*\}\s*\{\s*([0-9]{1,300})\s*\}|([0-9]{1,300})\s*(?:/|out of)\s*([0-9]{1,300}))"
_NUMBER = re.compile(
    r"(?P<sign>[+-]\s{0,3}|(?:minus|negative)\s+)?(?P<currency>(?:US)?[$€£¥₹]\s?|(?:USD|EUR|INR|Rs\.?)\s)?(?P<inner>-\s?)?"
    rf"(?:(?P<whole>[0-9]{{1,300}})(?:\s+and\s+|\s+|\s*(?=\\))(?P<part>{_FRACTION})"
    rf"|(?P<fraction>{_FRACTION})"
    rf"|(?P<european>[0-9]{{1,3}}(?:\.[0-9]{{3}})+,[0-9]{{1,30}})(?![0-9])"
    r"|(?P<start>[0-9]{0,100}\.[0-9]{0,100})(?:\\overline\s*\{\s*(?P<over>[0-9]{1,100})\s*\}|\((?P<round>[0-9]{1,100})\))"
    rf"|(?P<decimal>{_DECIMAL})(?:{_TEN})?)"
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "lakh": 5, "crore": 7}
_MAGNITUDE = re.compile(rf"\s*-?\s*({'|'.join(_MAGNITUDES)}|dozen)s?\b", re.IGNORECASE)
_SHORT = {"k": 3, "K": 3, "M": 6, "B": 9, "bn": 9, "mn": 6}
_SHORT_MAGNITUDE = re.compile(r" ?(?:[kKMB]|bn|mn)(?![A-Za-z])")
_PERCENT = re.compile(r"\s*(?:%|(?:percent(?:age)?|per cent|pct)\b)", re.IGNORECASE)
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: number for number, word in enumerate(_ONES)} | {word: 10 * number for number, word in enumerate(_TENS, start=2)}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_SPELLED_OUT = re.compile(
    rf"(?:(minus|negative)\s+)?((?:(?:{'|'.join([*_WORDS, *_MAGNITUDES, 'dozen', 'a', 'an'])})(?:\s+and\s+(?=[a-z])|[\s-]+|$))+)",
    re.IGNORECASE,
)
_PART = re.compile(
    rf"(?:(minus|negative)\s+)?(?:({'|'.join(_ONES)}|an?)[\s-]+(?={'|'.join(_PARTS)})|(?=half\b))({'|'.join(_PARTS)})s?\b(?!\s*a\b)",
    re.IGNORECASE,
)
_HALF = re.compile(rf"half an? ({'|'.join(_MAGNITUDES)}|dozen)\b", re.IGNORECASE)
_TIME = re.compile(
    r"(?:at\s+)?(?:([0-9]{1,2})(?::([0-9]{2}))?(?::[0-9]{2})?\s*(?:([ap])\.?\s?m\b\.?|(o'?\s?clock))|([0-9]{1,2}):([0-9]{2})(?:\s*h(?:ours?)?)?)",
    re.IGNORECASE,
)
# What makes a formula of a number and what is behind it: no unit begins with a power or a product, or has a power that varies.
_OPERATION = re.compile(
    r"[=<>|\[\]()&_!%~]|\\(?!circ|cdot|times)|^[-+*:;{]|^\s*(?:\^(?!\\circ)|\\(?:cdot|times)\b)|\^\{?[A-Za-z]|\s[-+*]\s"
)


@dataclass(frozen=True)
class Quantity:
    """An exact number with what it counts or measures."""

    value: Fraction
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True)
class Time:
    """A time of the day: minutes after twelve, and which half of the day where it is said."""

    minutes: int
    half: str | None


def read_quantity(text: str, loose: bool = False) -> Quantity | None:
    """The quantity that a text in one spelling is: ``-3 1/2``, ``$1.5 million``, ``60 km/h``, ``5 ft 6 in``; else None.

    ``loose``: a letter that touches the number may be its unit (``5m``), or a thousand (``5k``), where it could be a factor.
    """
    text = text.strip()
    number = _read_number(text, loose)
    if number is None:
        return None
    rest = text[number.end :].strip()
    unit = unit_named(number.currency) if number.currency else None
    if not rest or (number.percent and not re.search(r"[0-9\\^_=+*/]", rest)):
        return Quantity(number.value, unit, number.percent)
    if re.search(r"[0-9]", rest) and (compound := _compound(number.value, rest)):
        return compound
    if not _is_unit(rest, touches=text[number.end] != " ", loose=loose):
        return None
    return Quantity(number.value, unit or read_unit(rest), number.percent)


def same(gold: Quantity, answer: Quantity) -> bool | None:
    """Whether two quantities are the same.  A unit that only one of them names is passed over; of percent and its hundredth
    either is accepted where only one says percent."""
    factor = ratio(answer.unit, gold.unit)
    if factor is None:
        return False
    if gold.percent != answer.percent:
        percent, other = (gold.value, answer.value) if gold.percent else (answer.value, gold.value)
        return other in (percent, percent / 100)
    return gold.value == answer.value * factor


def last_number(text: str) -> Fraction | None:
    """The last number of a text in one spelling, behind its last ``=`` where there is one; None where there is none."""
    text = text.rpartition("=")[2].strip()
    numbers = [(match, value) for match in _NUMBER.finditer(text) if (value := _value_of(match)) is not None]
    if not numbers:
        return None
    match, value = numbers[-1]
    return -value if match.start() == 0 and text.startswith("-") else value


def read_time(text: str) -> Time | None:
    """A time of the day: ``5 p.m.``, ``17:00``, ``5 o'clock``, ``noon``; else None."""
    text = text.strip()
    if named := {"noon": Time(0, "p"), "midnight": Time(0, "a"), "12 noon": Time(0, "p"), "12 midnight": Time(0, "a")}.get(
        text.lower()
    ):
        return named
    match = _TIME.fullmatch(text.removesuffix(".") if not re.search(r"m\.$", text, re.IGNORECASE) else text)
    if match is None:
        return None
    hour, minute = int(match[1] or match[5]), int(match[2] or match[6] or 0)
    half = match[3].lower() if match[3] else {True: "p", False: None}[hour > 12]
    half = "a" if hour == 0 and match[5] else half
    if hour > 24 or minute > 59 or (match[3] and not 1 <= hour <= 12):
        return None
    return Time(hour % 12 * 60 + minute, half)


def only_time(text: str) -> Time | None:
    """The one time of the day in a text that names its half of the day and holds no other number; else None."""
    found = [match for match in _TIME.finditer(text) if match[3]]
    if len(found) != 1 or re.search(r"[0-9]", text[: found[0].start()] + text[found[0].end() :]):
        return None
    return read_time(found[0][0])


def same_time(gold: Time, answer: Time) -> bool | None:
    """Whether two times are the same; None where the answer does not say which half of the day, and the gold one does."""
    if gold.minutes != answer.minutes or (gold.half and answer.half and gold.half != answer.half):
        return False
    return None if gold.half and not answer.half else True


@dataclass(frozen=True)
class _Number:
    """A number at a text's beginning, with its marks, and the place where it ends."""

    value: Fraction
    end: int
    percent: bool = False
    currency: str = ""


def _read_number(text: str, loose: bool) -> _Number | None:
    number = _read_words(text) or _read_digits(text, loose)
    percent = _PERCENT.match(text, number.end) if number else None
    return replace(number, percent=True, end=percent.end()) if number and percent else number


def _read_words(text: str) -> _Number | None:
    """``twenty-four``, ``two thirds``, ``half``."""
    if half := _HALF.match(text):
        return _Number(Fraction(12 if half[1].lower() == "dozen" else 10 ** _MAGNITUDES[half[1].lower()], 2), half.end())
    match = _PART.match(text) or _SPELLED_OUT.match(text)
    if match is None:
        return None
    value = _in_words(match[2] or "one")
    if match.re is _PART:
        value = (value or Fraction(1)) / _PARTS[match[3].lower().rstrip("s")]
    return None if value is None else _Number(-value if match[1] else value, match.start() + len(match[0].rstrip()))


def _read_digits(text: str, loose: bool) -> _Number | None:
    match = _NUMBER.match(text)
    value = _value_of(match) if match else None
    if match is None or value is None:
        return None
    end, currency = match.end(), (match["currency"] or "").strip().replace("US$", "$")
    while magnitude := _MAGNITUDE.match(text, end):
        name = magnitude[1].lower()
        value, end = value * (12 if name == "dozen" else 10 ** _MAGNITUDES[name]), magnitude.end()
    short = _SHORT_MAGNITUDE.match(text, end)
    if short and (currency or (loose and short[0] in "kK")):
        value, end = value * 10 ** _SHORT[short[0].strip()], short.end()
    negative = ((match["sign"] or "+")[0] in "-mn") != bool(match["inner"])
    return _Number(-value if negative else value, end, currency=currency)


def _value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of _NUMBER without its sign; None where a fraction has no value or is none of a mixed number."""
    if fraction := match["part"] or match["fraction"]:
        top, bottom = map(int, re.findall(r"-?[0-9]+", fraction))
        if bottom == 0 or (match["whole"] and not 0 < top < bottom):
            return None
        return int(match["whole"] or 0) + Fraction(top, bottom)
    if match["european"]:
        return Fraction(match["european"].replace(".", "").replace(",", "."))
    if match["start"]:
        digits, places = match["over"] or match["round"], len(match["start"].partition(".")[2])
        return Fraction(match["start"] + "0") + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    exponent = int(match["ten"] or match["power"] or match["e"] or 0)
    value = Fraction(re.sub("[, ']", "", match["decimal"]))
    return value * Fraction(10) ** exponent if abs(exponent) <= _MAX_EXPONENT else None


def _in_words(text: str) -> Fraction | None:
    """A number in words; None where there is none ("a")."""
    total, group, counted = 0, 0, False
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _WORDS:
            group, counted = group + _WORDS[word], True
        elif word == "hundred" or word == "dozen":
            group, counted = max(group, 1) * (100 if word == "hundred" else 12), True
        elif word in _MAGNITUDES:
            total, group, counted = total + max(group, 1) * 10 ** _MAGNITUDES[word], 0, True
    return Fraction(total + group) if counted else None


def _is_unit(rest: str, touches: bool, loose: bool) -> bool:
    """Whether what follows a number may be its unit: no further number, operator or formula, and no variables."""
    if _OPERATION.search(rest) or CALCULATING.match(rest):
        return False
    word = re.match(r"[A-Za-z]+", rest)
    if (word and word[0].lower() in ("or", "and", "to", "than")) or (word and not _may_follow(word[0], touches, loose)):
        return False
    digits = re.sub(r"(?<=[A-Za-z.\s])\^?\{?-?[1-9]\}?(?![0-9])", "", rest) if re.search(r"[A-Za-z$€£]\s?\^", rest) else rest
    return not re.search(r"[0-9]", digits)


def _may_follow(word: str, touches: bool, loose: bool) -> bool:
    """Whether a word behind a number is its unit or goes on in prose, and is no factor."""
    if len(word) == 1:
        return word in ("mgL" if touches and loose else "" if touches else "mgshlLNJW")
    known = unit_named(word) is not None
    return known or (not touches and (is_word(word) or word.lower() in FILLERS))


def _compound(value: Fraction, rest: str) -> Quantity | None:
    """``value`` and the parts that follow, of one dimension: hours and minutes, feet and inches."""
    parts = [(value, "")]
    for piece in re.split(r"(?<![0-9.])(?=[0-9]+(?:\.[0-9]+)?\s*[A-Za-z])", rest):
        number = re.match(r"[0-9]+(?:\.[0-9]+)?", piece)
        if number:
            parts.append((Fraction(number[0]), piece[number.end() :]))
        else:
            parts[-1] = (parts[-1][0], piece)
    units = [read_unit(re.sub(r"(?:,|\band)\s*$", "", words.strip()).strip()) for _, words in parts]
    first = units[0]
    if len(parts) < 2 or first is None or not first.known:
        return None
    factors = [ratio(unit, first) if unit else None for unit in units]
    sizes = [factor for factor in factors if factor is not None]
    if len(sizes) < len(parts) or any(later >= earlier for earlier, later in itertools.pairwise(sizes)):
        return None
    return Quantity(sum((number * factor for (number, _), factor in zip(parts, sizes, strict=True)), Fraction(0)), first)
