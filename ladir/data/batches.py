"""Collators: samples to the tensors of one micro batch.

All randomness of a sample comes from ``randomness.Streams(seed).at(number)``, ``number`` being its place in the run, so a
batch is the same however it is split over ranks and micro batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ladir.config import DenoiserSettings, VaeSettings
from ladir.data.packing import IGNORE, Places, Rows, decoder_rows, encoder_rows, place, text_rows
from ladir.data.randomness import Streams, derive, generator
from ladir.data.token_lists import GroundedSentence
from ladir.layout import PAD, Layout, Mark, Source, Template, template
from ladir.spans import with_room

if TYPE_CHECKING:
    from ladir.data.latents import LatentRecord

BatchT = TypeVar("BatchT", bound="TensorBatch")


@dataclass
class TensorBatch:
    """A micro batch: tensors, label counts per loss term, real tokens, and which samples it holds."""

    counts: dict[str, float]
    num_tokens: int
    sample_ids: list[int]

    @property
    def kind(self) -> str:
        """Batches of one kind take the same passes of the model, in which a token costs about the same."""
        return ""

    def to(self: BatchT, device: torch.device | str) -> BatchT:
        """The batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor | Layout | Rows)
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
    """N sentences of n tokens in all, as encoder and decoder read them.

    ``encoder_ids`` [n], substituted ([n + N] with <bos>); ``decoder_ids`` [n]; ``labels`` [n + N] with the sentence each belongs
    to, ``owner`` [n + N]; and the two noises [N, L, d] (posterior: unit; extra: already scaled by k)."""

    encoder_ids: Tensor
    encoder: Rows
    decoder_ids: Tensor
    decoder: Rows
    labels: Tensor
    owner: Tensor
    posterior_noise: Tensor
    extra_noise: Tensor
    follows: Follows | None = None

    @property
    def kind(self) -> str:
        """Whether the decoder also reads what follows."""
        return "" if self.follows is None else "grounded"

    def to(self, device: torch.device | str) -> VaeBatch:
        """The batch with every tensor on ``device``."""
        moved = super().to(device)
        return moved if self.follows is None else replace(moved, follows=self.follows.to(device))


@dataclass(frozen=True)
class Follows:
    """What follows N sentences, as the decoder reads it: ``[prompt, latents, text]`` each.

    ``prompt_ids``, ``ids``: the tokens of all prompts and all texts; ``labels`` [n + N]: the texts' with the <eos> behind each,
    or IGNORE where a text was cut or nothing is known to follow; ``count``: of the others.
    """

    prompt_ids: Tensor
    ids: Tensor
    rows: Rows
    labels: Tensor
    count: int

    def to(self, device: torch.device | str) -> Follows:
        """The same on another device."""
        return Follows(self.prompt_ids.to(device), self.ids.to(device), self.rows.to(device), self.labels.to(device), self.count)


