"""Public data sets as they are published, recognised by their fields and read as question, reasoning and answer.

============== ============================================ ======================= ===========================
format         fields                                       reasoning               answer
============== ============================================ ======================= ===========================
GSM8K          question, answer                             before ``####``         behind it
MATH           problem, solution [, answer]                 solution                answer, or last ``\\boxed``
College-Math   data_source, question_number,                none                    the whole ``answer``
               question, answer
HumanEval      prompt, canonical_solution, test,            lines of the solution   prompt and solution
               entry_point
HumanEval+     prompt, canonical_solution,                  lines of the solution   prompt and solution
(EvalPlus'     entry_point, base_input, plus_input, atol
release)
MBPP+ (EvalPlus' the same, task_id                           lines of the solution   solution
release)
MBPP           text or prompt, code, test_list [, test]     lines of the code       code
MetaMath       query, response                              before the mark         behind it
completions    prompt, completion                           before the mark         behind it
Alpaca         instruction [, input], output                before the mark         behind it, or ``answer``
Countdown      :mod:`ladir.data.puzzles`                    steps                   the expression they make
chat           messages, or conversations                   before the mark         behind it, or ``answer``
============== ============================================ ======================= ===========================

The mark is one of ``data.answer_prefixes`` (GSM8K's own is ``####``).  A chat is one question and one reply.

Programs get the fields ``setup``, ``tests`` and ``entry_point`` that :mod:`ladir.tasks.code` asks for.  The sets without
written reasoning have their programs' lines as blocks: a draft before the answer.  HumanEval+ and MBPP+ have the fields of
the sets that they extend; MBPP+ shows ``test_list`` and is judged by ``test``.  EvalPlus' own release has inputs in place of
tests: such rows get tests of them, which compare an attempt with the row's own solution (:mod:`ladir.data.mbpp_plus`).
"""

from __future__ import annotations

import json
import keyword
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ladir.data import mbpp_plus
from ladir.data.blocks import last_boxed
from ladir.data.puzzles import published_puzzle

