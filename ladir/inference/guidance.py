"""What bends a trajectory at inference: classifier-free guidance and diversity among the trajectories of one question."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + scale (c - u)``; scale 1 gives the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def diversity_force(z: Tensor, owner: Tensor) -> Tensor:
    """Repulsion F [R, L, d] between trajectories of the same question (never across questions).

    ``F_i = sum_j 2 (1 - d_ij^2 / s^2) exp(-d_ij^2 / s^2) (z_i - z_j)`` with s the median distance between the trajectories of
    the question.  ``owner`` [R] says which question a row belongs to; rows of one question are consecutive.
    """
    force = torch.zeros_like(z)
    _, counts = torch.unique_consecutive(owner, return_counts=True)
    start = 0
    for count in counts.tolist():
        if count > 1:
            group = slice(start, start + count)
            force[group] = _repulsion(z[group].flatten(1)).view_as(z[group])
        start += count
    return force


def _repulsion(z: Tensor) -> Tensor:
    """The force [n, D] among n points [n, D]."""
    squared = torch.cdist(z, z).square()
    off_diagonal = squared[~torch.eye(len(z), dtype=torch.bool, device=z.device)]
    s2 = off_diagonal.sqrt().median().square().clamp_min(torch.finfo(z.dtype).tiny)
    ratio = squared / s2
    weight = 2 * (1 - ratio) * torch.exp(-ratio)
    return weight.sum(1, keepdim=True) * z - weight @ z
