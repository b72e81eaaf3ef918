"""Keys and values of what is finished (question, blocks), computed once and read by every denoising step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ladir.models.attention import WholePrefix, causal, left_padded
from ladir.models.backbone import Backbone
from ladir.models.prefix_attention import SharedPrefix

#: shorter prefixes (in tokens) are copied: on a CPU that is as fast or faster, and costs little memory
SHORTEST_SHARED = 16


class PrefixLayer(DynamicLayer):
    """Keys and values [R, heads, P, head] of one layer; new ones are kept only while ``growing``."""

    keys: Tensor
    values: Tensor
    growing = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and new tokens [R, heads, P + T, head]."""
        if self.growing:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    def select(self, rows: Tensor) -> PrefixLayer:
        """A layer of the given rows, repeats allowed."""
        layer = PrefixLayer()
        if self.is_initialized:
            layer.update(self.keys.index_select(0, rows), self.values.index_select(0, rows))
        return layer

    def without_first(self, count: int) -> PrefixLayer:
        """The layer without the first ``count`` tokens; with that many zeros before it, where it is negative."""
        layer = PrefixLayer()
        layer.update(*(F.pad(x, (0, 0, -count, 0)) for x in (self.keys, self.values)))
        return layer

    def joined(self, other: PrefixLayer) -> PrefixLayer:
        """A layer of both's rows, which are equally long."""
        layer = PrefixLayer()
        layer.update(torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values]))
        return layer


class PrefixCache(Cache):
    """A growing cache that can be read without growing, so that one prefix serves many denoising steps."""

    layers: list[PrefixLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[PrefixLayer] | None = None) -> None:
        if layers is None:
            super().__init__(layer_class_to_replicate=PrefixLayer)
        else:
            super().__init__(layers=[*layers])

    @contextmanager
    def read_only(self) -> Iterator[PrefixCache]:
        """Within, updates store nothing."""
        self._set_growing(False)
        try:
            yield self
        finally:
            self._set_growing(True)

    def _set_growing(self, growing: bool) -> None:
        for layer in self.layers:
            layer.growing = growing

    def select(self, rows: Tensor) -> PrefixCache:
        """A cache of the given rows, repeats allowed."""
        return PrefixCache([layer.select(rows) for layer in self.layers])


