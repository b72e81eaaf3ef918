"""Where the first answer of a completion begins and where it ends.

A model that does not stop goes on behind its answer: with another question, with the same answer again.  The first one counts.
"""

from __future__ import annotations

import ast
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ladir.data.blocks import split_sentences

_MARKUP = " \t*_"
_MOST = 20  # marks, and lines of prose, that are looked at in search of a program
_FEW = 4  # words beside a number that is an answer
# What opens another question: a word at the start of a line, some of them within one.
_LABEL = re.compile(
    r"^[ \t>*_]*(?:\#{1,6} )?(?:Question|Problem|Exercise|Instruction|User|Human|Prompt|Task|Example|Input|Q)[ \t]*\d{0,4}[ \t]*"
    r"(?:[*_]{0,2}:|[*_]{0,2}\n)|(?<=[.!?\s])(?:Question|Problem|Exercise|Instruction|User|Human)[ \t]?\d{0,4}[*_]{0,2}:",
    re.MULTILINE,
)
# A heading of the reasoning, not an answer.
_HEADING = re.compile(
    r"(?:step|part|case|section|phase|stage|what|how|not)\b|[0-9]{1,2}[.)]\s+[^\W\d]|[^\n]*[:?]$|(?:solution|explanation|reasoning|analysis|"
    r"approach|calculation|verification|check|conclusion|summary|setup|plan)\b[^0-9\n]*$",
    re.IGNORECASE,
)
_TITLE = re.compile(r"(?:the )?(?:final )?(?:answer|result)[ \t]*[:.]?[*_ \t]*\n\s*", re.IGNORECASE)  # the answer is below it
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_VALUE = re.compile(r"[0-9\\^=√π∞]|^\W*[A-Za-z]\W*$")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_PROGRAM = re.compile(r"(?:def|class|import|from|async def|return)\s+\w|@\w|```|(?:for|while|if|with) [^\n]*:[ \t]*\n")
_CODE = re.compile(r"[=(\[]|\b(?:def|class|return|import|lambda|pass)\b")
_PROSE = re.compile(
    r"^(?!(?:def|class|import|from|return|if|elif|else|for|while|with|try|except|finally|async|await|assert|raise|del|global|"
    r"nonlocal|not|lambda|yield|match|case|print)\b)[^\W\d_][\w'\u2019-]*[,:.!?]?[ \t]+[^\W_]",
    re.MULTILINE,
)


@dataclass(frozen=True)
class _Mark:
    """An occurrence of a mark, and the answer behind it, were it one."""

    start: int
    answer: str
    written: bool
    """Whether it is the first mark, at the start of a line: as the baseline learns to write it."""
    goes_on: bool
    """Whether there is more behind that answer."""
    asked: bool
    """Whether another question follows, before the next mark."""
    labelled: bool
    """Whether that is beyond doubt."""


def first_answer(text: str, marks: Sequence[str], programs: bool = False) -> tuple[str, str | None]:
    """(reasoning, answer) of a completion; None where no answer is marked.

    The answer is behind the first mark that is not part of the reasoning (a heading, "the answer is what we seek"), those that
    begin a line with ``marks[0]`` before the others.  It ends with its line; behind a mark in words with its sentence, where that
    is a number or a formula; a program, with its last line that is one.  ``programs``: all answers are.
    """
    found = _marks(text, [mark for mark in marks if mark], programs)
    chosen = _chosen_program(list(itertools.islice(found, _MOST))) if programs else _chosen(list(found))
    return (text[: chosen.start].strip(), chosen.answer) if chosen else (text.strip(), None)


def _chosen(found: Sequence[_Mark]) -> _Mark | None:
    as_taught = any(mark.written for mark in found)
    usable = [mark for mark in found if mark.answer and not (mark.goes_on and _HEADING.match(mark.answer.strip(_MARKUP)))]
    for mark in usable:
        if mark.labelled or ((mark.asked or _is_value(mark.answer) or _PROGRAM.match(mark.answer)) and mark.written == as_taught):
            return mark
    return next((mark for mark in reversed(usable) if mark.written == as_taught), None)


