"""Blocks from noise: Euler steps on a cached prefix, for all trajectories at once (section 1 of the design, inference)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ladir.config import SampleSettings
from ladir.data.batches import pad_right
from ladir.data.randomness import derive, generator
from ladir.inference.cache import Prefix
from ladir.inference.graphs import Graphs, can_capture
from ladir.inference.guidance import BlockValue, Guidance, Reward, block_inputs, diversity_force, reward_gradient
from ladir.layout import Mark, span_offsets
from ladir.models import flow
from ladir.models.attention import Visibility
from ladir.models.denoiser import Denoiser
from ladir.spans import num_passes, staggered, step_schedule

#: called after every Euler step with (rows, block, step, the current estimate of the clean latents [R, L, d]), and before the
#: first one of a block with the noise that it starts from, as step NOISE
StepHook = Callable[[list[int], int, int, Tensor], None]
NOISE = -1

#: called with (rows, block, the finished latents [R, L, d]) for every block that has become part of their chains
BlockHook = Callable[[list[int], int, Tensor], None]


class Reader(Protocol):
    """Reads finished blocks as text; ``read`` [row, block]: the token ids that it read last; ``encodes``: what it read takes the
    place of the latents, so that what follows depends on every reading, not on the last one alone; ``own``: it is what the blocks
    say, not what was given in its place."""

    read: dict[tuple[int, int], list[int]]
    encodes: bool
    own: bool

    def __call__(self, rows: list[int], blocks: list[int], z: Tensor, state: Tensor, prefix: Prefix) -> Tensor:
        """What takes the place of ``blocks`` of the rows, which end together: their finished latents ``z`` [R, E, L, d];
        ``state`` [R, E, L, H]: what their last step handed on; ``prefix``: what stands before their span, of all branches."""


def step_times(settings: SampleSettings) -> list[float]:
    """The ``num_steps + 1`` times of a block's Euler steps, from 1 (noise) down to 0."""
    return _spaced(settings, settings.num_steps)


def renoise_times(settings: SampleSettings) -> list[float]:
    """The ``renoise_steps + 1`` times from ``renoise_time`` down to 0, spaced as a block's first ones are."""
    return [settings.renoise_time * t for t in _spaced(settings, settings.renoise_steps)]


def restart_times(settings: SampleSettings) -> list[float]:
    """The ``restart_steps + 1`` times of a restart, from ``restart_time`` down to 0, spaced as a block's first ones are."""
    return [settings.restart_time * t for t in _spaced(settings, settings.restart_steps)]


def steps_per_block(settings: SampleSettings) -> int:
    """Denoising steps of a block, its restarts included."""
    return settings.num_steps + settings.restarts * settings.restart_steps


def passes_per_span(settings: SampleSettings, span: int) -> int:
    """Forward passes in which a span's blocks take their steps, restarts included."""
    rounds = [settings.num_steps, *[settings.restart_steps] * settings.restarts]
    return sum(num_passes(steps, span, settings.lag) for steps in rounds)


def _spaced(settings: SampleSettings, steps: int) -> list[float]:
    """``steps + 1`` times from 1 to 0; ``left`` is the share of steps still to do.

    Cosine spacing is that of CosyVoice (Du et al. 2024), on this time axis.
    """
    left = [1 - step / steps for step in range(steps + 1)]
    if settings.spacing == "cosine":
        return [math.sin(math.pi / 2 * share) for share in left]
    if settings.spacing == "power":
        return [share**settings.spacing_power for share in left]
    return left


