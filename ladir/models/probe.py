"""How good a VAE's latents are to read and to generate: reconstruction with and without noise, and what a small denoiser learns.

A latent that decodes without a mistake may be nearly impossible to generate.  The probe is the same small network for every VAE,
trained for a fixed number of steps, so that its figures compare VAEs before a denoiser is trained on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ladir.data.batches import flat_ids, pad_right
from ladir.data.latents import LatentRecord
from ladir.data.packing import decoder_rows
from ladir.models import flow
from ladir.models.metrics import ACTIVE_VARIANCE
from ladir.models.vae import ThoughtDecoder

# The instrument itself: with other sizes its figures would not compare.
_WIDTH, _HEADS, _LAYERS, _TIME_FEATURES = 128, 4, 2, 64
_BATCH, _LR, _PLACES = 64, 2e-3, 64
#: noise levels at which it is judged: the middles of as many equal parts of the path
_LEVELS = 8
#: where its estimate of a block is read as text
_HALF = 0.5
#: blocks that are decoded at a time
_AT_A_TIME = 64


@dataclass(frozen=True)
class Blocks:
    """N blocks as a denoiser meets them: standardised latents ``z0`` and those of the block ``before`` (zeros: none), [N, L, d];
    ``place`` [N] of each in its chain; the ``questions`` and the blocks' own ``sentences`` as token ids."""

    z0: Tensor
    before: Tensor
    place: Tensor
    questions: list[list[int]]
    sentences: list[list[int]]

    @classmethod
    def of(cls, records: Sequence[LatentRecord], mean: Tensor, std: Tensor) -> Blocks:
        """All blocks of ``records``, standardised by ``mean`` and ``std`` [d]."""
        latents = [(record.mu - mean) / std for record in records]
        before = [torch.cat([torch.zeros_like(z[:1]), z[:-1]]) for z in latents]
        place = torch.tensor([number for z in latents for number in range(len(z))])
        questions = [record.question for record in records for _ in record.blocks]
        return cls(torch.cat(latents), torch.cat(before), place, questions, [ids for r in records for ids in r.blocks])

    def __len__(self) -> int:
        return len(self.z0)


