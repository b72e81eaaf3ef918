"""Flow matching on the straight path ``z_t = (1 - t) z_0 + t eps`` and the objectives that describe it (section 1 of the design).

With a = 1 - t and s = t every objective is a linear combination of z_0 and eps, so each converts exactly into the others:
velocity = eps - z_0, x0 = z_0, epsilon = eps, v = a eps - s z_0 (Salimans and Ho 2022, on this path).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: below this distance from an end of the path a division is not trusted
EDGE = 1e-4
#: this close to pure noise a predicted noise says nothing of z_0, whose mean (0, standardised) is taken: an error of the
#: prediction would be a hundred times as large in z_0, and a block starts there
_BLIND = 0.01


def interpolate(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The noisy latent z_t; ``t`` broadcasts against ``z0`` and ``eps``."""
    return (1 - t) * z0 + t * eps


def target(objective: str, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network is asked to predict at ``t`` under ``objective``."""
    if objective == "velocity":
        return eps - z0
    if objective == "x0":
        return z0
    if objective == "epsilon":
        return eps
    if objective == "v":
        return (1 - t) * eps - t * z0
    raise ValueError(f"unknown objective {objective!r}; valid: velocity, x0, epsilon, v")


def to_x0(objective: str, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The clean latent that a prediction at (z_t, t) implies."""
    if objective == "velocity":
        return z_t - t * prediction
    if objective == "x0":
        return prediction
    if objective == "epsilon":
        return torch.where(1 - t < _BLIND, 0.0, (z_t - t * prediction) / (1 - t).clamp_min(EDGE))
    if objective == "v":
        return ((1 - t) * z_t - t * prediction) / ((1 - t) ** 2 + t**2)
    raise ValueError(f"unknown objective {objective!r}; valid: velocity, x0, epsilon, v")


def to_velocity(objective: str, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The velocity dz/dt = eps - z_0 that a prediction at (z_t, t) implies."""
    if objective == "velocity":
        return prediction
    if objective == "epsilon":
        return prediction - to_x0(objective, prediction, z_t, t)
    return (z_t - to_x0(objective, prediction, z_t, t)) / t.clamp_min(EDGE)


def transition(z_t: Tensor, velocity: Tensor, t: float, s: float, randomness: float = 1.0) -> tuple[Tensor, float]:
    """Mean [...] and standard deviation of z_s given z_t, s < t, where the path has unit noise and ``velocity`` [...] is true.

    ``randomness`` 1: the posterior of z_s given z_t and x0, of variance ``(s/t)^2 (t^2 - ((1 - t) / (1 - s))^2 s^2)`` (DDPM's, Ho
    et al. 2020, eq. 7, on the straight path); in between its standard deviation is that share of it, what is left of the noise in
    z_t taking the rest (as DDIM's eta, Song et al. 2021, eq. 16), so that the marginals stay; 0: the Euler step.
    """
    of_z, of_velocity, deviation = transition_weights(t, s, randomness)
    return of_z * z_t + of_velocity * velocity, deviation


def transition_weights(t: float, s: float, randomness: float) -> tuple[float, float, float]:
    """Those of z_t and of the velocity in the mean of :func:`transition`, and its standard deviation."""
    variance = randomness**2 * (s / t) ** 2 * (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2) if s < 1 else 0.0
    kept = max(s**2 - variance, 0.0) ** 0.5  # of the noise z_t + (1 - t) velocity, beside (1 - s) of x0 = z_t - t velocity
    return 1 - s + kept, kept * (1 - t) - (1 - s) * t, max(variance, 0.0) ** 0.5


def timestep_features(t: Tensor, size: int) -> Tensor:
    """Sinusoidal features [..., size] of t in [0, 1], frequencies 1 to 1000 radians, in fp32."""
    half = size // 2
    frequency = torch.exp(torch.linspace(0.0, math.log(1000.0), half, device=t.device, dtype=torch.float32))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
