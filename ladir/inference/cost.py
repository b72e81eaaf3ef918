"""What generating costs, counted where it happens: time, passes through the LM, operations of their matrix products."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ladir.models.backbone import Backbone
from ladir.models.prefix_attention import SharedPrefix


@dataclass
class Cost:
    """``passes``: sequences that went through the LM, once for each time (a step of n trajectories counts n, with guidance 2 n).

    ``flops``: two per multiply and add of linear layers and attention; a row's padding is counted with it.
    """

    seconds: float = 0.0
    passes: float = 0
    flops: float = 0

    def share(self, count: int) -> Cost:
        """The cost of one of ``count`` questions that were answered together."""
        return Cost(self.seconds / count, self.passes / count, self.flops / count)


@contextmanager
def count_cost(*models: nn.Module) -> Iterator[Cost]:
    """Inside, the time, every pass of the models' LMs and every linear layer count; the time is there at the end."""
    cost = Cost()

    def linear(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        cost.flops += 2 * arguments[0].numel() * layer.out_features

    def lm(backbone: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(backbone, Backbone)
        cost.passes += len(arguments[0])
        cost.flops += attention_flops(backbone, *arguments)

    with ExitStack() as hooks:
        for module in {id(module): module for model in models for module in model.modules()}.values():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(linear).remove)
            elif isinstance(module, Backbone):
                hooks.callback(module.register_forward_pre_hook(lm).remove)
        start = time.perf_counter()
        yield cost
        cost.seconds = time.perf_counter() - start


def attention_flops(backbone: Backbone, inputs: Tensor, visible: Any, positions: Tensor, cache: Cache | None = None) -> int:
    """Operations of ``softmax(q k) v`` in one call of a backbone, whose arguments these are; hidden keys count as well."""
    config = backbone.base.config.get_text_config()
    rows, length = inputs.shape[:2]
    keys = length + (cache.get_seq_length() if cache is not None else 0)
    if isinstance(visible, SharedPrefix):
        keys += visible.keys[0].shape[2]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * rows * length * keys * config.num_attention_heads * head * config.num_hidden_layers
