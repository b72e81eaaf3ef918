"""Collators: samples to the tensors of one micro batch.

All randomness of a sample comes from ``randomness.generator(seed, number)``, ``number`` being its place in the run, so a
batch is the same however it is split over ranks and micro batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ladir.config import DenoiserSettings, VaeSettings
from ladir.data.randomness import generator
from ladir.layout import PAD, Layout, Mark, Source, Template, template

if TYPE_CHECKING:
    from ladir.data.latents import LatentRecord

IGNORE = -100

BatchT = TypeVar("BatchT", bound="TensorBatch")


@dataclass
class TensorBatch:
    """A micro batch: tensors, label counts per loss term, real tokens, and which samples it holds."""

    counts: dict[str, float]
    num_tokens: int
    sample_ids: list[int]

    def to(self: BatchT, device: torch.device | str) -> BatchT:
        """The batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor | Layout)
        }
        return replace(self, **moved)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, S] padded on the left, and lengths [N]."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
    return torch.from_numpy(ids), torch.tensor([len(row) for row in rows])


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Integers [N, S] padded on the right with ``value``."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), value, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return torch.from_numpy(ids)


@dataclass
class VaeBatch(TensorBatch):
    """Sentences for the VAE: encoder ids [N, S] (left-padded, substituted), decoder ids [N, S] (right-padded), labels
    [N, S + 1], lengths [N], and the two noises [N, L, d] (posterior: unit; extra: already scaled by k)."""

    encoder_ids: Tensor
    lengths: Tensor
    decoder_ids: Tensor
    labels: Tensor
    posterior_noise: Tensor
    extra_noise: Tensor


