"""Stage 2 against the same rollout without cache, padding or recomputation; memory; two ranks under ZeRO-3 against one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladir.config import DeepSpeedSettings, LoraSettings, RolloutSettings, SampleSettings, TrainSettings
from ladir.data.latent_parts import write_latents
from ladir.data.latents import LatentForm, LatentRecord, LatentStore
from ladir.data.rollout import Golds, GoldStore, RolloutBatch, RolloutCollator, sampling_of
from ladir.inference.rollout import Rollout
from ladir.layout import Mark
from ladir.models import flow
from ladir.models.denoiser import Denoiser
from ladir.reference import clean_group, plain_forward, question_groups, span_hidden
from tests.distributed import ProcessGroup
from tests.tiny import (
    SHAPES,
    assert_same_gradients,
    collator,
    gradients,
    random_records,
    randomise_adapters,
    tiny_denoiser,
    tiny_lm,
)
from training.planning.trace import trace_training
from training.runtime.distributed import World
from training.runtime.engine import Engine
from training.runtime.sampler import DataOrder

# Rounding grows along the Euler steps.
TOLERANCE = 2e-5
WEIGHTS = {"flow": 0.3, "answer": 0.7, "stop": 1.3, "token": 0.5, "rollout": 0.9}
MAX_BLOCKS = 4
SAMPLE = SampleSettings(guidance_interval=[0.2, 0.8], guidance_rescale=0.7)


def rollout_settings(**changes: Any) -> RolloutSettings:
    return dataclasses.replace(RolloutSettings(), **{"num_steps": 3, "own_context": 0.0, **changes})


def rollout_collator(denoiser: Denoiser, rollout: RolloutSettings, **changes: Any) -> RolloutCollator:
    return RolloutCollator(collator(denoiser, **changes), rollout, seed=17, sample=SAMPLE)


def with_golds(records: Sequence[LatentRecord], seed: int) -> list[Golds]:
    """Every record with two, one or no other solutions of its question."""
    found = []
    for place, record in enumerate(records):
        generator = torch.Generator().manual_seed(seed + place)
        others = [
            dataclasses.replace(record, mu=torch.randn(record.mu.shape, generator=generator), answer=[5 + n] * (n + 1))
            for n in range(2 - place % 3)
        ]
        found.append(Golds(record, tuple(others)))
    return found


# --- the reference -----------------------------------------------------------------------------------------------------


def guided(velocity: Tensor, without: Tensor, z: Tensor, t: Tensor, how: SampleSettings) -> Tensor:
    """One block's velocity [L, d] under guidance whose estimate of the clean block is rescaled (Lin et al. 2023)."""
    stronger = without + how.guidance_scale * (velocity - without)
    x0, plain = z - t * stronger, z - t * velocity
    share = how.guidance_rescale * plain.std(correction=0) / x0.std(correction=0) + 1 - how.guidance_rescale
    return (z - share * x0) / t