class Probe(nn.Module):
    """A small Transformer that reads question (as a bag of tokens), the block before and a noisy block, and predicts velocity."""

    def __init__(self, latents: int, dim: int, words: Sequence[int]) -> None:
        """``words``: the token ids it knows; others count as one."""
        super().__init__()
        self.register_buffer("words", torch.tensor(sorted(words), dtype=torch.int64))
        self.question = nn.EmbeddingBag(len(words) + 2, _WIDTH, mode="mean", padding_idx=0)
        self.place = nn.Embedding(_PLACES, _WIDTH)
        self.latent_in = nn.Linear(dim, _WIDTH)
        self.time_in = nn.Sequential(nn.Linear(_TIME_FEATURES, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.position = nn.Parameter(torch.randn(2 * latents + 1, _WIDTH) / math.sqrt(_WIDTH))
        layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.latent_out = nn.Linear(_WIDTH, dim)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    words: Tensor

    def known(self, questions: Sequence[Sequence[int]]) -> Tensor:
        """Rows [N, Q] of the questions' embedding: 0 is padding, 1 any unknown token."""
        ids = pad_right(questions, -1).to(self.words.device)
        if not len(self.words):
            return (ids >= 0).long()
        place = torch.searchsorted(self.words, ids).clamp_max(len(self.words) - 1)
        rows = torch.where(self.words[place] == ids, place + 2, 1)
        return rows.masked_fill(ids < 0, 0)

    def forward(self, known: Tensor, place: Tensor, before: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Velocity [N, L, d] at noisy latents ``z_t`` [N, L, d] and t [N], behind the block ``before`` [N, L, d].

        That of independent normal latents, ``(2 t - 1) / s^2 z_t``, ``s^2 = (1 - t)^2 + t^2``, is there from the start; learnt
        is the rest, of variance ``1 / s^2`` (preconditioning as in Karras et al. 2022, "Elucidating the design space of
        diffusion-based generative models", table 1, on the straight path).
        """
        time = t[:, None, None]
        spread = ((1 - time) ** 2 + time**2).sqrt()
        context = (self.question(known) + self.place(place.clamp_max(_PLACES - 1)))[:, None]
        noisy = self.latent_in(z_t / spread) + self.time_in(flow.timestep_features(t, _TIME_FEATURES))[:, None]
        inputs = torch.cat([context, self.latent_in(before), noisy], dim=1) + self.position
        hidden: Tensor = self.layers(inputs)[:, -z_t.shape[1] :]
        return (2 * time - 1) / spread**2 * z_t + self.latent_out(hidden) / spread


@dataclass(frozen=True)
class Probed:
    """What the probe reached on held-out blocks: the share of the velocity's variance that it explains, and its estimate of the
    clean, standardised latents [N, L, d] from half noise."""

    flow_explained: float
    estimate: Tensor


def probe(
    trained: Blocks, held_out: Blocks, steps: int, seed: int, device: torch.device, between: Callable[[], None] | None = None
) -> Probed:
    """Train a fresh probe for ``steps`` steps on ``trained`` and judge it on ``held_out``; the same numbers for the same seed.
    ``between`` is called between two steps, which it may end by raising.

    It starts at what mean and deviation alone explain, 1 - pi / 4 = 0.21; how far it comes above that says what it has learned.
    """
    words = {token for question in trained.questions for token in question}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Probe(trained.z0.shape[1], trained.z0.shape[2], sorted(words)).to(device)
        _train(model, trained, steps, torch.Generator().manual_seed(seed), between or _go_on)
    return _judge(model, held_out, torch.Generator().manual_seed(seed + 1))


def _go_on() -> None:
    """Nobody wants to end it."""


def _train(model: Probe, blocks: Blocks, steps: int, generator: torch.Generator, between: Callable[[], None]) -> None:
    device = model.words.device
    optimizer = torch.optim.AdamW(model.parameters(), _LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        between()
        rows = torch.randint(len(blocks), (_BATCH,), generator=generator)
        z0, eps = blocks.z0[rows].to(device), torch.randn(_BATCH, *blocks.z0.shape[1:], generator=generator).to(device)
        t = torch.rand(_BATCH, generator=generator).to(device)
        loss = (_velocity(model, blocks, rows, z0, eps, t) - (eps - z0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _velocity(model: Probe, blocks: Blocks, rows: Tensor, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    device = z0.device
    known = model.known([blocks.questions[row] for row in rows.tolist()])
    z_t = flow.interpolate(z0, eps, t[:, None, None])
    velocity: Tensor = model(known, blocks.place[rows].to(device), blocks.before[rows].to(device), z_t, t)
    return velocity


@torch.no_grad()
def _judge(model: Probe, blocks: Blocks, generator: torch.Generator) -> Probed:
    device, rows = model.words.device, torch.arange(len(blocks))
    z0, eps = blocks.z0.to(device), torch.randn(blocks.z0.shape, generator=generator).to(device)
    wanted = eps - z0
    error = 0.0
    for level in range(_LEVELS):
        t = torch.full((len(blocks),), (level + 0.5) / _LEVELS, device=device)
        error += float((_velocity(model, blocks, rows, z0, eps, t) - wanted).square().mean()) / _LEVELS
    t = torch.full((len(blocks),), _HALF, device=device)
    estimate = flow.interpolate(z0, eps, t[:, None, None]) - _HALF * _velocity(model, blocks, rows, z0, eps, t)
    return Probed(1 - error / float(wanted.var(correction=0)), estimate)


@dataclass(frozen=True)
class Read:
    """How a decoder reads latents of known sentences: shares of exact sentences and of right tokens, cross-entropy per token."""

    exact: float
    token_accuracy: float
    cross_entropy: float


@torch.no_grad()
def read(
    decoder: ThoughtDecoder, z: Tensor, sentences: Sequence[Sequence[int]], eos_id: int, between: Callable[[], None] | None = None
) -> Read:
    """Teacher-forced reading of latents ``z`` [N, L, d] (not standardised) of N ``sentences``, each ended by ``eos_id``.

    A sentence is exact where every token, <eos> too, is the likeliest: greedy decoding then writes it.
    """
    device, latents = z.device, decoder.marks + z.shape[1]
    exact, right, loss, tokens = 0, 0, 0.0, 0
    for start in range(0, len(z), _AT_A_TIME):
        (between or _go_on)()
        some = sentences[start : start + _AT_A_TIME]
        lengths = [len(ids) for ids in some]
        labels = flat_ids([[*ids, eos_id] for ids in some]).to(device)
        rows = decoder_rows(lengths, latents, budget=0).to(device)
        losses, hits = decoder.label_losses(z[start : start + _AT_A_TIME], flat_ids(some).to(device), rows, labels)
        exact += sum(bool(part.all()) for part in hits.split([length + 1 for length in lengths]))
        right, loss, tokens = right + int(hits.sum()), loss + float(losses.sum()), tokens + len(labels)
    return Read(exact / len(z), right / tokens, loss / tokens)


def active_units(mu: Tensor) -> float:
    """Elements of a block's latents whose mean ``mu`` [N, L, d] varies over the blocks by more than 0.01 (variance)."""
    return float((mu.var(0, correction=0) > ACTIVE_VARIANCE).sum()) if len(mu) > 1 else 0.0


def latent_report(
    decoder: ThoughtDecoder,
    trained: Sequence[LatentRecord],
    held_out: Sequence[LatentRecord],
    mean: Tensor,
    std: Tensor,
    noise: float,
    probe_steps: int,
    eos_id: int,
    seed: int,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Figures of a VAE's latents on ``held_out`` records, standardised by ``mean`` and ``std`` [d].

    ``exact``, ``token_accuracy``, ``token_cross_entropy``: of the posteriors' means; ``noisy_...``: of these with ``noise``
    (standard deviation), as in training; ``active_units``; with ``probe_steps`` above 0 ``probe_flow_explained`` and,
    from half noise, ``probe_token_cross_entropy`` and ``probe_exact``.  ``between`` is called between the pieces of the work,
    which it may end by raising.
    """
    device = decoder.from_latent.weight.device
    blocks = Blocks.of(held_out, mean, std)
    mu = torch.cat([record.mu for record in held_out])
    noised = mu + noise * torch.randn(mu.shape, generator=torch.Generator().manual_seed(seed))
    plain, noisy = (read(decoder, z.to(device), blocks.sentences, eos_id, between) for z in (mu, noised))
    figures = {
        "exact": plain.exact,
        "token_accuracy": plain.token_accuracy,
        "token_cross_entropy": plain.cross_entropy,
        "noisy_exact": noisy.exact,
        "noisy_token_accuracy": noisy.token_accuracy,
        "active_units": active_units(mu),
    }
    if probe_steps:
        found = probe(Blocks.of(trained, mean, std), blocks, probe_steps, seed, device, between)
        z = found.estimate * std.to(device) + mean.to(device)
        half = read(decoder, z, blocks.sentences, eos_id, between)
        figures |= {
            "probe_flow_explained": found.flow_explained,
            "probe_token_cross_entropy": half.cross_entropy,
            "probe_exact": half.exact,
        }
    return figures
