"""What bends a trajectory at inference: classifier-free guidance, diversity among a question's trajectories, a reward, a
verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.layout import Mark
from ladir.models import flow
from ladir.models.denoiser import Denoiser
from ladir.models.verifier import Verifier

#: ``reward_fn(latents, t)``: a scalar per trajectory [R] for the current estimate of a block's clean latents [R, L, d]
RewardFn = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Reward:
    """A function whose gradient draws the blocks, and how strongly."""

    function: RewardFn
    scale: float = 1.0


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + scale (c - u)``; scale 1 gives the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Guidance:
    """How both branches' velocities become one: the scale, the times from ``low`` to ``high`` at which it holds, rescaling."""

    scale: float
    low: float = 0.0
    high: float = 1.0
    rescale: float = 0.0

    @classmethod
    def of(cls, settings: SampleSettings) -> Guidance:
        """As sampling is set."""
        low, high = settings.guidance_interval
        return cls(settings.guidance_scale, low, high, settings.guidance_rescale)

    def velocity(self, conditional: Tensor, unconditional: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Guided velocity [..., L, d] of both branches' at noisy latents ``z`` [..., L, d] and t [...].

        Outside the interval it is the conditional one (Kynkaanniemi et al. 2024, "Applying guidance in a limited interval",
        arXiv 2404.07724).  The times are compared where they lie, so that one captured step serves all of them.
        """
        time = t[..., None, None]
        velocity = classifier_free(conditional, unconditional, self.scale)
        if self.rescale:
            x0, plain = z - time * velocity, z - time * conditional
            velocity = velocity + (x0 - rescaled(x0, plain, self.rescale)) / time.clamp_min(flow.EDGE)
        if (self.low, self.high) == (0.0, 1.0):
            return velocity
        return torch.where((time >= self.low) & (time <= self.high), velocity, conditional)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """``guided`` latents [..., L, d] with a ``share`` of their standard deviation that of the ``conditional`` ones.

    Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", section 3.4, equations 13 to 15, over a
    block's elements; of the clean latents, whose spread guidance enlarges, whatever the network predicts.  A block without spread
    stays.
    """
    before, after = (x.std((-2, -1), correction=0, keepdim=True) for x in (conditional, guided))
    factor = torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), 1.0)
    return guided * (share * factor + (1 - share))


def diversity_force(z: Tensor, groups: Sequence[int]) -> Tensor:
    """Repulsion F [R, L, d] between trajectories of the same question (never across questions).

    ``F_i = mean_j 2 (1 - d_ij^2 / s^2) exp(-d_ij^2 / s^2) (z_i - z_j)`` over the others, with s the median distance between the
    trajectories of the question.  The paper has the sum, which grows with their number: of a hundred it is as large as the
    latents themselves, and one weight cannot serve ten and a hundred.

    ``groups``: trajectories of each question, which are consecutive rows; they add up to R.  Pairs that are closer than s repel,
    others attract; of two trajectories alone the distance is s, so that nothing moves.
    """
    return torch.cat([_repulsion(group.flatten(1)).view_as(group) for group in z.split(list(groups))])


def _repulsion(z: Tensor) -> Tensor:
    """The force [n, D] among n points [n, D]."""
    if len(z) == 1:
        return torch.zeros_like(z)
    # By matrix products the distance of equal points is not 0, and differs with their number.
    squared = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
    # n * n numbers without the first are n - 1 rows of n + 1, each of which ends on the diagonal.
    off_diagonal = squared.flatten()[1:].view(len(z) - 1, len(z) + 1)[:, :-1]
    s2 = off_diagonal.sqrt().median().square().clamp_min(torch.finfo(z.dtype).tiny)
    ratio = squared / s2
    weight = 2 * (1 - ratio) * torch.exp(-ratio)
    return (weight.sum(1, keepdim=True) * z - weight @ z) / (len(z) - 1)


def reward_gradient(function: RewardFn, latents: Tensor, t: float) -> Tensor:
    """Gradient [R, L, d] of every trajectory's reward with respect to its own ``latents`` [R, L, d].

    The network behind the latents is not differentiated.  Raises ValueError where the function does not give one differentiable
    number per trajectory.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = latents.clone().requires_grad_()
        reward = function(leaf, t)
        if not isinstance(reward, Tensor) or reward.shape != (len(leaf),):
            shape = list(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward_fn must return a tensor with one number per trajectory, [{len(leaf)}], not {shape}")
        if not reward.requires_grad:
            raise ValueError("reward_fn must be differentiable: its result does not depend on the latents it was given")
        [gradient] = torch.autograd.grad(reward.sum(), leaf)
    return gradient


def block_inputs(denoiser: Denoiser, z: Tensor) -> Tensor:
    """Input vectors [R, L + 2, H] of finished blocks ``<BOT> z <EOT>`` of standardised latents ``z`` [R, L, d]."""
    begin, end = (denoiser.mark(mark).expand(len(z), 1, -1) for mark in (Mark.BOT, Mark.EOT))
    return torch.cat([begin, denoiser.clean_inputs(z), end], dim=1)


@dataclass(frozen=True)
class BlockValue:
    """What a verifier thinks of blocks while they form: log-probability, read at <EOT>, that the answer will be right.

    Unlike a :data:`RewardFn` it sees the question and the blocks before.
    """

    denoiser: Denoiser
    verifier: Verifier

    def __call__(self, prefix: Prefix, z: Tensor) -> Tensor:
        """Value [R] of standardised blocks ``z`` [R, L, d] behind a prefix, which stays as it is; differentiable in ``z``."""
        with prefix.cache.read_only():
            hidden = prefix.read(block_inputs(self.denoiser, z))
        return F.logsigmoid(self.verifier.logit(hidden[:, -1]))

    def gradient(self, prefix: Prefix, x0: Tensor) -> Tensor:
        """Gradient [R, J, L, d] of every block's own value, at a span's estimates ``x0`` [R, J, L, d] behind those before it.

        ``prefix``: R rows, or more, of which the first R are the conditional branch.
        """
        behind = prefix.select(torch.arange(len(x0), device=x0.device))
        pulls = []
        for block in x0.unbind(1):
            pulls.append(self._gradient(behind, block))
            if len(pulls) < x0.shape[1]:
                behind.append(block_inputs(self.denoiser, block))
        return torch.stack(pulls, 1)

    def _gradient(self, prefix: Prefix, block: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = block.detach().clone().requires_grad_()
            [gradient] = torch.autograd.grad(self(prefix, leaf).sum(), leaf)
        return gradient
