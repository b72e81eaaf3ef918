"""Rewards for tests: of any answer something, so that groups differ."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

#: how many more questions are judged before this process is asked to stop; None: it is not
questions_left: int | None = None


def letters(questions: Sequence[str], thoughts: Sequence[Sequence[str]], answers: Sequence[str], records: Any) -> list[float]:
    """The letters of thoughts and answer, of which no two attempts have as many."""
    global questions_left
    if questions_left is not None:
        questions_left -= 1
        if questions_left == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
    return [float(len("".join((*chain, answer))) % 7) for chain, answer in zip(thoughts, answers, strict=True)]


def nan_for_the_last(questions: Sequence[str], *others: Any) -> list[float]:
    """No number, for one attempt."""
    return [1.0] * (len(questions) - 1) + [float("nan")]


def never_on_the_last_rank(questions: Sequence[str], *others: Any) -> list[float]:
    """Comes back on the first rank alone."""
    if int(os.environ["RANK"]) > 0:
        threading.Event().wait()
    return [float(place) for place in range(len(questions))]
