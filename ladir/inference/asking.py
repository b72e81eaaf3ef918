"""What is asked of a reasoner: questions with their trajectories, in batches that memory holds, and who watches them form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ladir.inference.decode import Between
from ladir.inference.sampler import TrajectoryNoise

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: trajectories that are generated together; None: all, "auto": as many as memory holds
BatchSize = int | Literal["auto"] | None

#: called after every denoising step with (trajectory, block, step, the block's current text)
TraceHook = Callable[[int, int, int, str], None]

#: called for every finished block with (trajectory, block, its text)
BlockTextHook = Callable[[int, int, str], None]


#: called after every token of an answer with (trajectory, the answer's token ids so far)
AnswerHook = Callable[[int, Sequence[int]], None]


@dataclass(frozen=True)
class Ask:
    """A question, how many trajectories think about it, and the seed of their randomness."""

    question: str
    num_trajectories: int = 1
    seed: int = 0


#: numbers of the denoising steps that are random, and their randomness (:class:`~ladir.inference.sampler.KeptSteps`)
RandomSteps = tuple[Sequence[int], float]


@dataclass(frozen=True)
class Extras:
    """What those who learn from trajectories ask for besides.

    ``states``: the hidden states that a verifier reads (:attr:`Trajectory.states`); ``num_answers``: independent answers to every
    line of thought (:attr:`Trajectory.answer_ids`); ``random_steps``: these add fresh noise, the others none, and they are kept
    (:attr:`Trajectory.steps`).
    """

    states: bool = False
    num_answers: int = 1
    random_steps: RandomSteps | None = None


@dataclass(frozen=True)
class Watch:
    """What is told of trajectories, by number, while they form; ``between_steps`` is called after every denoising step, every
    token of answers and every batch of thoughts that is read: what it raises ends everything."""

    on_step: TraceHook | None = None
    on_block: BlockTextHook | None = None
    on_answer: AnswerHook | None = None
    between_steps: Between | None = None

    def of_batch(self, first: int) -> Watch:
        """The same for a batch whose trajectories begin with number ``first``."""
        step, block, answer = self.on_step, self.on_block, self.on_answer
        return replace(
            self,
            on_step=None if step is None else lambda row, number, done, text: step(first + row, number, done, text),
            on_block=None if block is None else lambda row, number, text: block(first + row, number, text),
            on_answer=None if answer is None else lambda row, ids: answer(first + row, ids),
        )


class Rows:
    """All trajectories of several questions, one after another, and how they may be cut into batches.

    A trajectory's random numbers are its own, so that batches change nothing but rounding.
    """

    def __init__(self, asks: Sequence[Ask], together: bool) -> None:
        """``together``: the trajectories of a question stay in one batch, since they bear upon one another."""
        self._asks = asks
        self._of = [(place, number) for place, ask in enumerate(asks) for number in range(ask.num_trajectories)]
        self._together = together

    def __len__(self) -> int:
        return len(self._of)

    def part(self, first: int, size: int) -> range:
        """Trajectories from ``first`` on, ``size`` of them at most, unless those that stay together are more."""
        end = min(first + size, len(self))
        if self._together and end < len(self):
            owner = self._of[end][0]
            start = end - self._of[end][1]  # where that question begins
            end = start if start > first else start + self._asks[owner].num_trajectories
        return range(first, end)

    def questions(self, rows: range) -> list[str]:
        """The questions that ``rows`` are of, each once."""
        return [self._asks[place].question for place in range(self._of[rows.start][0], self._of[rows.stop - 1][0] + 1)]

    def owner(self, rows: range) -> Tensor:
        """Which of them each row is of, int64 [R]."""
        first = self._of[rows.start][0]
        return torch.tensor([place - first for place, _ in self._of[rows.start : rows.stop]])

    def noise(self, rows: range) -> TrajectoryNoise:
        """Their random numbers."""
        found = [(self._asks[place], number) for place, number in self._of[rows.start : rows.stop]]
        return TrajectoryNoise([ask.seed for ask, _ in found], [(ask.question, number) for ask, number in found])


def in_batches(rows: Rows, size: int | None, shrink: bool, one_batch: Callable[[range], list[T]]) -> list[T]:
    """What ``one_batch`` makes of all rows, ``size`` of them at a time (None: of all at once).

    ``shrink``: half as many from where memory runs out.
    """
    size, found = size or len(rows), list[T]()
    while len(found) < len(rows):
        part = rows.part(len(found), size)
        try:
            found += one_batch(part)
            continue
        except torch.OutOfMemoryError as error:
            if not shrink or part == rows.part(len(found), 1):
                error.add_note("Ask for fewer trajectories at a time: batch_size, or num_trajectories.")
                raise
        size = len(part) // 2  # here the error no longer holds the batch's tensors
        torch.cuda.empty_cache()
        logger.warning("out of memory: from here on %d trajectories at a time", len(rows.part(len(found), size)))
    return found
