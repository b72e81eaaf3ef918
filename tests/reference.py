"""The method written out the obvious way: one short sequence at a time, no padding, no cache, no shared layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladir.data.batches import DenoiserBatch
from ladir.data.latents import LatentRecord
from ladir.layout import Mark
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from tests.tiny import EOS


def plain_forward(backbone: Backbone, groups: Sequence[Tensor]) -> Tensor:
    """Hidden states [T, H] of one sequence given as groups of input vectors [n, H].

    A token sees its own group and the groups before it; a group of one is an ordinary causal token.
    """
    inputs = torch.cat(list(groups))[None]
    group = torch.tensor([i for i, vectors in enumerate(groups) for _ in range(len(vectors))])
    later = group[None, :] > group[:, None]
    mask = torch.zeros(later.shape, dtype=inputs.dtype).masked_fill(later, torch.finfo(inputs.dtype).min)
    positions = torch.arange(len(group))[None]
    decoder = backbone.base.get_decoder()
    return decoder(
        inputs_embeds=inputs, attention_mask=mask[None, None], position_ids=positions, use_cache=False
    ).last_hidden_state[0]


def question_groups(denoiser: Denoiser, ids: Sequence[int], hidden: bool) -> list[Tensor]:
    """A question's tokens, each a group; a hidden question is one learned vector at every place."""
    if hidden:
        return [denoiser.marks.weight[Mark.NULL][None] for _ in ids]
    return [denoiser.backbone.embed(torch.tensor([token])) for token in ids]


def clean_group(denoiser: Denoiser, z: Tensor) -> Tensor:
    """<BOT> z*L <EOT> [L + 2, H] of finished latents [L, d]."""
    marks = denoiser.marks.weight
    vectors = F.linear(z.to(denoiser.dtype), denoiser.latent_in.weight, denoiser.latent_in.bias)
    return torch.cat([marks[Mark.BOT][None], vectors, marks[Mark.EOT][None]])


def noisy_group(denoiser: Denoiser, z_t: Tensor, t: Tensor) -> Tensor:
    """<BOT> z~*L [L + 1, H] of noisy latents [L, d] at t []."""
    vectors = F.linear(z_t.to(denoiser.dtype), denoiser.latent_in.weight, denoiser.latent_in.bias)
    return torch.cat([denoiser.marks.weight[Mark.BOT][None], vectors + denoiser.time_embedding(t[None])])


def objective_target(objective: str, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What is predicted, by name."""
    return {"velocity": eps - z0, "x0": z0, "epsilon": eps, "v": (1 - t) * eps - t * z0}[objective]


def reference_losses(
    denoiser: Denoiser, records: Sequence[LatentRecord], batch: DenoiserBatch, hidden: Sequence[bool], prefix: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Summed losses of a batch: one forward per block and draw for the flow, one per record for answer and stop.

    Only the numbers drawn (``z0``, ``eps``, ``t``) are taken from the batch.
    """
    zero = torch.zeros((), dtype=denoiser.dtype)
    losses = {"flow": zero, "answer": zero, "stop": zero, **({"token": zero} if denoiser.token_head else {})}
    row = 0
    for record, is_hidden in zip(records, hidden, strict=True):
        groups = question_groups(denoiser, [*prefix, *record.question], is_hidden)
        for block in record.blocks:
            for draw in range(batch.t.shape[1]):
                for name, value in _one_draw(denoiser, groups, batch, row, draw, block).items():
                    losses[name] = losses[name] + value
            groups = [*groups, clean_group(denoiser, batch.z0[row])]
            row += 1
        if len(batch.answer_labels):
            answer, stop = _answer_and_stop(denoiser, groups, record)
            losses["answer"], losses["stop"] = losses["answer"] + answer, losses["stop"] + stop
    assert row == len(batch.z0)
    return losses


def _one_draw(
    denoiser: Denoiser, before: list[Tensor], batch: DenoiserBatch, row: int, draw: int, block: Sequence[int]
) -> dict[str, Tensor]:
    """Flow loss (and token loss) of one noisy copy of one block behind what is before it."""
    z0, eps, t = batch.z0[row], batch.eps[row, draw], batch.t[row, draw]
    z_t = (1 - t) * z0 + t * eps
    hidden = plain_forward(denoiser.backbone, [*before, noisy_group(denoiser, z_t, t)])[-len(z0) :]
    prediction = F.linear(hidden, denoiser.latent_out.weight, denoiser.latent_out.bias).float()
    losses = {"flow": (prediction - objective_target(denoiser.settings.objective, z0, eps, t)).square().sum()}
    if denoiser.token_head is not None:
        labels = torch.tensor(block[: denoiser.settings.token_positions])
        logits = denoiser.token_head(hidden[None, None], len(labels))[0, 0].float()
        losses["token"] = F.cross_entropy(logits, labels, reduction="sum")
    return losses


def _answer_and_stop(denoiser: Denoiser, before: list[Tensor], record: LatentRecord) -> tuple[Tensor, Tensor]:
    soa = denoiser.marks.weight[Mark.SOA][None]
    answer = [denoiser.backbone.embed(torch.tensor([token])) for token in record.answer]
    groups = [*before, soa, *answer]
    hidden = plain_forward(denoiser.backbone, groups)
    logits = denoiser.backbone.logits(hidden[-len(record.answer) - 1 :]).float()
    answer_loss = F.cross_entropy(logits, torch.tensor([*record.answer, EOS]), reduction="sum")
    stop_loss = torch.zeros((), dtype=denoiser.dtype)
    count = len(record.blocks)
    ends = torch.tensor([len(vectors) for vectors in groups]).cumsum(0)[len(groups) - len(answer) - 1 - count :] - 1
    for block in range(count):
        logit = denoiser.stop_head(hidden[ends[block]])[0].float()
        last = torch.tensor(float(block == count - 1))
        stop_loss = stop_loss + F.binary_cross_entropy_with_logits(logit, last)
    return answer_loss, stop_loss
