"""Programs (HumanEval, MBPP and the like): an answer is right if the record's tests run through after it.

A record needs a field ``tests``, a program text that raises where the answer is wrong.  It may have ``setup``, put
before the answer, and ``entry_point``, the function asked for.  :mod:`ladir.data.formats` makes such records of the
public sets.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Sequence
from functools import lru_cache

from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks.program_text import bodies, bound_names, readings, whole
from ladir.tasks.sandbox import Limits, Outcome, Program, Reading, run_program
from ladir.tasks.verdict import Verdict

_LAYOUT = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER})


def program_of(answer: str) -> str:
    """The likeliest program in an answer, whatever it is asked to define; empty where there is none."""
    return next(iter(readings(answer, lambda name: True)), "")


def assembled(answer: str, record: Record) -> Program:
    """What the answer may mean, with the record's set-up and tests.

    An answer that does not define ``entry_point`` is taken for the rest of the function that the set-up begins (HumanEval's
    completions).  Raises UnusableError on a record without tests.
    """
    tests, setup, entry_point = _tests_of(record), *(record.reference.get(name) for name in ("setup", "entry_point"))
    setup = setup if isinstance(setup, str) else ""

    def asked(name: str) -> bool:
        return name == entry_point if isinstance(entry_point, str) else re.search(rf"\b{name}\b", tests) is not None

    found: dict[Reading, None] = {}
    for text in readings(answer, asked):
        alone = [Reading(whole(text), before) for before in dict.fromkeys([setup, _without_head(setup)])]
        rest = (
            [Reading(body, setup.rstrip(), joined=True) for body in bodies(setup, text)] if isinstance(entry_point, str) else []
        )
        found |= dict.fromkeys([*alone, *rest] if not rest or entry_point in bound_names(text) else [*rest, *alone])
    return Program(tuple(found), tests)


def _without_head(setup: str) -> str:
    """The set-up before its last function: where that is only its head, it is no program without the answer."""
    heads = [match.start() for match in re.finditer(r"^(?:async[ \t]+)?def\b", setup, re.MULTILINE)]
    return setup[: heads[-1]] if heads else setup


def _tests_of(record: Record) -> str:
    tests = record.reference.get("tests")
    if not isinstance(tests, str) or not tests.strip():
        raise UnusableError(
            f'{record.source}: not a record of the task code: it needs "tests" (a program text that raises where the '
            "answer is wrong); HumanEval's and MBPP's files have them, for others choose evaluate.task=maths"
        )
    return tests


class CodeTask:
    """Runs the record's tests on the answer, isolated and limited (:mod:`ladir.tasks.sandbox`)."""

    name = "code"

    def __init__(self, limits: Limits | None = None, isolation: str = "namespaces") -> None:
        limits = limits or Limits()

        # Trajectories of one question often agree: each program runs once.
        @lru_cache(maxsize=4096)
        def run(program: Program) -> Outcome:
            return run_program(program, limits, isolation)

        self._run = run

    def check(self, record: Record) -> None:
        """Raise UnusableError where the record has no tests."""
        _tests_of(record)

    def verdict(self, answer: str, record: Record) -> Verdict:
        """Whether the tests run through, or how the program ended.  Raises UnusableError on a record without tests, and where
        programs cannot be isolated here."""
        outcome = self.outcome(answer, record)
        return Verdict(outcome.passed, "" if outcome.passed else str(outcome))

    def outcome(self, answer: str, record: Record) -> Outcome:
        """How the answer with the record's tests ended."""
        program = assembled(answer, record)
        return self._run(program) if program.readings else Outcome(False, "no program in the answer")

    def unread(self, record: Record) -> bool:
        """Never: answers are run."""
        return False

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: free-form steps are not judged."""
        return None

    def lenient(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """None: published figures are of answers."""
        return None

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        """None: whether free-form steps lead to a program is not judged."""
        return None

    def canonical(self, answer: str) -> str:
        """The program's tokens without comments and blank lines, else its text with white space normalised."""
        program = program_of(answer)
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
        except (tokenize.TokenError, SyntaxError, ValueError, RecursionError):
            return " ".join(program.split())
        words = [_word(token) for token in tokens if token.type not in _LAYOUT]
        return " ".join(words)


def isolated_code_task(limits: Limits, isolation: str) -> CodeTask:
    """The task, after a trial run.  Raises UnusableError where programs cannot be isolated here: before any is written."""
    run_program("", limits, isolation)
    return CodeTask(limits, isolation)


def _word(token: tokenize.TokenInfo) -> str:
    names = {tokenize.NEWLINE: "<newline>", tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}
    return names.get(token.type, token.string)