def _chosen_program(found: Sequence[_Mark]) -> _Mark | None:
    pool = [mark for mark in found if mark.written] or found
    programs = (mark for mark in pool if _FENCE.search(mark.answer) or (_CODE.search(mark.answer) and _parses(mark.answer)))
    otherwise = next((mark for mark in pool if mark.written), pool[-1] if pool else None)
    return next(programs, otherwise)


def _is_value(answer: str) -> bool:
    """Whether it is a number, a formula or an option, with few words around it."""
    return _VALUE.search(answer) is not None and len(_WORD.findall(_COMMAND.sub(" ", answer))) <= _FEW


def _marks(text: str, marks: Sequence[str], programs: bool) -> Iterator[_Mark]:
    """All occurrences, in the order of the text; one right behind another is the same one."""
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    again = "" if programs else rf"(?:\s*(?:{pattern}))*"  # a program may begin with one
    matches = list(re.finditer(rf"(?:{pattern}){again}", text)) if pattern else []
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        part = text[match.end() : following.start() if following else len(text)]
        label = _LABEL.search(part)
        labelled = label is not None and bool(part[: label.start()].strip(" \t\n:"))
        rest = part[: label.start()] if label and labelled else part
        if programs or _PROGRAM.match(rest.lstrip()):
            answer = _program(text[match.end() :].strip(), marks)
        else:
            answer = _short_answer(rest, _in_words(match[0]), following is not None and "\n" not in part.strip())
        yield _Mark(
            match.start(),
            answer,
            written=match[0].startswith(marks[0]) and text[match.start() - 1 : match.start()] in ("", "\n"),
            goes_on=not rest.rstrip().endswith(answer) or (following is not None and not labelled),
            asked=labelled or "?" in rest.replace(answer, "", 1),
            labelled=labelled,
        )


def _in_words(mark: str) -> bool:
    return re.search(r"[^\W\d_]", mark) is not None


def _short_answer(text: str, in_words: bool, on_one_line: bool) -> str:
    """The answer that begins a text, none that is a program; ``on_one_line``: the next mark is on the same line."""
    text = _TITLE.sub("", text.strip().removeprefix(":").lstrip(), count=1)
    sentences = split_sentences(text)
    runs_on = on_one_line or (in_words and bool(sentences) and _is_value(sentences[0]))
    answer = sentences[0] if runs_on and sentences else _line(text, sentences)
    bold = answer.count("**") % 2  # the other half stands before the mark
    return answer.removesuffix("**").removeprefix("**").strip() if bold else answer


def _line(text: str, sentences: Sequence[str]) -> str:
    """The first line, with what a formula or a block of code in it holds of others."""
    end = 0
    for sentence in sentences:
        start = text.index(sentence, end)
        if end and "\n" in text[end:start]:
            break
        end = start + len(sentence)
    return text[:end]


def _program(text: str, marks: Sequence[str]) -> str:
    """The program that begins a text, up to another question or mark; one without fences, up to the prose that makes it none."""
    labels = [match.start() for match in _LABEL.finditer(text) if text[match.start() - 1] == "\n" and match[0][0] != "#"]
    again = [match.start() for mark in marks for match in re.finditer(rf"^{re.escape(mark)}", text, re.MULTILINE)]
    prose = [match.start() for match in _PROSE.finditer(text)]
    text = _first_whole(text, labels)
    return text if _parses(text) else _first_whole(text, sorted([*again, *([] if _FENCE.search(text) else prose)]))


def _first_whole(text: str, ends: Sequence[int]) -> str:
    """The text up to the first of ``ends`` before which it is a program, or holds blocks of code that are closed; else all."""
    return next((part.rstrip() for end in ends[:_MOST] if (part := text[:end]).strip() and _is_whole(part)), text)


def _is_whole(text: str) -> bool:
    fences = len(_FENCE.findall(text))
    return fences % 2 == 0 if fences else _parses(text)


def _parses(text: str) -> bool:
    """Whether it is a program, or a function's body whose first line has lost its indentation."""
    spaces = min((line[: len(line) - len(line.lstrip())] for line in text.splitlines()[1:] if line.strip()), key=len, default="")
    return _is_python(text) or bool(spaces and _is_python(f"def f():\n{spaces}{text}"))


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
