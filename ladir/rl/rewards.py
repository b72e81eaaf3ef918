"""What attempts are worth: the verdicts of the task's checker, or numbers of a function of the user's."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ladir.config import Config, RlSettings
from ladir.config.checks import CHECKED_REWARDS, reads_blocks
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.evaluation.results import Trajectory
from ladir.rl.limits import OverTimeError, TimeLimit

#: (questions, thoughts, answers, records) of a batch of attempts to a number each
OwnReward = Callable[[list[str], list[list[str]], list[str], list[Record]], Sequence[float]]

#: rewards of judged attempts, each with its record and the share of the answer's limit that it took
RewardFunction = Callable[[Sequence[Record], Sequence[Trajectory], Sequence[float]], list[float]]

_SHOWN = 60  # characters of a question in a message


def reads_thoughts(reward: str) -> bool:
    """Whether thoughts have to be decoded to text to give this reward (``rl.reward``)."""
    return reward != "answer"


def decodes_thoughts(config: Config) -> bool:
    """Whether stage 3 reads any block as text: for its reward, or before the blocks behind it."""
    return reads_thoughts(config.rl.reward) or bool(reads_blocks(config))


def reward_function(settings: RlSettings) -> RewardFunction:
    """What ``rl.reward`` and its weights say.  UnusableError where a function of the user's cannot be found."""
    own = None if settings.reward in CHECKED_REWARDS else _imported(settings.reward)
    limit = TimeLimit(settings.reward_seconds)

    def rewards(records: Sequence[Record], judged: Sequence[Trajectory], lengths: Sequence[float]) -> list[float]:
        if own is None:
            values = [_checked(settings.reward, entry) for entry in judged]
        else:
            given = _own(settings.reward, own, limit, records, judged)
            values = [value + settings.checker_weight * entry.correct for value, entry in zip(given, judged, strict=True)]
        return [
            value
            + settings.format_weight * _has_form(entry, length)
            - settings.length_weight * length
            - settings.unstopped_weight * (not entry.stopped)
            for value, entry, length in zip(values, judged, lengths, strict=True)
        ]

    return rewards


def _has_form(judged: Trajectory, length: float) -> bool:
    """Whether thoughts and answer came to their end and the answer is one that the checker can read."""
    return judged.stopped and length < 1 and bool(judged.answer.strip()) and not judged.undecided


def _checked(reward: str, judged: Trajectory) -> float:
    if reward == "answer":
        return float(judged.correct)
    if judged.chain_correct is None:
        raise UnusableError(f"rl.reward={reward}: the checker of this task cannot judge thoughts alone; set rl.reward=answer")
    return float(judged.chain_correct) if reward == "chain" else (judged.chain_correct + judged.correct) / 2


def _imported(name: str) -> OwnReward:
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a program has its own folder there, not the one it was started in
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UnusableError(f"rl.reward={name}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise UnusableError(f"rl.reward={name}: there is no function {function} in {module}")
    own: OwnReward = found
    return own


def _own(
    name: str, function: OwnReward, limit: TimeLimit, records: Sequence[Record], judged: Sequence[Trajectory]
) -> list[float]:
    """UnusableError naming the function, and the question where it is one's, for errors, wrong numbers and none in time."""
    questions = [record.question for record in records]
    thoughts, answers = [list(entry.thoughts) for entry in judged], [entry.answer for entry in judged]
    try:
        given = limit(
            lambda: list(function(questions, thoughts, answers, list(records))), f"rl.reward={name}, at {_shown(questions[0])},"
        )
    except OverTimeError as error:
        raise UnusableError(f"{error}: make it faster, or raise rl.reward_seconds") from error
    except Exception as error:
        told = f"rl.reward={name} failed ({type(error).__name__}: {error})"
        raise UnusableError(f"{told} at {_shown(questions[0])}") from error
    if len(given) != len(judged):
        raise UnusableError(f"rl.reward={name} gave {len(given)} numbers for {len(judged)} attempts; it must give one each")
    values = []
    for question, value in zip(questions, given, strict=True):
        try:
            values.append(float(value))
        except (TypeError, ValueError) as error:
            raise UnusableError(f"rl.reward={name} gave {value!r}, no number, at {_shown(question)}") from error
        if not math.isfinite(values[-1]):
            raise UnusableError(f"rl.reward={name} gave {values[-1]}, which is not finite, at {_shown(question)}")
    return values


def _shown(question: str) -> str:
    words = " ".join(question.split())
    return f"question {words if len(words) <= _SHOWN else words[: _SHOWN - 3] + '...'!r}"