def own_span(
    denoiser: Denoiser,
    rollout: RolloutSettings,
    before: list[Tensor],
    start: Tensor,
    given: list[bool],
    free_before: list[Tensor],
) -> Tensor:
    """A span [J, L, d] from ``start``, whole forward passes per Euler step; blocks that are ``given`` are finished.

    ``free_before``: what the branch without the question has before it.
    """
    how = sampling_of(rollout, SAMPLE)
    steps, lag = how.num_steps, min(how.lag, how.num_steps)
    gradient = steps if rollout.gradient_steps is None else rollout.gradient_steps
    times = [1.0 - step / steps for step in range(steps)] + [0.0]
    blocks, carried, free_carried = list(start), None, None
    for number in range(steps + lag * (len(blocks) - 1)):
        taken = [number - lag * block for block in range(len(blocks))]
        now = torch.tensor([0.0 if true else times[min(max(n, 0), steps)] for n, true in zip(taken, given, strict=True)])
        with nullcontext() if any(0 <= steps - 1 - step < gradient for step in taken) else torch.no_grad():
            hidden = span_hidden(denoiser, before, torch.stack(blocks), now, carried)
            carried = hidden if rollout.carry_gradient else hidden.detach()
            prediction = F.linear(hidden, denoiser.latent_out.weight, denoiser.latent_out.bias).float()
            if how.guidance_scale != 1:
                hidden = span_hidden(denoiser, free_before, torch.stack(blocks), now, free_carried)
                free_carried = hidden if rollout.carry_gradient else hidden.detach()
                free = F.linear(hidden, denoiser.latent_out.weight, denoiser.latent_out.bias).float()
            for block, step in enumerate(taken):
                if given[block] or not 0 <= step < steps:
                    continue
                z, t = blocks[block], now[block]
                velocity = flow.to_velocity(denoiser.settings.objective, prediction[block], z, t)
                low, high = how.guidance_interval
                if how.guidance_scale != 1 and low <= float(t) <= high:
                    without = flow.to_velocity(denoiser.settings.objective, free[block], z, t)
                    velocity = guided(velocity, without, z, t, how)
                moved = z + (times[step + 1] - times[step]) * velocity
                blocks[block] = moved if steps - step <= gradient else moved.detach()
    return torch.stack(blocks)


def nearest(z: Tensor, golds: Tensor, rollout: RolloutSettings) -> int:
    if rollout.gold == "sampled":
        return 0
    return min(range(len(golds)), key=lambda place: float((z - golds[place]).square().mean()))