class TrajectoryNoise:
    """A trajectory's random numbers: functions of (seed, question, trajectory), not of its neighbours in the batch."""

    def __init__(self, seed: int | Sequence[int], keys: Sequence[tuple[str, int]]) -> None:
        """``seed``: of all of them, or of each; ``keys``: question and number of every trajectory."""
        seeds = [seed] * len(keys) if isinstance(seed, int) else seed
        self._keys = list(zip(seeds, keys, strict=True))
        self._latents, self._answers = self._generators("latents"), self._generators("answer")

    @cached_property
    def _thoughts(self) -> list[np.random.Generator]:
        return self._generators("thought")  # few samplings draw from them

    def _generators(self, purpose: str) -> list[np.random.Generator]:
        return [generator(derive(seed, purpose, question), index) for seed, (question, index) in self._keys]

    def apart(self, purpose: str) -> TrajectoryNoise:
        """Other random numbers of the same trajectories, which leave these as they are."""
        seeds = [derive(seed, purpose) for seed, _ in self._keys]
        return TrajectoryNoise(seeds, [key for _, key in self._keys])

    def normal(self, rows: list[int], shape: tuple[int, ...]) -> Tensor:
        """Fresh standard normal numbers [len(rows), *shape]."""
        return torch.from_numpy(np.stack([self._latents[r].standard_normal(shape, dtype=np.float32) for r in rows]))

    def uniform(self, rows: list[int], count: int) -> Tensor:
        """Fresh uniform numbers [len(rows), count] for the answer's tokens."""
        return torch.from_numpy(np.stack([self._answers[r].random(count, dtype=np.float32) for r in rows]))

    def uniform_of_thoughts(self, rows: list[int], shape: tuple[int, ...]) -> Tensor:
        """Fresh uniform numbers [len(rows), *shape] for the tokens that finished blocks are read as."""
        return torch.from_numpy(np.stack([self._thoughts[r].random(shape, dtype=np.float32) for r in rows]))


class KeptSteps:
    """Denoising steps that are made as an SDE's, the others being an ODE's, and what they were of every trajectory.

    For single blocks (span 1) without restarts: a trajectory's come in the order of its blocks.
    """

    def __init__(self, steps: Sequence[int], randomness: float) -> None:
        """``steps``: ascending, without the last one, which ends at the clean latents; ``randomness``: of a transition."""
        self.steps, self.randomness = list(steps), randomness
        self._kept: dict[int, list[Tensor]] = {}

    def add(self, rows: list[int], before: Tensor, after: Tensor) -> None:
        """A step of the trajectories ``rows`` took ``before`` [R, L, d] to ``after`` [R, L, d]."""
        for row, step in zip(rows, torch.stack([before, after], 1).cpu(), strict=True):
            self._kept.setdefault(row, []).append(step)

    def of(self, row: int) -> Tensor:
        """A trajectory's steps [B, S, 2, L, d], standardised: of every block and step where it began and where it led to."""
        return torch.stack(self._kept[row]).unflatten(0, (-1, len(self.steps)))


@dataclass
class FinishedTrajectories:
    """A group of trajectories that stopped after the same block: all their blocks are there, their answers are not.

    ``rows`` [n] trajectory indices; ``latents`` [n, B, L, d] standardised; ``states`` [n, B, H] hidden states at every <EOT>;
    ``prefix`` the cache behind the last <EOT> (conditional branch); ``stopped`` whether the stop head ended it, or the limit on
    blocks.
    """

    rows: list[int]
    latents: Tensor
    states: Tensor
    prefix: Prefix
    stopped: bool


