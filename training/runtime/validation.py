"""Validation: the same losses on held-out samples, with the averaged weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from training.runtime.distributed import World
from training.runtime.engine import Engine
from training.runtime.meters import LossSums, Meters
from training.runtime.phase import Phase, SampleSource, ValidationHook
from training.runtime.preemption import BrokenOff
from training.runtime.sampler import MicroBatch
from training.runtime.telemetry import Telemetry


def validate(
    engine: Engine, phase: Phase, most: int, micro: int, show: Callable[[], None], stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean loss per term over the first ``most`` validation samples, on all ranks alike; empty without such.

    Sample n has number n, so the noise is the same each time.  Then ``show`` is called, which may have samples of its own.
    ``stopped`` (collective) is asked between micro batches; None where it breaks off.
    """
    with engine.averaged_weights():
        averages = {} if phase.validation is None else _averages(engine, phase, phase.validation, most, micro, stopped)
        if averages is not None and not stopped():
            show()
    return averages


@torch.no_grad()
def show_samples(engine: Engine, phase: Phase, telemetry: Telemetry, step: int) -> float:
    """The phase's ``on_validate``, where it has one; the seconds it took on rank 0, which alone writes (collective)."""
    start = time.perf_counter()
    if isinstance(phase, ValidationHook):
        engine.model.eval()
        with suppress(BrokenOff):  # by a stop: the samples go without
            phase.on_validate(engine.model, telemetry, step)
    seconds: float = engine.world.broadcast(time.perf_counter() - start)
    return seconds


def _averages(
    engine: Engine, phase: Phase, source: SampleSource, most: int, micro: int, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    world = engine.world
    sums, counts = LossSums(phase.weights, world.device), dict.fromkeys(phase.weights, 0.0)
    meters = Meters(phase.weights)
    for (indices, numbers), real in share(min(most, source.num_samples), micro, world):
        if stopped():
            return None
        batch = source.collate(indices, numbers, training=False)
        outputs = engine.evaluate(batch)
        if real:
            sums.add(outputs)
            meters.add_metrics(outputs)
            for term in counts:
                counts[term] += batch.counts.get(term, 0)
    total = world.sum(torch.cat([sums.stacked().cpu(), torch.tensor(list(counts.values()), dtype=torch.float64)]))
    terms, values = list(counts), total.tolist()
    meters.add_losses(dict(zip(terms, values[: len(terms)], strict=True)), dict(zip(terms, values[len(terms) :], strict=True)))
    meters.collect(world)
    return meters.averages()


def share(num_samples: int, micro: int, world: World) -> list[tuple[MicroBatch, bool]]:
    """This rank's micro batches of samples 0..num_samples, and whether they count.

    All ranks get the same number, as sharded weights demand; a rank that is short repeats the first without counting.
    """
    starts = list(range(0, num_samples, micro))
    parts = [list(range(start, min(start + micro, num_samples))) for start in starts]
    rounds = -(-len(parts) // world.size)
    mine = [number * world.size + world.rank for number in range(rounds)]
    return [((parts[n], parts[n]), True) if n < len(parts) else ((parts[0], parts[0]), False) for n in mine]
