"""Sliding windows: layers that see the nearest tokens of what a mask shows, as their LM was trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

#: the kinds of layers as transformers names them (``layer_types`` of a config)
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class SlidingWindow:
    """A token sees those less than ``size`` positions away; ``mixed``: in some layers only, the others see all."""

    size: int
    mixed: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> SlidingWindow | None:
        """The window of an LM; None where it has none, or one as long as its longest text."""
        text = config.get_text_config()
        size, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
        slides = SLIDING in kinds if kinds else getattr(text, "use_sliding_window", True)
        if not size or not slides or size >= (getattr(text, "max_position_embeddings", None) or size + 1):
            return None
        return cls(int(size), mixed=bool(kinds))

    def spans(self, keys: int, new: int) -> bool:
        """Whether no two of ``keys`` tokens, of which ``new`` are new, can be further apart than the window."""
        return keys + new <= self.size  # blocks denoised together leave out a position each

    def near(self, visible: Tensor, positions: Tensor) -> Tensor:
        """What is left of ``visible`` [N, T, P + T] for new tokens at ``positions`` [N or 1, T].

        The P cached tokens lie at positions 0, 1, ... in their order; those that no new token sees are padding.
        """
        before = visible.shape[-1] - positions.shape[-1]
        cached = visible[..., :before].any(1).cumsum(-1) - 1
        keys = torch.cat([cached, positions.expand(len(cached), -1)], dim=-1)
        return visible & ((positions[:, :, None] - keys[:, None, :]).abs() < self.size)
