"""Rewards relative to their group: what the attempts at one question say of one another."""

from __future__ import annotations

import torch
from torch import Tensor

#: groups whose rewards differ by less than this are all alike: nothing can be told from them
_ALIKE = 1e-6


def has_signal(rewards: Tensor) -> Tensor:
    """Which groups of rewards [..., G] are not all alike, bool [...]."""
    return rewards.amax(-1) - rewards.amin(-1) > _ALIKE


def advantages(rewards: Tensor) -> Tensor:
    """How many standard deviations of its group a reward lies above the group's mean, [..., G] of rewards [..., G].

    Zeros where all are alike (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1.2).  In float64: the same on any
    machine.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(has_signal(rewards)[..., None], centred / spread.clamp_min(_ALIKE), 0.0)


def optimality(rewards: Tensor, clip: float) -> Tensor:
    """The probability r in [0, 1] that an attempt is a good one, of rewards [..., G].

    ``1/2 + 1/2 min(max(advantage / clip, -1), 1)``; ``clip``: standard deviations that are taken for certain (DiffusionNFT,
    arXiv 2509.16117, section 3.3: Z_c).
    """
    return 0.5 + 0.5 * (advantages(rewards) / clip).clamp(-1.0, 1.0)
