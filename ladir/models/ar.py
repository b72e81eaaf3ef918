"""The autoregressive baseline's model: a causal LM under its chain-of-thought loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladir.data.batches import ArBatch
from ladir.models.backbone import Backbone


class ArModel(nn.Module):
    """``forward`` gives the summed cross-entropy of the labelled tokens, which alone go through the LM head."""

    layers_run_once = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: ArBatch) -> dict[str, Tensor]:
        """``text``: loss summed over labels; metric: share of labelled tokens that greedy decoding gets right."""
        logits = self.backbone.logits(self.backbone.read(self.backbone.embed(batch.ids), batch.rows)).float()
        labels = batch.labels
        right = (logits.detach().argmax(-1) == labels).float().sum()
        return {
            "text": F.cross_entropy(logits, labels, reduction="sum"),
            "metric/token_accuracy": torch.stack([right, right.new_tensor(float(len(labels)))]),
        }