def one_record(
    denoiser: Denoiser, rollout: RolloutSettings, batch: RolloutBatch, row: int
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Losses through a record's own blocks, the blocks [B, L, d], and the gold solution that was nearest."""
    count = batch.blocks[row]
    ids = batch.question_ids[row, -int(batch.question_lengths[row]) :].tolist()
    groups, blocks, stop = question_groups(denoiser, ids, False), [], torch.tensor(0.0)
    first, last = batch.shown[0], len(ids) - batch.shown[1]
    free = question_groups(denoiser, ids[first:last], True, ids[:first], ids[last:])
    size = denoiser.settings.span
    for block in range(count):
        if block % size == 0:
            given = [place < count - (rollout.last_blocks or count) for place in range(block, block + size)]
            places = slice(block, block + size)
            span = torch.where(torch.tensor(given)[:, None, None], batch.gold[row, 0, places], batch.noise[row, places])
            if not all(given):
                span = own_span(denoiser, rollout, groups, span, given, free)
        z = span[block % size]
        groups, free = [*groups, clean_group(denoiser, z)], [*free, clean_group(denoiser, z)]
        hidden = plain_forward(denoiser.backbone, groups)
        stop = stop + F.binary_cross_entropy_with_logits(
            denoiser.stop_head(hidden[-1])[0].float(), torch.tensor(float(block + 1 == count))
        )
        blocks.append(z)
    z = torch.stack(blocks)
    chosen = nearest(z.detach(), batch.gold[row, batch.is_gold[row], :count], rollout)
    labels = batch.answer_labels[row, chosen]
    labels = labels[labels >= 0]
    answer = [denoiser.backbone.embed(token[None]) for token in labels[:-1]]
    groups = [*groups, denoiser.marks.weight[Mark.SOA][None], *answer]
    logits = denoiser.backbone.logits(plain_forward(denoiser.backbone, groups)[-len(labels) :]).float()
    return {"rollout": F.cross_entropy(logits, labels), "stop": stop}, z, chosen


def flow_behind(denoiser: Denoiser, batch: RolloutBatch, row: int, context: Tensor, chosen: int, first: int) -> Tensor:
    """The flow loss of a record whose earlier blocks are ``context``, one forward per block and draw."""
    ids = batch.question_ids[row, -int(batch.question_lengths[row]) :].tolist()
    groups, loss = question_groups(denoiser, ids, False), torch.tensor(0.0)
    size, teacher = denoiser.settings.span, batch.teacher
    for start in range(0, batch.blocks[row], size):
        z0, rows = batch.gold[row, chosen, start : start + size], slice(first + start, first + start + size)
        for eps, t in zip(teacher.eps[rows].unbind(1), teacher.t[rows].unbind(1), strict=True):
            times = t[:, None, None]
            carried = None
            if teacher.carry_t is not None:
                with torch.no_grad():
                    carried = span_hidden(denoiser, groups, (1 - times) * z0 + times * eps, t)
            hidden = span_hidden(denoiser, groups, (1 - times) * z0 + times * eps, t, carried)
            wanted = flow.target(denoiser.settings.objective, z0, eps, times)
            loss = loss + ((denoiser.predict(hidden) - wanted).square() * (times > 0)).sum()
        groups = [*groups, *(clean_group(denoiser, z) for z in context[start : start + size])]
    return loss


def reference(denoiser: Denoiser, rollout: RolloutSettings, batch: RolloutBatch) -> dict[str, Tensor]:
    losses = dict.fromkeys(("flow", "answer", "rollout"), torch.tensor(0.0)) | {"stop": torch.tensor(0.0)}
    if not batch.own_context:
        losses |= {name: value for name, value in denoiser(batch.teacher).items() if "/" not in name}
    first = 0
    for row in range(len(batch.blocks)):
        through, z, chosen = one_record(denoiser, rollout, batch, row)
        for name, value in through.items():
            losses[name] = losses[name] + value
        if batch.own_context:
            losses["flow"] = losses["flow"] + flow_behind(denoiser, batch, row, z.detach(), chosen, first)
        first += -(-batch.blocks[row] // denoiser.settings.span) * denoiser.settings.span
    return losses


def losses_and_gradients(denoiser: Denoiser, losses: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    denoiser.zero_grad()
    losses = {name: value for name, value in losses.items() if "/" not in name}
    sum((WEIGHTS[name] * value.double() for name, value in losses.items()), torch.tensor(0.0)).backward()
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(denoiser)


def assert_rollout_is_the_reference(denoiser: Denoiser, rollout: RolloutSettings, recompute: bool, seed: int, count: int) -> None:
    golds = with_golds(random_records(count, seed=seed, max_blocks=MAX_BLOCKS, latents=denoiser.latents_per_block), seed)
    batch = rollout_collator(denoiser, rollout, prefix=(3,), suffix=(6, 2), condition_dropout=0.0)(golds, list(range(count)))
    model = Rollout(denoiser, rollout, MAX_BLOCKS, recompute, sample=SAMPLE).train()
    ours, our_gradients = losses_and_gradients(denoiser, model(batch))
    theirs, their_gradients = losses_and_gradients(denoiser, reference(denoiser, rollout, batch))
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-5)
    assert_same_gradients(our_gradients, their_gradients, TOLERANCE)
    assert batch.own_context == bool(rollout.own_context)


def test_what_is_not_set_is_as_in_sampling() -> None:
    sample = SampleSettings(
        num_steps=7,
        lag=3,
        initial_noise=2.0,
        guidance_scale=4.0,
        guidance_interval=[0.1, 0.9],
        guidance_rescale=0.5,
        spacing="cosine",
    )
    assert sampling_of(RolloutSettings(), sample) == sample
    own = RolloutSettings(num_steps=5, lag=0, initial_noise=0.0, guidance_scale=1.0)
    wanted = dataclasses.replace(sample, num_steps=5, lag=0, initial_noise=0.0, guidance_scale=1.0)
    assert sampling_of(own, sample) == wanted
    denoiser = tiny_denoiser(tiny_lm())
    loud, plain = (
        RolloutCollator(collator(denoiser), RolloutSettings(), 17, SampleSettings(initial_noise=scale))(
            with_golds(random_records(2), 0), [0, 1]
        ).noise
        for scale in (2.0, 1.0)
    )
    assert torch.equal(loud, 2 * plain)


# --- equality ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "own context": {"own_context": 1.0},
    "last block": {"last_blocks": 1, "own_context": 1.0},
    "two last blocks": {"last_blocks": 2, "gold": "sampled"},
    "gradient of one step": {"gradient_steps": 1},
    "no gradient": {"gradient_steps": 0},
    "one step, louder": {"num_steps": 1, "initial_noise": 2.0},
    "all together": {"lag": 0, "gradient_steps": 1},
    "one after another": {"lag": 9, "last_blocks": 2},
    "guided": {"guidance_scale": 2.0, "gradient_steps": 2, "own_context": 1.0},
}


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_whole_forward_passes(variant: str, recompute: bool, span: int) -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, token_weight=0.5, objective="x0", span=span)
    if recompute:
        denoiser.backbone.enable_activation_checkpointing()
    assert_rollout_is_the_reference(denoiser, rollout_settings(**VARIANTS[variant]), recompute, seed=1, count=4)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(["velocity", "x0", "epsilon", "v"]),
    st.sampled_from(sorted(VARIANTS)),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
)
def test_random_shapes(
    seed: int, count: int, latents: int, kind: str, objective: str, variant: str, recompute: bool, span: int, bidirectional: bool
) -> None:
    denoiser = tiny_denoiser(
        tiny_lm(kind), latents=latents, draws=1, objective=objective, span=span, bidirectional_question=bidirectional
    )
    rollout = rollout_settings(**{"num_steps": 2, **VARIANTS[variant]})
    if objective == "epsilon":
        rollout = dataclasses.replace(rollout, gradient_steps=0)  # it divides by 1 - t: a step from t = 1 amplifies rounding
    assert_rollout_is_the_reference(denoiser, rollout, recompute, seed, count)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("carry_gradient", "variant"), [(False, "all"), (True, "own context"), (True, "all together"), (True, "guided")]
)
def test_a_carried_state_equals_the_reference(carry_gradient: bool, variant: str, recompute: bool) -> None:
    denoiser = tiny_denoiser(
        tiny_lm(), draws=1, objective="x0", span=2, carry="hidden", carry_probability=1.0, time_token=recompute
    )
    if recompute:
        denoiser.backbone.enable_activation_checkpointing()
    rollout = rollout_settings(**VARIANTS[variant], carry_gradient=carry_gradient)
    assert_rollout_is_the_reference(denoiser, rollout, recompute, seed=6, count=3)


