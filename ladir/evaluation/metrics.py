"""Figures of an evaluation: pass@k, chains, distinct solutions, votes, each with its standard error and interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ladir.evaluation.calibration import Calibration, calibration
from ladir.evaluation.results import QuestionResult, Trajectory
from ladir.evaluation.voting import elect

#: The numbers of samples that every results.json reports.
REPORTED_KS = (1, 10, 100)

#: quantile of the normal distribution behind the 95 % confidence intervals
_Z = 1.959964


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, given that c of n were: ``1 - C(n - c, k) / C(n, k)``.

    Unbiased for samples drawn independently (Chen et al. 2021, "Evaluating large language models trained on code",
    equation 1).  Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples of n={n}: c must lie between 0 and n")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per question, there are {n}; sample more or lower k")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


#: figures of a question that are of what was answered, not of what is right: those not asked say nothing about them
_OF_ANSWERS = ("consistent", "stopped")


def summarise(
    questions: Sequence[QuestionResult], ks: Sequence[int] = REPORTED_KS, samples: int | None = None, unasked: int = 0
) -> dict[str, Any]:
    """The figures of one method: means over questions, from 0 to 1 (``distinct_correct``: a count), and their errors.

    ``unasked``: questions that count beside them as ones without a right answer.

    Keys: ``pass@k`` for each k (None: some question has fewer than k trajectories, or fewer are ``samples``); ``chain``, the
    share of trajectories whose thoughts alone solve the question; ``lenient``, of those whose thoughts pass the rule of published
    figures (None: the task has none); ``consistent``, of those whose thoughts lead to their answer
    (None: the task cannot tell); ``distinct_correct``, different right answers per question; ``majority`` and
    ``majority_consistent``, the share of questions whose elected answer is right; ``stopped``, the share of trajectories that
    ended by themselves; ``standard_errors`` and ``confidence_intervals``, by question, under the same keys; ``pass_curve``,
    pass@k for k = 1, 2, 5, 10, ... as {"k": rate}; ``undecided``, the number of trajectories that the checker could not judge
    and that count as wrong; ``verifier``, how far its scores can be believed (:class:`~ladir.evaluation.calibration.Calibration`;
    None without a verifier).  Raises ValueError without questions.
    """
    if not questions:
        raise ValueError("there are no questions to summarise")
    figures: dict[str, Callable[[QuestionResult], float]] = {}
    fewest = min(samples or len(question.trajectories) for question in questions)
    for k in ks:
        if k <= fewest:
            figures[f"pass@{k}"] = partial(_pass, k=k)
    everything = [entry for question in questions for entry in question.trajectories]
    if all(entry.chain_correct is not None for entry in everything):
        figures["chain"] = lambda question: _mean([bool(entry.chain_correct) for entry in question.trajectories])
    if all(entry.lenient is not None for entry in everything):
        figures["lenient"] = lambda question: _mean([bool(entry.lenient) for entry in question.trajectories])
    if all(entry.consistent is not None for entry in everything):
        figures["consistent"] = lambda question: _mean([bool(entry.consistent) for entry in question.trajectories])
        figures["majority_consistent"] = partial(elected_correct, rule="consistent")
    figures["distinct_correct"] = distinct_correct
    figures["majority"] = elected_correct
    figures["stopped"] = lambda question: _mean([entry.stopped for entry in question.trajectories])

    names = [*(f"pass@{k}" for k in ks), "chain", "lenient", "consistent", "distinct_correct"]
    names += ["majority", "majority_consistent", "stopped"]
    missed = [0.0] * unasked
    values = {name: [*map(figure, questions), *(() if name in _OF_ANSWERS else missed)] for name, figure in figures.items()}
    return {
        **{name: _mean(values[name]) if name in values else None for name in names},
        "standard_errors": {name: standard_error(values[name]) if name in values else None for name in names},
        "confidence_intervals": {name: confidence_interval(values[name]) if name in values else None for name in names},
        "pass_curve": {str(k): _mean([*(_pass(question, k) for question in questions), *missed]) for k in _curve_ks(fewest)},
        "undecided": sum(entry.undecided for entry in everything),
        "verifier": None if (found := scores_of(everything)) is None else found.row(),
    }


def scores_of(trajectories: Sequence[Trajectory]) -> Calibration | None:
    """The calibration of their scores; None where they have none."""
    scored = [(entry.score, entry.correct) for entry in trajectories if entry.score is not None]
    return calibration(*zip(*scored, strict=True)) if scored else None


def distinct_correct(question: QuestionResult) -> float:
    """Number of different right answers among a question's trajectories."""
    return len({entry.canonical for entry in question.trajectories if entry.correct})


def elected_correct(question: QuestionResult, rule: str = "majority") -> float:
    """1 if the answer that the trajectories elect is right, else 0."""
    return float(elect(question.trajectories, rule).correct)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent ``values``; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def confidence_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval [low, high] of the mean of independent ``values``; None for fewer than two.

    Where all values lie in [0, 1]: Wilson's score interval, at the number of yes-or-no questions that would give the same
    standard error.  For 0 and 1 alone that is the ordinary one; it says something where all are equal, too.  Else (counts): the
    mean and 1.96 standard errors on each side.
    """
    if len(values) < 2:
        return None
    n, mean = len(values), _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / n
    if min(values) < 0 or max(values) > 1:
        spread = _Z * math.sqrt(variance / (n - 1))
        return [mean - spread, mean + spread]
    effective = n * mean * (1 - mean) / variance if variance > 1e-12 else n
    centre, shrink = mean + _Z**2 / (2 * effective), 1 + _Z**2 / effective
    spread = _Z * math.sqrt(mean * (1 - mean) / effective + (_Z / (2 * effective)) ** 2)
    return [max(0.0, (centre - spread) / shrink), min(1.0, (centre + spread) / shrink)]


def _pass(question: QuestionResult, k: int) -> float:
    return pass_at_k(len(question.trajectories), question.num_correct, k)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _curve_ks(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``most``, which is the last."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [*(k for k in steps if k < most), most]
