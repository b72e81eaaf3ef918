"""The VAE: a sentence becomes L latents of size d and back (section 1 of the design).

The encoder reads ``[sentence, L learned queries]``; the last hidden states at the queries give mean and log-variance.  The
decoder reads ``[W z, separator, sentence]``, teacher-forced.  Both read <bos> first where the tokenizer has one (``vae.bos``).
With LoRA the frozen decoder is the encoder's LM with the adapters off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ladir.config import VaeSettings
from ladir.data.batches import Follows, VaeBatch, flat_ids
from ladir.data.packing import IGNORE, Rows, encoder_rows
from ladir.models.backbone import Backbone
from ladir.models.metrics import accuracy, vae_metrics

#: log-variance of a fresh encoder: a small posterior lets reconstruction start at once
_INITIAL_LOGVAR = -4.0


@dataclass(frozen=True)
class LatentMaps:
    """The linear maps of a VAE that a denoiser starts from: latents [d] to input vectors [H], hidden states [H] to means [d]."""

    from_latent: nn.Linear
    to_mean: nn.Linear


@dataclass(frozen=True)
class ThoughtDecoder:
    """The half of the VAE that turns latents into text: ``[W z, separator, sentence]`` read by an LM, its adapters off.

    ``bos``: ids read before the latents (the tokenizer's <bos>, or none); ``separator``: ids read behind them.
    """

    backbone: Backbone
    from_latent: nn.Linear
    bos: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()

    @property
    def marks(self) -> int:
        """How many ids stand around the latents."""
        return len(self.bos) + len(self.separator)

    @contextmanager
    def lm(self) -> Iterator[Backbone]:
        """The decoding LM as it decodes: the base weights alone where it has adapters."""
        with self.backbone.adapter_off():
            yield self.backbone

    def vectors(self, z: Tensor) -> Tensor:
        """Input vectors [N, L, H] of latents ``z`` [N, L, d] (not standardised)."""
        vectors: Tensor = self.from_latent(z.to(self.from_latent.weight.dtype))
        return vectors

    def prefix(self, z: Tensor) -> Tensor:
        """What stands before a sentence [N, P, H]: <bos>, the vectors of its latents ``z`` [N, L, d], the separator."""
        vectors = self.vectors(z)
        if not self.marks:
            return vectors
        ids = torch.tensor([*self.bos, *self.separator], dtype=torch.int64, device=z.device)
        start, end = self.backbone.embed(ids).expand(len(z), -1, -1).split([len(self.bos), len(self.separator)], dim=1)
        return torch.cat([start, vectors, end], dim=1)

    def label_losses(self, z: Tensor, ids: Tensor, rows: Rows, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and whether greedy decoding is right, [n + N] each, for N sentences teacher-forced from ``z`` [N, L, d].

        ``ids`` [n]: the sentences' tokens; ``labels`` [n + N]: the same with the <eos> behind each; ``rows``: of
        :func:`ladir.data.packing.decoder_rows`.
        """
        with self.lm() as lm:
            return lm.label_losses(self._read(lm, z, ids, rows), labels)

    def following_losses(self, z: Tensor, follows: Follows) -> tuple[Tensor, Tensor]:
        """The same [n + N] of texts behind a prompt and latents ``z`` [N, L, d]; the sentences of the latents are not shown."""
        with self.lm() as lm:
            table = torch.cat([lm.embed(follows.ids), self.vectors(z).flatten(0, 1), lm.embed(follows.prompt_ids)])
            return lm.label_losses(lm.read(table, follows.rows), follows.labels)

    def logits(self, z: Tensor, ids: Tensor, rows: Rows) -> Tensor:
        """Logits [n + N, V] where :meth:`label_losses` gives losses."""
        with self.lm() as lm:
            return lm.logits(self._read(lm, z, ids, rows))

    def _read(self, lm: Backbone, z: Tensor, ids: Tensor, rows: Rows) -> Tensor:
        return lm.read(torch.cat([lm.embed(ids), self.prefix(z).flatten(0, 1)]), rows)


class Vae(nn.Module):
    """``forward`` gives the training losses; ``encode`` and ``thought_decoder`` serve the other phases."""

    def __init__(
        self,
        encoder: Backbone,
        decoder: Backbone | None,
        settings: VaeSettings,
        bos: Sequence[int] = (),
        separator: Sequence[int] = (),
    ) -> None:
        """``decoder`` None: the encoder's LM with its adapters off decodes (it must then have adapters).

        ``bos``: ids read before every sentence and before its latents; ``separator``: ids read behind the latents; what
        ``settings`` says of both is the caller's to heed.
        """
        super().__init__()
        hidden, d = encoder.hidden_size, settings.latent_dim
        self.settings = settings
        self.bos, self.separator = tuple(bos), tuple(separator)
        self.encoder = encoder
        self.own_decoder = decoder
        self.queries = nn.Embedding(settings.latents_per_block, hidden)
        self.to_mean = nn.Linear(hidden, d)
        self.to_logvar = nn.Linear(hidden, d)
        self.from_latent = nn.Linear(d, hidden)
        self._initialise()
        if decoder is not None and settings.decoder == "frozen":
            decoder.requires_grad_(False)

    @property
    def layers_run_once(self) -> bool:
        """Whether a forward pass runs every LM layer once: not where both halves share them or the decoder reads twice."""
        return self.own_decoder is not None and self.settings.objective == "reconstruct"

    @torch.no_grad()
    def _initialise(self) -> None:
        """What enters an LM beside its embeddings has their scale: latents with the training's noise, of variance 1 + k^2 each.

        A frozen decoder reads a hundredfold input (PyTorch's own start, beside a pretrained LM's embeddings) as noise for long.
        """
        nn.init.normal_(self.queries.weight, std=self.encoder.embedding_std())
        spread = self.settings.latent_dim * (1.0 + self.settings.latent_noise**2)
        nn.init.normal_(self.from_latent.weight, std=self.thought_decoder.backbone.embedding_std() / math.sqrt(spread))
        nn.init.zeros_(self.from_latent.bias)
        nn.init.normal_(self.to_logvar.weight, std=1e-3)
        nn.init.constant_(self.to_logvar.bias, _INITIAL_LOGVAR)
        for module in (self.queries, self.to_mean, self.to_logvar, self.from_latent):
            module.to(self.encoder.dtype)

    @property
    def thought_decoder(self) -> ThoughtDecoder:
        """The decoding half; with LoRA it is the encoder's own LM, adapters off."""
        return ThoughtDecoder(self.own_decoder or self.encoder, self.from_latent, self.bos, self.separator)

    def encode(self, ids: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each fp32 [N, L, d], of N sentences' tokens ``ids`` [n].

        ``rows``: of :func:`ladir.data.packing.encoder_rows`.
        """
        latents = self.settings.latents_per_block
        queries = self.queries(torch.arange(latents, device=ids.device))
        hidden = self.encoder.read(torch.cat([self.encoder.embed(ids), queries]), rows).unflatten(0, (-1, latents))
        return self.to_mean(hidden).float(), self.to_logvar(hidden).float()

    def forward(self, batch: VaeBatch) -> dict[str, Tensor]:
        """Summed losses: ``reconstruction`` over label tokens, ``kl`` over latents (each summed over d), ``grounded`` over
        the tokens of what follows.

        Metrics: see :func:`ladir.models.metrics.vae_metrics`.
        """
        mean, logvar = self.encode(batch.encoder_ids, batch.encoder)
        sigma = (0.5 * logvar).exp()
        z = mean + sigma * batch.posterior_noise + batch.extra_noise
        losses, right = self.thought_decoder.label_losses(z, batch.decoder_ids, batch.decoder, batch.labels)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum()
        with torch.no_grad():
            wrong = (~right).float()
            mistakes = wrong.new_zeros(len(mean)).index_add_(0, batch.owner, wrong)
        found = {"reconstruction": losses.sum(), "kl": kl, **vae_metrics(mistakes, len(batch.labels), mean, logvar)}
        if batch.follows is not None:
            following, known = self.thought_decoder.following_losses(z, batch.follows)
            found |= {"grounded": following.sum(), **accuracy("grounded", known[batch.follows.labels != IGNORE])}
        return found


@torch.no_grad()
def encode_sentences(vae: Vae, sentences: Sequence[Sequence[int]], pack_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [N, L, d] (fp32, on the model's device) of token-id lists, without <bos>."""
    sentences = [[*vae.bos, *sentence] for sentence in sentences]
    rows = encoder_rows([len(sentence) for sentence in sentences], vae.settings.latents_per_block, pack_tokens)
    device = vae.from_latent.weight.device
    return vae.encode(flat_ids(sentences).to(device), rows.to(device))
