"""Denoising steps as CUDA graphs: the thousand kernels of a step are launched as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ladir.inference.cost import Cost
from ladir.models.backbone import is_split
from ladir.models.denoiser import Denoiser

#: latents [R, J, L, d], times [J] and the carried state to the velocity [R, J, L, d] and the next state
Velocity = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: steps of a block from which on capturing one (it costs about as much as a step) pays
_WORTH_CAPTURING = 4


class Graphs:
    """Captures a block's denoising step and replays it."""

    def __init__(self) -> None:
        self._costs: list[Cost] = []

    @contextmanager
    def counted(self, cost: Cost) -> Iterator[None]:
        """Inside, ``cost`` grows with every replay as it does with the step itself, which hooks count: a replay runs none."""
        self._costs.append(cost)
        try:
            yield
        finally:
            self._costs.pop()

    def replayed(self, velocity: Velocity, steps: int) -> Velocity:
        """The same function, whose shapes and other inputs stay as they are for ``steps`` calls, for CUDA tensors."""
        return _Replayed(velocity, self._costs) if steps >= _WORTH_CAPTURING else velocity


def can_capture(denoiser: Denoiser) -> bool:
    """Whether a step of this model may be captured: on CUDA, of an architecture known not to wait, with all weights in place."""
    plain = denoiser.latent_mean.is_cuda and denoiser.backbone.shares_prefixes
    return plain and not any(is_split(parameter) for parameter in denoiser.parameters())


class _Replayed:
    """The first call runs as it is (libraries set themselves up), the second is captured, all from then on are replayed."""

    def __init__(self, velocity: Velocity, costs: list[Cost]) -> None:
        self._velocity, self._costs = velocity, costs
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, z: Tensor, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and the next state; they are overwritten by the next call."""
        self._calls += 1
        if self._calls == 1:
            return self._velocity(z, time, state)
        if self._calls == 2:
            self._capture(z, time, state)
        else:
            for buffer, value in zip(self._inputs, (z, time, state), strict=True):
                buffer.copy_(value)
            for cost, passes, flops in self._each:
                cost.passes += passes
                cost.flops += flops
        self._graph.replay()
        return self._output

    def _capture(self, *inputs: Tensor) -> None:
        before = [replace(cost) for cost in self._costs]
        self._inputs = [value.clone() for value in inputs]
        device = inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Not torch.cuda.graph, which gives back all cached memory of the process first.
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._output = self._velocity(*self._inputs)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._each = [(c, c.passes - b.passes, c.flops - b.flops) for c, b in zip(self._costs, before, strict=True)]