@pytest.mark.parametrize("carry", ["none", "hidden"])
def test_lora_with_recomputation_equals_the_reference(carry: str) -> None:
    adapters = LoraSettings(rank=2, alpha=4.0)
    denoiser = tiny_denoiser(tiny_lm(), lora=adapters, draws=1, objective="x0", carry=carry, carry_probability=1.0)
    randomise_adapters(denoiser, seed=3)
    denoiser.backbone.enable_activation_checkpointing(2)
    rollout = rollout_settings(own_context=1.0, carry_gradient=carry == "hidden")
    assert_rollout_is_the_reference(denoiser, rollout, True, seed=2, count=3)


def test_micro_batches_add_up_to_the_batch() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=1)
    rollout = rollout_settings()
    golds = with_golds(random_records(5, seed=7, max_blocks=MAX_BLOCKS), 7)
    collate, model = rollout_collator(denoiser, rollout), Rollout(denoiser, rollout, MAX_BLOCKS, False)
    batches = [collate(golds[a:b], list(range(a, b))) for a, b in ((0, 5), (0, 2), (2, 3), (3, 5))]
    whole, *parts = [losses_and_gradients(denoiser, model(batch)) for batch in batches]
    for name, value in whole[0].items():
        assert sum(losses[name] for losses, _ in parts) == pytest.approx(value, rel=TOLERANCE, abs=1e-6)
    summed = {name: torch.stack([part[1][name] for part in parts]).sum(0) for name in whole[1]}
    assert_same_gradients(summed, whole[1], TOLERANCE)
    for name, count in batches[0].counts.items():
        assert sum(batch.counts[name] for batch in batches[1:]) == count


