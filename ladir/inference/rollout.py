"""Training stage 2: the answer is learned through blocks that the model denoised itself (section 1 of the design, rollout).

A pass reads the keys and values before it, changes none, and returns its own.  It may therefore run again in the backward pass,
and what is kept between is a block's latents per Euler step: memory is linear in the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from ladir.models.later import LaterWeights, PassGroup
from ladir.spans import staggered, step_schedule

T = TypeVar("T")

#: the most of every number over all ranks: what one rank needs, the others run along
MaxOverRanks = Callable[[Sequence[int]], Sequence[int]]


class _LayerPast:
    """One layer's keys and values of G branches and R rows, and the gradients that passes leave for them.

    Autograd would take the gradient of what is behind a row apart in every pass, piece by piece.  Here a pass reads a stretch of
    one tensor and adds to a stretch of another; a chain of empty tickets, from every piece to the passes that read it, makes the
    backward pass come to a piece after them.
    """

    def __init__(self, branches: int, rows: int, capacity: int, like: Sequence[Tensor]) -> None:
        """``like``: keys and values [n, kv heads, T, head]."""
        shapes = [(branches, rows, x.shape[1], capacity, x.shape[3]) for x in like]
        self.keys, self.values = (x.new_zeros(shape) for x, shape in zip(like, shapes, strict=True))
        self.gradients: tuple[Tensor, Tensor] | None = None

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values, as large as they are."""
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        return self.gradients


