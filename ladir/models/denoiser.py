"""The denoiser: the LLM with a blockwise-bidirectional mask, generating blocks of latents from noise (section 1 of the design).

One forward pass trains all blocks and noise draws of a batch at once; :mod:`ladir.layout` says who sees whom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ladir.config import DenoiserSettings
from ladir.data.batches import DenoiserBatch
from ladir.data.packing import IGNORE, Rows
from ladir.layout import Mark, longest_block
from ladir.models import flow
from ladir.models.attention import Visibility
from ladir.models.backbone import Backbone
from ladir.models.metrics import accuracy, flow_by_time
from ladir.models.vae import LatentMaps, Vae


class TokenHead(nn.Module):
    """A noisy block's hidden states predict the sentence's first tokens (a loss; ``sample.token_head_weight``)."""

    def __init__(self, hidden: int, latents: int, positions: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.positions, self.rank = positions, rank
        self.down = nn.Linear(hidden * latents, positions * rank)
        self.up = nn.Linear(rank, vocab_size)

    def forward(self, hidden: Tensor, positions: int) -> Tensor:
        """Logits [K, M, P, V] of the first P = ``positions`` tokens from hidden states [K, M, L, H]."""
        return self.up(self.features(hidden)[..., :positions, :])

    def features(self, hidden: Tensor) -> Tensor:
        """What the logits are made of, [..., positions, rank], from hidden states [..., L, H]."""
        return F.silu(self.down(hidden.flatten(-2)).unflatten(-1, (self.positions, self.rank)))


def focal(losses: Tensor, gamma: float) -> Tensor:
    """Cross-entropies -log p, each times (1 - p)^gamma (Lin et al. 2017, "Focal loss for dense object detection", eq. 4)."""
    return losses if gamma == 0 else losses * (1 - (-losses).exp()) ** gamma


class Denoiser(nn.Module):
    """``forward`` gives the training losses; ``denoise_step``, ``clean_inputs``, marks and heads serve the sampler."""

    latent_mean: Tensor
    latent_std: Tensor
    layers_run_once = True

    def __init__(
        self,
        backbone: Backbone,
        settings: DenoiserSettings,
        latents_per_block: int,
        latent_mean: Tensor,
        latent_std: Tensor,
    ) -> None:
        """``latent_mean`` and ``latent_std`` [d]: the standardisation the flow works in; kept in the checkpoint."""
        super().__init__()
        hidden, d = backbone.hidden_size, len(latent_mean)
        self.settings = settings
        self.latents_per_block = latents_per_block
        self.backbone = backbone
        self.marks = nn.Embedding(len(Mark), hidden)
        self.latent_in = nn.Linear(d, hidden)
        self.latent_out = nn.Linear(hidden, d)
        self.time_in = nn.Linear(settings.timestep_features, hidden)
        self.time_out = nn.Linear(hidden, hidden)
        self.carry_in = None
        if settings.carry == "hidden":
            self.carry_in = nn.Linear(hidden, hidden, bias=False)
        self.stop_head = nn.Linear(hidden, 1)
        self.token_head = None
        if settings.token_weight:
            self.token_head = TokenHead(
                hidden, latents_per_block, settings.token_positions, settings.token_rank, backbone.vocab_size
            )
        self.register_buffer("latent_mean", latent_mean.float())
        self.register_buffer("latent_std", latent_std.float())
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Marks and latents at the scale of the embeddings; time and state without effect; all in the backbone's dtype."""
        scale = self.backbone.embedding_std()
        nn.init.normal_(self.marks.weight, std=scale)
        nn.init.normal_(self.latent_in.weight, std=scale / math.sqrt(self.latent_dim))
        nn.init.zeros_(self.latent_in.bias)
        if self.carry_in is not None:
            nn.init.zeros_(self.carry_in.weight)
        nn.init.zeros_(self.time_out.weight)
        nn.init.zeros_(self.time_out.bias)
        for module in self.heads().values():
            module.to(self.backbone.dtype)

    def heads(self) -> dict[str, nn.Module]:
        """Everything trainable that is not the LLM."""
        return {name: child for name, child in self.named_children() if name != "backbone"}

    @torch.no_grad()
    def init_from_vae(self, vae: Vae | LatentMaps) -> None:
        """Start the latent maps from the VAE's decoder projection and mean head, on standardised latents.

        The mean head gives z_0, so it is a start for ``latent_out`` under the x0 objective only.
        """
        w = vae.from_latent.weight.float()
        self.latent_in.weight.copy_(w * self.latent_std)
        self.latent_in.bias.copy_(vae.from_latent.bias.float() + w @ self.latent_mean)
        if self.settings.objective != "x0":
            return
        self.latent_out.weight.copy_(vae.to_mean.weight.float() / self.latent_std[:, None])
        self.latent_out.bias.copy_((vae.to_mean.bias.float() - self.latent_mean) / self.latent_std)

    @torch.no_grad()
    def init_marks(self, texts: Mapping[Mark, Sequence[int]]) -> None:
        """Start marks as the mean embedding of the token ids that the LM has read in their places (by all ranks together)."""
        if texts:  # all in one reading: embeddings that are split are gathered for it
            vectors = self.backbone.embeddings_of([id for ids in texts.values() for id in ids])
            parts = vectors.split([len(ids) for ids in texts.values()])
            self.marks.weight[list(texts)] = torch.stack([part.mean(0) for part in parts])

    @property
    def dtype(self) -> torch.dtype:
        return self.marks.weight.dtype

    @property
    def latent_dim(self) -> int:
        return len(self.latent_mean)

    def mark(self, mark: Mark) -> Tensor:
        """The input vector [H] of a mark."""
        # full, not tensor: nothing is copied from the host, so that a denoising step does not wait for the device
        return self.marks(torch.full((), int(mark), device=self.marks.weight.device))

    def time_embedding(self, t: Tensor) -> Tensor:
        """Vectors [..., H] added to a noisy block's latents at t [...]."""
        features = flow.timestep_features(t, self.settings.timestep_features).to(self.dtype)
        return self.time_out(F.silu(self.time_in(features)))

    def clean_inputs(self, z: Tensor) -> Tensor:
        """Input vectors [..., H] of finished, standardised latents [..., d]."""
        return self.latent_in(z.to(self.dtype))

    def null_state(self, z: Tensor) -> Tensor:
        """What the first step of noisy latents ``z`` [..., L, d] is handed: zeros [..., L, H], or [..., L, 0] without a carry."""
        return z.new_zeros(*z.shape[:-1], 0 if self.carry_in is None else self.backbone.hidden_size, dtype=self.dtype)

    def noisy_inputs(self, z: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """Input vectors [..., L, H] of noisy latents [..., L, d] at t [...] with what the step before handed on, ``state``.

        Zeros stay zeros through norm and map (Jo et al. 2025, "Loopholing discrete diffusion", arXiv 2510.19304).
        """
        inputs = self.latent_in(z.to(self.dtype)) + self.time_embedding(t)[..., None, :]
        return inputs if self.carry_in is None else inputs + self.carry_in(F.layer_norm(state, state.shape[-1:]))

    def noisy_block(self, z: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """<BOT> z~*L [..., L + 1, H] of noisy latents [..., L, d] at t [...]; with ``time_token`` <BOT> carries t as well."""
        bot = self.mark(Mark.BOT).expand(*t.shape, -1)
        if self.settings.time_token:
            bot = bot + self.time_embedding(t)
        return torch.cat([bot[..., None, :], self.noisy_inputs(z, t, state)], dim=-2)

    def next_state(self, hidden: Tensor) -> Tensor:
        """What a step hands on, of the hidden states [..., L, H] at its noisy latents."""
        return hidden[..., :0] if self.carry_in is None else hidden

    def predict(self, hidden: Tensor) -> Tensor:
        """The objective's prediction, fp32 [..., d], from hidden states [..., H] at noisy latents."""
        return self.latent_out(hidden).float()

    def longest_block(self, sentence: int) -> int:
        """:func:`~ladir.layout.longest_block` of this model, if sentences have at most ``sentence`` tokens."""
        return longest_block(self.latents_per_block, sentence, self.settings.context)

    @property
    def reads_tokens(self) -> bool:
        """Whether the token head can read what a step hands on."""
        return self.token_head is not None and self.carry_in is not None

    def stop_logit(self, hidden: Tensor) -> Tensor:
        """Logit [...] that the answer follows, from hidden states [..., H] at <EOT>."""
        return self.stop_head(hidden)[..., 0].float()

    def denoise_step(
        self, z: Tensor, t: Tensor, state: Tensor, visible: Visibility, positions: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """Prediction [R, J, L, d] for a span's noisy latents ``z`` [R, J, L, d] at ``t`` [R, J] behind a cached prefix.

        ``state``: what the step before handed on (:meth:`null_state` at first); beside the prediction is what this one does.
        """
        inputs = self.noisy_block(z, t, state)
        hidden = self.backbone(inputs.flatten(1, 2), visible, positions, cache)
        noisy = hidden.unflatten(1, inputs.shape[1:3])[:, :, 1:]
        return self.predict(noisy), self.next_state(noisy)

    def forward(self, batch: DenoiserBatch) -> dict[str, Tensor]:
        """Summed losses: ``flow`` over latent elements, ``answer``, ``token`` and ``lm`` over label tokens, ``stop`` over
        decisions."""
        return self.losses(batch, *self.read(batch))

    def losses(self, batch: DenoiserBatch, hidden: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` gives, of the hidden states that :meth:`read` does."""
        flow_loss = (self.predict(noisy) - self.wanted(batch)).square().sum((-2, -1)) * (batch.t > 0)
        losses = {
            "flow": flow_loss.sum(),
            **self._text_loss("answer", hidden[batch.answer_at], batch.answer_labels),
            **self._stop_loss(hidden, batch),
        }
        if self.token_head is not None:
            losses["token"] = self._token_loss(noisy, batch)
        if self.settings.lm_weight:
            losses |= self._text_loss("lm", hidden[batch.words_at], batch.word_labels)
        return {**losses, **flow_by_time(flow_loss, batch.t, batch.z0[0].numel())}

    def read(self, batch: DenoiserBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of a training pass: of the whole layout [N * T, H], and at the noisy latents [K, M, L, H]."""
        rows = self._rows(batch)
        hidden = self._hidden(batch, rows, batch.t, self._carried(batch))
        return hidden, self._noisy(hidden, rows, batch)

    def read_together(self, batches: Sequence[DenoiserBatch]) -> list[tuple[Tensor, Tensor]]:
        """What :meth:`read` gives of each batch, of one pass of the LM over all of their rows."""
        inputs = [(self._inputs(batch, self._rows(batch), batch.t, self._carried(batch)), batch.layout) for batch in batches]
        hidden = [own.flatten(0, 1) for own in self.backbone.together(inputs)]
        return [(own, self._noisy(own, self._rows(batch), batch)) for own, batch in zip(hidden, batches, strict=True)]

    @staticmethod
    def _rows(batch: DenoiserBatch) -> Rows:
        """All tokens of a batch; what is read are the noisy latents."""
        return Rows(batch.table_index, batch.layout, batch.noisy_at)

    @staticmethod
    def _noisy(hidden: Tensor, rows: Rows, batch: DenoiserBatch) -> Tensor:
        """Those [K, M, L, H] of the hidden states [n, H] of ``rows`` at the noisy latents."""
        return hidden[rows.at].unflatten(0, batch.eps.shape[:3])

    def wanted(self, batch: DenoiserBatch) -> Tensor:
        """What should be predicted at the noisy latents [K, M, L, d]."""
        return flow.target(self.settings.objective, batch.z0[:, None], batch.eps, batch.t[..., None, None])

    @torch.no_grad()
    def _carried(self, batch: DenoiserBatch) -> Tensor:
        """What the step before would have handed on [K, M, L, H]: of a pass at ``batch.carry_t``, or zeros."""
        state = self.null_state(batch.eps)
        if batch.carry_t is None or self.carry_in is None:
            return state
        assert batch.first is not None
        return self.next_state(self._noisy(self._hidden(batch, batch.first, batch.carry_t, state), batch.first, batch))

    def _hidden(self, batch: DenoiserBatch, rows: Rows, t: Tensor, state: Tensor) -> Tensor:
        """Hidden states [n, H] of the tokens of ``rows``, the noisy latents at ``t`` [K, M] with ``state`` [K, M, L, H]."""
        return self.backbone(self._inputs(batch, rows, t, state), rows.layout, rows.layout.position).flatten(0, 1)

    def _inputs(self, batch: DenoiserBatch, rows: Rows, t: Tensor, state: Tensor) -> Tensor:
        """Input vectors [N, T, H] of the tokens of ``rows``, as in :meth:`_hidden`."""
        z_t = flow.interpolate(batch.z0[:, None], batch.eps, t[..., None, None])
        table = torch.cat(
            [
                self.backbone.embed(batch.text_ids),
                self.marks(torch.arange(len(Mark), device=z_t.device)),
                self.clean_inputs(batch.z0 if batch.context is None else batch.context).flatten(0, 1),
                self.noisy_inputs(z_t, t, state).flatten(0, 2),
            ]
        )
        inputs = table[rows.index]
        if self.settings.time_token:
            begins = rows.at.unflatten(0, batch.eps.shape[:3])[..., 0].flatten() - 1  # a noisy block's <BOT> stands before it
            time = self.time_embedding(t).flatten(0, 1)
            inputs = inputs.flatten(0, 1).index_add(0, begins, time).view_as(inputs)
        return inputs

    def _text_loss(self, name: str, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy summed over the labels [n] of the tokens behind ``hidden`` [n, H], and its metric; only these go through
        the LM head."""
        losses, right = self.backbone.label_losses(hidden, labels)
        return {name: losses.sum(), **accuracy(name, right)}

    def _stop_loss(self, hidden: Tensor, batch: DenoiserBatch) -> dict[str, Tensor]:
        """Of the decisions behind clean blocks, and its metric."""
        logits = self.stop_logit(hidden[batch.end_at])
        loss = F.binary_cross_entropy_with_logits(logits, batch.stop_labels.float(), reduction="sum")
        return {"stop": loss, **accuracy("stop", (logits.detach() > 0) == batch.stop_labels.bool())}

    def _token_loss(self, noisy: Tensor, batch: DenoiserBatch) -> Tensor:
        assert self.token_head is not None
        logits = self.token_head(noisy, batch.block_tokens.shape[1]).float()
        labels = batch.block_tokens[:, None].masked_fill(batch.t[..., None] == 0, IGNORE)
        losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return focal(losses, self.settings.token_focus).sum()
