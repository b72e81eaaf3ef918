"""The block layout: which token stands where in one training pass, and what it may see.

Clean stream:  ``question [<BOT> z*L <EOT>]*B <SOA> answer``; noisy stream: ``[<BOT> z~*L]*J`` for every span of J blocks and
draw, from the position on where the span's first clean block begins (J is 1 but where blocks are denoised together; a record's
last span may reach beyond its last block).  Where finished blocks stand as text (``denoiser.context``), a clean block is ``<BOT>
tokens <EOT>``, read causally.  Everything attention needs is a few integers per token:

* ``position`` - rotary position; for clean tokens also their order in the clean stream,
* ``limit``    - a clean token is visible when its position is below the viewer's limit,
* ``copy``     - which noisy copy of a span a token belongs to (``CLEAN`` and ``PAD`` are negative); a copy sees itself,
* ``document`` - which sample a token belongs to, where several lie in one row: nothing is seen across samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ladir.spans import num_spans, with_room

CLEAN = -1
PAD = -2

_NOWHERE = np.empty(0, np.int64)


class Mark(IntEnum):
    """Learned vectors that are no vocabulary entries; NULL replaces a hidden question's embeddings."""

    BOT = 0
    EOT = 1
    SOA = 2
    NULL = 3


class Source(IntEnum):
    """Where a token's input vector comes from; ``Template.index`` counts within each source."""

    TEXT = 0
    MARK = 1
    CLEAN_LATENT = 2
    NOISY_LATENT = 3


@dataclass(frozen=True)
class Layout:
    """Attention structure of a batch; fields are int64 tensors [N, T] (N rows of T tokens).

    A sample's tokens lie together: first its clean ones, in the order of their positions from 0 on, then copy after copy.
    ``document`` None: a row is one sample, at its start.  ``boundaries``, only where every document is ordinary causal text:
    int32 [D + 1], where documents (and stretches of padding) begin among the N * T tokens, and the end; ``longest`` of them, in
    tokens.
    """

    position: Tensor
    limit: Tensor
    copy: Tensor
    document: Tensor | None = None
    boundaries: Tensor | None = None
    longest: int = 0
    key: bytes = b""

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device; it keeps the :meth:`digest` it had on the CPU."""
        names = ("position", "limit", "copy", "document", "boundaries")
        moved = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        leaves = self.position.device.type == "cpu" and torch.device(device).type == "cuda"
        return replace(self, **moved, key=self.digest() if leaves else self.key)

    def digest(self) -> bytes:
        """What tells layouts apart by their content."""
        if self.key:
            return self.key
        fields = [tensor for tensor in (self.position, self.limit, self.copy, self.document) if tensor is not None]
        content = hashlib.blake2b(repr([tuple(tensor.shape) for tensor in fields]).encode(), digest_size=16)
        for tensor in fields:
            content.update(tensor.cpu().numpy().tobytes())
        return content.digest()

    def visible(self) -> Tensor:
        """Boolean mask [N, T, T]: ``visible[n, i, j]`` says that token i attends to token j.

        Padding sees itself only, so that no row of the attention is empty.
        """
        clean_key = (self.copy == CLEAN)[:, None, :]
        earlier = self.position[:, None, :] < self.limit[:, :, None]
        same_copy = (self.copy[:, :, None] == self.copy[:, None, :]) & (self.copy >= 0)[:, :, None]
        itself = torch.eye(self.copy.shape[1], dtype=torch.bool, device=self.copy.device)
        seen = (clean_key & earlier) | same_copy
        if self.document is not None:
            seen &= self.document[:, :, None] == self.document[:, None, :]
        return seen | itself

    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`visible` as two stretches of the viewer's row, int64 [N, T] each: start, end, own start, own end.

        Token i sees ``start <= j < end`` of its sample's clean tokens and ``own_start <= j < own_end`` of its copy's (itself,
        where it is in none).
        """
        place = torch.arange(self.copy.shape[1], device=self.copy.device).expand_as(self.copy)
        alone = torch.where(self.copy >= 0, self.copy, -1 - place)
        begins = _differs_from_before(alone)
        start = torch.zeros_like(place)
        if self.document is not None:
            begins_sample = _differs_from_before(self.document)
            begins = begins | begins_sample
            start = (place * begins_sample).cummax(1).values
        own_start = (place * begins).cummax(1).values
        next_start = F.pad(torch.where(begins, place, place.shape[1])[:, 1:], (0, 1), value=place.shape[1])
        own_end = next_start.flip(1).cummin(1).values.flip(1)
        return start, start + self.limit, own_start, own_end

    def padded_to(self, width: int) -> Layout:
        """The same rows with padding behind them, ``width`` tokens each."""
        more = (0, width - self.position.shape[1])
        return Layout(
            position=F.pad(self.position, more),
            limit=F.pad(self.limit, more),
            copy=F.pad(self.copy, more, value=PAD),
            document=None if self.document is None else F.pad(self.document, more, value=-1),
        )


