"""The method written out the obvious way: short sequences, no padding, no cache, no shared layout.

What the fast paths must equal (the tests) and what they are measured against (``training/benchmark.py``); nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ladir.config import SampleSettings
from ladir.data.batches import DenoiserBatch
from ladir.data.latents import LatentRecord
from ladir.data.prompts import Frame
from ladir.inference.sampler import TrajectoryNoise
from ladir.layout import Mark
from ladir.models import flow
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.sliding import FULL, SLIDING, SlidingWindow


def plain_forward(backbone: Backbone, groups: Sequence[Tensor], positions: Sequence[int] | None = None) -> Tensor:
    """Hidden states [T, H] of one sequence given as groups of input vectors [n, H], at ``positions`` (not given: 0, 1, ...).

    A token sees its own group and the groups before it; a group of one is an ordinary causal token.  Layers with a sliding
    window show what is near of that.
    """
    inputs = torch.cat(list(groups))[None]
    group = torch.tensor([i for i, vectors in enumerate(groups) for _ in range(len(vectors))], device=inputs.device)
    later = group[None, :] > group[:, None]
    places = torch.tensor([*(range(len(group)) if positions is None else positions)], device=inputs.device)[None]
    window = SlidingWindow.of(backbone.base.config)
    masks: Any = _hiding(later, inputs.dtype)
    if window is not None:
        near = _hiding(later | ((places[0][None, :] - places[0][:, None]).abs() >= window.size), inputs.dtype)
        masks = {FULL: masks, SLIDING: near} if window.mixed else near
    decoder = backbone.base.get_decoder()
    output = decoder(inputs_embeds=inputs, attention_mask=masks, position_ids=places, use_cache=False)
    return output.last_hidden_state[0]


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [1, 1, T, T] that eager attention adds, of what is hidden [T, T]."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def question_groups(
    denoiser: Denoiser, ids: Sequence[int], hidden: bool, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> list[Tensor]:
    """A question's tokens between ``prefix`` and ``suffix``, each a group [1, H], or one group [n, H] where they see each other.

    A hidden question is one learned vector at every place; what is around it stays visible.
    """
    null = denoiser.marks.weight[Mark.NULL][None]
    question = [null for _ in ids] if hidden else _text_groups(denoiser, ids)
    groups = [*_text_groups(denoiser, prefix), *question, *_text_groups(denoiser, suffix)]
    return [torch.cat(groups)] if denoiser.settings.bidirectional_question else groups


def _text_groups(denoiser: Denoiser, ids: Sequence[int]) -> list[Tensor]:
    device = denoiser.marks.weight.device
    return list(denoiser.backbone.embed(torch.tensor(ids, dtype=torch.int64, device=device)).split(1))


def clean_group(denoiser: Denoiser, z: Tensor) -> Tensor:
    """<BOT> z*L <EOT> [L + 2, H] of finished latents [L, d]."""
    marks = denoiser.marks.weight
    vectors = F.linear(z.to(denoiser.dtype), denoiser.latent_in.weight, denoiser.latent_in.bias)
    return torch.cat([marks[Mark.BOT][None], vectors, marks[Mark.EOT][None]])


def sentence_groups(denoiser: Denoiser, ids: Sequence[int]) -> list[Tensor]:
    """<BOT> tokens <EOT>, each a group [1, H], of a finished block that stands as text."""
    begin, end = (denoiser.marks.weight[mark][None] for mark in (Mark.BOT, Mark.EOT))
    return [begin, *_text_groups(denoiser, ids), end]


def noisy_group(denoiser: Denoiser, z_t: Tensor, t: Tensor, carried: Tensor | None = None) -> Tensor:
    """<BOT> z~*L [L + 1, H] of noisy latents [L, d] at t [], handed the hidden states ``carried`` [L, H] of the step before."""
    vectors = F.linear(z_t.to(denoiser.dtype), denoiser.latent_in.weight, denoiser.latent_in.bias)
    vectors = vectors + denoiser.time_embedding(t[None])
    if carried is not None and denoiser.carry_in is not None:
        centred = carried.float() - carried.float().mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        vectors = vectors + normed.to(vectors.dtype) @ denoiser.carry_in.weight.T
    time = denoiser.time_embedding(t[None]) if denoiser.settings.time_token else 0.0
    return torch.cat([denoiser.marks.weight[Mark.BOT][None] + time, vectors])


def span_hidden(denoiser: Denoiser, before: Sequence[Tensor], z_t: Tensor, t: Tensor, carried: Tensor | None = None) -> Tensor:
    """Hidden states [J, L, H] at a span's noisy latents [J, L, d], each block at its t [J], behind what is ``before``.

    ``carried`` [J, L, H]: hidden states of the step before; None: this is the first one.
    Between two blocks a position is left out, where a finished block has its <EOT>.
    """
    span, latents = z_t.shape[:2]
    start = sum(map(len, before))
    states = [None] * span if carried is None else list(carried)
    noisy = torch.cat([noisy_group(denoiser, z, time, state) for z, time, state in zip(z_t, t, states, strict=True)])
    places = [start + block * (latents + 2) + offset for block in range(span) for offset in range(latents + 1)]
    hidden = plain_forward(denoiser.backbone, [*before, noisy], [*range(start), *places])[start:]
    return hidden.unflatten(0, (span, latents + 1))[:, 1:]


def objective_target(objective: str, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What is predicted, by name."""
    return {"velocity": eps - z0, "x0": z0, "epsilon": eps, "v": (1 - t) * eps - t * z0}[objective]