_PLUS_TESTS = Path(__file__).parents[1] / "tasks" / "isolated" / "plus_tests.py"
_PLUS_INPUTS = ("base_input", "plus_input")
_QUOTED_TASK = re.compile(
    r"""\s*(?P<quotes>\"{3}|'{3})\s*(?P<task>\S.*?)\s*^(?P<tests>assert\b.*?)\s*(?P=quotes)\s*""", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Published:
    """A row of a public set; ``answer`` is None where it has none."""

    question: Any
    reasoning: Any
    answer: Any
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that the task's checker needs beside those of the row."""
    marked: bool = False
    """Whether the answer stands behind a mark at the end of the reasoning, where ``answer`` is None."""
    mark: str | None = None
    """The set's own mark; None: those of the settings."""


class FormatError(ValueError):
    """A row of a public set's fields that does not hold what the set's rows hold; ``remedy`` says what to do."""

    def __init__(self, reason: str, remedy: str = "write it as the published set does") -> None:
        super().__init__(reason)
        self.remedy = remedy


def read_published(row: Mapping[str, Any]) -> Published | None:
    """The row as question, reasoning and answer (of whatever type the row has), None for no known format.

    Raises FormatError where its tests are no program texts, or its messages no question with one reply.
    """
    if (puzzle := published_puzzle(row)) is not None:
        extra = {"numbers": puzzle.numbers, "target": puzzle.target}
        return Published(puzzle.question(), puzzle.steps or None, puzzle.expression(), extra)
    for needed, convert in _FORMATS:
        if needed <= row.keys():
            return convert(row)
    return None


def _human_eval(row: Mapping[str, Any]) -> Published:
    return _completion(row, f"{_program(row, 'test')}\n\ncheck({_program(row, 'entry_point')})\n")


def _completion(row: Mapping[str, Any], tests: str) -> Published:
    prompt, solution = row["prompt"], row["canonical_solution"]
    answer = f"{prompt}{solution}" if isinstance(prompt, str) else None
    return Published(question=prompt, reasoning=solution, answer=answer, extra={"setup": prompt, "tests": tests})


def _evalplus(row: Mapping[str, Any]) -> Published:
    """HumanEval+ and MBPP+ as EvalPlus releases them."""
    quoted = _QUOTED_TASK.fullmatch(str(row.get("prompt")))
    of_mbpp = quoted is not None or "assertion" in row or str(row.get("task_id")).lower().startswith("mbpp")
    fault = _plus_fault(row)
    try:
        if not fault:
            return _mbpp_plus(row, quoted) if of_mbpp else _human_eval_plus(row)
    except RecursionError:
        fault = "nests its inputs too deeply"
    except ValueError as error:
        fault = str(error)
    name, release, hub = ("MBPP+", f" ({mbpp_plus.VERSION})", "mbppplus") if of_mbpp else ("HumanEval+", "", "humanevalplus")
    remedy = f"take it as EvalPlus releases it{release}, or with a field 'test' in its place, as the Hub has it (evalplus/{hub})"
    raise FormatError(f"it is of {name} in EvalPlus' release form, and {fault}", remedy)


def _human_eval_plus(row: Mapping[str, Any]) -> Published:
    rule = "root" if row["entry_point"] == "find_zero" else "equal"
    return _completion(row, _plus_tests(row, f"{row['prompt']}{row['canonical_solution']}", rule))


def _mbpp_plus(row: Mapping[str, Any], prompt: re.Match[str] | None) -> Published:
    """Shown is what EvalPlus shows, the task with the first of its tests.  Raises ValueError on a task that is not known."""
    number, name = mbpp_plus.task_number(row.get("task_id")), row["entry_point"]
    if prompt is None:
        raise ValueError("its 'prompt' is no text with an assertion, in quotes")
    read = {field: [mbpp_plus.arguments(number, given) for given in row[field]] for field in _PLUS_INPUTS}
    tests = _plus_tests({**row, **read}, row["canonical_solution"], mbpp_plus.rule_of(name))
    shown = {"prompt": prompt["task"], "test_list": prompt["tests"]}
    return _mbpp({**shown, "code": row["canonical_solution"], "test": tests})


def _plus_fault(row: Mapping[str, Any]) -> str:
    """What keeps a row from being judged by its inputs; empty where nothing does."""
    texts = ("prompt", "canonical_solution", "entry_point")
    lacking = ", ".join(repr(name) for name in (*texts, *_PLUS_INPUTS, "atol") if row.get(name) is None)
    if lacking:
        return f"lacks {lacking}"
    for name in texts:
        if not isinstance(row[name], str) or not row[name].strip():
            return f"field {name!r} is no text, or empty"
    if not row["entry_point"].isidentifier() or keyword.iskeyword(row["entry_point"]):
        return "field 'entry_point' is no function's name"
    if isinstance(row["atol"], bool) or not isinstance(row["atol"], (int, float)) or not 0 <= row["atol"] <= 1:
        return "field 'atol' is no tolerance (0 to 1)"
    for name in _PLUS_INPUTS:
        if row[name] == {}:  # as Mbpp/793 has it
            continue
        if not isinstance(row[name], list) or not all(isinstance(given, list) for given in row[name]):
            return f"field {name!r} is no list of inputs, each a list of arguments"
    return "" if any(row[name] for name in _PLUS_INPUTS) else "has no inputs"


def _plus_tests(row: Mapping[str, Any], solution: str, rule: str) -> str:
    """The tests of a row, whose function may be called ``check``."""
    # On lines of its own: what the solution imports is then guarded like what the tests import.
    solution = solution.replace("\\", "\\\\").replace('"', '\\"')
    task = f"solution, {row['entry_point']!r}, {rule!r}, {float(row['atol'])!r}"
    # Python writes as inf and nan what has no literal.
    makers = [f"    def {name}(): return {row[name]!r}" for name in _PLUS_INPUTS]
    check = [
        "def plus_check(candidate):",
        "    inf, nan = 1e999, 1e999 - 1e999",
        *makers,
        f'    solution = """\n{solution}\n"""',
        f"    plus_judge(candidate, ({task}), [{', '.join(_PLUS_INPUTS)}])",
    ]
    return "\n".join([_plus_judge(), "", *check, "", f"plus_check({row['entry_point']})", ""])


@lru_cache(maxsize=1)
def _plus_judge() -> str:
    return _PLUS_TESTS.read_text(encoding="utf-8")


def _mbpp(row: Mapping[str, Any]) -> Published:
    """MBPP shows its tests with the task: without them the function's name would be a guess.  MBPP+ has further ones, which
    stand for those shown, too.  Code that sets a test up may use the answer's own classes: it is a part of the tests."""
    task = row["text"] if "text" in row else row.get("prompt")
    setup, before = _program(row, "test_imports"), _program(row, "test_setup_code")
    shown = _program(row, "test_list")
    question = f"{task}\nYour code should pass these tests:\n\n{shown}" if isinstance(task, str) else task
    tests = _program(row, "test") or shown
    tests = f"{before}\n{tests}" if before.strip() else tests
    return Published(question=question, reasoning=row["code"], answer=row["code"], extra={"setup": setup, "tests": tests})


def _program(row: Mapping[str, Any], name: str) -> str:
    """A program text, or the lines of one; empty where there is none."""
    value = row.get(name)
    lines = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise FormatError(f"field {name!r} is neither a program text nor a list of lines")
    return "\n".join(lines)


def _math(row: Mapping[str, Any]) -> Published:
    solution, answer = row["solution"], row.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    return Published(question=row["problem"], reasoning=solution, answer=answer)


def _college_math(row: Mapping[str, Any]) -> Published:
    """Its answers, of whatever length, are no chains: "The sequence is increasing. It diverges." is one of them."""
    return Published(question=row["question"], reasoning=None, answer=row["answer"])


def _gsm8k(row: Mapping[str, Any]) -> Published:
    return Published(question=row["question"], reasoning=row["answer"], answer=None, marked=True, mark="####")


def chain_elsewhere(row: Mapping[str, Any]) -> bool:
    """Whether a row of GSM8K's fields has its chain in another one, and in ``answer`` no more than the name says."""
    chain = row.get("answer")
    whole = isinstance(chain, str) and "####" in chain and chain.partition("####")[0].strip() != ""
    return {"question", "answer"} <= row.keys() and not whole and _first(row, _CHAINS, taken={"question", "answer"}) is not None


def _marked(question: str, reasoning: str) -> Callable[[Mapping[str, Any]], Published]:
    """A set of two fields, the answer behind a mark at the end of the second."""
    return lambda row: Published(row[question], row[reasoning], answer=row.get("answer"), marked=True)


def _alpaca(row: Mapping[str, Any]) -> Published:
    """The instruction and what it is about, where there is something, are the question together."""
    asked, about = row["instruction"], row.get("input")
    question = f"{asked}\n{about}" if isinstance(asked, str) and isinstance(about, str) and about.strip() else asked
    return Published(question, row["output"], answer=row.get("answer"), marked=True)


_ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1, "model": 1}


