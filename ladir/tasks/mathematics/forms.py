"""The form of an answer: one value, a relation, a list, a set, a tuple, an interval, a union; its formulas stay LaTeX.

A form is a nested list that JSON can carry, its kind first::

    ["scalar", formula, unit]       unit: "" where there is none
    ["equation", left, form]        what is left of the last "=" and the form on its right
    ["relation", signs, formulas]   a chain of <, \\le, >, \\ge, \\ne; the formula "?" stands for the quantity asked for
    ["list", joined, forms]         joined: "and", "or" or ","
    ["set", forms]  ["tuple", "(" or "[", ")" or "]", forms]  ["union", forms]  ["empty"]
    ["difference", forms]  the first set without what is in the second
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ladir.tasks.mathematics.quantities import Quantity, read_quantity
from ladir.tasks.mathematics.units import CALCULATING, FILLERS, Unit, is_word, read_unit, unit_named

Form = list[Any]

_MAX_DEPTH = 12
_MAX_ITEMS = 100
_PIECE = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]{2,}|.", re.DOTALL)
_OPENING, _CLOSING = (
    frozenset({"(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\begin"}),
    frozenset({")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\end"}),
)
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|(?<![0-9.,])[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])")
_SIGNS = {"<": "<", ">": ">", "\\le": "\\le", "\\ge": "\\ge", "\\ne": "\\ne"}
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
_SHORT_WORDS = frozenset(
    [
        "so",
        "is",
        "it",
        "of",
        "to",
        "in",
        "at",
        "on",
        "or",
        "an",
        "as",
        "be",
        "by",
        "he",
        "we",
        "me",
        "my",
        "no",
        "up",
        "us",
        "do",
        "go",
        "if",
    ]
)
_UNIT_BEHIND = re.compile(
    r"^(.*?[0-9)}\]!A-Za-z])\s*?(\s(?:[A-Za-z$\u20ac\u00a3]{2,}|[mgslhLNJW])\b.*|\s?\^\\circ(?:\s?[CF])?)$", re.DOTALL
)
_SET = re.compile(r"\\\{.*\\\}", re.DOTALL)
# A parameter that runs through the whole numbers, as one does that nothing is said of: "2k\pi, k \in Z".
_PARAMETER = re.compile(r"(?<=\S)\s*[,;(]\s*(?:(?:where|for|with)\s+)?[a-z](?:\s*,\s*[a-z])*\s*\\in\s*\{?\s*Z\s*\}?\s*\)?$")
_WITHOUT = re.compile(r"\s*(?:\\setminus|\\backslash|-|\\\\)\s*(?=\\\{)")
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|hat|bar|mathcal|[A-Za-z]+)\s*)?\{?\|?[A-Za-z' ]*\|?\}?"
    r"(?:_(?:\{[^{}]{1,20}\}|[A-Za-z0-9]))?'*\s*(?:\([A-Za-z0-9, ]{1,20}\))?"
)


def read_form(text: str, depth: int = 0) -> Form | None:
    """The form of a text in one spelling; None where it is not mathematics alone."""
    text = _bare(text)
    if not text or depth > _MAX_DEPTH:
        return None
    if depth == 0 and text[0] not in "([{\\":
        text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    if (quantity := read_quantity(text)) is not None:
        return _number(quantity)
    for reader in (_read_list, _read_relation, _read_union, _read_enclosed):
        form, applies = reader(text, depth)
        if applies:
            return form
    return _read_scalar(text)


def is_name(text: str) -> bool:
    """Whether a text only names a quantity: ``x``, ``f(x)``, ``\\angle ABC``, ``m + n``, ``total cost``."""
    parts = [part.strip() for part in re.split(r"[-+/*]|\\cdot|\\times", text)]
    if any(part in ("\\pi", "e", "i") for part in parts) and len(parts) > 1:
        return False
    return bool(text.strip()) and all(part and _NAME.fullmatch(part) for part in parts)


def names_a_value(left: str) -> bool:
    """Whether what is left of an equation names what is right of it, or is a calculation: no numbers together with variables."""
    named = re.sub(r"_(?:\{[^{}]*\}|.)|\([A-Za-z0-9, ]*\)", "", left)
    letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", named)) or re.search(
        r"\\(?!frac|sqrt|cdot|times|div|pi|binom)[a-z]", named
    )
    words = re.search(r"(?<!\\)[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", named))
    return not (letters and not words and re.search(r"[0-9^]|\\(?:sqrt|sin|cos|tan|log|ln)", named))


def has_words(text: str) -> bool:
    """Whether there are words in a text, not only variables and commands."""
    found = _LETTERS.findall(text)
    return any(word.lower() in _SHORT_WORDS or (is_word(word) and not word.endswith(("matrix", "array"))) for word in found)


def _bare(text: str) -> str:
    """Without what stands around a form: spaces, final punctuation, and parentheses or braces around one value."""
    text = _PARAMETER.sub("", text.strip().strip('`"').rstrip(".;,: ").lstrip(":=, ").strip())
    while text[:1] == "{" and _closing(text, 0) == len(text) - 1 and not _has_top(text[1:-1], ","):
        text = text[1:-1].strip()
    return text


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Every token with the depth of brackets it stands at and its place."""
    depth = 0
    for match in _PIECE.finditer(text):
        token = match[0]
        depth -= token in _CLOSING
        yield token, depth, match.start()
        depth += token in _OPENING


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at ``start``; -1 where none does."""
    return (
        next((place for token, depth, place in _tokens(text[start:]) if place and token in _CLOSING and depth == 0), -1 - start)
        + start
    )


def _has_top(text: str, wanted: str) -> bool:
    return any(token == wanted and depth == 0 for token, depth, _ in _tokens(text))


def _split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators outside of all brackets, and the separators."""
    parts, found, start = list[str](), list[str](), 0
    for token, depth, place in _tokens(text):
        if token in separators and depth == 0:
            parts.append(text[start:place].strip())
            found.append(token)
            start = place + len(token)
    return [*parts, text[start:].strip()], found


