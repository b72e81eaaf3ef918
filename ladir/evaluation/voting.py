"""Choosing among a question's judged trajectories without knowing the answer (:mod:`ladir.evaluation.choosing`)."""

from __future__ import annotations

from collections.abc import Sequence

from ladir.evaluation import choosing
from ladir.evaluation.choosing import Candidate
from ladir.evaluation.results import QuestionResult, Trajectory

#: how one is chosen, by the ending of a method's name
RULES = tuple(rule for rule in choosing.RULES if rule != "first")


def elect(trajectories: Sequence[Trajectory], rule: str = "majority") -> Trajectory:
    """The trajectory that ``rule`` chooses; answers are the same where their normal forms are."""
    candidates = [Candidate(entry.canonical, entry.score, entry.drift, entry.consistent) for entry in trajectories]
    return trajectories[choosing.choose(candidates, rule)]


def elections(question: QuestionResult, rule: str, voters: int | None = None) -> QuestionResult:
    """The question with elected trajectories only: one, or one for each ``voters`` in a row that are whole."""
    entries = question.trajectories
    size = min(voters or len(entries), len(entries))
    groups = [entries[first : first + size] for first in range(0, len(entries) - size + 1, size)]
    return QuestionResult(question.question, tuple(elect(group, rule) for group in groups), question.reference)
