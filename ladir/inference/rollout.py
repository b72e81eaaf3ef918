"""Training stage 2: the answer is learned through blocks that the model denoised itself (section 1 of the design, rollout).

Keys and values are values here, not a cache that grows: a pass reads those before it and returns its own.  It may therefore run
again in the backward pass, and what is kept between is a block's latents per Euler step: memory is linear in the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from ladir.config import RolloutSettings, SampleSettings
from ladir.data.packing import IGNORE
from ladir.data.rollout import RolloutBatch, sampling_of
from ladir.inference.guidance import Guidance
from ladir.inference.sampler import step_times
from ladir.layout import Mark, block_length, span_offsets
from ladir.models import flow
from ladir.models.attention import left_padded
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.spans import staggered, step_schedule

T = TypeVar("T")

#: the most of every number over all ranks: what one rank needs, the others run along
MaxOverRanks = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of a stretch of tokens in the first n rows: per layer [n, kv heads, T, head]; ``valid`` bool [n, T]."""

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor


class _ReadingLayer(DynamicLayer):
    """One layer in one pass: attends to what is before, keeps the new keys and values apart, changes nothing."""

    new: tuple[Tensor, Tensor]

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self._before = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of everything before and of the new tokens [n, kv heads, P + T, head]."""
        self.new = key_states, value_states
        keys, values = self._before
        return torch.cat([*keys, key_states], dim=-2), torch.cat([*values, value_states], dim=-2)


class RolloutCache:
    """What R rows have behind them, as chunks that are joined only while a pass reads them."""

    def __init__(self, backbone: Backbone, recompute: bool) -> None:
        """``recompute``: passes with gradient store their inputs alone and run again in the backward pass."""
        self.backbone, self.recompute = backbone, recompute
        self.chunks: list[KeyValues] = []

    def visible(self, rows: slice, within: Tensor) -> Tensor:
        """Mask [n, T, P + T] of new tokens that see the past, and one another as ``within`` [n or 1, T, T] says."""
        count, length = rows.stop - rows.start, within.shape[1]
        parts = [_rows(chunk.valid, rows)[:, None].expand(-1, length, -1) for chunk in self.chunks]
        return torch.cat([*parts, within.expand(count, -1, -1)], dim=-1)

    def read(self, rows: slice, function: Callable[[Cache, Tensor], T], inputs: Tensor) -> T:
        """``function`` of a cache that holds the past of ``rows``, and of ``inputs``."""
        past = [
            (
                [_rows(chunk.keys[layer], rows) for chunk in self.chunks],
                [_rows(chunk.values[layer], rows) for chunk in self.chunks],
            )
            for layer in range(int(self.backbone.base.config.get_text_config().num_hidden_layers))
        ]

        def run(inputs: Tensor) -> T:
            with self.backbone.activations_stored():
                return function(Cache(layers=[_ReadingLayer(*layer) for layer in past]), inputs)

        if not (self.recompute and torch.is_grad_enabled()):
            return run(inputs)
        # The repetition must stop early (the default): its last module, whose backward pass is under way, must not come to its
        # end, where an engine would take away weights that it had just gathered for that backward pass.
        return checkpoint(run, inputs, use_reentrant=False)

    def extend(self, rows: slice, inputs: Tensor, positions: Tensor, within: Tensor) -> tuple[Tensor, KeyValues]:
        """Hidden states [n, T, H] of new tokens [n, T, H], and their keys and values (not added to the past)."""
        visible = self.visible(rows, within)

        def run(cache: Cache, inputs: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            hidden = self.backbone(inputs, visible, positions, cache)
            return hidden, [layer.new for layer in cache.layers if isinstance(layer, _ReadingLayer)]

        hidden, new = self.read(rows, run, inputs)
        keys, values = map(list, zip(*new, strict=True))
        return hidden, KeyValues(keys, values, torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device))


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Rows of a chunk's tensor; those it does not have are zeros (which ``valid`` hides)."""
    missing = rows.stop - len(x)
    if missing > 0:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return x if rows == slice(0, len(x)) else x[rows]


class _Thoughts:
    """A rollout under way.

    The past, with guidance that of the branch whose question is hidden as well, latents [R, L, d] by block (zeros behind a
    record's last one), the stop head's summed loss, and zero with the gradient of passes that ran for other ranks' sake.
    """

    def __init__(self, past: RolloutCache, free: RolloutCache | None) -> None:
        self.past, self.free = past, free
        self.latents: list[Tensor] = []
        self.stop_loss = self.anchor = torch.zeros(())

    @property
    def branches(self) -> list[RolloutCache]:
        """The pasts that a denoising step reads, that of the question first."""
        return [self.past] if self.free is None else [self.past, self.free]


