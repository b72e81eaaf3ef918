"""What an evaluation produces: judged trajectories, one row per method, and ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ladir.data.records import Record
from ladir.tasks import Task

#: under which a row has what every process spent on it, and the name that this had before
SECONDS, _EARLIER_SECONDS = "seconds_by_process", "seconds_by_rank"


@dataclass(frozen=True)
class Trajectory:
    """One sampled answer and what the task's checker says about it."""

    answer: str
    correct: bool
    canonical: str
    """Normal form of the answer: trajectories with the same one gave the same answer."""
    thoughts: tuple[str, ...] = ()
    """The reasoning as text, one entry per block."""
    chain_correct: bool | None = None
    """Whether the thoughts alone solve the question; None where the task cannot tell."""
    lenient: bool | None = None
    """Whether the thoughts pass the looser rule of published figures; None where the task has none."""
    stopped: bool = True
    """Whether the model ended its reasoning itself, before the limit on blocks or tokens."""
    consistent: bool | None = None
    """Whether the thoughts lead to this answer, right or wrong; None where the task cannot tell."""
    reason: str = ""
    """Why the answer is not right; empty where it is."""
    undecided: bool = False
    """Whether the checker came to no end or could not read the answer (``correct`` is false)."""
    score: float | None = None
    """The probability that the answer is right, by the verifier; None where there is none."""
    drift: float | None = None
    """How far the thoughts move when they are noised and denoised again; None where it was not measured."""


@dataclass(frozen=True)
class QuestionResult:
    """A question with all its sampled trajectories."""

    question: str
    trajectories: tuple[Trajectory, ...]
    reference: str = ""
    """The record's own answer."""

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"question {self.question!r} has no trajectories; sample at least one")

    @property
    def num_correct(self) -> int:
        """Trajectories whose answer is right."""
        return sum(trajectory.correct for trajectory in self.trajectories)


@dataclass(frozen=True)
class MethodResult:
    """One row of the results: a method, what it cost, and its figures (:func:`ladir.evaluation.metrics.summarise`)."""

    method: str
    summary: Mapping[str, Any]
    seconds_per_question: float
    """Seconds of generation per question on one process, all its trajectories included; without judging them, and without
    decoding latent thoughts to text unless the method needs it."""
    training_seconds: float
    """Seconds of training that the method needed in all, earlier phases included."""
    wall_seconds: float | None = None
    """Seconds from the first question to the last, over all restarts: what the process that took longest spent."""
    seconds_by_process: Mapping[int, float] = field(default_factory=dict)
    """What every process spent on the row, over all restarts."""
    forward_passes_per_question: float | None = None
    """Passes of a sequence through the LM (:class:`ladir.inference.cost.Cost`), all trajectories included."""
    flops_per_question: float | None = None
    """Operations of matrix products, all trajectories included."""
    training_steps: int | None = None
    """Optimizer steps of the model that answers: of the denoiser, its stages summed, or of the baseline and its base LM."""

    def row(self) -> dict[str, Any]:
        """The row as ``results.json`` stores it."""
        return {
            "method": self.method,
            **self.summary,
            "seconds_per_question": self.seconds_per_question,
            "wall_seconds": self.wall_seconds,
            SECONDS: {str(number): seconds for number, seconds in sorted(self.seconds_by_process.items())},
            "forward_passes_per_question": self.forward_passes_per_question,
            "flops_per_question": self.flops_per_question,
            "training_seconds": self.training_seconds,
            "training_steps": self.training_steps,
        }


def judge(task: Task, record: Record, answer: str, thoughts: Sequence[str] = (), stopped: bool = True) -> Trajectory:
    """A trajectory with the verdicts of the task's checker on its ``answer`` and, where there are any, ``thoughts``."""
    verdict = task.verdict(answer, record)
    return Trajectory(
        answer=answer,
        correct=verdict.right,
        canonical=task.canonical(answer),
        thoughts=tuple(thoughts),
        chain_correct=task.chain_correct(thoughts, record),
        lenient=task.lenient(thoughts, record),
        stopped=stopped,
        consistent=task.agrees(thoughts, answer),
        reason=verdict.reason or ("" if verdict.right else "judged wrong" if answer.strip() else "no answer"),
        undecided=verdict.undecided,
    )


def write_results(
    path: str | Path,
    methods: Sequence[MethodResult],
    *,
    task: str,
    num_questions: int,
    num_trajectories: int,
    seed: int,
    in_file: int | None = None,
    benchmark: str = "",
    split: str = "test",
    snapshot: int | None = None,
    sample: Mapping[str, Any] | None = None,
    ar: Mapping[str, Any] | None = None,
    left_out: Mapping[str, Any] | None = None,
    gold: Mapping[str, Any] | None = None,
    trained_on: int = 0,
    busy: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results.json``: rates from 0 to 1; null where there are too few trajectories or the task cannot tell.

    ``sample`` and ``ar``: the controls of LaDiR's generation and of the baseline's; ``snapshot``: the training step of models
    that are not the finished ones; ``left_out`` and ``gold``: what was not asked, and what the checker said of the records' own
    answers; ``trained_on``: questions that the training records have, too; ``in_file``: questions in the file, asked or not;
    ``benchmark``: name of the data set in a suite; ``busy``: the seconds of the last start, and the share of them that every
    process worked.
    """
    content = {
        "benchmark": benchmark,
        "task": task,
        "split": split,
        "snapshot": snapshot,
        "in_file": in_file,
        "num_questions": num_questions,
        "num_trajectories": num_trajectories,
        "seed": seed,
        "sample": dict(sample or {}),
        "ar": dict(ar or {}),
        "left_out": dict(left_out or {}),
        "gold": dict(gold or {}),
        "trained_on": trained_on,
        "busy": dict(busy or {}),
        "rows": [method.row() for method in methods],
    }
    _write(Path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_results(path: str | Path) -> dict[str, Any]:
    """The content of a ``results.json``, of earlier versions as well.

    Raises ValueError where the file is not one, OSError where there is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a results.json ({error}); run training/evaluate.py again") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path}: not a results.json (no rows); run training/evaluate.py again")
    for row in content["rows"]:
        if _EARLIER_SECONDS in row:
            row[SECONDS] = row.pop(_EARLIER_SECONDS)
    return content


def write_questions(path: str | Path, questions: Mapping[str, Sequence[QuestionResult]]) -> None:
    """Write every judged trajectory as JSONL, one line per method and question: the evidence behind the table."""
    lines = (
        json.dumps({"method": method, **asdict(question)}, ensure_ascii=False)
        for method, results in questions.items()
        for question in results
    )
    _write(Path(path), "".join(f"{line}\n" for line in lines))


def read_questions(path: str | Path) -> dict[str, list[QuestionResult]]:
    """What :func:`write_questions` wrote, by method, in the order of the file."""
    questions: dict[str, list[QuestionResult]] = {}
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            questions.setdefault(row["method"], []).append(question_from(row))
    return questions


def question_from(row: Mapping[str, Any]) -> QuestionResult:
    """A question read back from the JSON object of its ``dataclasses.asdict``; other keys are ignored."""
    trajectories = (Trajectory(**{**trajectory, "thoughts": tuple(trajectory["thoughts"])}) for trajectory in row["trajectories"])
    return QuestionResult(row["question"], tuple(trajectories), row.get("reference", ""))


def _write(path: Path, text: str) -> None:
    """Write aside and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
