"""Choosing among a question's trajectories without knowing the answer: majority vote and self-consistency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ladir.evaluation.results import QuestionResult, Trajectory

#: how a vote is held, by the ending of a method's name
RULES = ("majority", "consistent")


def elect(trajectories: Sequence[Trajectory], rule: str = "majority") -> Trajectory:
    """The first trajectory with the most frequent answer (Wang et al. 2023, "Self-consistency"); on a tie, of the answers
    the one sampled first.

    Answers are the same where their normal forms are; empty ones have no vote while there are others.  ``consistent``: only
    trajectories whose thoughts lead to their answer vote, unless there are none.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; valid: {', '.join(RULES)}")
    voters = [entry for entry in trajectories if entry.canonical] or list(trajectories)
    if rule == "consistent":
        voters = [entry for entry in voters if entry.consistent] or voters
    [(winner, _)] = Counter(entry.canonical for entry in voters).most_common(1)
    return next(entry for entry in voters if entry.canonical == winner)


def elections(question: QuestionResult, rule: str, voters: int | None = None) -> QuestionResult:
    """The question with elected trajectories only: one, or one for each ``voters`` in a row that are whole."""
    entries = question.trajectories
    size = min(voters or len(entries), len(entries))
    groups = [entries[first : first + size] for first in range(0, len(entries) - size + 1, size)]
    return QuestionResult(question.question, tuple(elect(group, rule) for group in groups), question.reference)
