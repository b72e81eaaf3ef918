"""The latent store: the training set as the encoder sees it, in Arrow files that are memory-mapped.

Per record it holds the token ids and the mean of every latent, and its log-variance where that is wanted; per store the
statistics that standardise the latents and the fingerprint of the VAE that made them.  A store is a folder of parts behind one
index (``stats.json``); :mod:`ladir.data.latent_parts` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ladir.config import DenoiserSettings
from ladir.data.columns import Chunks, Lists, RecordStore, TokenChunk, TokenRecord, mapped_batches
from ladir.errors import UnusableError
from ladir.layout import block_length, noisy_length

STATS = "stats.json"
_OLD_ARROW = "latents.arrow"
_REMEDY = "run training/encode_latents.py (again) to make it"


@dataclass(frozen=True)
class LatentRecord(TokenRecord):
    """One record: token ids, and mean and log-variance [B, L, d] (float32) of its B blocks' latents; None where not kept."""

    mu: Tensor
    logvar: Tensor | None


@dataclass(frozen=True)
class LatentForm:
    """What a store keeps of a latent: size d, how many there are per block, in which dtype, and whether with log-variances."""

    latent_dim: int
    latents_per_block: int
    dtype: str = "float32"
    logvar: bool = True


@dataclass(frozen=True)
class Stats:
    """What ``stats.json`` holds.  ``files``: name, records and bytes of every part, in order; one that an older version wrote has
    none, but ``arrow_bytes`` of its one file, by which a torn store is told from a whole one."""

    fingerprint: str
    latent_dim: int
    latents_per_block: int
    num_records: int
    num_latents: int
    mean: list[float]
    std: list[float]
    dtype: str = "float32"
    logvar: bool = True
    files: list[dict[str, Any]] = field(default_factory=list)
    arrow_bytes: int = 0

    @property
    def form(self) -> LatentForm:
        """What is kept of a latent."""
        return LatentForm(self.latent_dim, self.latents_per_block, self.dtype, self.logvar)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Name, records and bytes of every file."""
        return self.files or [{"name": _OLD_ARROW, "records": self.num_records, "bytes": self.arrow_bytes}]


class LatentStore(RecordStore):
    """A folder of latents, opened with :meth:`open`.

    ``mean`` and ``std`` [d] (float32) standardise the latents; they are taken over all ``mu``.  ``reader``: how the denoiser
    reads records, by which :meth:`length` goes.
    """

    def __init__(self, folder: Path, stats: Stats, batches: list[pa.RecordBatch], reader: DenoiserSettings | None = None) -> None:
        self.folder, self.reader = folder, reader or DenoiserSettings()
        self.fingerprint, self.form = stats.fingerprint, stats.form
        self.latent_dim = stats.latent_dim
        self.latents_per_block = stats.latents_per_block
        self.num_latents = stats.num_latents
        self.mean = torch.tensor(stats.mean, dtype=torch.float32)
        self.std = torch.tensor(stats.std, dtype=torch.float32)
        self._chunks = Chunks(_Chunk(batch, stats.form) for batch in batches)

    @staticmethod
    def open(folder: str | os.PathLike[str], reader: DenoiserSettings | None = None) -> LatentStore:
        """Open a store.  Raises FileNotFoundError where there is none, UnusableError where it is torn."""
        path = Path(folder)
        if not (path / STATS).is_file():
            raise FileNotFoundError(f"{path}: no latent store there ({STATS} is needed); {_REMEDY}")
        try:
            stats = Stats(**json.loads((path / STATS).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UnusableError(f"{path / STATS}: damaged ({error}); {_REMEDY}") from error
        batches = [batch for part in stats.parts for batch in _part_batches(path, part)]
        if (count := sum(batch.num_rows for batch in batches)) != stats.num_records:
            raise UnusableError(f"{path}: {count} records instead of {stats.num_records}; {_REMEDY}")
        return LatentStore(path, stats, batches, reader)

    def check_fingerprint(self, expected: str) -> None:
        """Raise UnusableError unless the latents were made by the VAE with this fingerprint."""
        if self.fingerprint != expected:
            raise UnusableError(
                f"{self.folder}: these latents were made by the VAE {self.fingerprint}, not by {expected}; run "
                "training/encode_latents.py again with the VAE in use, or point to the VAE that made them"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> LatentRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: record {index} of {len(self)}")
        chunk, place = self._chunks.find(index)
        return chunk.record(place)

    def num_blocks(self, index: int) -> int:
        """Blocks of a record."""
        chunk, place = self._chunks.find(index)
        return chunk.num_blocks(place)

    @property
    def chunks(self) -> Sequence[TokenChunk]:
        """Its batches, in order."""
        return self._chunks.all

    def length(self, place: int) -> int:
        """Tokens of a record in a training pass: question, marks and latents or words, <SOA>, answer, and all noisy copies."""
        chunk, i = self._chunks.find(place)
        blocks, latents, reader = chunk.num_blocks(i), self.latents_per_block, self.reader
        inside = chunk.block_tokens(i) if reader.context == "text" else blocks * latents
        clean = chunk.questions.length(i) + inside + blocks * block_length(0) + 1 + chunk.answers.length(i)
        return clean + noisy_length(blocks, latents, reader.draws, reader.span)

    def same_question(self) -> list[list[int]]:
        """Which records have the same question: the places of each group of several, by the first of each."""
        digests = self.question_digests()
        order = np.argsort(digests, kind="stable")
        edges = np.flatnonzero(digests[order][1:] != digests[order][:-1]) + 1
        groups = (group.tolist() for group in np.split(order, edges) if len(group) > 1)
        return sorted(groups, key=lambda group: group[0])


def _part_batches(folder: Path, part: dict[str, Any]) -> list[pa.RecordBatch]:
    """The batches of one file.  Raises UnusableError where it is not the one that was written."""
    file = folder / part["name"]
    size = file.stat().st_size if file.is_file() else 0
    if size != part["bytes"]:
        raise UnusableError(f"{file}: damaged: {size} bytes instead of {part['bytes']}; {_REMEDY}")
    try:
        return mapped_batches(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableError(f"{file}: damaged ({error}); {_REMEDY}") from error


class _Chunk(TokenChunk):
    """One batch with its latents."""

    def __init__(self, batch: pa.RecordBatch, form: LatentForm) -> None:
        super().__init__(batch)
        self._form = form
        self._mu = Lists(batch.column("mu"))
        self._logvar = Lists(batch.column("logvar")) if form.logvar else None

    def record(self, i: int) -> LatentRecord:
        """The i-th record; its tensors are copies."""
        one = self.tokens(i)
        logvar = None if self._logvar is None else self._latents(self._logvar[i])
        return LatentRecord(one.question, one.blocks, one.answer, self._latents(self._mu[i]), logvar)

    def _latents(self, values: np.ndarray[Any, Any]) -> Tensor:
        """Stored values as float32 [B, L, d]."""
        kept = values.copy()
        read = (
            torch.from_numpy(kept.view(np.int16)).view(torch.bfloat16)
            if self._form.dtype == "bfloat16"
            else torch.from_numpy(kept)
        )
        return read.float().reshape(-1, self._form.latents_per_block, self._form.latent_dim)