def reference_losses(
    denoiser: Denoiser, records: Sequence[LatentRecord], batch: DenoiserBatch, hidden: Sequence[bool], frame: Frame | None = None
) -> dict[str, Tensor]:
    """Summed losses of a batch, as :class:`Denoiser` gives them: the sum of all :func:`reference_passes`."""
    zero = torch.zeros((), dtype=denoiser.dtype)
    losses = {"flow": zero, "answer": zero, "stop": zero, **({"token": zero} if denoiser.token_head else {})}
    losses |= {"lm": zero} if denoiser.settings.lm_weight else {}
    for part in reference_passes(denoiser, records, batch, hidden, frame):
        losses.update({name: losses[name] + value for name, value in part.items()})
    return losses


def reference_passes(
    denoiser: Denoiser, records: Sequence[LatentRecord], batch: DenoiserBatch, hidden: Sequence[bool], frame: Frame | None = None
) -> Iterator[dict[str, Tensor]]:
    """Losses of one forward per span and draw for the flow, then of one per record for answer and stop, and one for sentences.

    Nothing is shared between them: a caller may go backward after each.  ``hidden``: whose question is hidden; only the numbers
    drawn (``z0``, ``eps``, ``t``) and the labels of answers and sentences are taken from the batch.
    """
    first = label = word = 0
    span = denoiser.settings.span
    for record, is_hidden in zip(records, hidden, strict=True):
        for start in range(0, len(record.blocks), span):
            for draw in range(batch.t.shape[1]):
                before, _ = _before(denoiser, record, is_hidden, frame, batch.z0[first : first + start])
                rows = slice(first + start, first + start + span)
                yield _one_draw(denoiser, before, batch, rows, draw, record.blocks[start : start + span])
        if len(batch.answer_labels):
            labels = batch.answer_labels[label : label + len(record.answer) + 1]
            label += len(labels)
            before, ends = _before(denoiser, record, is_hidden, frame, batch.z0[first : first + len(record.blocks)])
            yield _answer_and_stop(denoiser, before, ends, record, labels)
        if denoiser.settings.lm_weight:
            before, ends = _before(denoiser, record, is_hidden, frame, batch.z0[first : first + len(record.blocks)])
            count = sum(len(sentence) + 1 for sentence in record.blocks)
            yield {"lm": _sentences_loss(denoiser, before, ends, record, batch.word_labels[word : word + count])}
            word += count
        first += start + span
    assert first == len(batch.z0)


def _before(
    denoiser: Denoiser, record: LatentRecord, hidden: bool, frame: Frame | None, z0: Tensor
) -> tuple[list[Tensor], list[int]]:
    """The question and the finished blocks ``z0`` [B, L, d], or their sentences; and the place of every block's <EOT>."""
    around, ends = frame or Frame(), list[int]()
    groups = question_groups(denoiser, record.question, hidden, around.before, around.behind)
    for z, ids in zip(z0, record.blocks, strict=False):
        as_text = denoiser.settings.context == "text"
        groups += sentence_groups(denoiser, ids) if as_text else [clean_group(denoiser, z)]
        ends.append(sum(map(len, groups)) - 1)
    return groups, ends


