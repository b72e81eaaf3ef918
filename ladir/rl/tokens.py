"""The update of an answer's tokens: a clipped ratio to the model that sampled them, weighted by the answer's advantage."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """What is lost of the advantages [...] at log-probabilities ``new`` [...] of what was sampled with ``old`` [...].

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7): ``- min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)`` with
    ``ratio = exp(new - old)``: 1 at the start, where the gradient is ``- A``, not zero.
    """
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Where the clipping has stopped the gradient, bool [...]."""
    ratio = (new - old).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantage != 0)


@torch.no_grad()
def ratios(name: str, new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> dict[str, Tensor]:
    """Metrics: the mean ratio to the old model where something is learned, and the share that is clipped."""
    learned = advantage != 0
    count = learned.sum().float()
    ratio, stopped = ((new - old).exp() * learned).sum(), clipped(new, old, advantage, clip).sum().float()
    return {f"metric/{name}_ratio": torch.stack([ratio, count]), f"metric/{name}_clipped": torch.stack([stopped, count])}
