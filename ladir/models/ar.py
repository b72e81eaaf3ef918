"""The autoregressive baseline's model: a causal LM under its chain-of-thought loss."""

from __future__ import annotations

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
        hidden = self.backbone.read(self.backbone.embed(batch.ids), batch.rows)
        losses, right = self.backbone.label_losses(hidden, batch.labels)
        return {"text": losses.sum(), **accuracy("token", right)}
