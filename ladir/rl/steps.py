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


def step_log_density(after: Tensor, mean: Tensor, deviation: float) -> Tensor:
    """Log-density [...] per element of what steps led to, ``after`` [..., L, d], under Gaussians around ``mean``, fp32."""
    square = ((after - mean) / deviation).square().mean((-2, -1))
    return -0.5 * square - math.log(deviation) - 0.5 * math.log(2 * math.pi)


def path_log_density(
    z_t: Tensor, velocity: Tensor, after: Tensor, times: Sequence[tuple[float, float]], randomness: float, noise: float
) -> Tensor:
    """Log-densities [K, S] of S steps of K blocks, each from ``z_t`` [K, S, L, d] at the first of its ``times`` to ``after``.

    ``noise``: scale of the noise on the path (``sample.initial_noise``).
    """
    found = []
    for place, (t, s) in enumerate(times):
        mean, deviation = flow.transition(z_t[:, place], velocity[:, place], t, s, randomness)
        found.append(step_log_density(after[:, place], mean, noise * deviation))
    return torch.stack(found, 1)


def path_divergence(
    z_t: Tensor, velocity: Tensor, other: Tensor, times: Sequence[tuple[float, float]], randomness: float, noise: float
) -> Tensor:
    """KL divergences [K, S], per element, of the steps that ``velocity`` makes from those of ``other`` [K, S, L, d].

    Both are Gaussian with the same deviation, so that it is ``|mean - other mean|^2 / (2 deviation^2)``.
    The other arguments are those of :func:`path_log_density`.
    """
    found = []
    for place, (t, s) in enumerate(times):
        mean, deviation = flow.transition(z_t[:, place], velocity[:, place], t, s, randomness)
        its, _ = flow.transition(z_t[:, place], other[:, place], t, s, randomness)
        found.append(0.5 * ((mean - its) / (noise * deviation)).square().mean((-2, -1)))
    return torch.stack(found, 1)
