"""Rewards for tests: of any answer something, so that groups differ."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any


def letters(questions: Sequence[str], thoughts: Sequence[Sequence[str]], answers: Sequence[str], records: Any) -> list[float]:
    """The letters of thoughts and answer, of which no two attempts have as many."""
    return [float(len("".join((*chain, answer))) % 7) for chain, answer in zip(thoughts, answers, strict=True)]


def nan_for_the_last(questions: Sequence[str], *others: Any) -> list[float]:
    """No number, for one attempt."""
    return [1.0] * (len(questions) - 1) + [float("nan")]


def never_on_the_last_rank(questions: Sequence[str], *others: Any) -> list[float]:
    """Comes back on the first rank alone."""
    if int(os.environ["RANK"]) > 0:
        threading.Event().wait()
    return [float(place) for place in range(len(questions))]