class Rollout(nn.Module):
    """A denoiser in stage 2; ``forward`` gives stage 1's losses and the answer's through the model's own blocks."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: RolloutSettings,
        max_blocks: int,
        recompute: bool,
        max_over_ranks: MaxOverRanks | None = None,
        sample: SampleSettings | None = None,
    ) -> None:
        """``max_blocks``: most of a record; ``recompute``: see :class:`RolloutCache`.

        ``max_over_ranks``: needed with several ranks.

        ``sample``: how sampling is set, which the own blocks follow in steps, spacing, lag and guidance (:func:`sampling_of`).
        """
        super().__init__()
        self.sample = sample or SampleSettings()
        self.denoiser, self.settings, self.max_blocks, self.recompute = denoiser, settings, max_blocks, recompute
        self._own_blocks = settings.last_blocks or max_blocks
        self._max_over_ranks = max_over_ranks

    def forward(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Summed losses: stage 1's, and ``rollout``, the answer's cross-entropy, mean over a record's labels.

        ``stop`` includes the decisions behind the model's own blocks.  Metrics: how far the own blocks are from the gold solution
        (mean square per element), how often that is another one than the record's own, how many answer tokens are right.
        """
        thoughts = self._generate_blocks(batch)
        own = torch.stack(thoughts.latents, dim=1).detach()
        own = F.pad(own, (0, 0, 0, 0, 0, batch.gold.shape[2] - own.shape[1]))
        chosen, distance = self._nearest(own, batch)
        loss, right = self._answer(thoughts.past, batch, chosen)
        losses = self._teacher_losses(batch, own, chosen)
        losses["rollout"] = loss + thoughts.anchor
        losses["stop"] = losses["stop"] + thoughts.stop_loss
        count = torch.tensor(float(len(batch.blocks)), device=loss.device)
        return {
            **losses,
            "metric/rollout_distance": torch.stack([distance.sum(), count]),
            "metric/rollout_other_gold": torch.stack([(chosen > 0).float().sum(), count]),
            "metric/rollout_token_accuracy": right,
        }

    @property
    def sampling(self) -> SampleSettings:
        """How the own blocks are denoised."""
        return sampling_of(self.settings, self.sample)

    def _rounds(self, blocks: Sequence[int]) -> list[int]:
        """Per span what some rank has to do: 0 nothing, 1 add true blocks, 2 denoise some and add them."""
        last, span = self._own_blocks, self.denoiser.settings.span
        mine = [
            2 if any(first < count < first + span + last for count in blocks) else int(first < blocks[0])
            for first in range(0, self.max_blocks, span)
        ]
        rounds = list(self._max_over_ranks(mine)) if self._max_over_ranks is not None else mine
        return [work for work in rounds if work]

    def _generate_blocks(self, batch: RolloutBatch) -> _Thoughts:
        """Every record's true number of blocks, the last ones its own, all rows at once."""
        guided = self.sampling.guidance_scale != 1
        thoughts = _Thoughts(self._question(batch), self._question(batch, hidden=True) if guided else None)
        span = self.denoiser.settings.span
        for number, work in enumerate(self._rounds(batch.blocks)):
            first = number * span
            own = self._own(batch, thoughts, first) if work == 2 else batch.noise[:0, :span]
            active = sum(count > first for count in batch.blocks)
            z = torch.cat([_span(batch.gold[: max(active, 1) - len(own), 0], first, span), own])
            for place in range(span):
                self._add(batch, thoughts, z[:, place], first + place)
        return thoughts

    def _add(self, batch: RolloutBatch, thoughts: _Thoughts, z: Tensor, block: int) -> None:
        """Finished blocks ``z`` [n, L, d] to the past of those rows that have so many; where none has, row 0 runs along."""
        active = sum(count > block for count in batch.blocks)
        z = z[: max(active, 1)]
        (stop, chunk), *free = [self._append(past, batch, z, block) for past in thoughts.branches]
        for unread, _ in free:  # no loss looks at it, yet all ranks go backward through the pass
            thoughts.anchor = thoughts.anchor + 0.0 * unread.sum()
        if not active:
            thoughts.anchor = thoughts.anchor + 0.0 * stop.sum()
            return
        for past, new in zip(thoughts.branches, [chunk, *(own for _, own in free)], strict=True):
            past.chunks.append(new)
        thoughts.latents.append(F.pad(z, (0, 0, 0, 0, 0, len(batch.blocks) - active)))
        ends = (batch.num_blocks[:active] == block + 1).float()
        thoughts.stop_loss = thoughts.stop_loss + F.binary_cross_entropy_with_logits(stop, ends, reduction="sum")

    def _question(self, batch: RolloutBatch, hidden: bool = False) -> RolloutCache:
        """The past that begins with the questions, or with one learned vector in place of each of their tokens (``hidden``)."""
        past = RolloutCache(self.denoiser.backbone, self.recompute)
        bidirectional = self.denoiser.settings.bidirectional_question
        valid, visible, positions = left_padded(batch.question_lengths, batch.question_ids.shape[1], bidirectional)
        inputs = self.denoiser.backbone.embed(batch.question_ids)
        if hidden:
            places = torch.arange(inputs.shape[1], device=inputs.device)
            first, last = batch.shown
            covered = places >= (inputs.shape[1] - batch.question_lengths + first)[:, None]
            covered &= places < inputs.shape[1] - last
            inputs = torch.where(covered[..., None], self.denoiser.mark(Mark.NULL), inputs)
        _, chunk = past.extend(slice(0, len(batch.blocks)), inputs, positions, visible)
        past.chunks.append(replace(chunk, valid=valid))
        return past

    def _own(self, batch: RolloutBatch, thoughts: _Thoughts, first: int) -> Tensor:
        """Latents [n, J, L, d] of a span of the n active rows that have own blocks in it: the last of the active ones.

        Where there is none, row 0 runs along and only its (zero) gradient is kept.
        """
        span = self.denoiser.settings.span
        limits = (first, first + span + self._own_blocks - 1)
        active, true = (sum(count > limit for count in batch.blocks) for limit in limits)
        rows = slice(true, active) if active > true else slice(0, 1)
        places = first + torch.arange(span, device=batch.num_blocks.device)
        given = places < batch.num_blocks[rows, None] - self._own_blocks
        z = self._denoise(thoughts, batch, rows, first, given & (active > true))
        return z if active > true else z[:0]

    def _positions(self, batch: RolloutBatch, rows: slice, block: int | Tensor, offsets: Tensor) -> Tensor:
        """Rotary positions [n, T] of tokens at ``offsets`` [T] from the start of a row's block ``block`` on."""
        start = batch.question_lengths[rows] + block * block_length(self.denoiser.latents_per_block)
        return start[:, None] + offsets

    def _denoise(self, thoughts: _Thoughts, batch: RolloutBatch, rows: slice, first: int, given: Tensor) -> Tensor:
        """A span [n, J, L, d] from noise to t = 0 in Euler steps of the ODE; those ``given`` [n, J] are true and finished.

        A block's last ``gradient_steps`` carry gradient.
        """
        d, s, how, device = self.denoiser, self.settings, self.sampling, batch.noise.device
        span, steps = d.settings.span, how.num_steps
        learned = steps - (steps if s.gradient_steps is None else s.gradient_steps)  # the first such step
        offsets = torch.from_numpy(span_offsets(span, d.latents_per_block)).to(device)
        visible = thoughts.past.visible(rows, _all_see_all(len(offsets), device))
        positions = self._positions(batch, rows, first, offsets)
        true = given[..., None, None]
        z = torch.where(true, _span(batch.gold[rows, 0], first, span), _span(batch.noise[rows], first, span))
        states = [d.null_state(z)] * len(thoughts.branches)
        times = step_times(how)
        now = torch.tensor(staggered(times, span, how.lag), device=device)
        for number, moving in enumerate(step_schedule(steps, span, how.lag)):
            blocks = list(z.unbind(1))  # here, so that finished ones keep the gradient that they have
            learns = any(step >= learned for _, step in moving)
            with nullcontext() if learns else torch.no_grad():
                t = now[number].masked_fill(given, 0.0)
                found = [
                    past.read(rows, _predict(d, t, state, visible, positions), z)
                    for past, state in zip(thoughts.branches, states, strict=True)
                ]
                predictions, states = [prediction for prediction, _ in found], [state for _, state in found]
                velocity = self._velocity(predictions, z, t)
                for block, step in moving:
                    moved = blocks[block] + (times[step + 1] - times[step]) * velocity[:, block]
                    blocks[block] = moved if step >= learned else moved.detach()
            z = torch.where(true, z, torch.stack(blocks, 1))
            if not s.carry_gradient:
                states = [state.detach() for state in states]
            if learns:  # ranks whose blocks here are all true go backward through this pass as well
                thoughts.anchor = thoughts.anchor + 0.0 * torch.stack(predictions).sum()
        return z

    def _velocity(self, predictions: Sequence[Tensor], z: Tensor, t: Tensor) -> Tensor:
        """The velocity [n, J, L, d] of one branch's prediction, or of both with guidance."""
        objective = self.denoiser.settings.objective
        first, *free = [flow.to_velocity(objective, prediction, z, t[..., None, None]) for prediction in predictions]
        return Guidance.of(self.sampling).velocity(first, free[0], z, t) if free else first

    def _append(self, past: RolloutCache, batch: RolloutBatch, z: Tensor, block: int) -> tuple[Tensor, KeyValues]:
        """The stop head's logits [n] behind finished blocks [n, L, d] of the first rows, and the blocks' keys and values."""
        d, rows = self.denoiser, slice(0, len(z))
        bot, eot = (d.mark(mark).expand(len(z), 1, -1) for mark in (Mark.BOT, Mark.EOT))
        inputs = torch.cat([bot, d.clean_inputs(z), eot], dim=1)
        length = inputs.shape[1]
        positions = self._positions(batch, rows, block, torch.arange(length, device=z.device))
        hidden, chunk = past.extend(rows, inputs, positions, _all_see_all(length, z.device))
        return d.stop_logit(hidden[:, -1]), chunk

    def _nearest(self, latents: Tensor, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Which gold solution [R] each row is trained towards, and its distance [R]: mean square per element."""
        squares = (latents[:, None] - batch.gold).square().sum((3, 4))
        real = torch.arange(squares.shape[2], device=latents.device) < batch.num_blocks[:, None]
        elements = batch.num_blocks[:, None] * latents.shape[2] * latents.shape[3]
        distances = (squares * real[:, None]).sum(2) / elements
        distances = distances.masked_fill(~batch.is_gold, torch.inf)
        if self.settings.gold == "sampled":
            return torch.zeros_like(batch.num_blocks), distances[:, 0]
        return distances.argmin(1), distances.amin(1)

    def _answer(self, past: RolloutCache, batch: RolloutBatch, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen answers' cross-entropy behind all blocks, per record the mean over its labels, summed; (right, labels)."""
        d, everyone = self.denoiser, slice(0, len(batch.blocks))
        row = torch.arange(len(chosen), device=chosen.device)
        ids, labels = batch.answer_ids[row, chosen], batch.answer_labels[row, chosen]
        soa = d.mark(Mark.SOA).expand(len(ids), 1, -1)
        inputs = torch.cat([soa, d.backbone.embed(ids)], dim=1)
        length = inputs.shape[1]
        positions = self._positions(batch, everyone, batch.num_blocks, torch.arange(length, device=ids.device))
        hidden, _ = past.extend(everyone, inputs, positions, _all_see_all(length, ids.device).tril())
        labelled = labels != IGNORE
        # Padding does not go through the LM head; how many labels there may be is known without asking the device.
        first = labelled.flatten().int().argsort(descending=True, stable=True)[: batch.most_labels]
        losses, right = d.backbone.label_losses(hidden.flatten(0, 1)[first], labels.flatten()[first])
        count = torch.stack([right.sum(), labelled.sum()]).float()
        return (losses / labelled.sum(1)[first // length]).sum(), count

    def _teacher_losses(self, batch: RolloutBatch, own: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Stage 1's losses; with ``own_context`` a block's target is the chosen gold's, behind the own blocks before it."""
        if not batch.own_context:
            return self.denoiser(batch.teacher)
        gold = batch.gold[torch.arange(len(chosen), device=chosen.device), chosen]
        z0, context = (latents.flatten(0, 1)[batch.block_at] for latents in (gold, own))
        losses = self.denoiser(replace(batch.teacher, z0=z0, context=context))
        losses.pop("token", None)  # its labels are the record's own solution's
        return losses


def _predict(
    denoiser: Denoiser, time: Tensor, state: Tensor, visible: Tensor, positions: Tensor
) -> Callable[[Cache, Tensor], tuple[Tensor, Tensor]]:
    """The network's prediction at ``time`` and what it hands on, as a function of cache and noisy latents."""
    return lambda cache, z: denoiser.denoise_step(z, time, state, visible, positions, cache)


def _span(blocks: Tensor, first: int, span: int) -> Tensor:
    """The span from block ``first`` on, [n, J, L, d] of [n, B, L, d]; the last one, where there are no more."""
    first = min(first, blocks.shape[1] - span)
    return blocks[:, first : first + span]


def _all_see_all(length: int, device: torch.device) -> Tensor:
    return torch.ones(1, length, length, dtype=torch.bool, device=device)
