"""Judged trajectories, as a verifier learns from them: hidden states behind blocks, and whether the answer was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
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


def read_judged(file: Path) -> list[JudgedTrajectory]:
    """What :func:`pack_judged` gave, from the file it was saved in."""
    packed = load_file(file)
    states = packed["states"].split(packed["lengths"].tolist())
    facts = zip(states, packed["right"].tolist(), packed["question"].tolist(), packed["drift"], strict=True)
    return [JudgedTrajectory(*fact) for fact in facts]
