"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): what the denoising steps of an SDE led to, as a policy's actions.

Only some steps are random, the others an ODE's (MixGRPO, Li et al. 2025, arXiv 2507.21802).  A step's density is Gaussian; it is
taken per latent element, so that its ratio does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ladir.models import flow


def path_log_density(
    z_t: Tensor, velocity: Tensor, after: Tensor, times: Sequence[tuple[float, float]], randomness: float, noise: float
) -> Tensor:
    """Log-densities [K, S] of S steps of K blocks, each from ``z_t`` [K, S, L, d] at the first of its ``times`` to ``after``.

    Per latent element, fp32.  ``noise``: scale of the noise on the path (``sample.initial_noise``).
    """
    of_z, of_velocity, deviation = _weights(z_t, times, randomness, noise)
    beside = after - torch.addcmul(of_z * z_t, of_velocity, velocity)
    return -0.5 * (beside / deviation).square().mean((-2, -1)) - (deviation[:, 0, 0].log() + 0.5 * math.log(2 * math.pi))


def path_divergence(
    z_t: Tensor, velocity: Tensor, other: Tensor, times: Sequence[tuple[float, float]], randomness: float, noise: float
) -> Tensor:
    """KL divergences [K, S], per element, of the steps that ``velocity`` makes from those of ``other`` [K, S, L, d].

    Both are Gaussian with the same deviation, so that it is ``|mean - other mean|^2 / (2 deviation^2)``.
    The other arguments are those of :func:`path_log_density`.
    """
    _, of_velocity, deviation = _weights(z_t, times, randomness, noise)
    return 0.5 * ((velocity - other) * (of_velocity / deviation)).square().mean((-2, -1))


def _weights(z_t: Tensor, times: Sequence[tuple[float, float]], randomness: float, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ladir.models.flow.transition_weights` of every step [S, 1, 1], the deviation with the scale of the noise."""
    found = [flow.transition_weights(t, s, randomness) for t, s in times]
    rows = [[of_z, of_velocity, noise * deviation] for of_z, of_velocity, deviation in found]
    of_z, of_velocity, deviation = torch.tensor(rows, dtype=z_t.dtype, device=z_t.device).T[..., None, None]
    return of_z, of_velocity, deviation
