"""Achieved FLOP/s of every kind of step, beside the machine's matmul peak and the rate of the step's own matrix products.

FLOPs are those that :func:`training.runtime.utilisation.counted_flops` counts: linear layers, not attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.benchmarks.setup import Bench, backward
from training.runtime.utilisation import counted_flops, gradients_wanted, measured_peak


@dataclass(frozen=True)
class Product:
    """A linear layer applied to ``rows`` vectors, and which gradients are wanted."""

    weight: Tensor
    rows: int
    input_gradient: bool
    weight_gradient: bool


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Product]]:
    """The products of the linear layers that run inside (forward passes), in their order."""
    found: list[Product] = []

    def record(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = inputs[0].numel() // inputs[0].shape[-1]
        found.append(Product(layer.weight, rows, *gradients_wanted(layer, inputs, output)))

    hooks = [layer.register_forward_hook(record) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Replay:
    """The recorded products alone, with the model's own weights: what a step would take if it did nothing else."""

    def __init__(self, products: list[Product]) -> None:
        self._products = products
        self._buffers: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        for product in self._products:
            F.linear(self._buffer(product.rows, product.weight.shape[1], product.weight), product.weight)
        for product in reversed(self._products):
            gradient = self._buffer(product.rows, product.weight.shape[0], product.weight)
            if product.input_gradient:
                gradient @ product.weight
            if product.weight_gradient:
                gradient.T @ self._buffer(product.rows, product.weight.shape[1], product.weight)

    def _buffer(self, rows: int, width: int, like: Tensor) -> Tensor:
        shape = (rows, width)
        if shape not in self._buffers:
            self._buffers[shape] = torch.randn(shape, device=like.device, dtype=like.dtype)
        return self._buffers[shape]


@dataclass(frozen=True)
class Utilisation:
    """A step's seconds and FLOPs, the seconds of its products alone, and the rate [FLOP/s] of the device's best product."""

    name: str
    seconds: float
    flops: int
    products_seconds: float
    peak: float

    @property
    def rate(self) -> float:
        return self.flops / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak."""
        return self.rate / self.peak

    @property
    def of_own_shapes(self) -> float:
        """Share of the rate at which the step's own products run alone."""
        return self.products_seconds / self.seconds


def utilisation(bench: Bench, name: str, model: nn.Module, step: Callable[[], Any], forward: Callable[[], Any]) -> Utilisation:
    """Measure ``step()``, whose forward passes are those of ``forward()``, beside its products and the peak, in turn."""
    with recorded(model) as products, counted_flops(model) as count:
        forward()
    replay = Replay(products)
    peaks = []
    found: list[tuple[float, float]] = []
    for _ in range(bench.size.rounds + 1):
        found.append((bench.seconds(step), bench.seconds(replay)))
        peaks.append(measured_peak(bench.device, bench.dtype, bench.now))
    seconds, alone = (statistics.median(column) for column in zip(*found[1:], strict=True))  # the first warms up
    return Utilisation(name, seconds, count.flops, alone, max(peaks))


class PlainStep:
    """An optimizer step in plain PyTorch: forward, backward, clipping, AdamW."""

    def __init__(self, model: nn.Module, losses: Callable[[], dict[str, Tensor]], weights: dict[str, float]) -> None:
        self._model, self._losses, self._weights = model.train(), losses, weights
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-6, fused=True)

    def __call__(self) -> None:
        backward(self._model, self._losses(), self._weights)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
