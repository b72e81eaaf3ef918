"""Attention backends: how a boolean visibility mask reaches transformers' attention."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_attention(setting: str, device_type: str) -> str:
    """The transformers attention implementation for ``backbone.attention``.

    ``auto`` takes eager on a CPU, where SDPA's bf16 backward is half of a short step, and SDPA on CUDA.
    """
    if setting == "auto":
        return "eager" if device_type == "cpu" else "sdpa"
    return setting


def attention_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """The 4D mask [N, 1, Tq, Tk] for a boolean ``visible`` [N, Tq, Tk].

    Eager attention adds its mask, so it needs 0 / -max (a 0/1 mask cast to float would mask nothing); SDPA takes booleans.
    """
    if implementation != "eager":
        return visible[:, None]
    blocked = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, blocked)[:, None]


def causal(length: int, device: torch.device, past: int = 0) -> Tensor:
    """Boolean mask [1, length, past + length]: a token sees the past and the tokens up to itself."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None]


def left_padded(lengths: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Causal sequences of ``lengths`` [N] padded on the left to ``width``.

    Returns which tokens are real, bool [N, width]; who sees whom, bool [N, width, width], padding itself only; and the
    positions, int64 [N, width], that start at the first real token.
    """
    order = torch.arange(width, device=lengths.device)[None]
    padding = (width - lengths)[:, None]
    valid = order >= padding
    itself = torch.eye(width, dtype=torch.bool, device=lengths.device)
    visible = causal(width, lengths.device) & valid[:, None, :] | itself
    return valid, visible, (order - padding).clamp_min(0)