def test_nothing_but_the_latents_is_kept_per_step_where_passes_are_recomputed() -> None:
    denoiser = tiny_denoiser(tiny_lm(hidden_size=64), draws=1)
    golds = with_golds(random_records(2, seed=3), 3)

    def kept(steps: int, recompute: bool) -> int:
        """Elements that autograd keeps."""
        rollout = rollout_settings(num_steps=steps)
        batch = rollout_collator(denoiser, rollout)(golds, [0, 1])
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[id(tensor)] = tensor.numel()
            seen.append(tensor)
            return tensor

        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Rollout(denoiser, rollout, MAX_BLOCKS, recompute).train()(batch)
        return sum(sizes.values())

    stored = [kept(steps, False) for steps in (2, 4, 6)]
    recomputed = [kept(steps, True) for steps in (2, 4, 6)]
    assert stored[1] - stored[0] == stored[2] - stored[1]  # linear
    assert recomputed[1] - recomputed[0] == recomputed[2] - recomputed[1]
    assert 50 * (recomputed[2] - recomputed[1]) < stored[2] - stored[1]


def test_a_step_launches_as_much_for_every_block_and_hardly_more_for_two_branches() -> None:
    """However much is behind a block; operators forward and backward that are no views."""
    denoiser = tiny_denoiser(tiny_lm(), draws=1)

    def launches(blocks: int, guidance: float) -> int:
        rollout = rollout_settings(num_steps=2, guidance_scale=guidance)
        golds = [Golds(LatentRecord([3, 4], [[5]] * count, [6], *torch.zeros(2, count, 2, 3))) for count in (blocks, blocks - 1)]
        batch = rollout_collator(denoiser, rollout)(golds, [0, 1])
        return trace_training(Rollout(denoiser, rollout, blocks, False), batch).launches

    few, more, most = (launches(blocks, 1.0) for blocks in (2, 4, 6))
    assert most - more == pytest.approx(more - few, rel=0.02)
    assert launches(4, 2.0) < 1.2 * more


# --- several ranks -----------------------------------------------------------------------------------------------------


def trained(world: World, ds_config: str, recompute: bool, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after two steps on four records, which the ranks share: in the first step one has all the long ones."""
    changes = {**changes}
    model_settings = {"span": changes.pop("span", 1), "carry": changes.pop("carry", "none")}
    denoiser = tiny_denoiser(tiny_lm(dtype=torch.float32, num_hidden_layers=1), draws=1, objective="x0", **model_settings)
    if recompute:
        denoiser.backbone.enable_activation_checkpointing()
    rollout = rollout_settings(**changes)
    model = Rollout(denoiser, rollout, MAX_BLOCKS, recompute, world.largest)
    train = dataclasses.replace(TrainSettings(), max_grad_norm=0.0, eps=1e-2)
    engine = Engine(model, train, "float32", DeepSpeedSettings(config=ds_config), world)
    records = sorted(random_records(20, seed=4, max_blocks=2), key=lambda record: -len(record.blocks))
    golds = with_golds([*records[:2], *records[-2:]], 5)
    assert [len(entry.record.blocks) for entry in golds] == [2, 2, 1, 1]
    collate = rollout_collator(denoiser, rollout)
    for first, places in enumerate(([0, 1, 2, 3], [0, 2, 1, 3])):
        size = len(places) // world.size
        mine = places[world.rank * size : (world.rank + 1) * size]
        outputs = engine.forward(collate([golds[i] for i in mine], [first * 8 + i for i in mine]))
        losses = [WEIGHTS[name] * value for name, value in outputs.items() if "/" not in name]
        engine.backward(torch.stack(losses).sum(), last=True)
        engine.step(1e-2)
    return world.broadcast(dict(engine.full_state(ema=False)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("recompute", "changes"),
    [
        (False, {"num_steps": 2}),
        (True, {"num_steps": 2, "own_context": 1.0, "guidance_scale": 2.0}),
        (True, {"num_steps": 2, "span": 2, "lag": 1, "gradient_steps": 1, "last_blocks": 1}),
        (True, {"num_steps": 2, "carry": "hidden", "carry_gradient": True, "own_context": 1.0}),
    ],
)
def test_two_ranks_of_zero3_train_what_one_process_trains(
    one_process: ProcessGroup, two_processes: ProcessGroup, recompute: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the ranks' records have other numbers of blocks, and passes run again in the backward pass."""
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights are split, too
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    expected = one_process.run(trained, "ds_configs/zero0.json", False, changes, timeout=280)[0]
    for actual in two_processes.run(trained, str(tmp_path / "zero3.json"), recompute, changes, timeout=280):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=2e-5)


