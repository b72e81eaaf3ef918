"""The program in an answer, as people and models write them: fenced, between words, as a transcript, half a function.

Texts only: nothing here is parsed or run.  What cannot be told from the text is left to the sandbox, which takes the
first reading that compiles.
"""

from __future__ import annotations

import html
import keyword
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Asked = Callable[[str], bool]
"""Whether a name is one that the answer should define."""

# Bounded or anchored throughout: an answer may be anything, and long.
_OPENING = re.compile(r"^(?P<before>.*?)(?P<fence>(?<!`)`{3,}+|(?<![^\s>])~{3,}+)(?P<info>[^`]*)$")
_ONE_LINE = re.compile(r"(?<!`)`{3,}+(?:(?:python3?|py)[ \t]+)?([^`\n]+)`{3,}+")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LABEL = re.compile(r"\A\s*(?:(?:python3?|py)[ \t]*(?:copy(?: code)?)?|copy code)[ \t]*\n(?:copy code[ \t]*\n)?", re.IGNORECASE)
_QUOTES = re.compile(r"\A\s*('''|\"\"\")(?:python3?|py)[ \t]*\n(.*?)\s*(?:\1.*|\Z)", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(r"[ \t]*(?:>[ \t]?)+")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d+[.)])[ \t]+")
_PYTHON = re.compile(r"\W*$|.*\b(?:i?python|pycon|py)(?![a-z])", re.IGNORECASE)
_PYTHON_AGAIN = re.compile(r"[ \t]*(?:i?python|pycon|py)[\w.-]*[ \t]*", re.IGNORECASE)
_CODE_AS_INFO = re.compile(r"[ \t]*(?:(?:python|py)[\d.]*[ \t]+)?(?=(?:(?:def|class|import|from|async)[ \t]|@|\w+[ \t]+=[ \t]))")
_BEGINS = re.compile(
    r"^[ \t]*\[(?:BEGIN|PYTHON|CODE|ANSWER|SOLUTION)\]|(?:<(?:pre|code|python|answer|solution)\b[^>\n]{0,200}>\s*)+", re.MULTILINE
)
_ENDS = re.compile(
    r"^[ \t]*\[(?:DONE|END|/[A-Z]+)\][ \t]*$|</(?:pre|code|python|answer|solution)>|<\|[\w|]+\|>|</s>", re.MULTILINE
)
_MARK = re.compile(r"^[ \t]*\[(?:[A-Z]+|/[A-Z]+)\][ \t]*$", re.MULTILINE)  # which may be a list of a name
_TYPED = re.compile(r"[ \t]*(?:>>>|\.\.\.)(?: |$)")
_STARTS_AS_CODE = re.compile(
    r"(?:from|import|def|class|async|if|for|while|try|with|return|assert)\b|[@#]|[rubf]*[\"']|[\w.]+[ \t]*(?::.*)?=[^=]"
)

_COMPOUND = frozenset({"if", "elif", "else", "try", "except", "finally", "for", "while", "with"})
_BOUND = re.compile(
    r"[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(?P<made>\w+)|[ \t]*(?P<set>\w+)[ \t]*(?::[^=\n]*)?=(?!=)(?P<value>.*)"
)
_IMPORTED = re.compile(r"^[ \t]*(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+(\([^)]{0,5000}\)|[^\n#;]+)", re.MULTILINE)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+[^\n]*\n?", re.MULTILINE)

# Two words side by side are no Python, but for these and in strings.
_PAIR = re.compile(r"(?<![\w'’.-])([A-Za-z][\w'’-]*) ([A-Za-z][\w'’-]*)")
_STRING = re.compile(r"(?<!\w)[rbuf]{0,2}(['\"]).*?\1|#.*")
_INVISIBLE = {0xA0: " ", 0x200B: None}  # spaces of web pages
_STOPS = (".", ":", "!", "?", ",")
_KEYWORDS = frozenset(keyword.kwlist) | {"match", "case", "type", "print", "exec"}
_PROSE = re.compile(
    r"[A-Z][\w' ]*[:.!?]+$|(?:[-*+•]|\d+[.)])[ \t]+\S*[A-Za-z]|\*\*|[-=*_]{3,}$|</?\w+[ \t/>]|[^#'\"]*[，。：；！？、（）`]"
)