def _items(text: str, depth: int) -> tuple[list[Form] | None, list[str]]:
    """The forms of a list's entries (None: some cannot be read), and what stands between them."""
    masked = _GROUPED.sub(lambda match: match[0].replace(",", "") if _is_grouped(text, match, depth) else match[0], text)
    parts, separators = _split(masked, frozenset({",", ";", "and", "or"}))
    entries = [part for part in parts if part]
    if len(entries) > _MAX_ITEMS:
        return None, separators
    left = re.fullmatch(r"(.*[^=<>!])=(.*)", entries[0], re.DOTALL) if entries else None
    if left and is_name(left[1]) and not any(_has_top(entry, "=") for entry in entries[1:]):  # x = 3, 5, 7
        entries = [entry if "=" in entry else f"{left[1]}={entry}" for entry in entries]
    forms = [form for entry in entries for form in _signed(entry, depth + 1)]
    return (None if any(form is None for form in forms) else [form for form in forms if form]), separators


def _is_grouped(text: str, match: re.Match[str], depth: int) -> bool:
    """Whether commas between digits are those of a large number, not between entries: inside of brackets only where other
    entries are set apart by a space."""
    return depth == 0 or bool(re.search(r",\s", text)) or (match.start() > 0 and text[match.start() - 1] == "$")


def _signed(text: str, depth: int) -> list[Form | None]:
    """The forms of an entry: two, where it has a sign ``\\pm``."""
    if not _has_two_signs(text):
        return [read_form(text, depth)]
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    return [read_form(re.sub(r"(^|[=(,])\s*\+", r"\1", variant), depth) for variant in (upper, lower)]


def _has_two_signs(text: str) -> bool:
    """Whether there is a ``\\pm`` in it, and not within a set, which then has more members."""
    return "\\pm" in _SET.sub("", text)


def _read_list(text: str, depth: int) -> tuple[Form | None, bool]:
    masked = text if depth else _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    parts, separators = _split(masked, frozenset({",", ";", "and", "or"}))
    if len([part for part in parts if part]) < 2 and not _has_two_signs(text):
        return None, False
    forms, _ = _items(text, depth) if separators else ([form for form in _signed(text, depth + 1) if form], separators)
    if forms is None or len(forms) < 2:
        return None, True
    words = [word for word in separators if word in ("and", "or")]
    return ["list", words[-1] if words else ",", forms], True


def _read_relation(text: str, depth: int) -> tuple[Form | None, bool]:
    sides, signs = _split(text, frozenset({"=", *_SIGNS, "\\in", "\\approx"}))
    if not signs:
        return None, False
    if signs == ["\\in"]:
        return read_form(sides[1], depth + 1), True
    if "\\approx" in signs:  # what is exact stands before it
        before = text[: next(place for token, level, place in _tokens(text) if token == "\\approx" and level == 0)]
        return read_form(sides[1] if not before.strip() or is_name(before) else before, depth + 1), True
    if set(signs) == {"="}:
        return _equation(sides, depth), True
    if not set(signs) <= set(_SIGNS) or not all(sides[1:]):
        return None, True
    formulas = [_read_scalar(side) if side else ["scalar", "?", ""] for side in sides]
    values = [formula[1] for formula in formulas if formula]
    return (["relation", signs, values] if len(values) == len(sides) else None), True


