"""From a chain of thought to blocks: split the answer off, split the reasoning into sentences, group them.

Nothing but white space is lost: the sentences of a text, joined, are the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# GSM8K's calculator annotations, e.g. <<48/2=24>>.
_CALCULATOR = re.compile(r"<<([^<>;=\n]*)=([^<>;\n]*)>>")

_ONLY_MARKS = re.compile(r"[\W_]*")

# Words before "the answer is" that say nothing by themselves; they stand at the beginning of its sentence.
_LEAD_IN = re.compile(
    r"(?:^|(?<=[.!?:\n\u3002\uff01\uff1f]))(?:[\s*_>-]|(?:so|thus|therefore|hence|then|and|finally|now|consequently|overall|"
    r"in (?:conclusion|summary|total)|as a result|to conclude)\b[,:]?){1,12}$",
    re.IGNORECASE,
)

# Abbreviations that never end a sentence, those that are words unless a number follows ("No. 5"), and those that end
# one before a capital letter.
# fmt: off
_NEVER_FINAL = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "gen", "col", "lt", "sgt", "capt", "rev", "hon", "vs", "e.g", "i.e",
    "cf", "viz", "resp", "approx", "fig", "figs", "eq", "eqs", "vol", "eds", "al", "dept", "ph.d", "mt",
})
_FINAL_UNLESS_NUMBERED = frozenset({"no", "nos", "p", "pp", "ed", "sec", "ch"})
_FINAL_BEFORE_CAPITAL = frozenset({
    "etc", "a.m", "p.m", "jr", "inc", "ltd", "co", "corp", "bros", "ave", "blvd", "rd", "ft", "lb", "lbs", "oz", "hr",
    "hrs", "min", "mins", "secs", "km", "cm", "mm", "kg", "mi", "yd", "yds", "gal", "qt", "pt", "jan", "feb", "mar",
    "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "mon", "tue", "wed", "thu", "fri", "est", "avg",
})
# fmt: on

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([^{}\n]{1,40})\}")
# Pandoc's rule tells $x$ from prices: no space inside the dollars, no digit after the closing one.
_INLINE_MATH = re.compile(r"(?<![\\$])\$(?![\s$])(?:\\.|[^$\n\\])*(?<![\s\\])\$(?![\d$])")
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_FORMULA_END = re.compile(r"[.!?]\s*(?:\$\$?|\\\)|\\\])$")
_PAIRS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))

_BOXED = re.compile(r"\\(?:boxed|fbox)(?:\s?\{| \S{1,40})")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

# Full stops and question marks of scripts that put no space behind them, or whose marks mean nothing else.
_FOREIGN = "\u3002\uff01\uff1f\uff0e\uff61\u0964\u0965\u061f\u06d4\u1362\u104b\u17d4\u203c\u2047\u2048\u2049"
_LINE_ENDS = "\n\r\x0b\x0c\x85\u2028\u2029"
# Anchored at the start of a run and possessive, so that a long run of marks is read once.
_BOUNDARY = re.compile(
    rf"[{_LINE_ENDS}]|(?<![.!?\u2026])[.!?\u2026]++[\"'\u201d\u2019\u00bb)\]}}*_]*(?=\s|$)"
    r"|(?<=[.!?])(?:\$\$?|\\[)\]])(?=\s)"
    rf"|[{_FOREIGN}]++[!?]*[\u201d\u2019\u300d\u300f\u300b\uff09\u3011\u00bb\"')]*"
)
_NAMED_PART = r"(?:Step|Case|Part|Example|Method|Option|Rule|Fact)[ \t]+\d{1,3}"
_LIST_MARK = re.compile(
    rf"\s*[*_]*(?:\(?(?:\d{{1,3}}|[A-Za-z]|[ivxIVX]{{1,4}}|{_NAMED_PART})[.)\uff0e]{{1,2}}[*_]*|[-*+#>]+)\s*", re.IGNORECASE
)
_LONGEST_LIST_MARK = 20
# "b = 6", "x_1 > 2", "f(x) = 3", "x, y = 1, 2", "n is even": a lower-case name that a sentence can begin with.
_NAME = r"[a-z\u03b1-\u03c9]\w*['\u2032]{0,3}(?:_\{[^{}\s]{1,20}\})?(?:\([^()\n]{1,30}\))?!{0,2}(?:\^\S{1,20})?"
_VARIABLE = re.compile(
    rf"{_NAME}(?:, ?{_NAME}){{0,5}}\s*(?:[-+*/]\s*\w{{1,20}}\s*){{0,5}}(?:[:!<>=+*/-]?=|[<>\u2248\u2260\u2264\u2265])"
    r"|\(?(?:[a-z]|[ivx]{2,4})\)\s"  # b) of a list
    r"|(?:sin|cos|tan|log|ln|exp|sqrt|gcd|lcm|max|min|det|dim|lim)\b(?!\.)"
    r"|[b-hj-z\u03b1-\u03c9](?:\^\S{1,10})?(?: and [a-z\u03b1-\u03c9])?"
    r"\s+(?:is|are|has|equals|must|can|will|was|stands|denotes|represents)\b"
)
# What follows a factorial, not an exclamation: an operator, a bracket, the end of a part of the formula.
_OPERATOR = frozenset("=+-*/^<>%(,;:\\\u00d7\u00f7\u00b7\u2212\u2013\u2248\u2260\u2264\u2265\u22c5\u2217\u2044")
_FACTORIAL = re.compile(r"(?:\d|[)\]}]|(?<![^\W_])[A-Za-z])!{1,2}[)\]}]*")
_QUOTE_GOES_ON = re.compile("(?:\u3068|\u3063\u3066|\uff0c|\u3001)")
_WORD_BEFORE = re.compile(r"(?:^|[\s(\[\"'\u201c\u2018])([^\s(\[\"'\u201c\u2018]*)$")


def strip_calculator(text: str) -> str:
    """``text`` without GSM8K's ``<<...>>`` annotations; a result that stands in one alone (``6 = <<2*3=6>>``) stays."""
    return _CALCULATOR.sub(lambda found: found[2] if _result_is_missing(text, found) else "", text)


