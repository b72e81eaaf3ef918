"""The optimizer steps of stage 3: every so many of them learn from attempts that the old model has made in between.

All that is random is a function of the seed and of the iteration or step it belongs to, and the old model stands still within an
iteration.  So nothing but weights is kept in a checkpoint: a run that was stopped in the middle of an iteration makes its
attempts again.  A stop is obeyed while they are made, at the next denoising step, token or verdict, and where the old model reads
them, between two batches.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ladir.config import RlSettings
from ladir.data.randomness import derive, generator
from ladir.data.records import Record
from ladir.rl.batches import Attempt, attempts_of
from ladir.rl.beside import MOST_TOGETHER, BesideBatch
from ladir.rl.lines import Group, figures
from ladir.rl.policy import Policy
from ladir.rl.text import TextPolicy
from training.reinforcement.asking import Asked, Asker
from training.runtime.alarm import APART_MINUTES, Alarm
from training.runtime.distributed import World
from training.runtime.phase import Underway
from training.runtime.sampler import DataOrder
from training.runtime.status import say
from training.runtime.step_batches import StepBatch

logger = logging.getLogger(__name__)

#: attempts with their numbers in the iteration
_Numbered = list[tuple[int, Attempt]]


class Collator(Protocol):
    """Makes a batch of attempts."""

    def __call__(self, attempts: Sequence[Attempt], numbers: Sequence[int], counted: int | None = None) -> Any:
        """``numbers``: what the noise is a function of; only the first ``counted`` attempts teach anything."""


@dataclass
class OwnSteps:
    """Makes the batches of a training on its own attempts.

    ``records``: the questions; ``old``: a whole model of its own on every rank, which is given the old model's weights before
    every iteration; ``asker`` asks it; ``collator`` makes batches of attempts; ``num_steps``: denoising steps of a block;
    ``start``: the model that the stage began with, where attempts are compared with it.
    """

    records: Sequence[Record]
    old: Policy | TextPolicy
    asker: Asker
    collator: Collator
    settings: RlSettings
    seed: int
    num_steps: int
    start: Policy | None = None

    def __post_init__(self) -> None:
        self.order = DataOrder(len(self.records), self.settings.prompts, derive(self.seed, "rl", "questions"))
        self.last: list[Group] = []
        """The groups of the iteration under way, for those who look at them."""

    def step_batches(self, training: Underway) -> Generator[StepBatch]:
        """A batch for every step from the present one on; one without batches where the training ends."""
        step, alarm = training.progress.step, training.cadence.alarm()
        learning: float | None = None
        with self._gold(training) as gold:
            while True:
                iteration, update = divmod(step, self.settings.updates)
                asked = None if training.cadence.ending() else self._ask(training, alarm, iteration)
                if asked is None:
                    yield _nothing()
                    continue
                metrics = {} if update else _metrics(asked, learning)
                teaching = self._teaching(asked.groups)
                start = time.perf_counter()
                while step < (iteration + 1) * self.settings.updates:
                    yield self._step_batch(training, alarm, teaching, step, next(gold), metrics)
                    step, metrics = step + 1, {}
                learning = time.perf_counter() - start

    def _gold(self, training: Underway) -> AbstractContextManager[Iterator[StepBatch]]:
        """Batches of gold records, for stage 1's losses."""
        if self.settings.anchor_weight:
            return training.stored()
        return nullcontext(itertools.repeat(_nothing()))

    def _ask(self, training: Underway, alarm: Alarm, iteration: int) -> Asked | None:
        """An iteration's attempts on all ranks; None where a stop was asked for meanwhile."""
        training.engine.copy_old_weights(self.old)
        numbers = range(iteration * self.settings.prompts, (iteration + 1) * self.settings.prompts)
        records = [self.records[self.order.index(number)] for number in numbers]
        say(f"step {training.progress.step + 1}: answers {len(records)} questions, {self.settings.group} times each")
        with training.clock.patience(APART_MINUTES), training.ranges("own samples"):
            seed, steps = derive(self.seed, "rl", iteration), self._random_steps(iteration)
            asked = self.asker.ask(records, seed, training.world, alarm, steps)
        self.last = asked.groups if asked is not None else []
        return asked

    def _random_steps(self, iteration: int) -> list[int]:
        """Numbers of the denoising steps that are random in an iteration, ascending; the last one never is."""
        if self.settings.algorithm != "flow_grpo":
            return []
        rng, last = generator(derive(self.seed, "rl", "steps"), iteration), self.num_steps - 1
        return sorted(rng.choice(last, self.settings.random_steps, replace=False).tolist())

    def _teaching(self, groups: Sequence[Group]) -> _Numbered:
        """What is learned from; one attempt that teaches nothing where there is nothing, since a step needs a batch."""
        attempts = [attempt for group in groups for attempt in group.attempts(self.settings.advantage_clip)]
        numbered = list(enumerate(attempts))
        teaching = [(number, attempt) for number, attempt in numbered if attempt.teaches]
        if not teaching:
            logger.warning("no question of this iteration has attempts that differ in reward: nothing is learned from it")
        return teaching or numbered[:1]

    def _step_batch(
        self, training: Underway, alarm: Alarm, teaching: _Numbered, step: int, gold: StepBatch, metrics: dict[str, Tensor]
    ) -> StepBatch:
        """A step's micro batches of this rank: attempts, as many batches on every rank, then gold records.

        Without batches where any rank was asked to stop meanwhile: the training ends before it, on all ranks.
        """
        device = training.world.device
        parts = share_attempts(teaching, training.settings.micro_batch, training.world)
        if len(parts) == len(gold.batches) == 1 and self._are_few(len(teaching), training):
            records: Any = gold.batches[0].to(device)
            both = BesideBatch.of(self._batch(*parts[0], step, device, records), records)
            return StepBatch(gold.first, [both], gold.numbers, gold.wait, metrics)
        batches = []
        for part, counted in parts:
            if alarm.rung():
                return _nothing()
            batches.append(self._batch(part, counted, step, device))
        numbers = [gold.first for _ in parts]
        return StepBatch(gold.first, [*batches, *gold.batches], [*numbers, *gold.numbers], gold.wait, metrics, made=len(parts))

    def _are_few(self, attempts: int, training: Underway) -> bool:
        """Whether a rank's attempts and gold records go through the model together; the same on all ranks."""
        ranks, settings = training.world.size, training.settings
        return -(-attempts // ranks) + settings.global_batch // ranks <= min(settings.micro_batch, MOST_TOGETHER)

    def _batch(self, part: _Numbered, counted: int, step: int, device: torch.device, beside: Any = None) -> Any:
        """Attempts as a batch, with what the old model, and the start, predict there; ``beside``: gold records, on the device.

        Random steps learn while their density is what it was within ``rl.step_clip``, which is less than bfloat16's rounding: the
        old model reads the same rows as the one that learns.
        """
        numbers = [step * attempts_of(self.settings) + number for number, _ in part]
        batch = self.collator([attempt for _, attempt in part], numbers, counted).to(device)
        old: Any = self.old
        exact = beside is not None and self.settings.algorithm == "flow_grpo"
        remembered = old.remembered(batch, beside) if exact else old.remembered(batch)
        return remembered if self.start is None else self.start.compared(remembered)


def _nothing() -> StepBatch:
    """A step without batches: before it the training ends, or a step has no gold records."""
    return StepBatch(0, [], [], 0.0)


def share_attempts(teaching: _Numbered, micro: int, world: World) -> list[tuple[_Numbered, int]]:
    """This rank's micro batches of at most ``micro`` attempts, and how many of each count.

    All ranks get the same number, as sharded weights demand; a rank that is short repeats the first attempt without counting.
    """
    rounds = -(-len(teaching) // (micro * world.size))
    size = -(-len(teaching) // (rounds * world.size))
    starts = [(number * world.size + world.rank) * size for number in range(rounds)]
    parts = [teaching[start : start + size] for start in starts]
    return [(part, len(part)) if part else (teaching[:1], 0) for part in parts]


def _metrics(asked: Asked, learning_seconds: float | None) -> dict[str, Tensor]:
    """An iteration's figures, as a model's metrics: the same on all ranks, but for the seconds."""
    found = figures(asked.groups)
    found["sampling_seconds"], found["judging_seconds"] = (asked.sampling_seconds, 1.0), (asked.judging_seconds, 1.0)
    if learning_seconds is not None:
        found["learning_seconds"] = (learning_seconds, 1.0)
    return {f"metric/{name}": torch.tensor(pair, dtype=torch.float64) for name, pair in found.items()}
