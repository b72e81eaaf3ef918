"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): finished latents and their rewards, no stored trajectories.

The loss is written in what the network predicts.  Every objective is an affine function of the velocity at the same noisy latent
(:mod:`ladir.models.flow`), so that a mixture with weights that add up to 1 is the same mixture of velocities; only the weight of
a time is the objective's own, as in stage 1.
"""

from __future__ import annotations

from torch import Tensor


def nft_loss(new: Tensor, old: Tensor, target: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """Squared errors [...] of the implicit positive and negative predictions, summed over the last two dimensions (eq. 5).

    ``new`` and ``old``: predictions [..., L, d] of the network that learns and of the one that sampled, at the same noisy
    latents; ``target`` what stage 1 would have it predict there; ``optimality`` [...] r in [0, 1].

        v+ = (1 - beta) v_old + beta v_new,  v- = (1 + beta) v_old - beta v_new
        loss = r |v+ - v|^2 + (1 - r) |v- - v|^2

    Its minimum over the network is ``v_old + (2 r - 1) (v - v_old) / beta`` in the mean: towards what was good and away from
    what was not, as far from the old model as r is sure.
    """
    step = beta * (new - old)
    error = old - target
    positive, negative = ((error + sign * step).square().sum((-2, -1)) for sign in (1.0, -1.0))
    return optimality * positive + (1 - optimality) * negative