def _result_is_missing(text: str, found: re.Match[str]) -> bool:
    before = text[max(0, found.start() - 8) : found.start()].rstrip(" $\\(")
    behind = text[found.end() :][:80].lstrip(" -+$\\(")
    return before.endswith("=") and not (behind.lstrip(".")[:1].isdigit() or behind.startswith(found[2].strip()))


def calculations(sentence: str) -> str | None:
    """The sentence's annotations without their brackets, where it is nothing but annotations and marks; else None.

    GSM8K's annotations stand beside text that says the same.  In sets that keep them alone they are the steps themselves.
    """
    found = list(_CALCULATOR.finditer(sentence))
    if not found or not _ONLY_MARKS.fullmatch(_CALCULATOR.sub("", sentence)):
        return None
    return _CALCULATOR.sub(lambda one: f"{one[1]}={one[2]}", re.sub(r">>[ \t]*<<", ">>, <<", sentence)).strip()


def split_answer(text: str, prefixes: Sequence[str]) -> tuple[str, str | None]:
    """(reasoning, answer): the answer is what follows the last occurrence of any prefix, None where none occurs.

    Prefixes are found whatever their case.  Words that only lead to one ("So", "Therefore,") go with it.
    """
    marks = answer_marks(text, prefixes)
    if not marks:
        return text.strip(), None
    start, end = marks[-1].span()
    before = _LEAD_IN.sub("", text[:start]) if marks[-1][0][0].isalpha() else text[:start]
    return before.strip(), text[end:].strip().removeprefix(":").strip()


def answer_marks(text: str, prefixes: Sequence[str]) -> list[re.Match[str]]:
    """Every place at which a prefix stands, as a whole word and whatever its case, in order."""
    patterns = [_mark_pattern(prefix) for prefix in sorted(prefixes, key=len, reverse=True) if prefix]
    return list(re.finditer("|".join(patterns), text, re.IGNORECASE)) if patterns else []


