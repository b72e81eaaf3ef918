"""Where the samples of a micro batch lie: one to a row, or several laid end to end in rows of about a token budget.

Packing moves tokens and changes nothing else: a sample's positions start again, no sample sees another
(:attr:`ladir.layout.Layout.document`), and losses are read off the same tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ladir.layout import CLEAN, PAD, Layout

#: in place of a label: nothing is learned there
IGNORE = -100


@dataclass(frozen=True)
class Places:
    """Document i is tokens ``first[i] : first[i] + lengths[i]`` of ``rows * width`` flattened tokens (int64 arrays [D])."""

    lengths: np.ndarray
    first: np.ndarray
    rows: int
    width: int

    @property
    def packed(self) -> bool:
        """Whether documents share rows."""
        return self.rows < len(self.lengths)

    @cached_property
    def tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(flattened index, document, place within the document) of every token, document after document."""
        document = np.repeat(np.arange(len(self.lengths)), self.lengths)
        before = np.cumsum(self.lengths) - self.lengths
        within = np.arange(len(document)) - before[document]
        return self.first[document] + within, document, within

    def documents(self) -> Tensor | None:
        """The document of every token [rows, width], -1 where none is; None where a row is one document."""
        if not self.packed:
            return None
        at, document, _ = self.tokens
        return torch.from_numpy(_filled(self, -1, at, document))


def place(lengths: Sequence[int], budget: int) -> Places:
    """Lay documents of ``lengths`` tokens in rows.

    ``budget`` 0: one to a row.  Otherwise as few rows as hold them at ``budget`` tokens each (at the longest document's
    length, where that is more), filled evenly: the longest document first, always into the emptiest row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    longest = int(sizes.max())
    if budget == 0:
        return Places(sizes, np.arange(len(sizes)) * longest, len(sizes), longest)
    limit = max(budget, longest)
    rows = -(-int(sizes.sum()) // limit)
    while True:
        row, start, width = _spread(sizes, rows)
        if width <= limit:
            return Places(sizes, row * width + start, rows, width)
        rows += 1


def _spread(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(row and start of every document, fullest row's length) with ``rows`` rows filled evenly."""
    row, start = np.zeros_like(sizes), np.zeros_like(sizes)
    fills = [(0, number) for number in range(rows)]
    for document in np.argsort(-sizes, kind="stable").tolist():
        fill, emptiest = fills[0]
        row[document], start[document] = emptiest, fill
        heapq.heapreplace(fills, (fill + int(sizes[document]), emptiest))
    return row, start, max(fill for fill, _ in fills)


def _filled(places: Places, default: int, at: np.ndarray, values: np.ndarray | int) -> np.ndarray:
    """Integers [rows, width]: ``values`` at the flattened indices ``at``, ``default`` elsewhere."""
    flat = np.full(places.rows * places.width, default, np.int64)
    flat[at] = values
    return flat.reshape(places.rows, places.width)


def _causal_layout(places: Places) -> Layout:
    """Every document is ordinary text: a token sees those of its document before it, and itself."""
    at, _, within = places.tokens
    ends = places.first + places.lengths
    starts_and_ends = np.concatenate([np.arange(places.rows + 1) * places.width, places.first, ends])
    boundaries = np.unique(starts_and_ends)  # padding behind a document is a stretch of its own
    return Layout(
        position=torch.from_numpy(_filled(places, 0, at, within)),
        limit=torch.from_numpy(_filled(places, 0, at, within + 1)),
        copy=torch.from_numpy(_filled(places, PAD, at, CLEAN)),
        document=places.documents(),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        longest=int(np.diff(boundaries).max()),
    )


@dataclass(frozen=True)
class Rows:
    """Documents of text in R rows of T tokens; causal, or behind a question that is seen whole.

    ``index`` int64 [R, T]: which row of a table of input vectors is a token's (padding: any); ``at`` int64 [n]: the
    flattened tokens whose hidden states are read, document after document.
    """

    index: Tensor
    layout: Layout
    at: Tensor

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(self.index.to(device), self.layout.to(device), self.at.to(device))


def text_rows(lengths: Sequence[int], read: Sequence[int], budget: int, bidirectional_question: bool = False) -> Rows:
    """Plain text: the table holds all documents' tokens, one after another; the last ``read[i]`` of each are read.

    ``bidirectional_question``: a document's tokens up to the first one that is read are a question, and see each other.
    """
    places = place(lengths, budget)
    at, document, within = places.tokens
    first_read = places.lengths - np.asarray(read)
    rows = _rows(places, np.arange(len(at)), places.first + first_read, np.asarray(read))
    if not bidirectional_question:
        return rows
    # Without boundaries, which flash-attn takes for those of causal text.
    limit = _filled(places, 0, at, np.maximum(within, first_read[document]) + 1)
    return replace(rows, layout=replace(rows.layout, limit=torch.from_numpy(limit), boundaries=None, longest=0))


def encoder_rows(lengths: Sequence[int], latents: int, budget: int) -> Rows:
    """``[sentence, queries]`` for sentences of ``lengths``; the table holds all sentences' tokens, then the ``latents`` queries.

    The hidden states at the queries are read.
    """
    text = np.asarray(lengths, dtype=np.int64)
    places = place((text + latents).tolist(), budget)
    _, document, within = places.tokens
    before = np.cumsum(text) - text
    is_text = within < text[document]
    table = np.where(is_text, before[document] + within, text.sum() + within - text[document])
    return _rows(places, table, places.first + text, np.full(len(text), latents))


def decoder_rows(lengths: Sequence[int], latents: int, budget: int, prompts: Sequence[int] | None = None) -> Rows:
    """``[prompt, latents, sentence]``, prompts of so many tokens (not given: none).

    The table holds all sentences' tokens, then ``latents`` vectors per sentence (<bos> among them), then all prompts' tokens.
    Read is what predicts the sentence's tokens and the <eos> behind them: from the last latent on.
    """
    text = np.asarray(lengths, dtype=np.int64)
    prompt = np.zeros_like(text) if prompts is None else np.asarray(prompts, dtype=np.int64)
    places = place((prompt + text + latents).tolist(), budget)
    _, document, within = places.tokens
    first_text, first_prompt = (np.cumsum(sizes) - sizes for sizes in (text, prompt))
    behind = within - prompt[document]  # the prompt: below 0 in it
    in_latents = text.sum() + document * latents + behind
    in_prompt = text.sum() + len(text) * latents + first_prompt[document] + within
    table = np.where(behind < latents, np.where(behind < 0, in_prompt, in_latents), first_text[document] + behind - latents)
    return _rows(places, table, places.first + prompt + latents - 1, text + 1)


def _rows(places: Places, table: np.ndarray, read_from: np.ndarray, read: np.ndarray) -> Rows:
    """``table``: table row of every token, document after document; ``read[i]`` tokens from ``read_from[i]`` on are read."""
    at, _, _ = places.tokens
    document = np.repeat(np.arange(len(read)), read)
    offset = np.arange(len(document)) - (np.cumsum(read) - read)[document]
    return Rows(
        index=torch.from_numpy(_filled(places, 0, at, table)),
        layout=_causal_layout(places),
        at=torch.from_numpy(read_from[document] + offset),
    )
