"""Compares mathematical texts with math-verify, in a process that may be killed.  Started by :mod:`ladir.tasks.maths`.

One JSON object a line on standard input, one on standard output: ``{"gold", "answer"}`` gives ``{"equal"}``, ``{"text"}``
gives ``{"form"}`` (a normal form, or null).  The arguments are the processor seconds a request may take and the bytes
of address space; a request that takes more ends the process, whatever it is in the middle of.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import sys
from typing import Any

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|exp|min|max|mod|gcd|lcm)\b)[A-Za-z]{3,}")
_FORMULA = 200  # characters; longer texts are prose and not tried as one formula
_CALCULATION = re.compile(r"[\d\s.,+\-*/^()=!%]*")
_MAX_FORM = 2000


def _readings(text: str) -> list[Any]:
    """What the text may mean: a text of marked formulas or of words by what is in it, any other as one formula."""
    from math_verify import parse

    if _DELIMITED.search(text) or _WORD.search(text) or len(text) > _FORMULA or "\n" in text:
        return list(parse(text, parsing_timeout=None))
    formula = parse(f"${text}$", parsing_timeout=None)
    # The last number of a calculation that is none is not its value.
    return list(formula or ([] if _CALCULATION.fullmatch(text) else parse(text, parsing_timeout=None)))


def _answer(request: dict[str, str]) -> dict[str, Any]:
    from math_verify import verify

    if "text" in request:
        readings = _readings(request["text"])
        form = str(readings[0]) if readings else None
        return {"form": form if form and len(form) <= _MAX_FORM else None}
    gold, answer = _readings(request["gold"]), _readings(request["answer"])
    return {"equal": bool(gold and answer and verify(gold, answer, timeout_seconds=None))}


def _allow(seconds: float) -> None:
    """Let the process live for so many more processor seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(
        resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1])
    )


def main(seconds: float, memory: int) -> None:
    """Serve requests until standard input ends."""
    # What a library prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _answer({"gold": "$x^2 + \\frac{1}{2}$", "answer": "$\\frac{2}{4} + x^2$"})  # loads what is loaded at first use
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        _allow(seconds)
        try:
            reply = _answer(json.loads(line))
        except Exception as error:  # whatever a library does with hostile text: no verdict
            reply = {"error": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
