"""Batches of training stage 2: records with the true latents and answers of all gold solutions of their questions.

Within a batch, records with more blocks come first: those that still think are then always the first rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ladir.config import RolloutSettings, SampleSettings
from ladir.data.batches import DenoiserBatch, DenoiserCollator, TensorBatch, pad_left
from ladir.data.latents import LatentRecord, LatentStore
from ladir.data.packing import IGNORE
from ladir.data.randomness import derive, generator
from ladir.data.token_lists import Measured
from ladir.spans import num_passes, num_spans, with_room


def sampling_of(rollout: RolloutSettings, sample: SampleSettings) -> SampleSettings:
    """How stage 2 denoises its own blocks: as sampling does, but for what ``rollout`` sets otherwise."""
    own = {name: getattr(rollout, name) for name in ("num_steps", "lag", "initial_noise", "guidance_scale")}
    return replace(sample, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class Golds:
    """A record and the other gold solutions of its question that have as many blocks."""

    record: LatentRecord
    others: tuple[LatentRecord, ...] = ()


class GoldStore(Measured):
    """The records of a latent store, each with up to ``most`` - 1 other solutions of the same question."""

    def __init__(self, store: LatentStore, most: int) -> None:
        self.store, self.most = store, most
        self._group: dict[int, list[int]] = {}
        if most > 1:
            for members in store.same_question():
                self._group.update(dict.fromkeys(members, members))

    def __len__(self) -> int:
        return len(self.store)

    def length(self, place: int) -> int:
        """By blocks, which are denoised one after another; among those with as many, by tokens."""
        return self.store.num_blocks(place) * (1 << 20) + self.store.length(place)

    def __getitem__(self, index: int) -> Golds:
        record = self.store[index]
        alike = (self.store[other] for other in self._group.get(index, ()) if other != index)
        fitting = (other for other in alike if len(other.blocks) == len(record.blocks))
        return Golds(record, tuple(itertools.islice(fitting, self.most - 1)))


@dataclass
class RolloutBatch(TensorBatch):
    """R records of up to B blocks with up to C gold solutions each (the first is the record's own), answers of up to A tokens.

    B is a multiple of the span; there are zeros behind a record's last block.  ``blocks``: their true numbers of blocks,
    descending.  ``own_context``: the flow loss of ``teacher``, the ordinary batch of the same records, stands behind the model's
    own blocks instead of the true ones.  ``shown``: how many first and last tokens of a question
    stay where it is hidden (its <bos>, a chat template).
    """

    teacher: DenoiserBatch
    blocks: list[int]
    own_context: bool
    question_ids: Tensor  # [R, Q], padded on the left
    question_lengths: Tensor  # [R]
    num_blocks: Tensor  # [R], as ``blocks``
    noise: Tensor  # [R, B, L, d], what blocks start from, already scaled
    gold: Tensor  # [R, C, B, L, d], standardised
    is_gold: Tensor  # bool [R, C]: there are so many solutions
    answer_ids: Tensor  # [R, C, A], padded on the right
    answer_labels: Tensor  # [R, C, A + 1]: the answer and <eos>, IGNORE behind
    block_at: Tensor  # [K]: the teacher's blocks among the R * B blocks of this batch
    most_labels: int  # of the answers, if every record took its longest
    shown: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> str:
        """The teacher's, and whose context is read."""
        return f"{self.teacher.kind}, {'own' if self.own_context else 'true'} context"

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The batch with every tensor on ``device``."""
        return replace(super().to(device), teacher=self.teacher.to(device))


@dataclass(frozen=True)
class RolloutCollator:
    """Records with their gold solutions to a :class:`RolloutBatch`; ``teacher`` collates them for stage 1's losses.

    ``sample``: how sampling is set, which stage 2 follows.
    """

    teacher: DenoiserCollator
    settings: RolloutSettings
    seed: int
    sample: SampleSettings = field(default_factory=SampleSettings)

    @property
    def sampling(self) -> SampleSettings:
        """How the own blocks are denoised."""
        return sampling_of(self.settings, self.sample)

    def __call__(self, golds: Sequence[Golds], numbers: Sequence[int], training: bool = True) -> RolloutBatch:
        order = sorted(range(len(golds)), key=lambda i: -len(golds[i].record.blocks))
        golds, numbers = [golds[i] for i in order], [numbers[i] for i in order]
        records = [entry.record for entry in golds]
        blocks = [len(record.blocks) for record in records]
        most = self._padded(blocks[0])
        own_context = training and self._own_context(numbers[0] // self.teacher.samples_per_step)
        # Behind its own blocks the answer and the end are learned from the rollout itself.
        teacher = self.teacher(records, numbers, training, with_answer=False if own_context else None)
        questions = [[*self.teacher.prefix, *record.question, *self.teacher.suffix] for record in records]
        question_ids, lengths = pad_left(questions, self.teacher.eos_id)
        counts = {**teacher.counts, "rollout": float(len(records)), "stop": teacher.counts["stop"] + sum(blocks)}
        if own_context:
            counts.pop("token", None)  # another gold solution has other tokens
        return RolloutBatch(
            counts=counts,
            num_tokens=teacher.num_tokens + sum(map(self._tokens, records)),
            sample_ids=list(numbers),
            teacher=teacher,
            blocks=blocks,
            own_context=own_context,
            question_ids=question_ids,
            question_lengths=lengths,
            num_blocks=torch.tensor(blocks),
            noise=self._noise(records, numbers, most),
            block_at=torch.tensor([row * most + b for row, count in enumerate(blocks) for b in range(self._padded(count))]),
            shown=(len(self.teacher.prefix), len(self.teacher.suffix)),
            most_labels=sum(max(len(s.answer) for s in (entry.record, *entry.others)) + 1 for entry in golds),
            **self._gold(golds, most),
        )

    def _own_context(self, step: int) -> bool:
        """Drawn per optimizer step, so that all ranks run the same."""
        return bool(generator(derive(self.seed, "context"), step).random() < self.settings.own_context)

    def _tokens(self, record: LatentRecord) -> int:
        """Tokens that run through the model in a record's rollout."""
        how, span, last = self.sampling, self.teacher.settings.span, self.settings.last_blocks
        count, latents = record.mu.shape[:2]
        spans = num_spans(count, span) - (count - min(count, last or count)) // span
        generated = spans * num_passes(how.num_steps, span, how.lag) * span * (latents + 1) + count * (latents + 2)
        thought = len(self.teacher.prefix) + len(record.question) + len(self.teacher.suffix) + generated
        return thought * (2 if how.guidance_scale != 1 else 1) + 1 + len(record.answer)

    def _padded(self, blocks: int) -> int:
        """Blocks that the spans of so many have room for."""
        return with_room(blocks, self.teacher.settings.span)

    def _noise(self, records: Sequence[LatentRecord], numbers: Sequence[int], most: int) -> Tensor:
        noise = np.zeros((len(records), most, *records[0].mu.shape[1:]), dtype=np.float32)
        for row, record, number in zip(noise, records, numbers, strict=True):
            size = self._padded(len(record.blocks))
            generator(self.seed, number).standard_normal(dtype=np.float32, out=row[:size])
        return self.sampling.initial_noise * torch.from_numpy(noise)

    def _gold(self, golds: Sequence[Golds], most_blocks: int) -> dict[str, Tensor]:
        """Latents and answers of every gold solution, padded to the same sizes."""
        solutions = [[entry.record, *entry.others] for entry in golds]
        rows, most = len(golds), max(map(len, solutions))
        longest = max(len(solution.answer) for group in solutions for solution in group)
        shape = tuple(solutions[0][0].mu.shape[1:])
        gold = np.zeros((rows, most, most_blocks, *shape), dtype=np.float32)
        is_gold = np.zeros((rows, most), dtype=bool)
        ids = np.full((rows, most, longest), self.teacher.eos_id, dtype=np.int64)
        labels = np.full((rows, most, longest + 1), IGNORE, dtype=np.int64)
        for row, group in enumerate(solutions):
            for place, solution in enumerate(group):
                mu, size = np.asarray(solution.mu, dtype=np.float32), len(solution.answer)
                gold[row, place, : len(mu)] = (mu - self.teacher.mean) / self.teacher.std
                is_gold[row, place] = True
                ids[row, place, :size] = solution.answer
                labels[row, place, : size + 1] = [*solution.answer, self.teacher.eos_id]
        names = ("gold", "is_gold", "answer_ids", "answer_labels")
        return dict(zip(names, map(torch.from_numpy, (gold, is_gold, ids, labels)), strict=True))