def _equation(sides: list[str], depth: int) -> Form | None:
    """``left = right``; a name comes to the left, and of a longer chain its first and last member count."""
    left, right = sides[0], sides[-1]
    if not right or re.search(r"\b(?:not|never|cannot)\b|n't\b", left):
        return None
    if is_name(right) and not is_name(left) and len(sides) == 2 and len(right) <= 3:
        left, right = right, left
    form = read_form(right, depth + 1)
    if form is None or form[0] in ("equation", "relation"):
        return None
    if not left:
        return form
    return ["equation", " ".join(left.split()), form]


def _read_union(text: str, depth: int) -> tuple[Form | None, bool]:
    parts, signs = _split(text, frozenset({"\\cup"}))
    if not signs:
        return _read_difference(text, depth)
    forms = [read_form(part, depth + 1) for part in parts]
    return (None if None in forms else ["union", forms]), True


def _read_difference(text: str, depth: int) -> tuple[Form | None, bool]:
    """``\\reals \\setminus \\{1, 2\\}``: numbers without some."""
    parts = _WITHOUT.split(text)
    if len(parts) != 2 or not re.match(r"\\reals|[(\[]", parts[0]):
        return None, False
    forms = [read_form(part, depth + 1) for part in parts]
    sets = all(form and form[0] in ("tuple", "set") for form in forms)
    return (["difference", forms], True) if sets else (None, False)


def _read_enclosed(text: str, depth: int) -> tuple[Form | None, bool]:
    """A set, a tuple or an interval; a value in parentheses is that value."""
    if text == "\\reals":
        return read_form("(-\\infty,\\infty)", depth + 1), True
    if text == "\\emptyset" or re.fullmatch(r"\\\{\s*\\\}|\{\s*\}", text):
        return ["empty"], True
    text = re.sub(r"^[A-Z]\s*(?=\([^()]*,)", "", text)  # a point with its name: P(3, 4)
    opening = next((mark for mark in ("\\{", "{", "(", "[") if text.startswith(mark)), None)
    end = _closing(text, 0) if opening else -1
    closing = text[end:] if end > 0 else ""
    if opening is None or closing not in (")", "]", "\\}", "}"):
        return None, False
    inner = text[len(opening) : end]
    if opening in ("\\{", "{"):
        return _read_set(inner, depth), True
    if not _has_top(inner, ",") and not _has_top(inner, ";"):
        return (
            (None, False)
            if opening != "(" or closing != ")"
            else (read_form(inner, depth + 1), not re.search(r"[A-Za-z]$", text))
        )
    forms, _ = _items(inner, depth + 1)
    return (["tuple", opening, closing, forms] if forms and len(forms) > 1 else None), True


def _read_set(inner: str, depth: int) -> Form | None:
    """What is between the braces of a set: its members, or ``x \\mid condition``."""
    parts, found = _split(inner, frozenset({"\\mid", "|", ":"}))
    if len(found) == 1 and re.match(r"[a-z]\b(?:\s*\\in\s*(?:R|\\R))?\s*$", parts[0]):
        return read_form(parts[1], depth + 1)
    forms, _ = _items(inner, depth + 1)
    return ["set", forms] if forms else None


def _read_scalar(text: str) -> Form | None:
    """A formula with a unit behind it or none; None where there are words in it."""
    if (quantity := read_quantity(text)) is not None:
        return _number(quantity)
    unit = None
    behind = _UNIT_BEHIND.match(text) if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)\b.*\^\\circ", text) else None
    if behind and _is_unit(behind[2]) and (re.search(r"[0-9\\]", behind[1]) or unit_named(behind[2].split()[0])):
        unit, text = read_unit(behind[2]), behind[1]
    if text[:1] in "$\u20ac\u00a3" and len(text) > 1:
        unit, text = read_unit(text[0]), text[1:]
    text = text.strip()
    percent, text = text.endswith("%"), text.rstrip("%").strip()
    text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    if has_words(text) or not text or re.search(r"[$?\"@#]", text):
        return None
    return ["scalar", text, "%" if percent else _label(unit)]


def _is_unit(text: str) -> bool:
    """Whether words behind a formula are a unit, or say no more than "units"."""
    if CALCULATING.match(text) or re.search(r"[=<>(){}\[\]]|\\(?!circ)", re.sub(r"\^\{-?[0-9]\}", "", text)):
        return False
    first = re.match(r"\s*([A-Za-z$\u20ac\u00a3]+|\^)", text)
    name = first[1] if first else ""
    return name == "^" or unit_named(name) is not None or (is_word(name) and name.lower() not in FILLERS)


def _number(quantity: Quantity) -> Form:
    label = "%" if quantity.percent else _label(quantity.unit)
    return ["scalar", str(quantity.value), label]


def _label(unit: Unit | None) -> str:
    if unit is None:
        return ""
    return f"{unit.dimensions} {unit.size}" if unit.known else " ".join(sorted(unit.words))
