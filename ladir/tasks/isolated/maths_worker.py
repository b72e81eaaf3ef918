"""Compares forms of mathematical answers, in a process that may be killed.  Started by :mod:`ladir.tasks.maths`.

One JSON object a line on standard input, one on standard output: ``{"gold", "answer"}``, two forms
(:mod:`ladir.tasks.mathematics.forms`), gives ``{"equal"}``; ``{"form"}`` gives ``{"canonical"}``; ``{"numbers"}``, a form, gives
``{"values"}``; ``{"undecided": reason}`` where that cannot be told.  The arguments are the processor seconds a request may take
and the bytes of address space; a request that takes more ends the process, whatever it is in the middle of.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # the package that this file is of, wherever it lies

from ladir.tasks.mathematics.comparison import canonical, equal, values
from ladir.tasks.mathematics.formula import UnreadableError

_MAX_FORM = 2000


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "form" in request:
            form = canonical(request["form"])
            return {"canonical": form if len(form) <= _MAX_FORM else None}
        if "numbers" in request:
            return {"values": values(request["numbers"])}
        return {"equal": equal(request["gold"], request["answer"])}
    except UnreadableError as error:
        return {"undecided": str(error)}


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
    _answer(
        {"gold": ["scalar", "x^2+\\sqrt{2}", ""], "answer": ["scalar", "\\sqrt{2}+x^2", ""]}
    )  # loads what is loaded at first use
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        _allow(seconds)
        try:
            reply = _answer(json.loads(line))
        except Exception as error:  # whatever a library does with hostile text: no verdict
            reply = {"undecided": f"{type(error).__name__} in comparing"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
