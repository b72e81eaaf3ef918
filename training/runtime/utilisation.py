"""Model FLOPs utilisation (MFU): what a training computes each second, as a share of what its device could."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: side of the square product that gives a device's peak
_PEAK_SIDE = {"cpu": 512, "cuda": 8192}
_PEAK_ROUNDS = 4


def gradients_wanted(layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> tuple[bool, bool]:
    """Whether the backward pass of this call will compute the gradient of its input, and that of its weight."""
    trained = torch.is_grad_enabled() and output.requires_grad
    return trained and inputs[0].requires_grad, trained and layer.weight.requires_grad


class FlopCount:
    """FLOPs of one forward pass and of the backward pass that follows from it."""

    def __init__(self) -> None:
        self.flops = 0

    def add(self, layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook: 2 per weight and vector, as much again for each gradient that will be wanted."""
        vectors = inputs[0].numel() // layer.in_features
        gradients = sum(gradients_wanted(layer, inputs, output))
        # Not the weight's own size: a weight that is split over the ranks may be empty by now.
        self.flops += 2 * vectors * layer.in_features * layer.out_features * (1 + gradients)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, the model's compiled parts run as they were written.  (Kernels that are compiled by themselves stay so.)

    A forward pass whose activations are recomputed needs its backward pass inside, too: both must run alike.
    """
    compiled = [(part, part._compiled_call_impl) for part in model.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


@contextmanager
def counted_flops(model: nn.Module) -> Iterator[FlopCount]:
    """Counts the linear layers of the forward passes inside, with the gradients that are wanted of them.

    A backward pass belongs outside: what it recomputes would be counted again.  Attention's own products are left out, whatever
    kernel does them, so that the MFU is a little too low.  Compiled layers run as they were written here: what is compiled must
    not contain the counting; see :func:`as_written`.
    """
    count = FlopCount()
    hooks = [layer.register_forward_hook(count.add) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        with as_written(model):
            yield count
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a large square product, the best of a few by ``clock``: a device's peak for practical purposes."""
    side = _PEAK_SIDE.get(device.type, _PEAK_SIDE["cuda"])
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_PEAK_ROUNDS):
        _wait_for(device)
        start = clock()
        left @ right
        _wait_for(device)
        best = min(best, clock() - start)
    return 2 * side**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