@dataclass(frozen=True)
class VaeCollator:
    """Token-id lists of sentences to a :class:`VaeBatch`; ``training`` False leaves out noise and substitution.

    ``ordinary``: the ids that substitution draws (:func:`ladir.tokens.ordinary_ids`).
    ``pack_tokens``: see :func:`ladir.data.packing.place`.  ``bos``: ids read before every sentence and its latents;
    ``separator``: ids read between latents and sentence.
    """

    settings: VaeSettings
    ordinary: Sequence[int] | np.ndarray
    eos_id: int
    seed: int
    pack_tokens: int = 0
    bos: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()

    def __call__(
        self, items: Sequence[Sequence[int] | GroundedSentence], numbers: Sequence[int], training: bool = True
    ) -> VaeBatch:
        s = self.settings
        sentences = [item.sentence if isinstance(item, GroundedSentence) else item for item in items]
        follows = self._follows(items) if s.objective == "grounded" else None
        shape = (s.latents_per_block, s.latent_dim)
        posterior = np.zeros((len(sentences), *shape), dtype=np.float32)
        extra = np.zeros_like(posterior)
        read: list[Sequence[int]] = list(sentences)
        if training:
            streams = Streams(self.seed)
            for i, number in enumerate(numbers):
                rng = streams.at(number)
                rng.standard_normal(dtype=np.float32, out=posterior[i])
                if s.latent_noise:
                    extra[i] = s.latent_noise * rng.standard_normal(shape, dtype=np.float32)
                if s.token_substitution:
                    read[i] = self._substitute(np.asarray(sentences[i]), rng)
        lengths, start = [len(row) for row in sentences], len(self.bos)
        before = start + s.latents_per_block + len(self.separator)
        return VaeBatch(
            counts={
                "reconstruction": float(sum(lengths) + len(sentences)),
                "kl": float(len(sentences) * s.latents_per_block),
                **({} if follows is None else {"grounded": float(follows.count)}),
            },
            num_tokens=2 * sum(lengths)
            + len(sentences) * (start + s.latents_per_block + before)
            + (0 if follows is None else len(follows.ids) + len(follows.prompt_ids) + len(sentences) * s.latents_per_block),
            sample_ids=list(numbers),
            encoder_ids=flat_ids([[*self.bos, *row] for row in read]),
            encoder=encoder_rows([start + length for length in lengths], s.latents_per_block, self.pack_tokens),
            decoder_ids=flat_ids(sentences),
            decoder=decoder_rows(lengths, before, self.pack_tokens),
            labels=flat_ids([[*row, self.eos_id] for row in sentences]),
            owner=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths) + 1),
            posterior_noise=torch.from_numpy(posterior),
            extra_noise=torch.from_numpy(extra),
            follows=follows,
        )

    def _follows(self, items: Sequence[Sequence[int] | GroundedSentence]) -> Follows:
        """What follows each sentence, cut at ``grounded_tokens``; sentences of which nothing is known take part unlabelled."""
        most = self.settings.grounded_tokens
        known = [item if isinstance(item, GroundedSentence) else GroundedSentence([], [], []) for item in items]
        texts = [item.follows[:most] for item in known]
        ends = [self.eos_id if 0 < len(item.follows) <= most else IGNORE for item in known]
        labels = flat_ids([[*text, end] for text, end in zip(texts, ends, strict=True)])
        prompts = [item.prompt for item in known]
        rows = decoder_rows(
            [len(text) for text in texts], self.settings.latents_per_block, self.pack_tokens, [len(prompt) for prompt in prompts]
        )
        return Follows(flat_ids(prompts), flat_ids(texts), rows, labels, int((labels != IGNORE).sum()))

    def _substitute(self, row: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Each token replaced by a random ordinary one with probability p."""
        chosen = rng.random(len(row)) < self.settings.token_substitution
        drawn = rng.integers(0, len(self.ordinary), len(row))
        return [self.ordinary[other] if new else token for token, new, other in zip(row.tolist(), chosen, drawn, strict=True)]


@dataclass
class ArBatch(TensorBatch):
    """Token ids [n] of all texts; ``labels`` are the tokens that follow those at ``rows.at``."""

    ids: Tensor
    rows: Rows
    labels: Tensor


@dataclass(frozen=True)
class ArCollator:
    """(prompt ids, completion ids) pairs to an :class:`ArBatch`; only the completion is labelled.

    ``bidirectional_question``: the prompt's tokens see each other.
    """

    pack_tokens: int = 0
    bidirectional_question: bool = False

    def __call__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], numbers: Sequence[int], training: bool = True
    ) -> ArBatch:
        texts = [[*prompt, *completion[:-1]] for prompt, completion in pairs]
        completions = [completion for _, completion in pairs]
        labelled = [len(completion) for completion in completions]
        lengths = [len(text) for text in texts]
        return ArBatch(
            counts={"text": float(sum(labelled))},
            num_tokens=sum(lengths),
            sample_ids=list(numbers),
            ids=flat_ids(texts),
            rows=text_rows(lengths, labelled, self.pack_tokens, self.bidirectional_question),
            labels=flat_ids(completions),
        )


@dataclass
class DenoiserBatch(TensorBatch):
    """One training pass over all blocks and draws (K blocks in the batch, M draws, L latents of size d, N x T tokens).

    The K blocks are those of every record's spans: where its last span has room, blocks of zeros stand behind a record's last
    one.  A block with t = 0 is finished: others in its span see it, nothing is learned from it.
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
    words_at: Tensor  # where the next tokens of sentences that stand as text are predicted; none without denoiser.lm_weight
    word_labels: Tensor
    context: Tensor | None = None  # [K, L, d], what the clean stream holds where it is not z0
    carry_t: Tensor | None = None  # [K, M], times of the first pass, which supplies the carried state; None: there is none
    first: Rows | None = None  # the first pass' tokens: noisy latents, which are read, and what they see

    @property
    def kind(self) -> str:
        """Whether there is a first pass, which has no answers, and whether there are answers."""
        passes = "one pass" if self.carry_t is None else "two passes"
        return f"{passes}, answers" if len(self.answer_labels) else passes


@dataclass(frozen=True)
class _Noise:
    """Everything random about a batch of N records with K blocks in all."""

    z0: np.ndarray  # [K, L, d], standardised
    eps: np.ndarray  # [K, M, L, d]
    t: np.ndarray  # [K, M], 0 where the block is finished
    carry_t: np.ndarray  # [K, M], times of a first pass
    hidden_question: np.ndarray  # bool [N]


@dataclass(frozen=True)
class DenoiserCollator:
    """Latent records to a :class:`DenoiserBatch`.

    ``mean`` and ``std`` [d] standardise the latents.  ``samples_per_step`` (the global batch) tells the step a sample belongs
    to, for ``answer_every``.  ``prefix`` are ids put before every question (the tokenizer's <bos>, where it has one, or a chat
    template's), ``suffix`` ids behind it.
    ``pack_tokens``: see :func:`ladir.data.packing.place`.
    """

    settings: DenoiserSettings
    mean: np.ndarray
    std: np.ndarray
    eos_id: int
    seed: int
    samples_per_step: int
    prefix: tuple[int, ...] = ()
    pack_tokens: int = 0
    suffix: tuple[int, ...] = ()

    def __call__(
        self, records: Sequence[LatentRecord], numbers: Sequence[int], training: bool = True, with_answer: bool | None = None
    ) -> DenoiserBatch:
        """``with_answer`` overrides what ``answer_every`` says."""
        step = numbers[0] // self.samples_per_step
        if with_answer is None:
            with_answer = not training or step % self.settings.answer_every == 0
        questions = [[*self.prefix, *record.question, *self.suffix] for record in records]
        words = [record.blocks if self.settings.context == "text" else [] for record in records]
        texts = [list(chain(q, *w, r.answer if with_answer else ())) for q, r, w in zip(questions, records, words, strict=True)]
        noise = self._noise(records, numbers, training)
        blocks = [with_room(len(r.blocks), self.settings.span) for r in records]
        shown = (len(self.prefix), len(self.suffix))
        lay_out = _LayOut(_first_rows(texts, blocks, noise), noise.hidden_question, shown, self.pack_tokens)
        speaks = self.settings.lm_weight > 0
        templates = self._templates(questions, records, with_answer, last=speaks)
        places, rows = lay_out(templates)
        at = {f"{key}_at": _at(templates, places, pick) for key, pick in _PLACES.items()}
        has_first = self._has_first_pass(step, training)
        seen_by_noisy = lay_out([record.first_pass for record in templates])[1] if has_first and (with_answer or speaks) else rows
        block_tokens = self._block_tokens(records)
        answers = [[*r.answer, self.eos_id] for r in records] if with_answer else []
        stops = [[0] * (len(r.blocks) - 1) + [1] for r in records] if with_answer else []
        if not with_answer:
            at["end_at"] = at["end_at"][:0]
        spoken = self._spoken(templates, words)
        if not spoken:
            at["words_at"] = at["words_at"][:0]
        return DenoiserBatch(
            counts={
                "flow": float((noise.t > 0).sum() * noise.z0[0].size),
                "answer": float(sum(map(len, answers))),
                "stop": float(sum(map(len, stops))),
                **self._token_counts(block_tokens, noise.t),
                **({"lm": float(sum(map(len, spoken)))} if self.settings.lm_weight else {}),
            },
            num_tokens=sum(map(len, templates)),
            sample_ids=list(numbers),
            answer_labels=flat_ids(answers),
            word_labels=flat_ids(spoken),
            stop_labels=flat_ids(stops),
            block_tokens=block_tokens,
            layout=rows.layout,
            table_index=rows.index,
            noisy_at=rows.at,
            text_ids=flat_ids(texts),
            z0=torch.from_numpy(noise.z0).float(),
            eps=torch.from_numpy(noise.eps),
            t=torch.from_numpy(noise.t).float(),
            carry_t=torch.from_numpy(noise.carry_t) if has_first else None,
            first=seen_by_noisy if has_first else None,
            **at,
        )

    def _templates(
        self, questions: Sequence[Sequence[int]], records: Sequence[LatentRecord], with_answer: bool, last: bool = False
    ) -> list[Template]:
        """Every record's layout; ``last``: see :func:`ladir.layout.template`."""
        s, latents, text = self.settings, records[0].mu.shape[1], self.settings.context == "text"
        return [
            template(
                len(question),
                len(record.blocks),
                latents,
                s.draws,
                len(record.answer) if with_answer else None,
                s.span,
                s.bidirectional_question,
                [len(sentence) for sentence in record.blocks] if text else None,
                last,
            )
            for question, record in zip(questions, records, strict=True)
        ]

    def _spoken(self, templates: Sequence[Template], texts: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
        """The sentences that stand as text with the <eos> behind each, where their tokens are predicted: a clean block each."""
        if not self.settings.lm_weight:
            return []
        standing = [of_one[: len(layout.ends)] for layout, of_one in zip(templates, texts, strict=True)]
        return [[*sentence, self.eos_id] for sentences in standing for sentence in sentences]

    def _has_first_pass(self, step: int, training: bool) -> bool:
        """Whether a first pass supplies the carried state: all micro batches and ranks of a step alike; always in validation."""
        s = self.settings
        if s.carry == "none":
            return False
        return not training or generator(derive(self.seed, "carry"), step).random() < s.carry_probability

    def _noise(self, records: Sequence[LatentRecord], numbers: Sequence[int], training: bool) -> _Noise:
        """Posterior draws, noise, timesteps, and whose question is hidden, each sample's from its own number.

        Only the drawing goes sample by sample; a step as short as a small model's would wait for the rest.
        """
        s = self.settings
        sizes = [with_room(len(record.mu), s.span) for record in records]
        shape = (sum(sizes), *records[0].mu.shape[1:])
        sampled = s.sample_latents and training
        mu, spread, posterior = np.zeros((3, *shape), dtype=np.float32)
        eps = np.empty((shape[0], s.draws, *shape[1:]), dtype=np.float32)
        t = np.empty(eps.shape[:2], dtype=np.float32)
        split = np.empty((shape[0] // s.span, s.draws, 2), dtype=np.float32)
        real = np.zeros(shape[0], dtype=bool)
        shift = np.zeros((shape[0] // s.span, s.draws, 2), dtype=np.float32)
        hidden = np.zeros(len(records), dtype=bool)
        start, streams = 0, Streams(self.seed)
        for row, (record, number, size) in enumerate(zip(records, numbers, sizes, strict=True)):
            rng, own, true = streams.at(number), slice(start, start + size), slice(start, start + len(record.mu))
            start = own.stop
            mu[true], real[true] = record.mu, True
            rng.standard_normal(dtype=np.float32, out=eps[own])
            draw = rng.random if s.timesteps == "uniform" else rng.standard_normal
            draw(dtype=np.float32, out=t[own])
            hidden[row] = training and rng.random() < s.condition_dropout
            if sampled:
                spread[true] = np.exp(0.5 * np.asarray(record.logvar, dtype=np.float32))
                rng.standard_normal(dtype=np.float32, out=posterior[true])
            if s.span > 1:
                rng.random(dtype=np.float32, out=split[own.start // s.span : own.stop // s.span])
            if s.carry_own_rollout and training:
                rng.random(dtype=np.float32, out=shift[own.start // s.span : own.stop // s.span])
        if sampled:
            mu += spread * posterior
        if s.timesteps != "uniform":
            t = 1.0 / (1.0 + np.exp(-(s.timestep_mean + s.timestep_std * t)))
        if s.span > 1:
            t = self._levels(t, split, real)
        z0 = np.where(real[:, None, None], (mu - self.mean) / self.std, 0.0)
        return _Noise(z0, eps, t, self._carry_times(t, shift), hidden)

    def _carry_times(self, t: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Times [K, M] of a first pass: ``t``, or t + u (1 - t) in the share of copies that ``carry_own_rollout`` says.

        ``shift`` [K / J, M, 2] uniform, u and which copies; finished blocks stay finished.
        """
        shift = shift.repeat(self.settings.span, axis=0)
        earlier = (shift[..., 1] < self.settings.carry_own_rollout) & (t > 0)
        return np.where(earlier, t + shift[..., 0] * (1 - t), t).astype(np.float32)

    def _levels(self, t: np.ndarray, split: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Noise levels [K, M] of spans: as drawn, ``t`` [K, M], in the share of copies that ``independent_levels`` says.

        In the others one of the span's real blocks is drawn: those before it are finished, those behind it noise, as where one is
        denoised after another.  ``split`` [K / J, M, 2] uniform; ``real`` [K]: the block is one of the record's.
        """
        span = self.settings.span
        at = (split[..., 1] * real.reshape(-1, 1, span).sum(-1)).astype(np.int64)[:, None]
        ordered = (split[..., 0] >= self.settings.independent_levels)[:, None]
        place, levels = np.arange(span)[None, :, None], t.reshape(-1, span, t.shape[1])
        levels = np.where(ordered & (place < at), 0.0, np.where(ordered & (place > at), 1.0, levels))
        return levels.reshape(t.shape).astype(np.float32)

    def _token_counts(self, block_tokens: Tensor, t: np.ndarray) -> dict[str, float]:
        if not self.settings.token_weight:
            return {}
        labels = (block_tokens != IGNORE).sum(1).numpy()
        return {"token": float((labels[:, None] * (t > 0)).sum())}

    def _block_tokens(self, records: Sequence[LatentRecord]) -> Tensor:
        """Labels [K, P] for the auxiliary token head; P = 0 without it."""
        span, limit = self.settings.span, self.settings.token_positions
        rows: list[Sequence[int]] = []
        for record in records:
            room = with_room(len(record.blocks), span) - len(record.blocks)
            rows += [block[:limit] for block in record.blocks] + [()] * room
        if not self.settings.token_weight:
            return torch.empty(len(rows), 0, dtype=torch.int64)
        return pad_right(rows, IGNORE)


def flat_ids(rows: Sequence[Sequence[int]]) -> Tensor:
    """All integers of ``rows``, row after row."""
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


@dataclass(frozen=True)
class _LayOut:
    """Lays records' templates in padded rows and points every token at its input vector.

    ``first`` [N, 4]: :func:`_first_rows`; ``hidden`` [N]: whose question is hidden; ``shown``: how many first and last tokens of
    such a question stay (its <bos>, a chat template).
    """

    first: np.ndarray
    hidden: np.ndarray
    shown: tuple[int, int]
    pack_tokens: int

    def __call__(self, templates: Sequence[Template]) -> tuple[Places, Rows]:
        """Where the records stand, and their tokens; what is read are the noisy latents."""
        places = place([len(layout) for layout in templates], self.pack_tokens)
        size = places.rows * places.width
        position, limit, table_index = np.zeros((3, size), np.int64)
        copy = np.full(size, PAD, np.int64)
        for record, start, rows, hidden in zip(templates, places.first.tolist(), self.first, self.hidden, strict=True):
            tokens = slice(start, start + len(record))
            position[tokens] = record.position
            limit[tokens] = record.limit
            copy[tokens] = record.copy
            table_index[tokens] = rows[record.source] + record.index
            if hidden:
                question = slice(start + self.shown[0], start + record.question_length - self.shown[1])
                table_index[question] = rows[Source.MARK] + Mark.NULL
        shape = (places.rows, places.width)
        rows_of = [torch.from_numpy(flat.reshape(shape)) for flat in (position, limit, copy)]
        layout = Layout(rows_of[0], rows_of[1], rows_of[2], document=places.documents())
        return places, Rows(
            torch.from_numpy(table_index.reshape(shape)), layout, _at(templates, places, lambda layout: layout.noisy)
        )


#: where labels are read off, by the name of their places
_PLACES: dict[str, Callable[[Template], np.ndarray]] = {
    "end": lambda layout: layout.ends,
    "answer": lambda layout: layout.answer,
    "words": lambda layout: layout.words,
}


def _first_rows(texts: Sequence[Sequence[int]], blocks: Sequence[int], noise: _Noise) -> np.ndarray:
    """First table row [N, 4] of each record's text, marks, clean latents and noisy latents."""
    draws, latents = noise.eps.shape[1:3]
    text = np.cumsum([0, *map(len, texts)])
    clean = np.cumsum([0, *blocks]) * latents
    marks = np.full(len(texts), text[-1])
    start = text[-1] + len(Mark)
    return np.stack([text[:-1], marks, start + clean[:-1], start + clean[-1] + clean[:-1] * draws], axis=1)


def _at(templates: Sequence[Template], places: Places, pick: Callable[[Template], np.ndarray]) -> Tensor:
    """Flattened token indices of what ``pick`` names in every record."""
    return torch.from_numpy(np.concatenate([first + pick(layout) for first, layout in zip(places.first, templates, strict=True)]))