class Prefix:
    """R sequences of equal padded length behind which tokens are generated.

    ``cache`` holds the rows' own tokens, P each; ``valid`` bool [R, P] marks the real ones (questions are padded on the left,
    texts behind them on the right), ``padded`` says whether there are others; ``next_position`` int64 [R]; ``shared`` is what the
    rows read together, in front of their own tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: PrefixCache,
        valid: Tensor,
        next_position: Tensor,
        padded: bool,
        shared: SharedPrefix | None = None,
    ) -> None:
        self.backbone = backbone
        self.cache = cache
        self.valid = valid
        self.next_position = next_position
        self.padded = padded
        self.shared = shared

    @classmethod
    def start(cls, backbone: Backbone, inputs: Tensor, lengths: Tensor, bidirectional: bool = False) -> tuple[Prefix, Tensor]:
        """A prefix of input vectors [R, P, H] padded on the left to ``lengths`` [R]; and the last hidden states [R, H].

        They see what is before them, or each other (``bidirectional``).
        """
        valid, visible, positions = left_padded(lengths, inputs.shape[1], bidirectional)
        cache = PrefixCache()
        hidden = backbone(inputs, visible, positions, cache)
        return cls(backbone, cache, valid, lengths.clone(), padded=not bool(valid.all())), hidden[:, -1]

    def __len__(self) -> int:
        return len(self.valid)

    def share(self, owner: Tensor) -> Prefix:
        """A row for every trajectory, ``owner`` [R] naming the sequence it continues; rows of one sequence are consecutive.

        The sequences' keys and values stay where they are; a row has only its own tokens' (every row has a copy where the
        prefix is short, nothing would be shared, or the model's attention cannot read the two apart).
        """
        shareable = self.valid.shape[1] >= SHORTEST_SHARED and len(owner) > len(self) and self.backbone.shares_prefixes
        if not shareable:
            return self.select(owner)
        layers = self.cache.layers
        shared = SharedPrefix.build([layer.keys for layer in layers], [layer.values for layer in layers], self.valid, owner)
        own = PrefixCache([PrefixLayer() for _ in layers])
        return Prefix(self.backbone, own, self.valid.new_ones(len(owner), 0), self.next_position[owner], False, shared)

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of ``rows`` (indices, repeats allowed), copied but for what is shared."""
        shared = self.shared.select(rows) if self.shared is not None else None
        valid, next_position = self.valid[rows], self.next_position[rows]
        return Prefix(self.backbone, self.cache.select(rows), valid, next_position, self.padded, shared)

    def without_first(self, count: int) -> Prefix:
        """Without the first ``count`` tokens of every row; with padding before them, where it is negative."""
        if not count:
            return self
        assert self.shared is None
        cache = PrefixCache([layer.without_first(count) for layer in self.cache.layers])
        valid = F.pad(self.valid, (-count, 0))
        return Prefix(self.backbone, cache, valid, self.next_position, self.padded or count < 0)

    def trimmed(self) -> Prefix:
        """Without the tokens that are padding in all rows."""
        return self.without_first(int(self.valid.any(0).int().argmax())) if self.padded else self

    def joined(self, other: Prefix) -> Prefix:
        """The rows of both, of different lengths, none of which share anything."""
        most = max(self.valid.shape[1], other.valid.shape[1])
        mine, its = (prefix.without_first(prefix.valid.shape[1] - most) for prefix in (self, other))
        layers = zip(mine.cache.layers, its.cache.layers, strict=True)
        return Prefix(
            self.backbone,
            PrefixCache([layer.joined(new) for layer, new in layers]),
            torch.cat([mine.valid, its.valid]),
            torch.cat([mine.next_position, its.next_position]),
            mine.padded or its.padded,
        )

    def visible(self, length: int) -> WholePrefix | SharedPrefix:
        """What ``length`` new tokens see: the prefix and each other."""
        if self.shared is not None and not self.padded:
            return self.shared
        valid = torch.cat([self.valid, self.valid.new_ones(len(self), length)], dim=1)
        if self.shared is not None:
            return replace(self.shared, own=valid[:, None].expand(-1, length, -1))
        return WholePrefix(valid, length, self.padded)

    def positions(self, offsets: Tensor) -> Tensor:
        """Rotary positions [R, T] of tokens at ``offsets`` [T] behind the prefix."""
        return self.next_position[:, None] + offsets

    def read(self, inputs: Tensor) -> Tensor:
        """Hidden states [R, T, H] of tokens [R, T, H] that see the prefix and each other; a cache that may grow keeps them."""
        length = inputs.shape[1]
        positions = self.positions(torch.arange(length, device=self.valid.device))
        return self.backbone(inputs, self.visible(length), positions, self.cache)

    def append(self, inputs: Tensor) -> Tensor:
        """Add tokens [R, T, H] that see the prefix and each other (T = 1: an ordinary token); their hidden states [R, T, H]."""
        length, hidden = inputs.shape[1], self.read(inputs)
        self.valid = torch.cat([self.valid, self.valid.new_ones(len(self), length)], dim=1)
        self.next_position = self.next_position + length
        return hidden

    def append_text(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Add ordinary text, causal, ``lengths`` [R] of the tokens [R, T, H], padding behind; the last hidden states [R, H].

        Padding stays in the cache, where nobody sees it.
        """
        length, device = inputs.shape[1], inputs.device
        real = torch.arange(length, device=device) < lengths[:, None]
        among = causal(length, device) & real[:, None] | torch.eye(length, dtype=torch.bool, device=device)
        own = torch.cat([self.valid[:, None].expand(-1, length, -1), among], dim=2)
        visible = own if self.shared is None else replace(self.shared, own=own)
        hidden = self.backbone(inputs, visible, self.positions(torch.arange(length, device=device)), self.cache)
        self.valid = torch.cat([self.valid, real], dim=1)
        self.padded = self.padded or not bool(real.all())
        self.next_position = self.next_position + lengths
        return hidden[torch.arange(len(self), device=device), lengths - 1]
