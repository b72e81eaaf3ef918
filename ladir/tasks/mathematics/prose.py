"""Where the answer is in what a model writes, and what it is: a choice, a time, a quantity, a form, or words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from ladir.data.blocks import last_boxed
from ladir.tasks.mathematics.forms import Form, has_words, names_a_value, read_form
from ladir.tasks.mathematics.quantities import Quantity, Time, only_time, read_quantity, read_time
from ladir.tasks.mathematics.spelling import folded_words, spelled
from ladir.tasks.mathematics.units import stem

_MAX_LENGTH = 2_000  # characters of an answer that are looked at, from its end
_MAX_PART = 600  # characters of the sentence that is read: what goes on without end is no answer
_MAX_PIVOTS = 12
_MARKED = re.compile(r"\banswer\b\s*(?:\bis\b|\bare\b|[:=])+\s*|(?:^|\n)\W*answer\s+", re.IGNORECASE)
_STATED = re.compile(r"\banswer\s*(?:is|:)[\s:*]*[$\\(]*-?[0-9]", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<![ap]\.m)(?<!\b[A-Za-z])(?<=[^\s.]{1})[.!?]\s+(?=[A-Z\"(])|\n")
_PIVOT = re.compile(
    r"(?:\b(?:it's|that's|is|are|was|were|equals?|be|becomes|gives?|gets?|yields?|so|thus|hence|therefore|then|have|has|had|leaving"
    r"|costs?|makes?|earns?|needs?|takes?|pays?|spends?|total of|that)\b|(?<!\d):(?=\s)|:\s|\\Rightarrow|=>|\\therefore)[\s,:]*",
    re.IGNORECASE,
)
_REASON = re.compile(r"[\s,]*\b(?:because|since|where|which|as)\b", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:(?:about|approximately|approx\.?|around|roughly|exactly|only|just|precisely|a total of|equal to|the|therefore|thus|so|"
    r"on|at|in|hence|\\approx|\\therefore|\\Rightarrow|=)(?![A-Za-z])[\s,:]*)+",
    re.IGNORECASE,
)
_BEFORE = {
    "\\ge": r"at least|(?:no|not) (?:less|fewer|smaller|lower) than|(?:more|greater|larger|higher|bigger) than or equal to|"
    r"(?:a )?minimum of",
    "\\le": r"at most|(?:no|not) (?:more|greater|larger|higher) than|(?:less|fewer|smaller|lower) than or equal to|up to|"
    r"(?:a )?maximum of",
    ">": r"(?:strictly )?(?:more|greater|larger|higher|bigger) than|over|above|exceed(?:s|ing)?",
    "<": r"(?:strictly )?(?:less|fewer|smaller|lower) than|under|below",
}
_BEHIND = {
    "\\ge": r"(?:(?<=[0-9])\+(?=$|\s[A-Za-z]{3})|,?\s*(?:or|and) (?:more|greater|higher|larger|above|over|up))",
    "\\le": r",?\s*or (?:less|fewer|lower|smaller|below|under)",
}
_BETWEEN = re.compile(r"(?:between|from)\s+(.+?)\s+(?:and|to)\s+(.+)", re.IGNORECASE | re.DOTALL)
_DENIED = re.compile(
    r"\b(?:not|never|nearly|almost|cannot|neither|nor|except|without|unless|between|than|least|most|twice|double|triple"
    r"|(?:root|half|third|quarter|square|cube|logarithm|factorial) of)\b|n't\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|neither|cannot|isn't|aren't|wasn't)\b[^,;]*$", re.IGNORECASE)
_CHOICE = re.compile(r"\(([A-Za-z])\)\.?|([A-Z])[.):]?|\(([A-Za-z])\)[.:]?\s*(\S.*)|([A-Z])[.):]\s+(\S.*)", re.DOTALL)
_OPTION = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s*\(?([A-Z])\)?(?![A-Za-z])|^\(?([A-Z])\)? is (?:the )?(?:correct|right|answer|best)\b"
)
_BASED = re.compile(
    r"(-?[0-9A-F]{1,200}(?:\.[0-9A-F]{1,200})?)\s*"
    r"(?:_\s*\{?\s*\(?([0-9]{1,2}|[a-z]+)\)?\s*\}?|\(?\s*(?:in )?base[ -]([0-9]{1,2}|[a-z]+)\)?)",
    re.IGNORECASE,
)
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
_RATIO = re.compile(r"[0-9]{1,50}(?:\.[0-9]{1,50})?(?:\s*(?::|\bto\b)\s*[0-9]{1,50}(?:\.[0-9]{1,50})?)+")
_JOINED = re.compile(r"(?:\}|\$|\s|,|;|\\q?quad|\\(?:text|mathrm)\{|\\[,;: ()\[\]]|\b(?:and|or)\b)*")
_VALUE = re.compile(r"[0-9\\^_=<>|+*/]")
_HEAD = re.compile(r"((?:[A-Za-z][A-Za-z']*(?:[\s,\"]+|-(?=[0-9])))*)(?=[-+]?\s?[$\u20ac\u00a3\u00a5\u20b9]?\s?[0-9.\\])")


@dataclass(frozen=True)
class Reading:
    """What an answer is; several at once where it is written so."""

    words: tuple[tuple[str, ...], ...]
    """Its words, without articles and plural endings; of the whole answer, and of what follows "is" and the like."""
    label: str | None = None
    """Of a choice, upper case."""
    rest: str = ""
    """What is said of the choice."""
    time: Time | None = None
    based: tuple[str, int] | None = None
    """Digits and the base of a number that names one."""
    ratio: tuple[Fraction, ...] | None = None
    """In lowest terms: the last part is 1, or 0."""
    quantity: Quantity | None = None
    form: Form | None = None
    mathematical: bool = False
    """Whether there are digits, signs or formulas in it."""
    opens: bool = False
    """Whether its first word stands apart: ``Yes, because ...``."""


def answer_of(text: str) -> str:
    """The answer in a text: what its last ``\\boxed`` holds (the last ones, where they are joined by "and" or commas), or all of
    it; its end, where it is very long."""
    text = text[-_MAX_LENGTH:].strip()
    boxes = last_boxes(text)
    if not boxes or _STATED.search(text, max(text.rfind("\\boxed"), text.rfind("\\fbox")) + len(boxes[-1])):
        return text
    return ", ".join(boxes)


def last_boxes(text: str) -> list[str]:
    """What the last ``\\boxed`` of a text holds, and those before it that are joined with it."""
    held, rest = list[str](), text
    while (found := last_boxed(rest)) is not None:
        start = max(rest.rfind("\\boxed"), rest.rfind("\\fbox"))
        if held and not _JOINED.fullmatch(rest[rest.index(found, start) + len(found) :]):
            break
        held.insert(0, found)
        rest = rest[:start]
    return held


@lru_cache(maxsize=8192)
def read_answer(text: str, gold: bool = False) -> Reading:
    """What an answer (:func:`answer_of`) is.  Of a gold one nothing that stands before its value is passed over."""
    part = _without_reasons(_answering_part(spelled(text)))
    variants = [variant for variant in dict.fromkeys(_variants(part)) if not _NEGATED.search(part[: part.find(variant)])]
    words = tuple(dict.fromkeys(_words(variant) for variant in variants))
    mathematical = bool(_VALUE.search(part)) or not has_words(re.sub(r"\b(?:and|or)\b", " ", part))
    label, rest = _choice(variants)
    for variant in variants:
        if found := _value(variant, words, mathematical):
            return replace(found, label=label, rest=rest)
    if not gold and (time := only_time(part)):
        return Reading(words, label, rest, time=time, mathematical=True)
    if not gold and (quantity := _only_number(part)):
        return Reading(words, label, rest, quantity=quantity, mathematical=mathematical)
    return Reading(words, label, rest, mathematical=mathematical, opens=bool(re.match(r"[A-Za-z]+[,.;:!]", part)))


def loosely(form: Form | None) -> Quantity | None:
    """The quantity of a number that a letter touches, which may be its unit: ``5m``, ``5k``."""
    if form and form[0] == "scalar" and re.fullmatch(r"[^A-Za-z]+[A-Za-z](?:\^\{[23]\})?", form[1]):
        return read_quantity(form[1], loose=True)
    return None


def _value(text: str, words: tuple[tuple[str, ...], ...], mathematical: bool) -> Reading | None:
    """The value that a text is, and nothing else; None where it is none."""
    if time := read_time(text):
        return Reading(words, time=time, ratio=_ratio(text), mathematical=True)
    if (based := _based(text)) and based[1] != 10:
        return Reading(words, based=based, mathematical=True)
    if ratio := _ratio(text):
        return Reading(words, ratio=ratio, mathematical=True)
    if bound := _bound(text):
        return Reading(words, form=bound, mathematical=mathematical)
    joined = based[0] if based else _joined(text)
    for spelling in dict.fromkeys((joined if based else text, joined, _without_remark(text))):
        if quantity := read_quantity(spelling):
            return Reading(words, quantity=quantity, form=read_form(spelling), mathematical=True)
    form = read_form(text) if mathematical or len(text) <= 3 else None
    if form is None:
        return None
    return Reading(words, quantity=_stated(form), form=form, mathematical=mathematical)


def _stated(form: Form) -> Quantity | None:
    """The number on the right of an equation that only states it: ``x = 5``, ``12 - 5 = 7``."""
    if form[0] == "equation" and names_a_value(form[1]) and form[2][0] == "scalar" and form[2][2] in ("", "%"):
        quantity = read_quantity(form[2][1])
        return quantity and Quantity(quantity.value, percent=form[2][2] == "%")
    return None


def _answering_part(text: str) -> str:
    """What follows the last "answer is", or the last sentence with a value in it, or the last one."""
    text = " ".join(text.split()) if "\\begin" in text else text
    marked = list(_MARKED.finditer(text))
    if marked and text[marked[-1].end() :].strip():
        sentence = next(iter(_sentences(text[marked[-1].end() :])), "")
        return sentence if len(sentence) <= _MAX_PART else sentence[:_MAX_PART].rpartition(" ")[0]
    sentences = _sentences(text) or [""]
    sentence = next((sentence for sentence in reversed(sentences) if _VALUE.search(sentence)), sentences[-1])
    return sentence if len(sentence) <= _MAX_PART else sentence[-_MAX_PART:].partition(" ")[2]


def _without_reasons(text: str) -> str:
    """The text before "because" and the like, where there is a value in it."""
    before = _REASON.split(text, maxsplit=1)[0]
    return before if _VALUE.search(before) else text


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]


def _variants(text: str) -> Iterator[str]:
    """The text, and what follows the words after which a value is said, longest first."""
    text = _ended(text)
    yield text
    for start in [0, *(match.end() for match in list(_PIVOT.finditer(text))[:_MAX_PIVOTS])]:
        lead = _LEAD.match(text, start)
        for begin in dict.fromkeys([start, lead.end() if lead else start]):
            if begin and (variant := text[begin:].strip()):
                yield variant


def _ended(text: str) -> str:
    """Without a final full stop, unless it belongs to a.m., p.m."""
    text = text.strip().strip("\"'`").strip()
    return text if re.search(r"\b[ap]\.\s?m\.$", text, re.IGNORECASE) else text.rstrip(".;, ")


def _joined(text: str) -> str:
    """With compound words in one: ``7-day week``, ``3 t-shirts``."""
    return re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z]{3})", "", re.sub(r"(?<=[0-9])-(?=[A-Za-z]{2})", " ", text))


def _without_remark(text: str) -> str:
    """Without what is said in words in parentheses at its end, or is in parentheses behind words: ``8 (eight)``."""
    remark = re.fullmatch(r"(.*\S)\s*\(([^()]*)\)", text)
    return remark[1] if remark and (re.search(r"[A-Za-z]{3}", remark[2]) or re.fullmatch(r"[A-Za-z\s-]{3,}", remark[1])) else text


def _only_number(text: str) -> Quantity | None:
    """The quantity with words before it, of which none changes its meaning."""
    head = _HEAD.match(text)
    if head is None or _DENIED.search(head[1]) or re.search(r"(?<![A-Za-z])(?!a\b|A\b|I\b)[A-Za-z](?![A-Za-z'])", head[1]):
        return None
    if any(read_quantity(word) for word in re.findall(r"[A-Za-z]{3,}", head[1])):
        return None
    return read_quantity(_joined(text[head.end() :]))


def _bound(text: str) -> Form | None:
    """``at least 7``, ``7 or more``, ``between 7 and 9`` as a relation of the quantity asked for."""
    if between := _BETWEEN.fullmatch(text):
        low, high = read_quantity(between[1]), read_quantity(between[2])
        return ["relation", ["\\le", "\\le"], [str(low.value), "?", str(high.value)]] if low and high else None
    for sign in _BEFORE:
        match = re.match(rf"(?:{_BEFORE[sign]})\s+", text, re.IGNORECASE)
        form = read_form(text[match.end() :]) if match else None
        if form and form[0] == "scalar":
            return ["relation", [sign], ["?", form[1]]]
    for sign, words in _BEHIND.items():
        match = re.fullmatch(rf"(.+?){words}((?:\s+[A-Za-z]+)*)", text, re.IGNORECASE | re.DOTALL)
        quantity = read_quantity(match[1]) if match else None
        if quantity:
            return ["relation", [sign], ["?", str(quantity.value)]]
    return None


def _choice(variants: list[str]) -> tuple[str | None, str]:
    """The letter of a choice, and what is said of it."""
    for variant in variants:
        if match := _CHOICE.fullmatch(variant):
            rest = (match[4] or match[6] or "").strip()
            if not re.search(r"^[A-Z][.):]\s|\([A-Z]\)|\b(?:and|or)\b\s*\(?[A-Z]\)?$", rest):
                return (match[1] or match[2] or match[3] or match[5]).upper(), rest
    named = {match[1] or match[2] for match in _OPTION.finditer(variants[0])}
    return (named.pop(), "") if len(named) == 1 else (None, "")


def _based(text: str) -> tuple[str, int] | None:
    """The digits and the base of ``101_2``, ``101 base 2``, ``0b101``."""
    if prefixed := re.fullmatch(r"(0[box])([0-9a-f]{1,200})", text, re.IGNORECASE):
        return prefixed[2].upper().lstrip("0"), {"b": 2, "o": 8, "x": 16}[prefixed[1][1].lower()]
    match = _BASED.fullmatch(text)
    name = (match[2] or match[3] or "").lower() if match else ""
    base = int(name) if name.isdigit() else _BASES.get(name, 0)
    if match is None or base < 2 or not (base > 10 or re.search(r"[0-9]", match[1])):
        return None
    return re.sub(r"^(-?)0+(?=[0-9A-F])", r"\1", match[1].upper()), base


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    text = text.rpartition("=")[2].strip()
    if not _RATIO.fullmatch(text):
        return None
    parts = [Fraction(part) for part in re.findall(r"[0-9.]+", text)]
    return tuple(part / parts[-1] for part in parts) if parts[-1] else tuple(parts)


def _words(text: str) -> tuple[str, ...]:
    """The words and signs of a text without case, articles and plural endings."""
    folded = re.sub(r"\b(?:a|an|the)\s+(?=[a-z]{2})", "", folded_words(text))
    tokens = re.findall(r"\\?[A-Za-z\u00c0-\u024f]+|[0-9]+(?:[.,][0-9]+)*|[^\sA-Za-z0-9]", folded)
    return tuple(stem(token) for token in tokens if token not in (".", '"', "'", "$") or len(tokens) == 1)
