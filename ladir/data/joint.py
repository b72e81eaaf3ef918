"""Batches of joint training: records as the denoiser reads them, with every block's text for the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ladir.data.batches import DenoiserBatch, DenoiserCollator, TensorBatch, VaeBatch, VaeCollator, flat_ids
from ladir.data.columns import TokenRecord
from ladir.data.grounding import GroundedSentences
from ladir.data.latents import LatentRecord
from ladir.data.packing import Rows, encoder_rows
from ladir.data.token_lists import GroundedSentence, MadeWhenRead, Measured, length_of
from ladir.spans import with_room


@dataclass(frozen=True)
class JointRecord:
    """A record without latents, which training makes; ``sentences``: its blocks, with what follows where that is learned."""

    tokens: TokenRecord
    sentences: Sequence[list[int] | GroundedSentence]


class JointRecords(MadeWhenRead[JointRecord], Measured):
    """Records for joint training; ``grounded``: the same records' sentences with what follows, in their order."""

    def __init__(self, records: Sequence[TokenRecord], grounded: GroundedSentences | None) -> None:
        self._records, self._grounded = records, grounded

    def __len__(self) -> int:
        return len(self._records)

    def length(self, place: int) -> int:
        """Tokens of a record."""
        return length_of(self._records, place)

    def _at(self, place: int) -> JointRecord:
        record = self._records[place]
        return JointRecord(record, record.blocks if self._grounded is None else self._grounded.of(place))


@dataclass
class JointBatch(TensorBatch):
    """``teacher``: the records for the denoiser, whose K blocks have no latents yet; ``vae``: their blocks for the VAE's losses.

    ``ids`` and ``encoder``: the n real blocks as the encoder reads them, nothing substituted; ``block_at`` [n]: their places
    among the K.
    """

    teacher: DenoiserBatch
    vae: VaeBatch
    ids: Tensor
    encoder: Rows
    block_at: Tensor

    @property
    def kind(self) -> str:
        """That of both parts."""
        return f"{self.teacher.kind} {self.vae.kind}"

    def to(self, device: torch.device | str) -> JointBatch:
        """The batch with every tensor on ``device``."""
        return replace(super().to(device), teacher=self.teacher.to(device), vae=self.vae.to(device))


@dataclass(frozen=True)
class JointCollator:
    """Records to a :class:`JointBatch`; ``max_blocks``: most blocks of a record, by which blocks are numbered for their noise."""

    teacher: DenoiserCollator
    vae: VaeCollator
    max_blocks: int

    def __call__(self, records: Sequence[JointRecord], numbers: Sequence[int], training: bool = True) -> JointBatch:
        teacher = self.teacher([self._without_latents(record.tokens) for record in records], numbers, training)
        sentences = [sentence for record in records for sentence in record.sentences]
        counted = [n * self.max_blocks + b for n, r in zip(numbers, records, strict=True) for b in range(len(r.sentences))]
        vae = self.vae(sentences, counted, training)
        texts = [[*self.vae.bos, *block] for record in records for block in record.tokens.blocks]
        latents = self.vae.settings.latents_per_block
        encoder = encoder_rows([len(text) for text in texts], latents, self.vae.pack_tokens)
        return JointBatch(
            counts={**vae.counts, **teacher.counts},
            num_tokens=vae.num_tokens + teacher.num_tokens + sum(map(len, texts)) + len(texts) * latents,
            sample_ids=list(numbers),
            teacher=teacher,
            vae=vae,
            ids=flat_ids(texts),
            encoder=encoder,
            block_at=torch.tensor(self._places([len(record.tokens.blocks) for record in records])),
        )

    def _places(self, blocks: Sequence[int]) -> list[int]:
        """Where the real blocks stand among those that the spans have room for."""
        first, places = 0, list[int]()
        for count in blocks:
            places += range(first, first + count)
            first += with_room(count, self.teacher.settings.span)
        return places

    def _without_latents(self, record: TokenRecord) -> LatentRecord:
        zeros = torch.zeros(len(record.blocks), self.vae.settings.latents_per_block, self.vae.settings.latent_dim)
        return LatentRecord(record.question, record.blocks, record.answer, zeros, None)
