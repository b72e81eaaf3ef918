"""Figures of an evaluation: pass@k, chains, distinct solutions, majority vote, each with its standard error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ladir.evaluation.results import QuestionResult

#: The numbers of samples that every results.json reports.
REPORTED_KS = (1, 10, 100)


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


def summarise(questions: Sequence[QuestionResult], ks: Sequence[int] = REPORTED_KS) -> dict[str, Any]:
    """The figures of one method: means over questions, from 0 to 1 (``distinct_correct``: a count), and their errors.

    Keys: ``pass@k`` for each k (None: some question has fewer than k trajectories); ``chain``, the share of
    trajectories whose thoughts alone solve the question (None: the task cannot tell); ``distinct_correct``, different
    right answers per question; ``majority``, the share of questions whose most frequent answer is right; ``stopped``,
    the share of trajectories that ended by themselves; ``standard_errors``, by question, under the same keys;
    ``pass_curve``, pass@k for k = 1, 2, 5, 10, ... as {"k": rate}.  Raises ValueError without questions.
    """
    if not questions:
        raise ValueError("there are no questions to summarise")
    figures: dict[str, Callable[[QuestionResult], float]] = {}
    fewest = min(len(question.trajectories) for question in questions)
    for k in ks:
        if k <= fewest:
            figures[f"pass@{k}"] = partial(_pass, k=k)
    if all(trajectory.chain_correct is not None for question in questions for trajectory in question.trajectories):
        figures["chain"] = lambda question: _mean([bool(entry.chain_correct) for entry in question.trajectories])
    figures["distinct_correct"] = distinct_correct
    figures["majority"] = majority_correct
    figures["stopped"] = lambda question: _mean([entry.stopped for entry in question.trajectories])

    names = [*(f"pass@{k}" for k in ks), "chain", "distinct_correct", "majority", "stopped"]
    values = {name: [figure(question) for question in questions] for name, figure in figures.items()}
    return {
        **{name: _mean(values[name]) if name in values else None for name in names},
        "standard_errors": {name: standard_error(values[name]) if name in values else None for name in names},
        "pass_curve": {str(k): _mean([_pass(question, k) for question in questions]) for k in _curve_ks(fewest)},
    }


def distinct_correct(question: QuestionResult) -> float:
    """Number of different right answers among a question's trajectories."""
    return len({entry.canonical for entry in question.trajectories if entry.correct})


def majority_correct(question: QuestionResult) -> float:
    """1 if the most frequent answer is right, else 0; of equally frequent answers the one sampled first counts."""
    answer, _ = Counter(entry.canonical for entry in question.trajectories).most_common(1)[0]
    return float(next(entry.correct for entry in question.trajectories if entry.canonical == answer))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent ``values``; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _pass(question: QuestionResult, k: int) -> float:
    return pass_at_k(len(question.trajectories), question.num_correct, k)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _curve_ks(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``most``, which is the last."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [*(k for k in steps if k < most), most]
