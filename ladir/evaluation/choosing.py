"""Which of a question's answers to give, without knowing the right one: votes, a verifier's scores, thoughts at rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ladir.errors import UnusableError


@dataclass(frozen=True)
class Candidate:
    """What is known of an answer when one is chosen.

    ``answer``: its normal form, equal where answers are; ``score``: the probability that it is right, by a verifier;
    ``drift``: how far its thoughts move when they are noised and denoised again; ``consistent``: whether they lead to it.
    """

    answer: str
    score: float | None = None
    drift: float | None = None
    consistent: bool | None = None


#: indices of candidates, among which one is chosen
_Voters = Sequence[int]


def choose(candidates: Sequence[Candidate], rule: str) -> int:
    """The index of the candidate that ``rule`` gives; on a tie the first.  Empty answers are no choice while there are others.

    ``first``: the first of all; ``majority``: of the most frequent answer (Wang et al. 2023, "Self-consistency");
    ``consistent``: the same among those whose thoughts lead to their answer, unless there are none; ``best``: the highest score;
    ``weighted``: of the answer with the largest sum of scores (Li et al. 2023, "Making language models better reasoners with
    step-aware verifier", section 3.2); ``stable``: the least drift.

    Raises ValueError for an unknown rule, UnusableError where what it goes by was not measured.
    """
    if rule not in _RULES:
        raise ValueError(f"unknown rule {rule!r}; valid: {', '.join(_RULES)}")
    if rule == "first":
        return 0
    voters = [i for i, entry in enumerate(candidates) if entry.answer] or list(range(len(candidates)))
    return _RULES[rule](candidates, voters)


def _first(candidates: Sequence[Candidate], voters: _Voters) -> int:
    return voters[0]


def _majority(candidates: Sequence[Candidate], voters: _Voters) -> int:
    return _heaviest(candidates, voters, [1.0] * len(voters))


def _consistent(candidates: Sequence[Candidate], voters: _Voters) -> int:
    return _majority(candidates, [i for i in voters if candidates[i].consistent] or voters)


def _best(candidates: Sequence[Candidate], voters: _Voters) -> int:
    return max(voters, key=dict(zip(voters, _scores(candidates, voters), strict=True)).__getitem__)


def _weighted(candidates: Sequence[Candidate], voters: _Voters) -> int:
    return _heaviest(candidates, voters, _scores(candidates, voters))


def _stable(candidates: Sequence[Candidate], voters: _Voters) -> int:
    drifts = {i: candidates[i].drift for i in voters}
    known = {i: drift for i, drift in drifts.items() if drift is not None}
    if len(known) < len(voters):
        raise UnusableError("choosing the stable one: how far thoughts drift was not measured")
    return min(known, key=known.__getitem__)


def _heaviest(candidates: Sequence[Candidate], voters: _Voters, weights: Sequence[float]) -> int:
    """The first voter with the answer of most weight; of answers of equal weight the one given first."""
    votes: dict[str, list[float]] = defaultdict(list)
    for i, weight in zip(voters, weights, strict=True):
        votes[candidates[i].answer].append(weight)
    winner = max(votes, key=lambda answer: math.fsum(votes[answer]))
    return next(i for i in voters if candidates[i].answer == winner)


def _scores(candidates: Sequence[Candidate], voters: _Voters) -> list[float]:
    found = [score for i in voters if (score := candidates[i].score) is not None]
    if len(found) < len(voters):
        raise UnusableError("choosing by scores needs a verifier: train one with training/train_verifier.py, then export again")
    return found


_RULES: dict[str, Callable[[Sequence[Candidate], _Voters], int]] = {
    "first": _first,
    "majority": _majority,
    "consistent": _consistent,
    "best": _best,
    "weighted": _weighted,
    "stable": _stable,
}
#: how one of several answers is chosen
RULES = tuple(_RULES)
#: those that ask nothing of a task
CHOICES = tuple(rule for rule in RULES if rule != "consistent")
