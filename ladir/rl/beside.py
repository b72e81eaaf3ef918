"""Attempts and gold records of one step in one pass of the model, where both are few: launching a pass is then what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ladir.data.batches import TensorBatch

#: samples from which on padding attempts to the width of records, which have an answer, costs more than another pass launches
MOST_TOGETHER = 128


@dataclass
class BesideBatch(TensorBatch):
    """``judged`` attempts and ``gold`` records of a policy; their loss terms have different names."""

    judged: TensorBatch
    gold: TensorBatch

    @classmethod
    def of(cls, judged: TensorBatch, gold: TensorBatch) -> BesideBatch:
        """Both, with the labels and tokens of both."""
        return cls(
            counts={**judged.counts, **gold.counts},
            num_tokens=judged.num_tokens + gold.num_tokens,
            sample_ids=[*judged.sample_ids, *gold.sample_ids],
            judged=judged,
            gold=gold,
        )

    @property
    def kind(self) -> str:
        """That of both."""
        return f"{self.judged.kind} beside gold, {self.gold.kind}"

    def to(self, device: torch.device | str) -> BesideBatch:
        """The batch with every tensor on ``device``."""
        return replace(self, judged=self.judged.to(device), gold=self.gold.to(device))
