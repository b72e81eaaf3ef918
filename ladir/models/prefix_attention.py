"""Attention of many rows behind shared prefixes: a prefix's keys and values lie in memory once and are never copied per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

#: the name under which transformers knows this attention
PREFIX_ATTENTION = "ladir_prefix"

#: architectures whose attention is softmax(q k) v and nothing else, without soft caps or sinks
_PLAIN_ATTENTION = frozenset(
    [
        "cohere",
        "gemma",
        "glm4",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    ]
)


def has_plain_attention(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration may run with an attention that is none of transformers' own."""
    return config.get_text_config().model_type in _PLAIN_ATTENTION


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of Q prefixes, read by R rows.

    ``keys`` and ``values``: per layer [Q, kv heads, P, head]; ``valid`` bool [Q, P]; ``owner`` int64 [R], the prefix of every
    row.  ``most``: rows of the prefix that has most; ``slots`` [R]: a row's place among Q x most, None where every prefix has
    as many rows; ``bias`` [Q, 1, 1, P]: what hides padding, None where there is none; ``own`` bool [R, T, O + T]: which of its
    own tokens each of a row's new ones sees, None where all.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    valid: Tensor
    owner: Tensor
    most: int
    slots: Tensor | None
    bias: Tensor | None
    own: Tensor | None = None

    @classmethod
    def build(cls, keys: Sequence[Tensor], values: Sequence[Tensor], valid: Tensor, owner: Tensor) -> SharedPrefix:
        """Prefixes with the rows that read them; those without rows are left out.  Rows of one prefix are consecutive."""
        present, row_owner, counts = torch.unique_consecutive(owner, return_inverse=True, return_counts=True)
        if not torch.equal(present, torch.arange(len(valid), device=present.device)):
            keys, values = ([layer.index_select(0, present) for layer in layers] for layers in (keys, values))
            valid = valid[present]
        most = int(counts.max())
        slots = None
        if len(owner) < len(present) * most:
            first = counts.cumsum(0) - counts
            slots = row_owner * most + torch.arange(len(owner), device=owner.device) - first[row_owner]
        bias = None
        if not bool(valid.all()):
            bias = torch.zeros(valid.shape, dtype=keys[0].dtype, device=valid.device)
            bias = bias.masked_fill_(~valid, torch.finfo(bias.dtype).min)[:, None, None]
        return cls(keys, values, valid, row_owner, most, slots, bias)

    def select(self, rows: Tensor) -> SharedPrefix:
        """The prefixes of the given rows."""
        return SharedPrefix.build(self.keys, self.values, self.valid, self.owner[rows])

    def gather(self, x: Tensor) -> Tensor:
        """Rows [R, kv heads, G, n] by prefix [Q, kv heads, most * G, n]."""
        if self.slots is not None:
            x = x.new_zeros(len(self.valid) * self.most, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (len(self.valid), self.most)).transpose(1, 2).flatten(2, 3)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        rows = x.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.slots is None else rows.index_select(0, self.slots)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    shared_prefix: SharedPrefix,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [R, T, heads, head] of ``query`` [R, heads, T, head] over the shared prefix and a row's own tokens.

    ``key`` and ``value`` [R, kv heads, O + T, head] are the row's own.  One matrix product serves all rows of a prefix; the
    softmax runs over both parts together.
    """
    assert attention_mask is None, "a shared prefix brings its own mask"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    before_keys, before_values = shared_prefix.keys[layer], shared_prefix.values[layer]
    width = before_keys.shape[2]
    grouped = (query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the query heads of a kv head side by side
    before = shared_prefix.gather(grouped) @ before_keys.transpose(2, 3)
    if shared_prefix.bias is not None:
        before = before + shared_prefix.bias
    among = grouped @ key.transpose(2, 3)
    if shared_prefix.own is not None:
        hidden = ~shared_prefix.own.repeat(1, grouped.shape[2] // query.shape[2], 1)[:, None]
        among = among.masked_fill(hidden, torch.finfo(among.dtype).min)
    weights = torch.cat([before, shared_prefix.gather(among)], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = shared_prefix.scatter(weights[..., :width] @ before_values)
    output = output + shared_prefix.scatter(weights[..., width:]) @ value
    return output.reshape(query.shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
