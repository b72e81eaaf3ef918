"""Public data sets as they are published, recognised by their fields and read as question, reasoning and answer.

============== ============================================ ======================= ===========================
format         fields                                       reasoning               answer
============== ============================================ ======================= ===========================
GSM8K          question, answer                             before ``####``         behind it
MATH           problem, solution [, answer]                 solution                answer, or last ``\\boxed``
HumanEval      prompt, canonical_solution, test,            lines of the solution   prompt and solution
               entry_point
MBPP           text or prompt, code, test_list              lines of the code       code
============== ============================================ ======================= ===========================

Programs get the fields ``setup``, ``tests`` and ``entry_point`` that :mod:`ladir.tasks.code` asks for.  The sets without
written reasoning have their programs' lines as blocks: a draft before the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ladir.data.blocks import last_boxed, split_answer


@dataclass(frozen=True)
class Published:
    """A row of a public set; ``answer`` is None where it has none."""

    question: Any
    reasoning: Any
    answer: Any
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that the task's checker needs beside those of the row."""


def read_published(row: Mapping[str, Any]) -> Published | None:
    """The row as question, reasoning and answer (of whatever type the row has), None for no known format.

    Raises ValueError where its tests are no program texts.
    """
    for needed, convert in _FORMATS:
        if needed <= row.keys():
            return convert(row)
    return None


def _human_eval(row: Mapping[str, Any]) -> Published:
    prompt, solution = row["prompt"], row["canonical_solution"]
    tests = f"{_program(row, 'test')}\n\ncheck({_program(row, 'entry_point')})\n"
    answer = f"{prompt}{solution}" if isinstance(prompt, str) else None
    return Published(question=prompt, reasoning=solution, answer=answer, extra={"setup": prompt, "tests": tests})


def _mbpp(row: Mapping[str, Any]) -> Published:
    """MBPP shows its tests with the task: without them the function's name would be a guess."""
    task = row["text"] if "text" in row else row.get("prompt")
    setup = _program(row, "test_setup_code") or _program(row, "test_imports")
    tests = _program(row, "test_list")
    question = f"{task}\nYour code should pass these tests:\n\n{tests}" if isinstance(task, str) else task
    return Published(question=question, reasoning=row["code"], answer=row["code"], extra={"setup": setup, "tests": tests})


def _program(row: Mapping[str, Any], name: str) -> str:
    """A program text, or the lines of one; empty where there is none."""
    value = row.get(name)
    lines = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"field {name!r} is neither a program text nor a list of lines")
    return "\n".join(lines)


def _math(row: Mapping[str, Any]) -> Published:
    solution, answer = row["solution"], row.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    return Published(question=row["problem"], reasoning=solution, answer=answer)


def _gsm8k(row: Mapping[str, Any]) -> Published:
    reasoning, answer = split_answer(row["answer"], ("####",)) if isinstance(row["answer"], str) else (row["answer"], None)
    return Published(question=row["question"], reasoning=reasoning, answer=answer)


_FORMATS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Published]], ...] = (
    (frozenset({"prompt", "canonical_solution", "test", "entry_point"}), _human_eval),
    (frozenset({"code", "test_list"}), _mbpp),
    (frozenset({"problem", "solution"}), _math),
    (frozenset({"question", "answer"}), _gsm8k),
)
