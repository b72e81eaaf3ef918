"""Which rank holds the others up: how fast each one's matrix products are, how long it waits for data, how much memory it takes.

A step takes as long as its slowest rank does, and with sharded weights every rank spends that time, since the others wait in the
collectives inside the passes.  So what is timed is what no rank waits in: the linear layers' own products in a forward pass.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.runtime.distributed import World

logger = logging.getLogger(__name__)

_IN_A_ROW = 3  # log lines on end that name the same rank, before it is warned of


@dataclass(frozen=True)
class Slowest:
    """The rank whose products take longest, and how many times the median rank's time they take."""

    rank: int
    factor: float


class RankWatch:
    """What the ranks of a training say of themselves between two log lines.  Made by all ranks together."""

    def __init__(self, world: World, warn_factor: float) -> None:
        """``warn_factor``: a rank is warned of that takes so many times as long as the median one, several times on end."""
        self._world, self._warn_factor = world, warn_factor
        self.names: list[str] = world.gather(name_of(world))
        self._products = Products(world.device)
        self._wait = 0.0
        self._suspect, self._times = -1, 0

    def waited(self, seconds: float) -> None:
        """This rank waited so long for its batch."""
        self._wait += seconds

    @contextmanager
    def timed(self, model: nn.Module) -> Iterator[None]:
        """The forward pass inside is timed, where it is the first since the last log line.

        Not where there is one rank, which no other waits for, nor of compiled layers, which would be compiled anew for it.
        """
        if self._world.size == 1 or self._products or any(part._compiled_call_impl is not None for part in model.modules()):
            yield
            return
        with self._products.measured(model):
            yield

    def figures(self, memory_gib: float, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
        """Of all ranks since the last time, ``seconds`` ago (collective): figures by name, and names of ranks by what they are.

        ``memory_gib``: this rank's; the figure is the worst rank's.
        """
        own = (self._products.seconds_per_tflop(), self._wait, memory_gib)
        self._products, self._wait = Products(self._world.device), 0.0
        times, waits, memory = zip(*self._world.gather(own), strict=True)
        fullest = max(range(len(memory)), key=memory.__getitem__)
        if self._world.size == 1:
            return {"memory_gib": memory[0]}, {}
        figures = {"memory_gib": memory[fullest], "memory_rank": float(fullest), "data_wait_worst": max(waits) / seconds}
        names = {"memory_rank": self.names[fullest]}
        if (slowest := slowest_rank(times)) is not None:
            figures |= {"rank_slowest": float(slowest.rank), "rank_slowdown": slowest.factor}
            names["slow_rank"] = f"{self.names[slowest.rank]}, {slowest.factor:.2f} times the median"
            self._warn(slowest)
        return figures, names

    def _warn(self, slowest: Slowest) -> None:
        """Say it once where it is the same rank again and again."""
        is_slow = slowest.factor >= self._warn_factor
        self._times = self._times + 1 if is_slow and slowest.rank == self._suspect else int(is_slow)
        self._suspect = slowest.rank
        if self._times == _IN_A_ROW and self._world.is_main:
            logger.warning(
                "%s is slow: its matrix products take %.2f times as long as the median rank's, and every rank waits for it; look "
                "at that device (clock, temperature, other processes) or leave its node out",
                self.names[slowest.rank],
                slowest.factor,
            )


def slowest_rank(times: tuple[float | None, ...]) -> Slowest | None:
    """Among the ranks' times for the same work; None where a rank did not measure any (the median of two is the smaller)."""
    known = [entry for entry in times if entry is not None]
    if len(known) < len(times) or not min(known, default=0.0):
        return None
    slowest = max(range(len(known)), key=known.__getitem__)
    return Slowest(slowest, known[slowest] / statistics.median_low(known))


class Products:
    """Time and FLOPs of linear layers in one forward pass; on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flops = 0
        self._spans: list[tuple[Any, Any]] = []

    def __bool__(self) -> bool:
        """Whether something was measured."""
        return bool(self._spans)

    @contextmanager
    def measured(self, model: nn.Module) -> Iterator[None]:
        """The forward pass inside counts."""
        begun: dict[nn.Module, Any] = {}

        def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            begun[layer] = self._now()

        def after(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            self._spans.append((begun.pop(layer), self._now()))
            self._flops += 2 * inputs[0].numel() * layer.out_features

        with ExitStack() as hooks:
            for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
                hooks.callback(layer.register_forward_pre_hook(before).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
            yield

    def seconds_per_tflop(self) -> float | None:
        """None where nothing was measured."""
        if not self._flops:
            return None
        if self._cuda:
            self._spans[-1][1].synchronize()
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3 / (self._flops / 1e12)
        return sum(end - start for start, end in self._spans) / (self._flops / 1e12)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def name_of(world: World) -> str:
    """A rank as people find it: node and device."""
    device = f"GPU {world.local_rank}" if world.device.type == "cuda" else f"process {world.local_rank}"
    return f"rank {world.rank} ({platform.node()}, {device})"
