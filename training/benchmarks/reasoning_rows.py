"""Inference against the obvious way: cached prefixes shared by all trajectories."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.inference.graphs import Graphs
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from ladir.layout import block_length
from ladir.models.denoiser import Denoiser
from ladir.reference import reference_blocks
from training.benchmarks.setup import Bench, Row

#: trajectories and steps of the comparison of numbers, which runs every block both ways
_CHECKED_TRAJECTORIES, _CHECKED_STEPS = 4, 2
#: blocks of the obvious way that are timed: those in the middle, whose sequences are of mean length
_TIMED_BLOCKS = 2


class Reasoning:
    """One question with trajectories that all think ``blocks`` blocks."""

    def __init__(self, bench: Bench, denoiser: Denoiser, trajectories: int, steps: int, blocks: int, before: int = 0) -> None:
        """``before``: blocks that are there already; they count as a longer question."""
        self.bench, self.denoiser = bench, denoiser
        with torch.no_grad():  # nobody stops early
            nn.init.zeros_(denoiser.stop_head.weight)
            denoiser.stop_head.bias.fill_(-1e4)
        [ids] = bench.token_ids([bench.size.lengths.question + before * block_length(bench.size.latents)])
        with torch.no_grad():
            self.question = denoiser.backbone.embed(torch.tensor([ids], device=bench.device))
        self.owner = torch.zeros(trajectories, dtype=torch.int64, device=bench.device)
        self.settings = SampleSettings(num_steps=steps, max_blocks=blocks)
        self.step_seconds: dict[int, list[float]] = {}

    def _noise(self) -> TrajectoryNoise:
        return TrajectoryNoise(0, [("question", i) for i in range(len(self.owner))])

    @torch.no_grad()
    def ours(self) -> Tensor:
        """Latents [R, B, L, d] behind a cached question; the seconds of every step but a block's first are kept."""
        last = 0.0

        def watch(rows: list[int], block: int, step: int, x0: Tensor) -> None:
            nonlocal last
            now = self.bench.now()
            if step > 0:
                self.step_seconds.setdefault(block, []).append(now - last)
            last = now

        lengths = torch.tensor([self.question.shape[1]], device=self.bench.device)
        prefix = Prefix.start(self.denoiser.backbone, self.question, lengths)[0].share(self.owner)
        sampler = BlockSampler(self.denoiser, self.settings, self._noise(), graphs=Graphs())
        [group] = sampler.sample(prefix, self.owner, watch)
        return group.latents

    def obvious(self) -> Tensor:
        """The same, the whole sequence run anew at every step."""
        question = self.question[self.owner]
        return reference_blocks(self.denoiser, question, self.settings, self._noise())


def cached_reasoning(bench: Bench) -> Row:
    """All trajectories of a question on its cache against recomputing the sequence at every step.

    Every step of a block costs the same, so few are made and the others are added: ours after the first of a block, which
    appending the block before and preparing the mask are not part of.  The obvious way's cost grows with the block's number, a
    little more than linearly (attention): counted as that of the blocks in the middle it is rather too small.
    """
    size, denoiser = bench.size, bench.denoiser().eval()
    blocks = size.lengths.blocks
    check = Reasoning(bench, denoiser, _CHECKED_TRAJECTORIES, _CHECKED_STEPS, blocks)
    bench.check_equal("cached reasoning", check.ours(), check.obvious())
    ours = Reasoning(bench, denoiser, size.trajectories, size.timed_steps, blocks)
    timed = min(_TIMED_BLOCKS, blocks)
    obvious = Reasoning(bench, denoiser, size.trajectories, size.timed_obvious, timed, before=(blocks - timed) // 2)
    seconds = bench.in_turn({"ours": ours.ours, "obvious": obvious.obvious}, rounds=1, warm_up=False)
    again = bench.seconds(ours.ours)
    steps = sum(statistics.median(found) for found in ours.step_seconds.values())  # one of every block
    total = statistics.mean([seconds["ours"], again]) + (size.steps - size.timed_steps) * steps
    recomputed_step = seconds["obvious"] / timed / size.timed_obvious
    block, new, question = block_length(size.latents), size.latents + 1, size.lengths.question
    tokens = question + size.trajectories * blocks * (size.steps * new + block)
    all_tokens = size.trajectories * size.steps * sum(question + b * block + new for b in range(blocks))
    return Row(
        "cached_reasoning",
        f"shared cache, {size.trajectories} trajectories, {size.steps} steps, {blocks} blocks",
        "the whole sequence at every step",
        total,
        recomputed_step * blocks * size.steps,
        at_most=all_tokens / tokens,
        details={
            "trajectories_per_second": size.trajectories / total,
            "step_seconds": steps / blocks,
            "recomputed_step_seconds": recomputed_step,
        },
    )
