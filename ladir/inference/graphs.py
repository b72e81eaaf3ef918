"""Denoising steps as CUDA graphs: the thousand kernels of a step are launched as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ladir.models.backbone import is_split
from ladir.models.denoiser import Denoiser

#: latents [R, L, d] and time (a scalar) to velocity [R, L, d]
Velocity = Callable[[Tensor, Tensor], Tensor]

#: called when a capture begins; what it returns, when it ends; and what that returns, at every repetition of what was captured
Observer = Callable[[], Callable[[], Callable[[], None]]]

#: steps of a block from which on capturing one (it costs about as much as a step) pays
_WORTH_CAPTURING = 4


class Graphs:
    """Captures a block's denoising step and replays it; ``observers`` are told, for modules' hooks do not run in a replay."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Inside, ``observer`` is told of captures and repetitions."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def replayed(self, velocity: Velocity, steps: int) -> Velocity:
        """The same function, whose shapes and other inputs stay as they are for ``steps`` calls, for CUDA tensors."""
        return _Replayed(velocity, self._observers) if steps >= _WORTH_CAPTURING else velocity


def can_capture(denoiser: Denoiser) -> bool:
    """Whether a step of this model may be captured: on CUDA, of an architecture known not to wait, with all weights in place."""
    plain = denoiser.latent_mean.is_cuda and denoiser.backbone.shares_prefixes
    return plain and not any(is_split(parameter) for parameter in denoiser.parameters())


class _Replayed:
    """The first call runs as it is (libraries set themselves up), the second is captured, all from then on are replayed."""

    def __init__(self, velocity: Velocity, observers: list[Observer]) -> None:
        self._velocity, self._observers = velocity, observers
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, z: Tensor, time: Tensor) -> Tensor:
        """The velocity; it is overwritten by the next call."""
        self._calls += 1
        if self._calls == 1:
            return self._velocity(z, time)
        if self._calls == 2:
            self._capture(z, time)
        else:
            self._z.copy_(z)
            self._time.copy_(time)
            for repeat in self._repeats:
                repeat()
        self._graph.replay()
        return self._output

    def _capture(self, z: Tensor, time: Tensor) -> None:
        ends = [begin() for begin in self._observers]
        self._z, self._time = z.clone(), time.clone()
        stream = torch.cuda.Stream(z.device)
        stream.wait_stream(torch.cuda.current_stream(z.device))
        # Not torch.cuda.graph, which gives back all cached memory of the process first.
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._output = self._velocity(self._z, self._time)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(z.device).wait_stream(stream)
        self._repeats = [end() for end in ends]
