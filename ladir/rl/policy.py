"""The denoiser as a policy: stage 1's losses of gold records, and those of its own judged attempts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ladir.config import RlSettings, SampleSettings
from ladir.data.batches import DenoiserBatch
from ladir.models import flow
from ladir.models.denoiser import Denoiser
from ladir.rl.batches import JudgedBatch, terms
from ladir.rl.beside import BesideBatch
from ladir.rl.nft import nft_loss
from ladir.rl.steps import path_divergence, path_log_density
from ladir.rl.tokens import clipped_loss, ratios


class Policy(nn.Module):
    """A denoiser in stage 3; ``forward`` gives summed losses: of attempts the rewards' alone, of gold records stage 1's."""

    def __init__(self, denoiser: Denoiser, settings: RlSettings, sample: SampleSettings) -> None:
        """``sample``: how attempts are sampled."""
        super().__init__()
        self.denoiser, self.settings, self.sample = denoiser, settings, sample
        self._terms = terms(settings)

    def forward(self, batch: DenoiserBatch | JudgedBatch | BesideBatch) -> dict[str, Tensor]:
        """``nft`` summed over latent elements, ``steps`` and ``kl`` over random steps, ``answers`` over labels of answers; or
        what :class:`Denoiser` gives; or both, of one pass."""
        if isinstance(batch, DenoiserBatch):
            losses: dict[str, Tensor] = self.denoiser(batch)
            return losses
        if isinstance(batch, JudgedBatch):
            return self._judged(batch, *self.denoiser.read(batch.attempts))
        judged, gold = batch.judged, batch.gold
        assert isinstance(judged, JudgedBatch) and isinstance(gold, DenoiserBatch)
        read, of_gold = self.denoiser.read_together([judged.attempts, gold])
        return {**self._judged(judged, *read), **self.denoiser.losses(gold, *of_gold)}

    def _judged(self, batch: JudgedBatch, hidden: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        """What is learned from the rewards, of what :meth:`Denoiser.read` gives."""
        prediction, logprob = self._outputs(batch.attempts, hidden, noisy)
        losses = {}
        if prediction is not None:
            losses.update(self._nft(batch, prediction) if "nft" in self._terms else self._steps(batch, prediction))
        if logprob is not None:
            losses.update(self._answers(batch, logprob))
        return losses

    @torch.no_grad()
    def remembered(self, batch: JudgedBatch, beside: DenoiserBatch | None = None) -> JudgedBatch:
        """The batch with what this model says of it, which is then the old one.

        ``beside``: what goes through the model with it, so that the same weights give the same values to the last bit.
        """
        read, *_ = self.denoiser.read_together([batch.attempts, *([beside] if beside else [])])
        prediction, logprob = self._outputs(batch.attempts, *read)
        return replace(batch, old_prediction=prediction, old_logprob=logprob)

    @torch.no_grad()
    def compared(self, batch: JudgedBatch) -> JudgedBatch:
        """The batch with what this model predicts there, which is the one that the stage began with."""
        _, noisy = self.denoiser.read(batch.attempts)
        return replace(batch, start_prediction=self.denoiser.predict(noisy))

    def _outputs(self, batch: DenoiserBatch, hidden: Tensor, noisy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predictions [K, M, L, d] at the noisy latents, log-probabilities [n] of the answers' labels; where they learn."""
        d = self.denoiser
        prediction = d.predict(noisy) if self.settings.policy != "answer" else None
        if "answers" not in self._terms:
            return prediction, None
        losses, _ = d.backbone.label_losses(hidden[batch.answer_at], batch.answer_labels, self.sample.answer_temperature)
        return prediction, -losses

    def _nft(self, batch: JudgedBatch, prediction: Tensor) -> dict[str, Tensor]:
        old, learned = batch.old_prediction, batch.learned[:, None] & (batch.attempts.t > 0)
        assert old is not None
        losses = nft_loss(prediction, old, self.denoiser.wanted(batch.attempts), batch.optimality[:, None], self.settings.beta)
        with torch.no_grad():
            moved = ((prediction - old).square().sum((-2, -1)) * learned).sum()
        count = learned.sum() * old[0, 0].numel()
        return {"nft": (losses * learned).sum(), "metric/nft_distance": torch.stack([moved, count.float()])}

    def _steps(self, batch: JudgedBatch, prediction: Tensor) -> dict[str, Tensor]:
        """Of every random step the clipped ratio of its densities, weighted by the thoughts' advantage within its limits; with
        a weight the divergence from the start's steps."""
        assert batch.old_prediction is not None and batch.after is not None
        tried, noise = batch.attempts, (self.settings.step_randomness, self.sample.initial_noise)
        times = tried.t[..., None, None]
        z_t = flow.interpolate(tried.z0[:, None], tried.eps, times)
        velocity = partial(flow.to_velocity, self.denoiser.settings.objective, z_t=z_t, t=times)
        moves = velocity(prediction)
        new, old = (path_log_density(z_t, v, batch.after, batch.times, *noise) for v in (moves, velocity(batch.old_prediction)))
        within = self.settings.advantage_clip * (2 * batch.optimality - 1)
        advantages = torch.where(batch.learned, within, 0.0)[:, None].expand_as(new)
        clip = self.settings.step_clip
        losses = {"steps": clipped_loss(new, old, advantages, clip).sum(), **ratios("step", new, old, advantages, clip)}
        if batch.start_prediction is None:
            return losses
        divergence = path_divergence(z_t, moves, velocity(batch.start_prediction), batch.times, *noise)
        return {**losses, "kl": (divergence * batch.learned[:, None]).sum()}

    def _answers(self, batch: JudgedBatch, logprob: Tensor) -> dict[str, Tensor]:
        old, advantages = batch.old_logprob, batch.advantages
        assert old is not None
        clip = self.settings.token_clip
        loss = clipped_loss(logprob, old, advantages, clip).sum()
        return {"answers": loss, **ratios("token", logprob, old, advantages, clip)}
