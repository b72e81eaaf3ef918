"""The autoregressive baseline's model: a causal LM under its chain-of-thought loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladir.data.batches import ArBatch
from ladir.models.attention import causal
from ladir.models.backbone import Backbone


class ArModel(nn.Module):
    """``forward`` gives the summed cross-entropy of the labelled tokens, which alone go through the LM head."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: ArBatch) -> dict[str, Tensor]:
        """``text``: loss summed over labels; metric: share of labelled tokens that greedy decoding gets right."""
        length = batch.ids.shape[1]
        positions = torch.arange(length, device=batch.ids.device)[None]
        hidden = self.backbone(self.backbone.embed(batch.ids), causal(length, batch.ids.device), positions)
        labels = batch.labels
        logits = self.backbone.logits(hidden.flatten(0, 1)[batch.label_at]).float()
        right = (logits.detach().argmax(-1) == labels).float().sum()
        return {
            "text": F.cross_entropy(logits, labels, reduction="sum"),
            "metric/token_accuracy": torch.stack([right, right.new_tensor(float(len(labels)))]),
        }
