"""The subcommands of ``python -m ladir``: a new one is a line of :data:`COMMANDS` and a module with ``run(argv) -> int``."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand: the module with its ``run``, imported when called, and how the help shows its arguments and purpose."""

    module: str
    arguments: str
    purpose: str


COMMANDS: dict[str, Command] = {
    "ask": Command("ladir.cli.ask", "QUESTION... --model DIR", "a trained model answers and shows its thoughts"),
    "answer": Command(
        "ladir.cli.answer", "FILE --model DIR --out FILE", "a file of questions is answered; stopped, it continues"
    ),
    "serve": Command("ladir.cli.serve", "--model DIR", "a server that speaks OpenAI's protocol, and a page that asks"),
    "inspect": Command("ladir.cli.inspect", "FILE", "blocks and token lengths of a data file, and what would be refused"),
    "report": Command("ladir.cli.report", "RUN...", "one page about runs: curves, tables, thoughts forming"),
    "status": Command("ladir.cli.status", "RUN [--watch]", "what a run's job is doing, and when it will be done"),
    "harness": Command("ladir.cli.harness", "--model ladir ...", "lm-evaluation-harness, with LaDiR among its models"),
    "countdown": Command("ladir.cli.countdown", "--out DIR", "write Countdown puzzles"),
    "gym": Command("ladir.cli.gym", "SET --out DIR", "write records of a set of reasoning-gym, such as gsm_symbolic"),
}

_HELP = ("-h", "--help")
_LONE_WORD = re.compile(r"[A-Za-z][\w-]*")


def run(argv: Sequence[str]) -> int:
    """Run the subcommand that ``argv`` begins with (without one: ask); returns its exit status, 2 where there is none such."""
    first = argv[0] if argv else ""
    if not argv or first in _HELP:
        (sys.stdout if argv else sys.stderr).write(overview())
        return 0 if argv else 2
    if first in COMMANDS:
        return _call(first, argv[1:])
    if (mistake := _mistaken(first, argv)) is not None:
        sys.stderr.write(f"ladir: {mistake}\n")
        return 2
    return _call("ask", argv)


def overview() -> str:
    """What ``--help`` prints: every subcommand, one a line."""
    calls = {name: f"{name} {command.arguments}" for name, command in COMMANDS.items()}
    width = max(map(len, calls.values()))
    lines = [f"  {calls[name]:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m ladir COMMAND ...",
            "",
            *lines,
            "",
            'python -m ladir "question" --model DIR is short for ask.  Each command has its own --help.',
            "",
        ]
    )


def _call(name: str, argv: Sequence[str]) -> int:
    """Each command imports what it needs: help and small commands stay quick."""
    status: int = importlib.import_module(COMMANDS[name].module).run(argv)
    return status


def _mistaken(first: str, argv: Sequence[str]) -> str | None:
    """What is wrong where a lone word looks like a mistyped command; None where it may well be a question."""
    if _LONE_WORD.fullmatch(first) is None:
        return None
    near = difflib.get_close_matches(first.lower(), COMMANDS, n=1)
    if not near and any(argument.partition("=")[0] == "--model" for argument in argv):
        return None
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
    return f"unknown command {first}; {meant} A question of one word: python -m ladir ask {first} --model DIR"