def stacked(layouts: Sequence[Layout]) -> Layout:
    """The rows of several layouts below one another, as wide as the widest; padding behind the others."""
    width = max(layout.position.shape[1] for layout in layouts)
    padded = [layout.padded_to(width) for layout in layouts]
    packed = any(layout.document is not None for layout in layouts)
    documents = [torch.zeros_like(p.position) if p.document is None else p.document for p in padded] if packed else []
    return Layout(
        position=torch.cat([layout.position for layout in padded]),
        limit=torch.cat([layout.limit for layout in padded]),
        copy=torch.cat([layout.copy for layout in padded]),
        document=torch.cat(documents) if packed else None,
        key=b"+".join(layout.key for layout in layouts) if all(layout.key for layout in layouts) else b"",
    )


def _differs_from_before(values: Tensor) -> Tensor:
    """Which of [N, T] are not what stands before them in their row; the first ones are not."""
    return F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)


@dataclass(frozen=True)
class Template:
    """Layout of one record, as int64 arrays of length T, with the places where losses are read off.

    ``question`` marks the question's tokens, ``noisy`` the noisy latents in the order [block, draw, latent], ``ends`` the
    clean <EOT>s, ``answer`` the tokens whose next token is the answer's (from <SOA> on), ``words`` those whose next token is one
    of a sentence that stands as text, or its end (from its <BOT> on).
    """

    position: np.ndarray
    limit: np.ndarray
    copy: np.ndarray
    source: np.ndarray
    index: np.ndarray
    noisy: np.ndarray
    ends: np.ndarray
    answer: np.ndarray
    words: np.ndarray
    question_length: int

    def __len__(self) -> int:
        return len(self.position)

    @cached_property
    def first_pass(self) -> Template:
        """The noisy latents with the clean tokens that any of them sees: no answer, no clean block of the last span.

        No loss is read off it: ``ends``, ``answer`` and ``words`` are empty.
        """
        clean, kept = int((self.copy == CLEAN).sum()), int(self.limit[-1])
        keep = np.r_[:kept, clean : len(self)]
        return replace(
            self,
            position=self.position[keep],
            limit=self.limit[keep],
            copy=self.copy[keep],
            source=self.source[keep],
            index=self.index[keep],
            noisy=self.noisy - (clean - kept),
            ends=_NOWHERE,
            answer=_NOWHERE,
            words=_NOWHERE,
        )


def block_length(latents: int) -> int:
    """Tokens of a clean block: <BOT>, L latents, <EOT>."""
    return latents + 2


def noisy_length(blocks: int, latents: int, draws: int, span: int) -> int:
    """Tokens of all noisy copies of a record's blocks, for which the last span may have room for more: <BOT>, L latents each."""
    return draws * with_room(blocks, span) * (latents + 1)


def longest_block(latents: int, sentence: int, context: str) -> int:
    """Tokens of a finished block as it stands in ``context`` (``denoiser.context``), or of a noisy one where that is longer, if
    sentences have at most ``sentence`` tokens."""
    return block_length(max(latents, sentence) if context == "text" else latents)


def span_offsets(span: int, latents: int) -> np.ndarray:
    """Positions of a noisy copy's tokens [J * (L + 1)], from the start of its first block on: <EOT>s have no noisy copy."""
    return (np.arange(span)[:, None] * block_length(latents) + np.arange(latents + 1)).ravel()


def template(
    question: int,
    blocks: int,
    latents: int,
    draws: int,
    answer: int | None,
    span: int = 1,
    bidirectional_question: bool = False,
    sentences: Sequence[int] | None = None,
    last: bool = False,
) -> Template:
    """Layout of a record with ``question`` tokens, ``blocks`` blocks of ``latents`` latents, ``draws`` noisy copies of each span.

    ``answer`` is the answer's token count; ``None`` leaves out the answer and the clean blocks of the last span, which only the
    answer and the stop decisions need; with ``last`` these blocks stand in any case.  ``sentences``: tokens of every block, where
    finished ones stand as text; None: they stand as latents.  Text tokens are indexed question first, then sentences, then
    answer.  ``bidirectional_question``: the question's
    tokens all see each other (a prefix LM, Raffel et al. 2020), not only those before them.
    """
    shape = None if sentences is None else tuple(sentences)
    return _template(question, blocks, latents, draws, answer, span, bidirectional_question, shape, last)