def _chat(name: str, role: str, content: str) -> Callable[[Mapping[str, Any]], Published]:
    def convert(row: Mapping[str, Any]) -> Published:
        turns, apart = row[name], "write question and reply into fields of their own: data.input_field, data.output_field"
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise FormatError(f"field {name!r} is no list of messages", apart)
        roles = [turn.get(role) for turn in turns]
        if [_ROLES.get(str(found)) for found in roles] != [0, 1]:
            listed = ", ".join(map(str, roles[:6])) or "none"
            raise FormatError(f"field {name!r} is no single question with its reply (its messages are of: {listed})", apart)
        question, reply = (turn.get(content) for turn in turns)
        return Published(question, reply, answer=row.get("answer"), marked=True)

    return convert


# fmt: off
_QUESTIONS = ("question", "problem", "query", "prompt", "instruction", "input", "task", "text", "body", "puzzle", "user")
_CHAINS = (
    "cot", "chain_of_thought", "chain", "steps", "rationale", "rationales", "reasoning", "solution", "solutions", "thoughts",
    "thought", "thinking", "explanation", "response", "completion", "output", "generation", "generated_solution", "proof",
)
_ANSWERS = (
    "answer", "final_answer", "expected_answer", "gold_answer", "gold", "ground_truth", "target", "label", "result", "correct",
)
# fmt: on


def fields_hint(row: Mapping[str, Any]) -> str:
    """Which settings name a row's fields, with those of its fields that seem to be meant."""
    inner = next(
        (name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)), None
    )
    if inner is not None:
        path = shlex.quote(f".{json.dumps(inner)}[]")
        return f"write the {len(row[inner])} objects in its list {inner!r} one per line, e.g. jq -c {path} OLD > NEW"
    if row and all(isinstance(value, Mapping) for value in row.values()):
        return "write the objects in it one per line, e.g. jq -c '.[]' OLD > NEW"
    settings: dict[str, str] = {}
    for setting, known in (("input_field", _QUESTIONS), ("output_field", _CHAINS), ("answer_field", _ANSWERS)):
        found = _first(row, known, taken=set(settings.values()))
        if found is not None:
            settings[setting] = found
    if "answer_field" in settings and "output_field" not in settings:
        settings["output_field"] = settings.pop("answer_field")
    shown = [f"data.{setting}={settings.get(setting, '...')}" for setting in ("input_field", "output_field", "answer_field")]
    optional = "" if "answer_field" in settings else " (the last only where the answer has a field of its own)"
    return f"name its fields: {' '.join(shown)}{optional}"


def _first(row: Mapping[str, Any], known: Sequence[str], taken: set[str]) -> str | None:
    """The row's field with the first of the ``known`` names, whatever its case."""
    names = {str(name).lower(): str(name) for name in row if name not in taken}
    return next((names[name] for name in known if name in names), None)


_FORMATS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Published]], ...] = (
    *((frozenset({name}), _evalplus) for name in _PLUS_INPUTS),  # first: such a row may have HumanEval's tests, too
    (frozenset({"prompt", "canonical_solution", "test", "entry_point"}), _human_eval),
    (frozenset({"code", "test_list"}), _mbpp),
    (frozenset({"problem", "solution"}), _math),
    (frozenset({"question", "answer", "data_source", "question_number"}), _college_math),
    (frozenset({"question", "answer"}), _gsm8k),
    (frozenset({"query", "response"}), _marked("query", "response")),
    (frozenset({"instruction", "output"}), _alpaca),
    (frozenset({"prompt", "completion"}), _marked("prompt", "completion")),
    (frozenset({"messages"}), _chat("messages", "role", "content")),
    (frozenset({"conversations"}), _chat("conversations", "from", "value")),
)
