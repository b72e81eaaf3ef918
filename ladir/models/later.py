"""Gradients of weights for many passes at once: one product where every pass would have its own, and a sum besides.

In a pass of few tokens each weight meets few vectors, but its gradient is as large as the weight: writing it, and adding it to
that of the other passes, is most of what such a pass moves through memory backward, and a quarter of what it launches.  Here a
layer keeps its inputs and what comes back for its outputs, and they are multiplied when a group of passes is back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass
class _Kept:
    """Of one layer in a group of passes: inputs [n, in], and gradients of outputs [n, out]."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


class PassGroup:
    """Passes whose weights' gradients are computed together."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, _Kept]] = {}

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """What the layer gives for ``x`` [..., in]; its weights' gradients come with the group's last pass backward."""
        if id(layer) not in self._layers:
            kept = _Kept()
            self._layers[id(layer)] = _Weights.apply(kept, layer.weight, layer.bias), kept
        ticket, kept = self._layers[id(layer)]
        y: Tensor = _Product.apply(kept, ticket, x, layer.weight, layer.bias)
        return y


class LaterWeights:
    """The linear layers of a model, for which a group of passes may be named; outside of groups they are as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.group: PassGroup | None = None
        for module in model.modules():
            if type(module) in (nn.Linear, _LaterLinear):
                module.__class__ = _LaterLinear
                module.__dict__["later"] = self

    @contextmanager
    def within(self, group: PassGroup) -> Iterator[None]:
        """A pass of this group; the same when it is run again backward."""
        before, self.group = self.group, group
        try:
            yield
        finally:
            self.group = before


class _LaterLinear(nn.Linear):
    """A linear layer that asks for the group of the pass that it is in."""

    later: LaterWeights

    def forward(self, input: Tensor) -> Tensor:
        group = self.later.group
        if group is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        return group.linear(self, input)


class _Weights(torch.autograd.Function):
    """A ticket for a layer's weights: who uses them leaves its part with the layer, and comes back before them."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``weight`` [out, in], ``bias`` [out]; the ticket is empty."""
        ctx.set_materialize_grads(False)
        ctx.kept = kept
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor | None) -> Any:
        """The gradients of the weights from all passes."""
        gradients, inputs = _whole(ctx.kept.gradients), _whole(ctx.kept.inputs)
        ctx.kept.gradients, ctx.kept.inputs = [], []
        of_bias = gradients.sum(0) if ctx.needs_input_grad[2] else None
        return None, gradients.t() @ inputs, of_bias


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, whose backward pass leaves the weights' part with the layer."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, ticket: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` [..., in]."""
        ctx.save_for_backward(x, weight)
        ctx.kept = kept
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of the input alone."""
        x, weight = ctx.saved_tensors
        ctx.kept.inputs.append(x.flatten(0, -2))
        ctx.kept.gradients.append(gradient.flatten(0, -2))
        return None, None, gradient @ weight if ctx.needs_input_grad[2] else None, None, None


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