def readings(answer: str, asked: Asked) -> tuple[str, ...]:
    """What the program may be, the likeliest first; empty where the answer holds nothing but words.

    Of several fenced blocks it is the last of those that define most of what is asked, with those that define what it uses.
    """
    text = answer.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").rpartition("</think>")[2]
    text = _QUOTES.sub(r"\2", _LABEL.sub("", text, count=1), count=1)
    inner = _unwrapped(text)
    fences = _fences(inner)
    picked = _picked(fences, asked)
    spans = [span for span in _SPAN.findall("\n".join(fences.outside)) if any(map(asked, bound_names(span)))]
    sources = [picked, inner, *spans[-1:]]
    if not any(without_prose(source).strip() for source in sources):
        return ()
    first = [text] if _STARTS_AS_CODE.match(text.lstrip()) and not _MARK.search(text) else []
    found = dict.fromkeys([*first, *(form for source in sources for form in _forms(source, asked))])
    return tuple(form for form in found if form.strip())


def bound_names(program: str) -> dict[str, bool]:
    """Names that a program gives to something at its outermost level, and whether to a function, class or import."""
    names: dict[str, bool] = {}
    compound = False
    for line in textwrap.dedent(program).split("\n"):
        outermost = line[:1] not in (" ", "\t", "", "#")
        if outermost:
            compound = re.split(r"\W", line, maxsplit=1)[0] in _COMPOUND
        if (outermost or compound) and (match := _BOUND.match(line)):
            name = match["made"] or match["set"]
            names[name] = names.get(name, False) or match["made"] is not None or "lambda" in match["value"]
    for match in _IMPORTED.finditer(program):
        made = (part.split()[-1].partition(".")[0] for part in match[1].strip("() \t\n").split(",") if part.split())
        names |= {name: True for name in made if name.isidentifier()}  # not the star of "import *", nor what stands in prose
    return names


def bodies(setup: str, text: str) -> Iterator[str]:
    """Ways to read ``text`` as the rest of the function that ends ``setup``, each with the set-up before it: its first line
    may have lost its indentation, all lines may have, it may be indented in another manner, and go on behind the function."""
    header = re.findall(r"^(?:async[ \t]+)?def\b[^\n]*\n(?:[^\n]*:[ \t]*\n)?([ \t]+)", f"{setup.rstrip()}\n", re.MULTILINE)
    pad = header[-1] if header else "    "
    text = text.strip("\n")
    own = re.split(r"\n(?=[^\s#])", text, maxsplit=1)[0]
    for part in [text, own] if own[:1] in (" ", "\t", "") or "\n" in own.strip() or own.startswith("return") else [text]:
        spaces = re.sub(r"^[ \t]+", lambda match: match[0].expandtabs(4), part, flags=re.MULTILINE)
        head, _, rest = spaces.partition("\n")
        for form in (
            part if part[:1] in (" ", "\t") else f"{pad}{part}",
            textwrap.indent(textwrap.dedent(spaces), pad),
            f"{pad}{head.lstrip()}\n{textwrap.indent(textwrap.dedent(rest), pad)}",
        ):
            yield f"{setup.rstrip()}\n{form}"


def whole(text: str) -> str:
    """A text as a program of its own: without the indentation of all its lines."""
    return textwrap.dedent(text) if text.lstrip("\n")[:1].isspace() else text


def without_prose(text: str) -> str:
    """The text with an empty line for every one that is words and no program."""
    return "\n".join("" if _is_prose(line) else line for line in text.split("\n"))


def _is_prose(line: str) -> bool:
    """Indented lines are not: texts in programs mostly are."""
    if line[:1] in (" ", "\t", ""):
        return False
    words = _STRING.sub("", line).strip()
    pairs = _PAIR.findall(words) if words.count(" ") > 1 or words[-1:] in _STOPS else []
    title = re.fullmatch(r"(\w+)(?: \w+)*:", words)
    return (
        _PROSE.match(line) is not None
        or (title is not None and title[1] not in _KEYWORDS)
        or any(one not in _KEYWORDS and other not in _KEYWORDS for one, other in pairs)
    )


def _forms(text: str, asked: Asked) -> Iterator[str]:
    """A text and what may be meant by it."""
    yield text
    typed = "\n".join(_TYPED.sub("", line, count=1) for line in text.split("\n") if _TYPED.match(line))
    if any(map(asked, bound_names(typed))):
        yield typed
    yield without_prose(text)
    yield html.unescape(text.translate(_INVISIBLE))


def _unwrapped(text: str) -> str:
    """What is between marks such as [BEGIN] and [DONE], or the whole text."""
    begin = _BEGINS.search(text)
    start = begin.end() if begin else 0
    end = _ENDS.search(text, start)
    inner = text[start : end.start() if end else None]
    return inner if inner.strip() else text


@dataclass(frozen=True)
class _Opening:
    fence: str
    python: bool
    """Whether it says so, or nothing."""
    width: int
    """Columns before it, which the lines of its block have, too."""
    quoted: bool


