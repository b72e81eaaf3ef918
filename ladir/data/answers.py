"""What stands behind the marks of an answer (``####``, ``The answer is``): whether a chain has one answer, and only one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ladir.data.blocks import answer_marks, split_answer, split_sentences

_NUMBER = re.compile(
    r"([-+\u2212]?)\s*[$\u20ac\u00a3]?\s*([-+]?\d[\d,]{0,60}(?:\.\d{1,60})?|\.\d{1,60})(?:\s*/\s*(\d{1,60}))?\s*%?(?:\s+[^\W\d]+)?"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?[A-Ea-e]\)?")
_SECOND_THOUGHT = re.compile(r"but|wait|however|no|actually|hmm|let|so|then|question|explanation\b", re.IGNORECASE)
_VERDICTS = frozenset({"yes", "no", "true", "false"})


def bare(text: str) -> str:
    """A text without what does not make another answer of it: white space, a last full stop, emphasis, dollars, a box."""
    text = _BOXED.sub(r"\1", " ".join(text.split()))
    return text.strip("*_ ").rstrip(".!").strip("*_$ ").removeprefix(":").strip()


def same_answer(one: str, other: str) -> bool:
    """Whether two marked answers say the same: the same number, or the same text whatever its case."""
    one, other = bare(one), bare(other)
    numbers = _number(one), _number(other)
    return one.lower() == other.lower() or (None not in numbers and numbers[0] == numbers[1])


def without_repeats(reasoning: str, answer: str, prefixes: Sequence[str]) -> str:
    """``reasoning`` without lines at its end that mark ``answer`` itself once more: they are no thoughts."""
    while True:
        before, marked = split_answer(reasoning, prefixes)
        if marked is None or not same_answer(marked, answer):
            return reasoning
        reasoning = before


def other_answer(reasoning: str, answer: str, prefixes: Sequence[str]) -> str | None:
    """A marked answer in ``reasoning`` that is of the same kind as ``answer`` and another one; None where there is none.

    Headings ("#### Step 1") and phrases ("The answer is what we seek") are marked, too, but are no answers.
    """
    marks = answer_marks(reasoning, prefixes)
    wanted = _kind(bare(answer), phrase=True)
    ends = [*(mark.start() for mark in marks), len(reasoning)][1:]
    for mark, end in zip(marks, ends, strict=True) if marks else ():
        said = _said(reasoning[mark.end() : end])
        found = bare(said[0])
        kind = _kind(found, _is_phrase(mark[0]))
        if kind is not None and kind == wanted and not same_answer(found, answer):
            return found
    return None


def goes_on(text: str, answer: str, prefixes: Sequence[str]) -> str | None:
    """What follows the answer's first sentence behind the last mark of ``text``, where that sentence alone was the answer.

    "The answer is 5. But wait, it is 6." goes on; a program behind ``####`` does not.
    """
    sentences = _said(answer)
    marks = answer_marks(text, prefixes)
    if len(sentences) < 2 or not marks:
        return None
    phrase = _is_phrase(marks[-1][0])
    kind = _kind(bare(sentences[0]), phrase)
    option = kind == "choice" and len(sentences) == 2 and not _SECOND_THOUGHT.match(sentences[1])  # "A. Paris"
    return sentences[1] if (phrase or kind is not None) and not option else None


def _said(text: str) -> list[str]:
    """The sentences of what stands behind a mark: a number or letter at its beginning is the answer, not a list's."""
    first, *others = split_sentences(f"= {text.strip().removeprefix(':').strip()}")
    return [first[1:].strip(), *others]


def _is_phrase(mark: str) -> bool:
    return any(character.isalpha() for character in mark)


def _kind(text: str, phrase: bool) -> str | None:
    """What kind of short answer a text is: a number, a choice, a verdict, behind a phrase also a single word; else None."""
    if _NUMBER.fullmatch(text):
        return "number"
    if _CHOICE.fullmatch(text):
        return "choice"
    if text.lower() in _VERDICTS:
        return "verdict"
    return "word" if phrase and text.isalpha() else None


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, digits, below = found.groups()
    value = Fraction(digits.replace(",", "")) / (int(below or 1) or 1)
    return -value if sign in ("-", "\u2212") else value
