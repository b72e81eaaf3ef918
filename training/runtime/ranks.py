"""Which rank holds the others up: how fast each one computes, how long it waits for data, how much memory it takes.

A step takes as long as its slowest rank does, and every rank spends that time, since the others wait for it in the collectives.
So what is timed is what no rank waits in: the forward passes, in which there is no collective; with sharded weights, which are
gathered inside the passes, the linear layers' own products in one of them.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.runtime.distributed import World

logger = logging.getLogger(__name__)

_IN_A_ROW = 3  # log lines on end that name the same rank, before it is warned of


@dataclass(frozen=True)
class Slowest:
    """The rank that takes longest for the same work, and how many times the median rank's time that is."""

    rank: int
    factor: float


class RankWatch:
    """What the ranks of a training say of themselves between two log lines.  Made by all ranks together."""

    def __init__(self, world: World, warn_factor: float, sharded: bool) -> None:
        """``warn_factor``: a rank is warned of that takes so many times as long as the median one, several times on end.

        ``sharded``: the passes gather weights, and wait for the other ranks.
        """
        self._world, self._warn_factor, self._sharded = world, warn_factor, sharded
        self.names: list[str] = world.gather(name_of(world))
        self._own = self._nothing()
        self._wait = 0.0
        self._suspect, self._times = -1, 0

    def waited(self, seconds: float) -> None:
        """This rank waited so long for its batch."""
        self._wait += seconds

    def timed(self, model: nn.Module, kind: str, tokens: int) -> AbstractContextManager[None]:
        """The forward pass inside, of a batch of this kind with so many tokens, is timed.

        Not where there is one rank, which no other waits for.  With sharded weights it is but the first since the last log line,
        and none of compiled layers, which would be compiled anew for it.
        """
        if self._world.size == 1:
            return nullcontext()
        if isinstance(self._own, Passes):
            return self._own.measured(kind, tokens)
        compiled = any(part._compiled_call_impl is not None for part in model.modules())
        return nullcontext() if self._own or compiled else self._own.measured(model)

    def _nothing(self) -> Passes | Products:
        return Products(self._world.device) if self._sharded else Passes(self._world.device)

    def figures(
        self, memory_gib: float, seconds: float, flops_per_token: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Of all ranks since the last time, ``seconds`` ago (collective): figures by name, and names of ranks by what they are.

        ``memory_gib``: this rank's; the figure is the worst rank's.  ``flops_per_token``: of a kind of batches, as this rank has
        counted it.
        """
        own = (self._own.seconds(), self._own.done, dict(flops_per_token), self._wait, memory_gib)
        self._own, self._wait = self._nothing(), 0.0
        spent, done, costs, waits, memory = zip(*self._world.gather(own), strict=True)
        times = seconds_for_the_same(spent, done, costs)
        fullest = max(range(len(memory)), key=memory.__getitem__)
        if self._world.size == 1:
            return {"memory_gib": memory[0]}, {}
        figures = {"memory_gib": memory[fullest], "memory_rank": float(fullest), "data_wait_worst": max(waits) / seconds}
        names = {"memory_rank": self.names[fullest], "data_wait_rank": self.names[max(range(len(waits)), key=waits.__getitem__)]}
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
                "%s is slow: its own %s take %.2f times as long as the median rank's, and every rank waits for it; look at that "
                "device (clock, temperature, other processes) or leave its node out",
                self.names[slowest.rank],
                "matrix products" if self._sharded else "forward passes",
                slowest.factor,
            )


def seconds_for_the_same(
    spent: Sequence[float], done: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, float]]
) -> tuple[float | None, ...]:
    """The ranks' times for the same work; None where one has measured none.

    ``done``: tokens by the kind of their batches (of :class:`Products`: FLOPs).  What a token of a kind costs is the same on all:
    each has counted it in its first batch, and how much of that was padding says nothing of the later ones.
    """
    kinds = {kind for cost in costs for kind in cost}
    mean = {kind: statistics.fmean(cost[kind] for cost in costs if kind in cost) for kind in kinds}
    work = [sum(mean.get(kind, 1.0) * count for kind, count in own.items()) for own in done]
    return tuple(seconds / flops if flops else None for seconds, flops in zip(spent, work, strict=True))


def slowest_rank(times: tuple[float | None, ...]) -> Slowest | None:
    """Among the ranks' times for the same work; None where a rank did not measure any (the median of two is the smaller)."""
    known = [entry for entry in times if entry is not None]
    if len(known) < len(times) or not min(known, default=0.0):
        return None
    slowest = max(range(len(known)), key=known.__getitem__)
    return Slowest(slowest, known[slowest] / statistics.median_low(known))


class Spans:
    """Time of what no rank waits in, and what was ``done`` in it; on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.done: Counter[str] = Counter()
        self._spans: list[tuple[Any, Any]] = []

    def __bool__(self) -> bool:
        """Whether something was measured."""
        return bool(self._spans)

    def seconds(self) -> float:
        """All of it together."""
        if not self._cuda:
            return sum(end - start for start, end in self._spans)
        if self._spans:
            self._spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Passes(Spans):
    """Whole forward passes, with whatever keeps a GPU waiting for its process."""

    @contextmanager
    def measured(self, kind: str, tokens: int) -> Iterator[None]:
        """The forward pass inside counts."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))
        self.done[kind] += tokens


class Products(Spans):
    """The linear layers of one forward pass."""

    @contextmanager
    def measured(self, model: nn.Module) -> Iterator[None]:
        """The forward pass inside counts."""
        begun: dict[nn.Module, Any] = {}

        def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            begun[layer] = self._now()

        def after(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            self._spans.append((begun.pop(layer), self._now()))
            self.done["FLOPs"] += 2 * inputs[0].numel() * layer.out_features

        with ExitStack() as hooks:
            for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
                hooks.callback(layer.register_forward_pre_hook(before).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
            yield


def name_of(world: World) -> str:
    """A rank as people find it: node and device."""
    device = f"GPU {world.local_rank}" if world.device.type == "cuda" else f"process {world.local_rank}"
    return f"rank {world.rank} ({platform.node()}, {device})"
