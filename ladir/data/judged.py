"""Judged trajectories, as a verifier learns from them: hidden states behind blocks, and whether the answer was right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import torch
from safetensors import safe_open
from torch import Tensor

from ladir.data.batches import TensorBatch


@dataclass(frozen=True)
class JudgedTrajectory:
    """``states`` [B + 1, H]: hidden states at the <EOT> of its B blocks and at <SOA>; ``right``: its answer; ``question``: its
    number; ``drift`` [2]: features of how far it moves when noised and denoised again (zeros: not measured)."""

    states: Tensor
    right: bool
    question: int
    drift: Tensor


@dataclass
class JudgedBatch(TensorBatch):
    """The states [n, H] of N trajectories end to end; ``right`` [n] (0 or 1) and ``at_end`` bool [n] (<SOA>) of each; ``drifts``
    [N, 2]."""

    states: Tensor
    right: Tensor
    at_end: Tensor
    drifts: Tensor


def collate_judged(items: Sequence[JudgedTrajectory], numbers: Sequence[int], training: bool = True) -> JudgedBatch:
    """A micro batch; nothing in it is random."""
    lengths = torch.tensor([len(item.states) for item in items])
    right = torch.tensor([float(item.right) for item in items]).repeat_interleave(lengths)
    at_end = torch.zeros(len(right), dtype=torch.bool)
    at_end[lengths.cumsum(0) - 1] = True
    counts = {"verifier": float(len(items)), "value": float(len(right) - len(items))}
    states, drifts = torch.cat([item.states for item in items]), torch.stack([item.drift for item in items])
    return JudgedBatch(counts, len(right), [int(number) for number in numbers], states, right, at_end, drifts)


def pack_judged(items: Sequence[JudgedTrajectory]) -> dict[str, Tensor]:
    """Trajectories as the tensors of one file."""
    return {
        "states": torch.cat([item.states for item in items]),
        "lengths": torch.tensor([len(item.states) for item in items]),
        "right": torch.tensor([item.right for item in items]),
        "question": torch.tensor([item.question for item in items]),
        "drift": torch.stack([item.drift for item in items]),
    }


class JudgedStore(Sequence[JudgedTrajectory]):
    """Trajectories in files of :func:`pack_judged`, which are mapped: states are read when a trajectory is asked for.

    Of all are known ``right`` bool [N] and ``question`` int64 [N], and in which rows of which file their states are.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """All in ``files``, one file after another."""
        self._files = [safe_open(file, "pt") for file in files]
        parts = [_Facts.of(file, number) for number, file in enumerate(self._files)]
        self._facts = _Facts(*(torch.cat(column) for column in zip(_Facts.none(), *parts, strict=True)))
        self.right, self.question = self._facts.right, self._facts.question

    def chosen(self, mask: Tensor) -> JudgedStore:
        """Those where ``mask`` bool [N] is set, of the same files."""
        found = copy.copy(self)
        found._facts = _Facts(*(column[mask] for column in self._facts))
        found.right, found.question = found._facts.right, found._facts.question
        return found

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.right)

    @overload
    def __getitem__(self, place: int) -> JudgedTrajectory: ...

    @overload
    def __getitem__(self, place: slice) -> list[JudgedTrajectory]: ...

    def __getitem__(self, place: int | slice) -> JudgedTrajectory | list[JudgedTrajectory]:
        """One trajectory, or several, read now."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        part, first, length = (int(column[place]) for column in (self._facts.part, self._facts.first, self._facts.length))
        states = self._files[part].get_slice("states")[first : first + length]
        return JudgedTrajectory(states, bool(self.right[place]), int(self.question[place]), self._facts.drift[place])


class _Facts(NamedTuple):
    """Of N trajectories, by columns: file, first row and number of rows of the states, and all else."""

    part: Tensor
    first: Tensor
    length: Tensor
    right: Tensor
    question: Tensor
    drift: Tensor

    @classmethod
    def none(cls) -> _Facts:
        """Of no trajectories."""
        number = torch.zeros(0, dtype=torch.int64)
        return cls(number, number, number, number.bool(), number, torch.zeros(0, 2))

    @classmethod
    def of(cls, file: safe_open, part: int) -> _Facts:
        """Of a file, the ``part``-th; its states are not read."""
        length, right, question, drift = (file.get_tensor(name) for name in ("lengths", "right", "question", "drift"))
        return cls(torch.full_like(length, part), length.cumsum(0) - length, length, right, question, drift)
