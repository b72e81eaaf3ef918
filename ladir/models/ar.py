"""The autoregressive baseline's model: a causal LM under its chain-of-thought loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ladir.data.batches import ArBatch
from ladir.models.backbone import Backbone
from ladir.models.metrics import accuracy


class ArModel(nn.Module):
    """``forward`` gives the summed cross-entropy of the labelled tokens, which alone go through the LM head."""

    layers_run_once = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: ArBatch) -> dict[str, Tensor]:
        """``text``: loss summed over labels; metric: share of labelled tokens that greedy decoding gets right."""
        return self.losses(batch, self.read(batch))

    def losses(self, batch: ArBatch, hidden: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` gives, of the hidden states that :meth:`read` does."""
        losses, right = self.backbone.label_losses(hidden, batch.labels)
        return {"text": losses.sum(), **accuracy("token", right)}

    def read(self, batch: ArBatch) -> Tensor:
        """Hidden states [n, H] before the labels."""
        return self.backbone.read(self.backbone.embed(batch.ids), batch.rows)

    def read_together(self, batches: Sequence[ArBatch]) -> list[Tensor]:
        """What :meth:`read` gives of each batch, of one pass of the LM over all of their rows."""
        inputs = [(F.embedding(batch.rows.index, self.backbone.embed(batch.ids)), batch.rows.layout) for batch in batches]
        hidden = self.backbone.together(inputs)
        return [own.flatten(0, 1).index_select(0, batch.rows.at) for own, batch in zip(hidden, batches, strict=True)]