# --- several solutions -------------------------------------------------------------------------------------------------


def test_a_record_comes_with_the_other_solutions_of_its_question_that_have_as_many_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [([5, 6], 2, [7]), ([5], 2, [8]), ([5, 6], 1, [9]), ([5, 6], 2, [10]), ([5, 6], 2, [11]), ([6, 5], 2, [12])]
    rows = [
        {"question": question, "blocks": [[3]] * count, "answer": answer, "mu": [0.5] * 6 * count, "logvar": [0.0] * 6 * count}
        for question, count, answer in kinds
    ]
    store = write_latents(tmp_path / "latents", rows, "vae", LatentForm(latent_dim=3, latents_per_block=2))
    assert store.same_question() == [[0, 2, 3, 4]]

    def answers(most: int) -> list[list[list[int]]]:
        golds = GoldStore(store, most)
        return [[solution.answer for solution in (golds[i].record, *golds[i].others)] for i in range(len(golds))]

    assert answers(8) == [[[7], [10], [11]], [[8]], [[9]], [[10], [7], [11]], [[11], [7], [10]], [[12]]]
    assert answers(2)[0] == [[7], [10]]
    assert answers(1)[0] == [[7]]
    read: list[int] = []
    monkeypatch.setattr(
        LatentStore, "__getitem__", lambda store, index, get=LatentStore.__getitem__: read.append(index) or get(store, index)
    )
    assert len(GoldStore(store, 2)[0].others) == 1
    assert read == [0, 2, 3]  # no more than are wanted; the second has fewer blocks


def test_ranks_are_given_records_of_as_many_blocks_in_every_pass(tmp_path: Path) -> None:
    """Blocks are made one after another: whoever has fewer waits.  Sentences and answers of any length change nothing of that."""
    rows: list[dict[str, Any]] = [
        {"question": [5], "blocks": [[3] * (1 + 7 * i % 5)] * count, "answer": [7] * (1 + 5 * i % 3), "mu": [0.5] * 6 * count}
        for i, count in enumerate([1, 2, 3, 4] * 4)
    ]
    form = LatentForm(latent_dim=3, latents_per_block=2, logvar=False)
    order = DataOrder(16, 16, 0, GoldStore(write_latents(tmp_path / "latents", rows, "vae", form), 1).length)
    ranks = [order.micro_batches(0, rank, 2, 2) for rank in range(2)]
    for passes in zip(*ranks, strict=True):
        assert len({len(rows[i]["blocks"]) for indices, _ in passes for i in indices}) == 1


def test_the_flow_stands_behind_own_blocks_in_the_share_of_steps_that_is_set() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=1)
    golds = [Golds(record) for record in random_records(2, seed=1)]
    collate = rollout_collator(denoiser, rollout_settings(own_context=0.3), samples_per_step=2)
    own = [collate(golds, [2 * step, 2 * step + 1]).own_context for step in range(200)]
    assert 0.2 < sum(own) / 200 < 0.4
    behind_own = collate(golds, [2 * own.index(True), 2 * own.index(True) + 1])
    assert behind_own.counts["answer"] == 0 < behind_own.counts["stop"]
    assert not collate(golds, [2 * own.index(True), 2 * own.index(True) + 1], False).own_context  # validation
