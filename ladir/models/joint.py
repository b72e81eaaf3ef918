"""VAE and denoiser trained together: the flow runs on the latents that the encoder makes now (``train_denoiser.py stage=joint``).

The direction is the authors' next step (Uni-LaDiR); the form is this repository's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ladir.data.joint import JointBatch
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae


class Joint(nn.Module):
    """``forward`` gives the losses of both; the denoiser's standardisation stays that of the latents it started with."""

    def __init__(self, vae: Vae, denoiser: Denoiser) -> None:
        super().__init__()
        self.vae = vae
        self.denoiser = denoiser

    def latents(self, batch: JointBatch) -> Tensor:
        """Standardised means [K, L, d] of the batch's blocks as the encoder makes them, zeros where a span has room."""
        mean, _ = self.vae.encode(batch.ids, batch.encoder)
        z = (mean - self.denoiser.latent_mean) / self.denoiser.latent_std
        return z.new_zeros(batch.teacher.z0.shape).index_copy(0, batch.block_at, z)

    def forward(self, batch: JointBatch) -> dict[str, Tensor]:
        """Summed losses of :class:`~ladir.models.vae.Vae` and :class:`~ladir.models.denoiser.Denoiser`.

        What the flow is to reach, and what is noised, is detached: an encoder that could move it would make it easy to reach and
        empty.  The clean blocks that later ones, stop and answer see are not: what is useful there reaches the encoder.  Where
        finished blocks stand as text nothing is, and no gradient is made ready for it.
        """
        as_text = self.denoiser.settings.context == "text"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not as_text):
            z = self.latents(batch)
        losses = self.denoiser(replace(batch.teacher, z0=z.detach(), context=None if as_text else z))
        return {**self.vae(batch.vae), **losses}