def _one_draw(
    denoiser: Denoiser, before: list[Tensor], batch: DenoiserBatch, rows: slice, draw: int, blocks: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Flow loss (and token loss) of one noisy copy of one span, whose own blocks are ``blocks``, behind what is before it."""
    z0, eps, t = batch.z0[rows], batch.eps[rows, draw], batch.t[rows, draw]
    times = t[:, None, None]
    carried = None
    if batch.carry_t is not None:
        earlier = batch.carry_t[rows, draw]
        with torch.no_grad():
            z_earlier = (1 - earlier)[:, None, None] * z0 + earlier[:, None, None] * eps
            carried = span_hidden(denoiser, before, z_earlier, earlier)
    hidden = span_hidden(denoiser, before, (1 - times) * z0 + times * eps, t, carried)
    prediction = F.linear(hidden, denoiser.latent_out.weight, denoiser.latent_out.bias).float()
    wanted = objective_target(denoiser.settings.objective, z0, eps, times)
    noisy = [place for place, time in enumerate(t.tolist()) if time > 0]
    losses = {"flow": (prediction - wanted)[noisy].square().sum()}
    if denoiser.token_head is not None:
        losses["token"] = torch.zeros((), dtype=denoiser.dtype, device=hidden.device)
        for place in noisy:
            if place < len(blocks):
                labels = torch.tensor(blocks[place][: denoiser.settings.token_positions], device=hidden.device)
                logits = denoiser.token_head(hidden[place][None, None], len(labels))[0, 0].float()
                probability = logits.softmax(-1)[torch.arange(len(labels)), labels]
                weights = (1 - probability) ** denoiser.settings.token_focus
                losses["token"] = losses["token"] - (weights * probability.log()).sum()
    return losses


def _answer_and_stop(
    denoiser: Denoiser, before: list[Tensor], ends: list[int], record: LatentRecord, labels: Tensor
) -> dict[str, Tensor]:
    soa = denoiser.marks.weight[Mark.SOA][None]
    answer = _text_groups(denoiser, record.answer)
    groups = [*before, soa, *answer]
    hidden = plain_forward(denoiser.backbone, groups)
    logits = denoiser.backbone.logits(hidden[-len(record.answer) - 1 :]).float()
    stop_loss = torch.zeros((), dtype=denoiser.dtype, device=hidden.device)
    count = len(record.blocks)
    for block in range(count):
        logit = denoiser.stop_head(hidden[ends[block]])[0].float()
        last = torch.full_like(logit, float(block == count - 1))
        stop_loss = stop_loss + F.binary_cross_entropy_with_logits(logit, last)
    return {"answer": F.cross_entropy(logits, labels, reduction="sum"), "stop": stop_loss}


def _sentences_loss(denoiser: Denoiser, before: list[Tensor], ends: list[int], record: LatentRecord, labels: Tensor) -> Tensor:
    """Cross-entropy of every token of the sentences before the blocks' ``ends``, and of each one's end."""
    hidden, loss = plain_forward(denoiser.backbone, before), torch.zeros((), dtype=denoiser.dtype, device=labels.device)
    rest = labels
    for end, sentence in zip(ends, record.blocks, strict=False):
        mine, rest = rest.split([len(sentence) + 1, len(rest) - len(sentence) - 1])
        assert mine[:-1].tolist() == list(sentence)
        logits = denoiser.backbone.logits(hidden[end - len(sentence) - 1 : end]).float()
        loss = loss + F.cross_entropy(logits, mine, reduction="sum")
    return loss


@torch.no_grad()
def reference_blocks(
    denoiser: Denoiser,
    question: Tensor,
    settings: SampleSettings,
    noise: TrajectoryNoise,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents [R, B, L, d] of ``settings.max_blocks`` blocks per trajectory by Euler steps of the ODE, all trajectories in one
    batch, the whole sequence run anew at every step; for models of single blocks (span 1) that read questions causally.

    ``question`` [R, P, H]: input vectors of every trajectory's question, all of one length; ``on_step(block, step)`` is called
    after every step.
    """
    d, count = denoiser, len(question)
    shape, device, rows = (d.latents_per_block, d.latent_dim), question.device, list(range(len(question)))
    bot, eot = (d.mark(mark).expand(count, 1, -1) for mark in (Mark.BOT, Mark.EOT))
    clean, groups = question, list(range(question.shape[1]))
    blocks: list[Tensor] = []
    for block in range(settings.max_blocks):
        z = settings.initial_noise * noise.normal(rows, shape).to(device)
        group = torch.tensor([*groups, *[len(groups)] * (shape[0] + 1)], device=device)
        visible, positions = (group[None, :] <= group[:, None])[None], torch.arange(len(group), device=device)[None]
        state = d.null_state(z)
        for step in range(settings.num_steps):
            t = torch.full((count,), 1 - step / settings.num_steps, device=device)
            hidden = d.backbone(torch.cat([clean, d.noisy_block(z, t, state)], dim=1), visible, positions)
            prediction, state = d.predict(hidden[:, -shape[0] :]), d.next_state(hidden[:, -shape[0] :])
            z = z - flow.to_velocity(d.settings.objective, prediction, z, t[:, None, None]) / settings.num_steps
            if on_step is not None:
                on_step(block, step)
        blocks.append(z)
        clean = torch.cat([clean, bot, d.clean_inputs(z), eot], dim=1)
        groups += [len(groups)] * (shape[0] + 2)
    return torch.stack(blocks, 1)