def _mark_pattern(prefix: str) -> str:
    """A prefix as a pattern: not within a longer word (``The answer isn't``), nor in a deeper heading (``#####``)."""
    guards = {character: f"[{character}]" for character in "#"}
    before, after = (
        guards.get(end) or ("[A-Za-z]" if end.isascii() and end.isalpha() else None) for end in (prefix[0], prefix[-1])
    )
    return (f"(?<!{before})" if before else "") + re.escape(prefix) + (f"(?!{after})" if after else "")


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` (or ``\\fbox``, or ``\\boxed x``) of a text holds; None without a complete one."""
    found = list(_BOXED.finditer(text))
    if not found:
        return None
    start = found[-1]
    if not start[0].endswith("{"):
        return start[0].split()[-1].rstrip("$.")
    depth = 1
    for brace in _BRACE.finditer(text, start.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start.end() : brace.start()].strip()
    return None


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, without surrounding white space; empty for a blank text.

    A newline or a full stop, exclamation or question mark ends a sentence, except inside code fences, inline code and
    LaTeX, after an abbreviation, an initial or a list mark, and where an ellipsis or a lower-case word shows that it
    goes on.
    """
    sentences = []
    start = 0
    for end in _boundaries(text):
        sentence = text[start:end].strip()
        if sentence:
            sentences.append(sentence)
        start = end
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def group_sentences(sentences: Sequence[str], per_block: int) -> list[str]:
    """Blocks of ``per_block`` sentences joined by newlines, the last one maybe shorter; 0: one block of all."""
    size = per_block or max(len(sentences), 1)
    return ["\n".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def _boundaries(text: str) -> Iterator[int]:
    """Ends of sentences, ascending."""
    start = position = 0
    spans = [*_protected_spans(text), (len(text), len(text))]
    current = 0
    while (match := _BOUNDARY.search(text, position)) is not None:
        position = match.end()
        while spans[current][1] <= match.start() and current < len(spans) - 1:
            current += 1
        if spans[current][0] <= match.start() < spans[current][1]:
            position = max(position, spans[current][1])
            if _formula_ends_sentence(text, position):
                start = position
                yield position
        elif match[0] in _LINE_ENDS or _ends_sentence(text, start, match):
            start = position
            yield position


def _formula_ends_sentence(text: str, end: int) -> bool:
    """Whether the full stop of a sentence stands within the formula that ends there, as in ``$x = 5.$ Then``."""
    return _FORMULA_END.search(text[max(0, end - 8) : end]) is not None and text[end : end + 8].lstrip(" \t")[:1].isupper()


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark = match[0]
    if mark[0] in "$\\":  # the end of a formula, seen where it is one
        return False
    rest = text[match.end() : match.end() + 80].lstrip(" \t\u00a0\u3000")
    following = rest[:1]
    before = text[max(start, match.start() - 60) : match.start()]
    if not following or following in _LINE_ENDS:
        return True
    if mark[0] in _FOREIGN:
        return _ends_foreign(before, mark, text[match.end() : match.end() + 2]) and not _is_list_mark(text, start, match)
    if (
        mark[0] == "!"
        and (following in _OPERATOR or (following.isdigit() and before.count("(") > before.count(")")))
        and not rest.startswith("**")
        and _FACTORIAL.fullmatch(before[-2:] + mark, max(0, len(before[-2:]) - 1))
    ):
        return False
    begins = following.isupper() or _VARIABLE.match(rest) is not None
    if following.islower() and not begins:
        return False
    if mark.startswith(("...", "..", "\u2026")):
        return following.isupper()
    if mark[0] != ".":
        return True
    return not _is_list_mark(text, start, match) and not _is_abbreviation(before, following, begins)


def _is_list_mark(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the full stop belongs to a number or letter of a list at the beginning of the sentence."""
    short = match.start() - start < _LONGEST_LIST_MARK
    return short and _LIST_MARK.fullmatch(text[start : match.end()]) is not None


def _ends_foreign(before: str, mark: str, behind: str) -> bool:
    """Not within a number (a full-width point), nor where a quoted sentence is part of a longer one."""
    if mark == "\uff0e" and before[-1:].isdigit() and behind[:1].isdigit():
        return False
    return mark[-1] in _FOREIGN or _QUOTE_GOES_ON.match(behind) is None


def _is_abbreviation(before: str, following: str, begins: bool) -> bool:
    """Whether the full stop after ``before`` belongs to an abbreviation or an initial, not to the sentence.

    ``begins``: what follows may begin a sentence.
    """
    word_match = _WORD_BEFORE.search(before)
    word = word_match[1] if word_match else ""
    lowered = word.lower()
    if lowered in _NEVER_FINAL:
        return True
    if lowered in _FINAL_UNLESS_NUMBERED:
        return following.isdigit()
    if lowered in _FINAL_BEFORE_CAPITAL:
        return not begins and following not in "\"'\u201c$\\"
    if re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word):
        return True
    if len(word) == 1 and word.isupper() and following.isupper():
        preceding = before[: -len(word)].split()
        return not preceding or preceding[-1][:1].isupper()
    return False


def _protected_spans(text: str) -> list[tuple[int, int]]:
    """Disjoint [start, end) of code fences, code and LaTeX, ascending.  Linear in the length of the text."""
    candidates = [*_fences(text), *_environments(text)]
    for opening, closing in _PAIRS:
        candidates += _delimited(text, opening, closing)
    candidates += [match.span() for match in _INLINE_MATH.finditer(text)]
    candidates += [match.span() for match in _INLINE_CODE.finditer(text)]
    spans: list[tuple[int, int]] = []
    for start, end in sorted(candidates, key=lambda span: (span[0], -span[1])):
        if not spans or start >= spans[-1][1]:
            spans.append((start, end))
    return spans


def _fences(text: str) -> Iterator[tuple[int, int]]:
    """Code fences; one that is never closed reaches to the end of the text."""
    opening: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opening is None:
            opening = match
        elif match[1].startswith(opening[1]):
            yield opening.start(), match.end()
            opening = None
    if opening is not None:
        yield opening.start(), len(text)


def _environments(text: str) -> Iterator[tuple[int, int]]:
    """LaTeX environments from ``\\begin{x}`` to the matching ``\\end{x}``, nested ones included."""
    open_at: dict[str, list[int]] = {}
    for match in _ENVIRONMENT.finditer(text):
        stack = open_at.setdefault(match[2], [])
        if match[1] == "begin":
            stack.append(match.start())
        elif stack:
            yield stack.pop(), match.end()


def _delimited(text: str, opening: str, closing: str) -> Iterator[tuple[int, int]]:
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            return
        position = end + len(closing)
        yield start, position