class _Add(torch.autograd.Function):
    """Keys and values to a layer's past; their gradient is what all passes that read it have left there."""

    @staticmethod
    def forward(ctx: Any, past: _LayerPast, stretch: slice, ticket: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The ticket of those who read them."""
        branches = len(past.keys)
        ctx.set_materialize_grads(False)
        ctx.past, ctx.place = past, (slice(None), slice(len(keys) // branches), slice(None), stretch)
        past.keys[ctx.place] = keys.unflatten(0, (branches, -1))
        past.values[ctx.place] = values.unflatten(0, (branches, -1))
        return torch.empty_like(ticket)

    @staticmethod
    def backward(ctx: Any, *ticket: Tensor | None) -> Any:
        """Nothing for the ticket before it, which only orders."""
        keys, values = (gradient[ctx.place].flatten(0, 1) for gradient in ctx.past.gradient())
        return None, None, None, keys, values


class _Read(torch.autograd.Function):
    """A layer's past of some rows with new keys and values behind it [n, kv heads, P + T, head]."""

    @staticmethod
    def forward(ctx: Any, past: _LayerPast, place: Any, ticket: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``place``: the branches, rows and tokens that are read; the new ones are of the same branches and rows."""
        ctx.past, ctx.place = past, place
        before = past.keys[place], past.values[place]
        both = zip(before, (keys, values), strict=True)
        joined = [torch.cat([old, new.unflatten(0, old.shape[:2])], dim=-2).flatten(0, 1) for old, new in both]
        return joined[0], joined[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of the past where it is kept, of the new ones as it is."""
        new = []
        for kept, gradient in zip(ctx.past.gradient(), gradients, strict=True):
            old = kept[ctx.place]
            length = old.shape[-2]
            old += gradient[..., :length, :].unflatten(0, old.shape[:2])
            new.append(gradient[..., length:, :])
        return None, None, None, *new


class _ReadingLayer(DynamicLayer):
    """One layer in one pass: attends to what is before, keeps the new keys and values apart, changes nothing."""

    new: tuple[Tensor, Tensor]

    def __init__(self, past: _LayerPast, place: Any, ticket: Tensor) -> None:
        super().__init__()
        self._past, self._place, self._ticket = past, place, ticket

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of everything before and of the new tokens [n, kv heads, P + T, head]."""
        self.new = key_states, value_states
        keys, values = _Read.apply(self._past, self._place, self._ticket, key_states, value_states)
        return keys, values


class _FirstLayer(DynamicLayer):
    """One layer in the pass before which there is nothing."""

    new: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values."""
        self.new = key_states, value_states
        return key_states, value_states


#: keys and values of new tokens, by layer
KeyValues = list[tuple[Tensor, Tensor]]


class RolloutCache:
    """What R rows have behind them in each of their branches, which go through the LM together: rows of branch 0, then of 1.

    With guidance there are two branches, that of the question and that which does not see it.
    """

    def __init__(
        self, backbone: Backbone, recompute: bool, branches: int, rows: int, capacity: int, weights: LaterWeights
    ) -> None:
        """``recompute``: passes with gradient store their inputs alone and run again in the backward pass.

        ``capacity``: most tokens that a row will have behind it; ``weights``: the backbone's.
        """
        self.backbone, self.recompute, self._weights = backbone, recompute, weights
        self._group = PassGroup()
        self.branches, self._rows, self._capacity = branches, rows, capacity
        self._layers: list[_LayerPast] = []
        self._tickets: list[Tensor] = []  # apart from the layers, which their graphs know
        self._valid = torch.zeros(0)
        self._length = 0

    def each(self, x: Tensor) -> Tensor:
        """The rows of ``x`` once for every branch."""
        return x if self.branches == 1 else torch.cat([x] * self.branches)

    def visible(self, rows: slice, within: Tensor, branches: int) -> Tensor:
        """Mask [G n, T, P + T] of new tokens that see the past, and one another as ``within`` [n or 1, T, T] says."""
        count, length = rows.stop - rows.start, within.shape[1]
        mask = within.expand(count, -1, -1)
        if self._layers:
            mask = torch.cat([self._valid[rows, None, : self._length].expand(-1, length, -1), mask], dim=-1)
        return mask if branches == 1 else torch.cat([mask] * branches)

    def read(self, rows: slice, function: Callable[[Cache, Tensor], T], inputs: Tensor, branches: int) -> T:
        """``function`` of a cache that holds the past of ``rows`` in the first ``branches``, and of ``inputs``."""
        place = (slice(branches), rows, slice(None), slice(self._length))
        past = [(layer, place, ticket) for layer, ticket in zip(self._layers, self._tickets, strict=True)]
        count = int(self.backbone.base.config.get_text_config().num_hidden_layers)
        group = self._group

        def run(inputs: Tensor) -> T:
            layers: list[Any] = [_ReadingLayer(*layer) for layer in past] or [_FirstLayer() for _ in range(count)]
            with self.backbone.activations_stored(), self._weights.within(group):
                return function(Cache(layers=layers), inputs)

        if not (self.recompute and torch.is_grad_enabled()):
            return run(inputs)
        # The repetition must stop early (the default): its last module, whose backward pass is under way, must not come to its
        # end, where an engine would take away weights that it had just gathered for that backward pass.
        return checkpoint(run, inputs, use_reentrant=False)

    def next_group(self) -> None:
        """The passes from here on give their weights' gradients together, apart from those before."""
        self._group = PassGroup()

    def extend(self, rows: slice, inputs: Tensor, positions: Tensor, within: Tensor, branches: int) -> tuple[Tensor, KeyValues]:
        """Hidden states [G n, T, H] of new tokens [G n, T, H], and their keys and values (not added to the past)."""
        visible = self.visible(rows, within, branches)

        def run(cache: Cache, inputs: Tensor) -> tuple[Tensor, KeyValues]:
            hidden = self.backbone(inputs, visible, positions, cache)
            return hidden, [layer.new for layer in cache.layers if isinstance(layer, _ReadingLayer | _FirstLayer)]

        return self.read(rows, run, inputs, branches)

    def add(self, new: KeyValues, valid: Tensor) -> None:
        """New tokens of all branches to the past of the first n rows; ``valid`` bool [n, T]: those that are there."""
        if not self._layers:
            self._layers = [_LayerPast(self.branches, self._rows, self._capacity, layer) for layer in new]
            self._tickets = [keys.new_zeros(()) for keys, _ in new]
            self._valid = valid.new_zeros(self._rows, self._capacity)
        stretch = slice(self._length, self._length + valid.shape[1])
        known = zip(self._layers, self._tickets, new, strict=True)
        self._tickets = [_Add.apply(layer, stretch, ticket, *own) for layer, ticket, own in known]
        self._valid[: len(valid), stretch] = valid
        self._length = stretch.stop


class _Thoughts:
    """A rollout under way.

    The past, latents [R, L, d] by block (zeros behind a record's last one), the stop head's summed loss, and zero with the
    gradient of passes that ran for other ranks' sake.
    """

    def __init__(self, past: RolloutCache) -> None:
        self.past = past
        self.latents: list[Tensor] = []
        self.stop_loss = self.anchor = torch.zeros(())


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
        self._weights = LaterWeights(denoiser.backbone.base.get_decoder())
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
        span, rounds = self.denoiser.settings.span, self._rounds(batch.blocks)
        thoughts = _Thoughts(self._question(batch, len(rounds) * span))
        for number, work in enumerate(rounds):
            first = number * span
            thoughts.past.next_group()
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
        stop, new = self._append(thoughts.past, batch, z, block)
        if not active:
            thoughts.anchor = thoughts.anchor + 0.0 * stop.sum()
            return
        thoughts.past.add(new, torch.ones(active, new[0][0].shape[-2], dtype=torch.bool, device=z.device))
        thoughts.latents.append(F.pad(z, (0, 0, 0, 0, 0, len(batch.blocks) - active)))
        ends = (batch.num_blocks[:active] == block + 1).float()
        thoughts.stop_loss = thoughts.stop_loss + F.binary_cross_entropy_with_logits(stop, ends, reduction="sum")

    def _question(self, batch: RolloutBatch, blocks: int) -> RolloutCache:
        """The past that begins with the questions, with room for so many blocks.

        With guidance a second branch begins with one learned vector in place of each of their tokens.
        """
        rows, branches = len(batch.blocks), 1 if self.sampling.guidance_scale == 1 else 2
        capacity = batch.question_ids.shape[1] + blocks * block_length(self.denoiser.latents_per_block)
        past = RolloutCache(self.denoiser.backbone, self.recompute, branches, rows, capacity, self._weights)
        bidirectional = self.denoiser.settings.bidirectional_question
        valid, visible, positions = left_padded(batch.question_lengths, batch.question_ids.shape[1], bidirectional)
        inputs = self.denoiser.backbone.embed(batch.question_ids)
        if branches > 1:
            places = torch.arange(inputs.shape[1], device=inputs.device)
            first, last = batch.shown
            covered = places >= (inputs.shape[1] - batch.question_lengths + first)[:, None]
            covered &= places < inputs.shape[1] - last
            inputs = torch.cat([inputs, torch.where(covered[..., None], self.denoiser.mark(Mark.NULL), inputs)])
        _, new = past.extend(slice(0, rows), inputs, past.each(positions), visible, branches)
        past.add(new, valid)
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
        past = thoughts.past
        visible = past.visible(rows, _all_see_all(len(offsets), device), past.branches)
        positions = past.each(self._positions(batch, rows, first, offsets))
        true = given[..., None, None]
        z = torch.where(true, _span(batch.gold[rows, 0], first, span), _span(batch.noise[rows], first, span))
        state = past.each(d.null_state(z))
        times = step_times(how)
        now = torch.tensor(staggered(times, span, how.lag), device=device)
        for number, moving in enumerate(step_schedule(steps, span, how.lag)):
            blocks = list(z.unbind(1))  # here, so that finished ones keep the gradient that they have
            learns = any(step >= learned for _, step in moving)
            with nullcontext() if learns else torch.no_grad():
                t = now[number].masked_fill(given, 0.0)
                predict = _predict(d, past.each(t), state, visible, positions)
                predictions, state = past.read(rows, predict, past.each(z), past.branches)
                velocity = self._velocity(predictions.chunk(past.branches), z, t)
                for block, step in moving:
                    moved = blocks[block] + (times[step + 1] - times[step]) * velocity[:, block]
                    blocks[block] = moved if step >= learned else moved.detach()
            z = torch.where(true, z, torch.stack(blocks, 1))
            if not s.carry_gradient:
                state = state.detach()
            if learns:  # ranks whose blocks here are all true go backward through this pass as well
                thoughts.anchor = thoughts.anchor + 0.0 * predictions.sum()
        return z

    def _velocity(self, predictions: Sequence[Tensor], z: Tensor, t: Tensor) -> Tensor:
        """The velocity [n, J, L, d] of one branch's prediction, or of both with guidance."""
        objective = self.denoiser.settings.objective
        first, *free = [flow.to_velocity(objective, prediction, z, t[..., None, None]) for prediction in predictions]
        return Guidance.of(self.sampling).velocity(first, free[0], z, t) if free else first

    def _append(self, past: RolloutCache, batch: RolloutBatch, z: Tensor, block: int) -> tuple[Tensor, KeyValues]:
        """The stop head's logits [n] behind finished blocks [n, L, d] of the first rows, and the blocks' keys and values.

        The branch that does not see the question has them behind it as well, but decides nothing.
        """
        d, rows = self.denoiser, slice(0, len(z))
        bot, eot = (d.mark(mark).expand(len(z), 1, -1) for mark in (Mark.BOT, Mark.EOT))
        inputs = torch.cat([bot, d.clean_inputs(z), eot], dim=1)
        length = inputs.shape[1]
        positions = self._positions(batch, rows, block, torch.arange(length, device=z.device))
        within = _all_see_all(length, z.device)
        hidden, new = past.extend(rows, past.each(inputs), past.each(positions), within, past.branches)
        return d.stop_logit(hidden[: len(z), -1]), new

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
        hidden, _ = past.extend(everyone, inputs, positions, _all_see_all(length, ids.device).tril(), branches=1)
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
