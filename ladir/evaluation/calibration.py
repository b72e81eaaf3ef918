"""How far a verifier's scores can be believed: what share of the answers with a score is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Scores of ``count`` answers beside the verdicts on them.

    ``scores``, ``rates``, ``counts``: mean score, share of right answers and number of answers of every bin that has some, of ten
    bins of equal width; ``error``: the mean distance of the first two, weighted by the third (expected calibration error, Naeini
    et al. 2015); ``brier``: mean square distance of score and verdict; ``auc``: the probability that a right answer has a higher
    score than a wrong one (ties count half; None where all are right or all wrong).
    """

    count: int
    scores: list[float]
    rates: list[float]
    counts: list[int]
    error: float
    brier: float
    auc: float | None

    def row(self) -> dict[str, float | int | None]:
        """As ``results.json`` has it."""
        return {"answers": self.count, "calibration_error": self.error, "brier": self.brier, "auc": self.auc}


def calibration(scores: Sequence[float], right: Sequence[bool]) -> Calibration:
    """The calibration of ``scores`` (0 to 1) of answers that were judged ``right`` or not.  ValueError without any."""
    if not scores:
        raise ValueError("there are no scores")
    given, true = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=np.float64)
    of_bin = np.minimum((given * _BINS).astype(int), _BINS - 1)
    bins = [of_bin == number for number in range(_BINS) if (of_bin == number).any()]
    means, rates, counts = ([float(f(b)) for b in bins] for f in (lambda b: given[b].mean(), lambda b: true[b].mean(), np.sum))
    error = sum(count * abs(mean - rate) for mean, rate, count in zip(means, rates, counts, strict=True)) / len(given)
    brier = float(((given - true) ** 2).mean())
    return Calibration(len(given), means, rates, [int(count) for count in counts], error, brier, _auc(given, true))


def _auc(scores: np.ndarray, right: np.ndarray) -> float | None:
    """By ranks (Mann and Whitney 1947), those of equal scores their mean."""
    positives = right.sum()
    negatives = len(right) - positives
    if positives == 0 or negatives == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]
    return float((ranks[right > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))
