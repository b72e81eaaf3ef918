"""How time grows with question length, blocks, latents, draws, trajectories and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ladir.config import Config
from ladir.models.denoiser import Denoiser
from training.benchmarks.reasoning_rows import Reasoning
from training.benchmarks.setup import Bench, backward, released
from training.benchmarks.sizes import Size
from training.benchmarks.zero import EngineTraining
from training.jobs import launcher_command, run_job, tail
from training.phases.denoiser import denoiser_weights
from training.planning.models import Lengths
from training.runtime.distributed import start, stop

ENTRY = Path(__file__).parents[1] / "benchmark.py"

#: Euler steps and blocks of the trajectories whose number grows
_STEPS, _BLOCKS = 2, 1
#: blocks of the record whose question grows: few, so that the question is what costs
_FEW_BLOCKS = 2


@dataclass(frozen=True)
class Scaling:
    """Seconds by the value of one quantity, all else fixed."""

    quantity: str
    values: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of log seconds against log value, by least squares."""
        x, y = ([math.log(v) for v in values] for values in (self.values, self.seconds))
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def training_scaling(bench: Bench) -> Iterator[Scaling]:
    """A training pass (forward and backward) of the denoiser on one record, and a step on several ranks."""
    with released():
        model = bench.denoiser(lambda config: _shallow(bench, config)).train()
        base = bench.size.lengths
        cases: dict[str, Callable[[int], Callable[[], Any]]] = {
            "question tokens": lambda n: _pass(bench, model, replace(base, question=n, blocks=_FEW_BLOCKS), draws=1),
            "blocks": lambda n: _pass(bench, model, replace(base, blocks=n), draws=1),
            "draws": lambda n: _pass(bench, model, base, draws=n),
        }
        for quantity, make in cases.items():
            yield _measure(bench, quantity, make)
    with released():
        yield _measure(bench, "latents per block", lambda n: _latents(bench, n))
    if "ranks" in bench.size.scaling and (bench.device.type == "cpu" or torch.cuda.device_count() > 1):
        yield ranks(bench)


def reasoning_scaling(bench: Bench) -> Scaling:
    """Euler steps of a growing number of trajectories of one question."""
    model = bench.denoiser(lambda config: _shallow(bench, config)).eval()
    return _measure(bench, "trajectories", lambda n: Reasoning(bench, model, n, _STEPS, _BLOCKS).ours)


def _shallow(bench: Bench, config: Config) -> None:
    config.backbone.scratch["num_hidden_layers"] = bench.size.scaling_layers


def _measure(bench: Bench, quantity: str, make: Callable[[int], Callable[[], Any]]) -> Scaling:
    values = bench.size.scaling[quantity]
    seconds = bench.in_turn({str(value): make(value) for value in values})
    return Scaling(quantity, values, tuple(seconds[str(value)] for value in values))


def _pass(bench: Bench, model: Denoiser, lengths: Lengths, draws: int, latents: int | None = None) -> Callable[[], Any]:
    batch, weights = bench.denoiser_batch(bench.records([lengths], latents), draws), denoiser_weights(bench.config.denoiser)

    def run() -> None:
        model.zero_grad()
        backward(model, model(batch), weights)

    return run


def _latents(bench: Bench, latents: int) -> Callable[[], Any]:
    def change(config: Config) -> None:
        _shallow(bench, config)
        config.vae.latents_per_block = latents

    return _pass(bench, bench.denoiser(change).train(), bench.size.lengths, draws=1, latents=latents)


def ranks(bench: Bench) -> Scaling:
    """A denoiser step of one global batch on one process and on several (ZeRO-3, a thread each): jobs of their own."""
    values = bench.size.scaling["ranks"]
    return Scaling("ranks", values, tuple(_job_seconds(bench, count) for count in values))


def _job_seconds(bench: Bench, count: int) -> float:
    with TemporaryDirectory() as folder:
        result, log = Path(folder) / "seconds.json", Path(folder) / "log"
        arguments = ["--size", bench.size.name, "--rank-job", str(result)]
        job = run_job(launcher_command(ENTRY, count, arguments), log, count)
        if job.status != 0:
            raise RuntimeError(f"the job on {count} ranks failed: {' | '.join(tail(log, 5))}")
        return float(json.loads(result.read_text(encoding="utf-8")))


def rank_job(size: Size, result: Path) -> None:
    """What each process of :func:`ranks` does: steps on its share of the records; rank 0 writes the seconds of one."""
    torch.set_num_threads(1)
    settings = size.config("cuda" if torch.cuda.is_available() else "cpu")
    world = start(settings.deepspeed)
    try:
        bench = Bench(size, world.device)
        training = EngineTraining(bench.denoiser(lambda config: _shallow(bench, config)), settings, world)
        share = bench.records([size.lengths] * size.records)[world.rank :: world.size]
        batch = bench.denoiser_batch(share, settings.denoiser.draws)

        def step() -> None:
            training(batch)
            world.barrier()

        seconds = bench.in_turn({"step": step})["step"]
        if world.is_main:
            result.write_text(json.dumps(seconds), encoding="utf-8")
    finally:
        stop()