@lru_cache(maxsize=2048)  # records of one shape are many where they are short; of long ones that many take tens of MB
def _template(
    question: int,
    blocks: int,
    latents: int,
    draws: int,
    answer: int | None,
    span: int,
    bidirectional_question: bool,
    sentences: tuple[int, ...] | None,
    last: bool,
) -> Template:
    """:func:`template`, once for each shape."""
    spans = num_spans(blocks, span)
    clean_blocks = blocks if last or answer is not None else (spans - 1) * span
    starts = question + np.cumsum([0, *(block_length(n) for n in sentences or [latents] * blocks)])
    first_words = question + np.cumsum([0, *(sentences or [0] * blocks)])
    parts = [_text(question, start=0, first_index=0, seen=question if bidirectional_question else 0)]
    for b in range(clean_blocks):
        block = _clean_block(starts[b], b, latents) if sentences is None else _sentence(starts[b], sentences[b], first_words[b])
        parts.append(block)
    if answer is not None:
        parts.append(_answer(starts[blocks], first_words[blocks], answer))
    firsts = range(0, blocks, span)
    parts += [_noisy_span(starts[first], first, m, latents, draws, span) for first in firsts for m in range(draws)]
    position, limit, copy, source, index = np.concatenate(parts, axis=1)
    clean_end = starts[clean_blocks]
    noisy = np.flatnonzero(source == Source.NOISY_LATENT)
    return Template(
        position=position,
        limit=limit,
        copy=copy,
        source=source,
        index=index,
        noisy=noisy[np.argsort(index[noisy])],
        ends=starts[1 : clean_blocks + 1] - 1,
        answer=np.arange(clean_end, clean_end + answer + 1) if answer is not None else _NOWHERE,
        words=np.concatenate([_NOWHERE, *(starts[b] + np.arange(n + 1) for b, n in enumerate((sentences or [])[:clean_blocks]))]),
        question_length=question,
    )


def _rows(position: np.ndarray, limit: np.ndarray, copy: int, source: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.stack([position, limit, np.full_like(position, copy), source, index])


def _text(count: int, start: int, first_index: int, seen: int = 0) -> np.ndarray:
    """Causal text: a token sees everything clean up to itself, and up to position ``seen`` in any case."""
    position = np.arange(start, start + count)
    index = np.arange(first_index, first_index + count)
    return _rows(position, np.maximum(position + 1, seen), CLEAN, np.full(count, Source.TEXT), index)


def _clean_block(start: int, block: int, latents: int) -> np.ndarray:
    """<BOT> z*L <EOT>, all of which see the whole block and what is before it."""
    end = start + block_length(latents)
    source = np.array([Source.MARK, *[Source.CLEAN_LATENT] * latents, Source.MARK])
    index = np.array([Mark.BOT, *range(block * latents, (block + 1) * latents), Mark.EOT])
    return _rows(np.arange(start, end), np.full(latents + 2, end), CLEAN, source, index)


def _sentence(start: int, count: int, first_index: int) -> np.ndarray:
    """<BOT> tokens <EOT>, causal."""
    return np.concatenate(
        [_mark(start, Mark.BOT), _text(count, start + 1, first_index), _mark(start + count + 1, Mark.EOT)], axis=1
    )


def _answer(start: int, first_index: int, answer: int) -> np.ndarray:
    """<SOA> and the answer's tokens, causal."""
    return np.concatenate([_mark(start, Mark.SOA), _text(answer, start + 1, first_index)], axis=1)


def _mark(position: int, mark: Mark) -> np.ndarray:
    """One causal token."""
    return np.array([[position], [position + 1], [CLEAN], [Source.MARK], [mark]])


def _noisy_span(start: int, first: int, draw: int, latents: int, draws: int, span: int) -> np.ndarray:
    """<BOT> z~*L of every block of a span: all of them see the clean stream before block ``first``, and each other."""
    parts = []
    for block in range(first, first + span):
        noisy = (block * draws + draw) * latents
        source = [Source.MARK, *[Source.NOISY_LATENT] * latents]
        parts.append(np.array([source, [Mark.BOT, *range(noisy, noisy + latents)]]))
    source, index = np.concatenate(parts, axis=1)
    position = start + span_offsets(span, latents)
    return _rows(position, np.full_like(position, start), first // span * draws + draw, source, index)
