"""The data order: a pure function of (seed, epoch, samples consumed), the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ladir.errors import UnusableError

MicroBatch = tuple[list[int], list[int]]
"""(indices of the samples, their numbers in the whole run)"""


class BatchSizeError(ValueError):
    """The global batch cannot be divided over the ranks."""


def micro_batch_size(global_batch: int, world_size: int, most: int) -> int:
    """Samples per rank and forward pass: the largest divisor of ``global_batch / world_size`` that is <= ``most``.

    Raises :class:`BatchSizeError`, naming the nearest valid values, when the ranks cannot share the batch equally.
    """
    if global_batch % world_size:
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        valid = f"{below} or {above}" if below else f"{above}"
        raise BatchSizeError(
            f"global_batch={global_batch} cannot be shared equally by {world_size} ranks: use {valid}, "
            "or another number of processes"
        )
    per_rank = global_batch // world_size
    return max(size for size in range(1, min(most, per_rank) + 1) if per_rank % size == 0)


class DataOrder:
    """Shuffled epochs laid end to end; global batch n is the n-th stretch of ``global_batch`` samples of it.

    Batches may span two epochs, so no sample is ever dropped or repeated within an epoch.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int, length: Callable[[int], int] | None = None) -> None:
        """``length``: about how much work a sample is; where it is known, ranks get equal shares of every global batch."""
        if num_samples < 1:
            raise UnusableError("there are no training samples: check data.train and what was skipped")
        self.num_samples, self.global_batch, self.seed = num_samples, global_batch, seed
        self._length = length
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.num_samples)

    def index(self, number: int) -> int:
        """Which sample is number ``number`` (0, 1, 2, ... over all epochs)."""
        epoch, position = divmod(number, self.num_samples)
        return int(self._permutation(epoch)[position])

    def micro_batches(self, consumed: int, rank: int, world_size: int, micro: int) -> list[MicroBatch]:
        """This rank's micro batches of the next global batch, after ``consumed`` samples of the run."""
        numbers = list(range(consumed, consumed + self.global_batch))
        stride = micro * world_size
        if self._length is not None and world_size > 1:
            numbers = self._dealt(numbers, self._length, world_size, stride)
        parts = (numbers[start : start + micro] for start in range(rank * micro, self.global_batch, stride))
        return [([self.index(number) for number in part], part) for part in parts]

    def _dealt(self, numbers: list[int], length: Callable[[int], int], ranks: int, stride: int) -> list[int]:
        """``numbers`` so ordered that the micro batches that ranks go through together are alike, and their sums as well.

        The longest come first, ``stride`` of them at a time, dealt out to and fro.  Whoever gets a sample, it is the same: all
        that is random about it follows from its number.
        """
        ordered = sorted(numbers, key=lambda number: -length(self.index(number)))
        groups = [ordered[start : start + stride] for start in range(0, len(ordered), stride)]
        hands = [hand for group in groups for hand in _to_and_fro(group, ranks)]
        return [number for hand in hands for number in sorted(hand)]


def _to_and_fro(cards: list[int], players: int) -> list[list[int]]:
    """The cards dealt out in rounds, every other one backwards."""
    hands: list[list[int]] = [[] for _ in range(players)]
    for place, card in enumerate(cards):
        turn, player = divmod(place, players)
        hands[player if turn % 2 == 0 else -1 - player].append(card)
    return hands