class _Fences:
    """The fenced blocks of a text and the text around them.

    A fence that stands more than ``furthest`` columns behind the opening one does not close it: it may be in a docstring.
    """

    def __init__(self, text: str, furthest: int) -> None:
        self.blocks: list[str] = []
        self.python: list[bool] = []
        self.outside: list[str] = []
        self._furthest = furthest
        self._opening: _Opening | None = None
        self._inside: list[str] = []
        for line in text.split("\n"):
            if self._opening is None:
                self._read_outside(line)
            else:
                self._read_inside(line, self._opening)
        self.complete = self._opening is None
        self._close()

    def _read_outside(self, line: str) -> None:
        match = None if _ONE_LINE.search(line) else _OPENING.match(line)
        if match is None:
            programs = _ONE_LINE.findall(line)
            self.blocks += programs
            self.python += [True] * len(programs)
            self.outside.append(_ONE_LINE.sub("", line))
            return
        before, info = match["before"], match["info"]
        item = _ITEM.fullmatch(before)
        code = _CODE_AS_INFO.match(info)
        self._opening = _Opening(
            fence=match["fence"],
            python=bool(code or _PYTHON.match(info)),
            width=len(before) if item else len(before) - len(before.lstrip()),
            quoted=bool(_QUOTED.match(before)),
        )
        self._inside = [info[code.end() :]] if code else []
        self.outside.append("" if item else before)

    def _read_inside(self, line: str, opening: _Opening) -> None:
        line = _QUOTED.sub("", line, count=1) if opening.quoted else line
        bare = line.lstrip()
        depth = len(line.expandtabs(4)) - len(bare.expandtabs(4))
        if bare.startswith(opening.fence) and depth <= opening.width + self._furthest:
            self._close()
            behind = bare.lstrip(opening.fence[0])
            self._read_outside(f"{opening.fence}{behind}" if _PYTHON_AGAIN.fullmatch(behind) else behind)
        elif opening.fence[0] == "`" and line.rstrip().endswith(opening.fence) and line.count(opening.fence) == 1:
            self._inside.append(line.rstrip().removesuffix(opening.fence))
            self._close()
        else:
            self._inside.append(line)

    def _close(self) -> None:
        if self._opening is not None:
            width = 0 if self._opening.quoted else self._opening.width
            self.blocks.append("".join(re.sub(rf"^[ \t]{{0,{width}}}", "", line) + "\n" for line in self._inside))
            self.python.append(self._opening.python)
            self._opening = None


def _fences(text: str) -> _Fences:
    fences = _Fences(text, furthest=3)
    return fences if fences.complete else _Fences(text, furthest=len(text))


def _picked(fences: _Fences, asked: Asked) -> str:
    """The block that is the program, with what it uses from others; the text around them where that alone defines what is
    asked."""
    blocks = [text for text, python in zip(fences.blocks, fences.python, strict=True) if python and text.strip()] or fences.blocks
    scores = [_score(text, asked) for text in blocks]
    outside = "\n".join(fences.outside)
    if max(scores, default=(0, 0)) == (0, 0):
        # Where the prompt has begun the fence, the first one ends it.
        started = _score(outside, asked) > (0, 0) or outside[:1].isspace() or _STARTS_AS_CODE.match(outside)
        return outside if (started and outside.strip()) or not blocks else blocks[0]
    return _with_helpers(blocks, max(range(len(blocks)), key=lambda place: (scores[place], place)))


def _score(text: str, asked: Asked) -> tuple[int, int]:
    names = [made for name, made in bound_names(text).items() if asked(name)]
    return sum(names), len(names)


def _with_helpers(texts: list[str], chosen: int) -> str:
    """A block with those, at their places, that make functions, classes and constants it needs."""
    parts = {chosen: texts[chosen]}
    used, known = set(re.findall(r"\w+", texts[chosen])), set(bound_names(texts[chosen]))
    for place in [*reversed(range(chosen)), *range(chosen + 1, len(texts))]:
        names = bound_names(texts[place])
        if any(name in used and name not in known for name, made in names.items() if made or name.isupper()):
            parts[place] = texts[place]
            used |= set(re.findall(r"\w+", texts[place]))
            known |= set(names)
    if len(parts) == 1:
        return texts[chosen]
    joined = "\n".join(parts[place] for place in sorted(parts))
    # Imports from the future must come first.
    return "".join(dict.fromkeys(f"{line.strip()}\n" for line in _FUTURE.findall(joined))) + _FUTURE.sub("", joined)
