"""What bends a trajectory at inference: classifier-free guidance and diversity among the trajectories of one question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + scale (c - u)``; scale 1 gives the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def diversity_force(z: Tensor, groups: Sequence[int]) -> Tensor:
    """Repulsion F [R, L, d] between trajectories of the same question (never across questions).

    ``F_i = sum_j 2 (1 - d_ij^2 / s^2) exp(-d_ij^2 / s^2) (z_i - z_j)`` with s the median distance between the trajectories of
    the question.  ``groups``: trajectories of each question, which are consecutive rows; they add up to R.
    """
    return torch.cat([_repulsion(group.flatten(1)).view_as(group) for group in z.split(list(groups))])


def _repulsion(z: Tensor) -> Tensor:
    """The force [n, D] among n points [n, D]."""
    if len(z) == 1:
        return torch.zeros_like(z)
    squared = torch.cdist(z, z).square()
    # n * n numbers without the first are n - 1 rows of n + 1, each of which ends on the diagonal.
    off_diagonal = squared.flatten()[1:].view(len(z) - 1, len(z) + 1)[:, :-1]
    s2 = off_diagonal.sqrt().median().square().clamp_min(torch.finfo(z.dtype).tiny)
    ratio = squared / s2
    weight = 2 * (1 - ratio) * torch.exp(-ratio)
    return weight.sum(1, keepdim=True) * z - weight @ z