class BlockSampler:
    """Generates blocks behind a prefix until the stop head says the answer follows."""

    kept: KeptSteps | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        settings: SampleSettings,
        noise: TrajectoryNoise,
        reward: Reward | None = None,
        reader: Reader | None = None,
        graphs: Graphs | None = None,
        kept: KeptSteps | None = None,
        value: BlockValue | None = None,
    ) -> None:
        """``reader``: what finished blocks are read by, where they are; ``graphs``: steps are captured and
        replayed where they can be; ``kept``: steps that are random, and kept; ``value``: what ``verifier_scale`` goes by."""
        self.denoiser = denoiser
        self.settings = settings
        self.noise = noise
        self.reward = reward
        self.reader = reader
        self.value = value if settings.verifier_scale else None
        self.graphs = graphs if can_capture(denoiser) else None
        self.kept = kept

    def sample(
        self, prefix: Prefix, owner: Tensor, on_step: StepHook | None = None, on_block: BlockHook | None = None
    ) -> Iterator[FinishedTrajectories]:
        """All trajectories' blocks, in groups as they end: a group's cache is let go before the others go on.

        ``prefix``: R rows, or 2 R with the unconditional branch behind the conditional one (guidance); ``owner`` [R]: question
        of each row, consecutive.
        """
        rows = list(range(len(owner)))
        blocks, states = list[Tensor](), list[Tensor]()
        limit, size = self.settings.max_blocks, self.denoiser.settings.span
        for block in range(limit):
            if block % size == 0:
                span = self.sample_span(prefix, rows, owner, block, on_step)
            blocks.append(span[:, block % size])
            states.append(append_block(self.denoiser, prefix, blocks[-1], self._sentences(rows, block)))
            if on_block is not None:
                on_block(rows, block, blocks[-1])
            stop = self.denoiser.stop_logit(states[-1]) > 0
            leaving = torch.ones_like(stop) if block + 1 == limit else stop
            for ended in (True, False):
                group = (leaving & (stop == ended)).nonzero()[:, 0]
                if len(group):
                    latents, seen = torch.stack(blocks, 1)[group], torch.stack(states, 1)[group]
                    yield FinishedTrajectories([rows[i] for i in group.tolist()], latents, seen, prefix.select(group), ended)
            keep = (~leaving).nonzero()[:, 0]
            if not len(keep):
                break
            prefix = prefix.select(self._branches(keep, len(rows), len(prefix)))
            rows, owner, span = [rows[i] for i in keep.tolist()], owner[keep], span[keep]
            blocks, states = [b[keep] for b in blocks], [s[keep] for s in states]

    def _sentences(self, rows: list[int], block: int) -> list[list[int]] | None:
        """What the rows' finished blocks read as, where they stand as text before what follows."""
        if self.denoiser.settings.context == "latents":
            return None
        assert self.reader is not None
        return [self.reader.read[row, block] for row in rows]

    @staticmethod
    def _branches(keep: Tensor, rows: int, prefix_rows: int) -> Tensor:
        """Prefix rows of the kept trajectories, both guidance branches where there are two."""
        return torch.cat([keep, keep + rows]) if prefix_rows > rows else keep

    def sample_span(self, prefix: Prefix, rows: list[int], owner: Tensor, first: int, on_step: StepHook | None) -> Tensor:
        """A span of blocks [R, J, L, d] per row, from block ``first`` on.

        They go from noise to t = 0, then from ``restart_time`` again as often as asked.
        A block starts ``lag`` passes after the one before it; finished ones stay in the span, where the others see them.
        A restart noises the finished span afresh: errors that estimates drag along are forgotten, what is sure of a block is
        found again (Xu et al. 2023, "Restart sampling for improving generative processes", here on the straight path).
        """
        s = self.settings
        z = s.initial_noise * self._noise(prefix, rows)
        if on_step is not None:
            for number, block in enumerate(z.unbind(1), start=first):
                on_step(rows, number, NOISE, block)
        null = self.denoiser.null_state(z.repeat(len(prefix) // len(z), 1, 1, 1))
        with prefix.cache.read_only():
            hook, reader = _numbered(on_step, first, 0), self._reader_before(s.restarts)
            z, state = self._denoise(prefix, rows, owner, z, null, step_times(s), hook, reader, first)
            for restart in range(s.restarts):
                noise = s.initial_noise * self._noise(prefix, rows)
                z = flow.interpolate(z, noise, torch.tensor(s.restart_time))
                hook = _numbered(on_step, first, s.num_steps + restart * s.restart_steps)
                begun, reader = state if s.restart_keeps_state else null, self._reader_before(s.restarts - restart - 1)
                z, state = self._denoise(prefix, rows, owner, z, begun, restart_times(s), hook, reader, first)
        return z

    def _reader_before(self, restarts: int) -> Reader | None:
        """What reads the blocks of a round before so many ``restarts``: nothing where the next round leaves no trace of it."""
        return self.reader if not restarts or (self.reader is not None and self.reader.encodes) else None

    def drift(
        self,
        prefix: Prefix,
        rows: list[int],
        owner: Tensor,
        z: Tensor,
        sentences: Sequence[list[list[int]] | None],
        on_step: StepHook | None = None,
    ) -> Tensor:
        """How far finished chains ``z`` [R, B, L, d] move when their blocks are noised to ``renoise_time`` and denoised again.

        Mean square [R, B] of the standardised latents' difference.  Chains that hold together are fixed points, others move
        ("FRM", arXiv 2606.29150).  ``prefix``: behind the questions; the chains' blocks are added to it, as ``sentences`` [B][R]
        where they stand as text; ``on_step`` is called after each step.
        """
        size, moved = self.denoiser.settings.span, list[Tensor]()
        null = self.denoiser.null_state(z.new_zeros(len(prefix), size, *z.shape[2:]))
        times, behind = renoise_times(self.settings), iter(sentences)
        for blocks in z.split(size, dim=1):
            span = F.pad(blocks, (0, 0, 0, 0, 0, size - blocks.shape[1]))  # zeros behind a chain's end, as in training
            noisy = flow.interpolate(span, self._noise(prefix, rows), torch.tensor(times[0]))
            with prefix.cache.read_only():
                again, _ = self._denoise(prefix, rows, owner, noisy, null, times, on_step)
            moved.append((again[:, : blocks.shape[1]] - blocks).square().mean((-2, -1)))
            for block in blocks.unbind(1):
                append_block(self.denoiser, prefix, block, next(behind))
        return torch.cat(moved, dim=1)

    def _noise(self, prefix: Prefix, rows: list[int]) -> Tensor:
        """Fresh noise for a span of each row [R, J, L, d]."""
        d = self.denoiser
        return self.noise.normal(rows, (d.settings.span, d.latents_per_block, d.latent_dim)).to(prefix.valid.device)

    def _denoise(
        self,
        prefix: Prefix,
        rows: list[int],
        owner: Tensor,
        z: Tensor,
        state: Tensor,
        times: Sequence[float],
        on_step: StepHook | None,
        reader: Reader | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents [R, J, L, d] from the first of the ``times`` to the last, a block ``lag`` passes after the one before.

        ``state``: what the first pass is handed, a row for every branch; the last one's stands beside the result.  ``reader``:
        what blocks are read by as they end; ``first``: the number of the span's first block.
        """
        s, span, steps = self.settings, z.shape[1], len(times) - 1
        now, passes = torch.tensor(staggered(times, span, s.lag), device=z.device), step_schedule(steps, span, s.lag)
        offsets = torch.from_numpy(span_offsets(span, z.shape[2])).to(z.device)
        visible, positions = prefix.visible(len(offsets)), prefix.positions(offsets)
        groups = owner.unique_consecutive(return_counts=True)[1].tolist() if s.diversity_scale else []
        fresh = self._fresh_noise(rows, steps, z)

        def eager(z: Tensor, times: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return self._velocity(prefix, z, times, state, visible, positions)

        velocity_at = eager if self.graphs is None else self.graphs.replayed(eager, len(passes))
        # Nothing in the loop waits for the device or copies to it (the reader apart); shapes are the same at every pass.
        for number, moving in enumerate(passes):
            velocity, state = velocity_at(z, now[number], state)
            force = diversity_force(z, groups) if s.diversity_scale else None
            pull = self._pull(prefix, z, velocity, now[number])
            blocks, estimates = list(z.unbind(1)), []
            for block, step in moving:
                t, t_next = times[step : step + 2]
                bends = (None if bend is None else bend[:, block] for bend in (force, pull))
                bent = self._bent(velocity[:, block], blocks[block], t, *bends)
                estimates.append((block, step, blocks[block] - t * bent))
                before = blocks[block]
                blocks[block] = self._advance(before, bent, t, t_next, fresh[block][step])
                if self.kept is not None and step in self.kept.steps:
                    self.kept.add(rows, before, blocks[block])
            ended = [block for block, step in moving if step == steps - 1]
            if ended and reader is not None:
                finished, numbers = torch.stack([blocks[block] for block in ended], 1), [first + block for block in ended]
                read = reader(rows, numbers, finished, state[: len(rows), ended], prefix)
                for block, latents in zip(ended, read.unbind(1), strict=True):
                    blocks[block] = latents
            z = torch.stack(blocks, 1)
            if on_step is not None:
                for block, step, x0 in estimates:
                    on_step(rows, block, step, x0)
        return z, state

    def _velocity(
        self, prefix: Prefix, z: Tensor, times: Tensor, state: Tensor, visible: Visibility, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The network's velocity [R, J, L, d] at every block's time [J], of both branches where there are two, each with a
        ``state`` of its own, which goes on also at times that are not guided; and what the step hands on."""
        d = self.denoiser
        branches = len(prefix) // len(z)
        inputs = z.repeat(branches, 1, 1, 1)
        t = times.expand(len(inputs), -1)
        prediction, state = d.denoise_step(inputs, t, state, visible, positions, prefix.cache)
        velocity = flow.to_velocity(d.settings.objective, prediction, inputs, t[..., None, None])
        if branches == 2:
            conditional, unconditional = velocity.chunk(2)
            velocity = Guidance.of(self.settings).velocity(conditional, unconditional, z, times.expand(len(z), -1))
        return velocity, state

    def _bent(self, velocity: Tensor, z: Tensor, t: float, force: Tensor | None, pull: Tensor | None) -> Tensor:
        """``velocity`` [R, L, d] at a block ``z`` and time t, drawn by the reward, by ``force``, away from its neighbours, and by
        ``pull``, towards what the verifier thinks right."""
        if self.reward is not None:
            velocity = velocity - self.reward.scale * t * self._reward_gradient(z - t * velocity, t)
        if force is not None:
            velocity = velocity - self.settings.diversity_scale * t * force
        return velocity if pull is None else velocity - self.settings.verifier_scale * t * pull

    def _pull(self, prefix: Prefix, z: Tensor, velocity: Tensor, times: Tensor) -> Tensor | None:
        """Gradient [R, J, L, d] of every block's value at the estimates that ``velocity`` gives at ``times`` [J]."""
        if self.value is None:
            return None
        return self.value.gradient(prefix, z - times[:, None, None] * velocity)

    def _reward_gradient(self, x0: Tensor, t: float) -> Tensor:
        """Gradient of the reward with respect to standardised latents ``x0`` [R, L, d]; the function sees them unstandardised."""
        assert self.reward is not None
        d = self.denoiser
        return d.latent_std * reward_gradient(self.reward.function, x0 * d.latent_std + d.latent_mean, t)

    def _fresh_noise(self, rows: list[int], steps: int, z: Tensor) -> list[list[Tensor | None]]:
        """What every block's steps of an SDE add to ``z`` [R, J, L, d] but the last ones, [R, L, d] each; an ODE adds nothing."""
        span = z.shape[1]
        if self.settings.sampler == "ode" and self.kept is None:
            return [[None] * steps for _ in range(span)]
        random = range(steps - 1) if self.kept is None else self.kept.steps
        # As large as what the block started from: the marginals keep that scale, at 0 nothing is random.
        noise = self.settings.initial_noise * self.noise.normal(rows, (span, len(random), *z.shape[2:])).to(z.device)
        return [[block[:, random.index(step)] if step in random else None for step in range(steps)] for block in noise.unbind(1)]

    def _advance(self, z: Tensor, velocity: Tensor, t: float, t_next: float, fresh: Tensor | None) -> Tensor:
        """One Euler step of the ODE, or one step of the SDE with the same marginals, which adds ``fresh`` [R, L, d].

        Where noise has the scale k (``initial_noise``), ``z_t = (1 - t) x0 + t k e``, so has ``fresh``; what is kept of the noise
        in z_t has it already (:func:`ladir.models.flow.transition`).
        """
        if fresh is None:  # of an ODE, or an SDE's last one
            return z + (t_next - t) * velocity
        mean, deviation = flow.transition(z, velocity, t, t_next, 1.0 if self.kept is None else self.kept.randomness)
        return mean + deviation * fresh


def append_block(denoiser: Denoiser, prefix: Prefix, z: Tensor, sentences: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Add finished blocks [R, L, d], or the ``sentences`` that they read as, to the cache of every branch; the conditional one's
    hidden states [R, H] at <EOT>."""
    branches = len(prefix) // len(z)
    if sentences is None:
        return prefix.append(block_inputs(denoiser, z).repeat(branches, 1, 1))[: len(z), -1]
    inputs, lengths = sentence_inputs(denoiser, sentences)
    return prefix.append_text(inputs.repeat(branches, 1, 1), lengths.repeat(branches))[: len(z)]


def sentence_inputs(denoiser: Denoiser, sentences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Input vectors [R, T, H] of ``<BOT> tokens <EOT>`` of finished blocks that stand as text, padded behind; how many, [R]."""
    device = denoiser.marks.weight.device
    counts = torch.tensor([len(ids) for ids in sentences], device=device)
    begin, end = (denoiser.mark(mark).expand(len(counts), 1, -1) for mark in (Mark.BOT, Mark.EOT))
    words = denoiser.backbone.embed(pad_right(sentences, 0).to(device))
    inputs = torch.cat([begin, words, end], dim=1)
    is_end = torch.arange(inputs.shape[1], device=device) == counts[:, None] + 1
    return torch.where(is_end[..., None], end, inputs), counts + len((Mark.BOT, Mark.EOT))


def _numbered(on_step: StepHook | None, block: int, step: int) -> StepHook | None:
    """The hook for a part of a span's steps: its first block is number ``block``, the first step number ``step``."""
    if on_step is None:
        return None
    return lambda rows, after, more, x0: on_step(rows, block + after, step + more, x0)
