"""From a chain of thought to blocks: split the answer off, split the reasoning into sentences, group them.

Nothing but white space is lost: the sentences of a text, joined, are the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# GSM8K's calculator annotations, e.g. <<48/2=24>>.
_CALCULATOR = re.compile(r"<<[^<>;=\n]*=[^<>;\n]*>>")

# Abbreviations that never end a sentence, those that are words unless a number follows ("No. 5"), and those that end
# one before a capital letter.
# fmt: off
_NEVER_FINAL = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "gen", "col", "lt", "sgt", "capt", "rev", "hon", "vs", "e.g", "i.e",
    "cf", "viz", "resp", "approx", "fig", "figs", "eq", "eqs", "vol", "eds", "al", "dept", "ph.d",
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
_PAIRS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))

_BOXED = re.compile(r"\\(?:boxed|fbox)(?:\s?\{| \S{1,40})")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

# Anchored at the start of a run and possessive, so that a long run of marks is read once.
_BOUNDARY = re.compile(
    r"\n|(?<![.!?\u2026])[.!?\u2026]++[\"'\u201d\u2019)\]}*_]*(?=\s|$)|[\u3002\uff01\uff1f]+[\u201d\u300d\u300f]*"
)
_LIST_MARK = re.compile(r"\s*(?:\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})[.)]|[-*+#>]+)\s*")
_WORD_BEFORE = re.compile(r"(?:^|[\s(\[\"'\u201c\u2018])([^\s(\[\"'\u201c\u2018]*)$")


def strip_calculator(text: str) -> str:
    """``text`` without GSM8K's ``<<...>>`` annotations."""
    return _CALCULATOR.sub("", text)


def split_answer(text: str, prefixes: Sequence[str]) -> tuple[str, str | None]:
    """(reasoning, answer): the answer is what follows the last occurrence of any prefix, None where none occurs."""
    start, prefix = max(((text.rfind(prefix), prefix) for prefix in prefixes if prefix), default=(-1, ""))
    if start < 0:
        return text.strip(), None
    return text[:start].strip(), text[start + len(prefix) :].strip().removeprefix(":").strip()


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
        elif match[0] == "\n" or _ends_sentence(text, start, match):
            start = position
            yield position


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark = match[0]
    following = text[match.end() : match.end() + 80].lstrip(" \t")[:1]
    before = text[max(start, match.start() - 60) : match.start()]
    if not following or following == "\n" or mark[0] in "\u3002\uff01\uff1f":
        return True
    if following.islower():
        return False
    if mark.startswith(("...", "..", "\u2026")):
        return following.isupper()
    if mark[0] != ".":
        return True
    if match.start() - start < 8 and _LIST_MARK.fullmatch(text[start : match.start() + 1]):
        return False
    return not _is_abbreviation(before, following)


def _is_abbreviation(before: str, following: str) -> bool:
    """Whether the full stop after ``before`` belongs to an abbreviation or an initial, not to the sentence."""
    word_match = _WORD_BEFORE.search(before)
    word = word_match[1] if word_match else ""
    lowered = word.lower()
    if lowered in _NEVER_FINAL:
        return True
    if lowered in _FINAL_UNLESS_NUMBERED:
        return following.isdigit()
    if lowered in _FINAL_BEFORE_CAPITAL:
        return not following.isupper() and following not in "\"'\u201c$\\"
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