@dataclass(frozen=True)
class VaeCollator:
    """Token-id lists of sentences to a :class:`VaeBatch`; ``training`` False leaves out noise and substitution."""

    settings: VaeSettings
    vocab_size: int
    pad_id: int
    eos_id: int
    seed: int

    def __call__(self, sentences: Sequence[Sequence[int]], numbers: Sequence[int], training: bool = True) -> VaeBatch:
        s = self.settings
        shape = (s.latents_per_block, s.latent_dim)
        posterior = np.zeros((len(sentences), *shape), dtype=np.float32)
        extra = np.zeros_like(posterior)
        encoder_rows: list[Sequence[int]] = list(sentences)
        if training:
            for i, number in enumerate(numbers):
                rng = generator(self.seed, number)
                rng.standard_normal(dtype=np.float32, out=posterior[i])
                if s.latent_noise:
                    extra[i] = s.latent_noise * rng.standard_normal(shape, dtype=np.float32)
                if s.token_substitution:
                    encoder_rows[i] = self._substitute(np.asarray(sentences[i]), rng)
        encoder_ids, lengths = pad_left(encoder_rows, self.pad_id)
        labels = pad_right([[*row, self.eos_id] for row in sentences], IGNORE)
        tokens = int(lengths.sum())
        return VaeBatch(
            counts={
                "reconstruction": float(tokens + len(sentences)),
                "kl": float(len(sentences) * s.latents_per_block),
            },
            num_tokens=2 * (tokens + len(sentences) * s.latents_per_block),
            sample_ids=list(numbers),
            encoder_ids=encoder_ids,
            lengths=lengths,
            decoder_ids=pad_right(sentences, self.pad_id),
            labels=labels,
            posterior_noise=torch.from_numpy(posterior),
            extra_noise=torch.from_numpy(extra),
        )

    def _substitute(self, row: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Each token replaced by a random one with probability p."""
        chosen = rng.random(len(row)) < self.settings.token_substitution
        return np.where(chosen, rng.integers(0, self.vocab_size, len(row)), row).tolist()


@dataclass
class ArBatch(TensorBatch):
    """Token ids [N, T] (right-padded); ``labels`` [n] are the tokens that follow those at ``label_at`` [n], indices into the
    N*T flattened tokens."""

    ids: Tensor
    label_at: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ArCollator:
    """(prompt ids, completion ids) pairs to an :class:`ArBatch`; only the completion is labelled."""

    pad_id: int

    def __call__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], numbers: Sequence[int], training: bool = True
    ) -> ArBatch:
        rows = [[*prompt, *completion[:-1]] for prompt, completion in pairs]
        ids = pad_right(rows, self.pad_id)
        ends = [i * ids.shape[1] + len(row) for i, row in enumerate(rows)]
        label_at = [range(end - len(completion), end) for end, (_, completion) in zip(ends, pairs, strict=True)]
        return ArBatch(
            counts={"text": float(sum(len(completion) for _, completion in pairs))},
            num_tokens=sum(map(len, rows)),
            sample_ids=list(numbers),
            ids=ids,
            label_at=_flat(label_at),
            labels=_flat([completion for _, completion in pairs]),
        )


@dataclass
class DenoiserBatch(TensorBatch):
    """One training pass over all blocks and draws (K blocks in the batch, M draws, L latents of size d, N x T tokens).

    ``table_index`` [N, T] says which row of [text | marks | clean latents | noisy latents] is a token's input vector;
    ``*_at`` are indices into the N*T flattened tokens.
    """

    layout: Layout
    table_index: Tensor
    text_ids: Tensor  # [n_text]
    z0: Tensor  # [K, L, d], standardised
    eps: Tensor  # [K, M, L, d]
    t: Tensor  # [K, M]
    noisy_at: Tensor  # [K * M * L]
    end_at: Tensor  # [clean <EOT>s]
    stop_labels: Tensor  # the same length: 1 where the answer follows
    answer_at: Tensor
    answer_labels: Tensor
    block_tokens: Tensor  # [K, P] labels of the auxiliary token head, IGNORE-padded; P may be 0


@dataclass(frozen=True)
class _Noise:
    z0: np.ndarray
    eps: np.ndarray
    t: np.ndarray
    hidden_question: bool


@dataclass(frozen=True)
class DenoiserCollator:
    """Latent records to a :class:`DenoiserBatch`.

    ``mean`` and ``std`` [d] standardise the latents.  ``samples_per_step`` (the global batch) tells the step a sample belongs
    to, for ``answer_every``.  ``prefix`` are ids put before every question (the tokenizer's <bos>, where it has one).
    """

    settings: DenoiserSettings
    mean: np.ndarray
    std: np.ndarray
    eos_id: int
    seed: int
    samples_per_step: int
    prefix: tuple[int, ...] = ()

    def __call__(self, records: Sequence[LatentRecord], numbers: Sequence[int], training: bool = True) -> DenoiserBatch:
        step = numbers[0] // self.samples_per_step
        with_answer = not training or step % self.settings.answer_every == 0
        questions = [[*self.prefix, *record.question] for record in records]
        latents = records[0].mu.shape[1]
        templates = [
            template(len(q), len(r.blocks), latents, self.settings.draws, len(r.answer) if with_answer else None)
            for q, r in zip(questions, records, strict=True)
        ]
        noises = [self._noise(r, n, training) for r, n in zip(records, numbers, strict=True)]
        texts = [q + list(r.answer) if with_answer else q for q, r in zip(questions, records, strict=True)]
        batch = _assemble(templates, texts, noises)
        answers = [[*r.answer, self.eos_id] for r in records] if with_answer else []
        stops = [[0] * (len(r.blocks) - 1) + [1] for r in records] if with_answer else []
        if not with_answer:
            batch["end_at"] = batch["end_at"][:0]
        return DenoiserBatch(
            counts={
                "flow": float(batch["eps"].numel()),
                "answer": float(sum(map(len, answers))),
                "stop": float(sum(map(len, stops))),
                **self._token_counts(records),
            },
            num_tokens=sum(map(len, templates)),
            sample_ids=list(numbers),
            answer_labels=_flat(answers),
            stop_labels=_flat(stops),
            block_tokens=self._block_tokens(records),
            **batch,
        )

    def _noise(self, record: LatentRecord, number: int, training: bool) -> _Noise:
        """Everything random about one sample: posterior draw, noise, timesteps, whether the question is hidden."""
        s = self.settings
        rng = generator(self.seed, number)
        mu = np.asarray(record.mu, dtype=np.float32)
        eps = rng.standard_normal((len(mu), s.draws, *mu.shape[1:]), dtype=np.float32)
        if s.timesteps == "uniform":
            t = rng.random((len(mu), s.draws), dtype=np.float32)
        else:
            normal = rng.standard_normal((len(mu), s.draws), dtype=np.float32)
            t = 1.0 / (1.0 + np.exp(-(s.timestep_mean + s.timestep_std * normal)))
        hidden = training and rng.random() < s.condition_dropout
        if s.sample_latents and training:
            sigma = np.exp(0.5 * np.asarray(record.logvar, dtype=np.float32))
            mu = mu + sigma * rng.standard_normal(mu.shape, dtype=np.float32)
        return _Noise((mu - self.mean) / self.std, eps, t, hidden)

    def _token_counts(self, records: Sequence[LatentRecord]) -> dict[str, float]:
        if not self.settings.token_weight:
            return {}
        limit = self.settings.token_positions
        tokens = sum(min(len(block), limit) for record in records for block in record.blocks)
        return {"token": float(tokens * self.settings.draws)}

    def _block_tokens(self, records: Sequence[LatentRecord]) -> Tensor:
        """Labels [K, P] for the auxiliary token head; P = 0 without it."""
        rows = [block[: self.settings.token_positions] for record in records for block in record.blocks]
        if not self.settings.token_weight:
            return torch.empty(len(rows), 0, dtype=torch.int64)
        return pad_right(rows, IGNORE)


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


def _assemble(templates: Sequence[Template], texts: Sequence[Sequence[int]], noises: Sequence[_Noise]) -> dict[str, Any]:
    """Stack the records' layouts into one padded batch and point every token at its input vector."""
    width = max(map(len, templates))
    shape = (len(templates), width)
    position, limit = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    copy = np.full(shape, PAD, np.int64)
    table_index = np.zeros(shape, np.int64)
    first = _first_rows(texts, noises)
    for i, layout in enumerate(templates):
        size = len(layout)
        position[i, :size] = layout.position
        limit[i, :size] = layout.limit
        copy[i, :size] = layout.copy
        table_index[i, :size] = first[i][layout.source] + layout.index
        if noises[i].hidden_question:
            table_index[i, : layout.question_length] = first[i][Source.MARK] + Mark.NULL
    return {
        "layout": Layout(*map(torch.from_numpy, (position, limit, copy))),
        "table_index": torch.from_numpy(table_index),
        "text_ids": _flat(texts),
        "z0": torch.from_numpy(np.concatenate([noise.z0 for noise in noises])).float(),
        "eps": torch.from_numpy(np.concatenate([noise.eps for noise in noises])),
        "t": torch.from_numpy(np.concatenate([noise.t for noise in noises])).float(),
        **{f"{key}_at": _places(templates, width, pick) for key, pick in _PLACES.items()},
    }


_PLACES: dict[str, Callable[[Template], np.ndarray]] = {
    "noisy": lambda layout: layout.noisy,
    "end": lambda layout: layout.ends,
    "answer": lambda layout: layout.answer,
}


def _first_rows(texts: Sequence[Sequence[int]], noises: Sequence[_Noise]) -> np.ndarray:
    """First table row [N, 4] of each record's text, marks, clean latents and noisy latents."""
    text = np.cumsum([0, *map(len, texts)])
    clean = np.cumsum([0, *(n.z0.shape[0] * n.z0.shape[1] for n in noises)])
    noisy = np.cumsum([0, *(n.eps[..., 0].size for n in noises)])
    marks = np.full(len(texts), text[-1])
    start = text[-1] + len(Mark)
    return np.stack([text[:-1], marks, start + clean[:-1], start + clean[-1] + noisy[:-1]], axis=1)


def _places(templates: Sequence[Template], width: int, pick: Callable[[Template], np.ndarray]) -> Tensor:
    """Flattened token indices of what ``pick`` names in every record."""
    return torch.from_numpy(np.concatenate([i * width + pick(layout) for i, layout in enumerate(templates)]))
