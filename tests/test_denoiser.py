"""One pass over all blocks and draws against one plain forward per block and draw; who can influence whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ladir.config import LoraSettings
from ladir.data.batches import DenoiserBatch
from ladir.data.latents import LatentRecord
from ladir.data.prompts import Frame
from ladir.data.randomness import Streams, generator
from ladir.layout import CLEAN, PAD, Mark
from ladir.models import flow
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser, focal
from ladir.reference import reference_losses
from tests.tiny import (
    SHAPES,
    assert_same_gradients,
    collator,
    gradients,
    random_records,
    randomise_adapters,
    tiny_denoiser,
    tiny_lm,
    tiny_vae,
)

# Norms, softmax and losses are computed in float32 whatever the weights: equality is to float32's rounding.
TOLERANCE = 1e-5
WEIGHTS = {"flow": 5.0, "answer": 0.7, "stop": 1.3, "token": 0.5, "lm": 0.6}
OBJECTIVES = ("velocity", "x0", "epsilon", "v")


def hidden_questions(denoiser: Denoiser, records: Sequence[LatentRecord], numbers: Sequence[int], **changes: Any) -> list[bool]:
    """Whether each sample's question is hidden: its layout alone then differs from the one without dropout."""
    answers = []
    for record, number in zip(records, numbers, strict=True):
        shown = collator(denoiser, **{**changes, "condition_dropout": 0.0})([record], [number])
        drawn = collator(denoiser, **changes)([record], [number])
        answers.append(not torch.equal(shown.table_index, drawn.table_index))
    return answers


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum((WEIGHTS[name] * value.double() for name, value in losses.items() if "/" not in name), torch.tensor(0.0))


def losses_and_gradients(
    model: nn.Module, compute: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    losses = {name: value for name, value in compute().items() if "/" not in name}
    total(losses).backward()
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(model)


def assert_one_pass_is_the_reference(
    denoiser: Denoiser, records: Sequence[LatentRecord], numbers: Sequence[int], frame: Frame | None = None, **changes: Any
) -> None:
    around = frame or Frame()
    changes = {"prefix": around.before, "suffix": around.behind, **changes}
    batch = collator(denoiser, **changes)(records, list(numbers))
    hidden = hidden_questions(denoiser, records, numbers, **changes)
    ours, our_gradients = losses_and_gradients(denoiser, lambda: denoiser(batch))
    theirs, their_gradients = losses_and_gradients(denoiser, lambda: reference_losses(denoiser, records, batch, hidden, frame))
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-5)
    assert_same_gradients(our_gradients, their_gradients, TOLERANCE)
    assert max(float(g.abs().max()) for g in our_gradients.values()) > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SHAPES)
def test_one_pass_equals_one_forward_per_block_and_draw(kind: str, attention: str) -> None:
    for span in (1, 2):
        denoiser = tiny_denoiser(tiny_lm(kind, attention=attention), draws=2, token_weight=0.5, span=span)
        records = random_records(4, seed=1, max_blocks=3)
        assert_one_pass_is_the_reference(denoiser, records, range(4), condition_dropout=0.5, sample_latents=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_equals_the_reference(objective: str) -> None:
    denoiser = tiny_denoiser(tiny_lm(), objective=objective, draws=1, timesteps="logit_normal", timestep_mean=1.0)
    assert_one_pass_is_the_reference(denoiser, random_records(2, seed=2), range(2))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["latents", "text"]),
)
def test_random_layouts_equal_the_reference(
    latents: int,
    draws: int,
    count: int,
    seed: int,
    answer: bool,
    kind: str,
    span: int,
    bidirectional_question: bool,
    context: str,
) -> None:
    reads: dict[str, Any] = {"bidirectional_question": bidirectional_question, "context": context}
    reads["lm_weight"] = 0.5 if context == "text" else 0.0
    denoiser = tiny_denoiser(tiny_lm(kind), latents=latents, draws=draws, answer_every=2, span=span, token_weight=0.5, **reads)
    records = random_records(count, seed=seed, latents=latents)
    first = (seed % 100) * 16 + (0 if answer else 8)
    numbers = range(first, first + count)
    assert_one_pass_is_the_reference(denoiser, records, numbers, Frame((3,), (6, 2)), condition_dropout=0.3, samples_per_step=8)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_a_focal_token_loss_equals_the_reference(gamma: float) -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, span=2, token_weight=1.0, token_focus=gamma)
    assert_one_pass_is_the_reference(denoiser, random_records(3, seed=3), range(3))


def test_a_certain_token_has_a_finite_focal_gradient() -> None:
    losses = torch.tensor([0.0, 2.0], requires_grad=True)
    focal(losses, 2.0).sum().backward()
    assert losses.grad is not None and losses.grad[0] == 0 and losses.grad[1] > 0


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["latents", "text"]),
)
def test_a_carried_state_and_a_time_token_equal_the_reference(
    latents: int, draws: int, seed: int, kind: str, span: int, earlier: bool, time_token: bool, context: str
) -> None:
    carry = {"carry": "hidden", "carry_probability": 0.7, "carry_own_rollout": 0.6 * earlier, "time_token": time_token}
    reads = {"context": context, "lm_weight": 0.5 if context == "text" else 0.0, "answer_every": 2}
    denoiser = tiny_denoiser(tiny_lm(kind), latents=latents, draws=draws, span=span, token_weight=0.5, **carry, **reads)
    numbers = range((seed % 100) * 8, (seed % 100) * 8 + 3)
    frame, records = Frame((3,), (6, 2)), random_records(3, seed=seed, latents=latents)
    assert_one_pass_is_the_reference(denoiser, records, numbers, frame, condition_dropout=0.3, samples_per_step=8)


@pytest.mark.parametrize(("answer_every", "lm_weight"), [(1, 0.0), (2, 0.5)])
def test_a_first_pass_has_only_what_noisy_latents_see(answer_every: int, lm_weight: float) -> None:
    """Neither answers nor the last span's finished blocks, which are written or read behind it."""
    settings = {"context": "text", "carry_probability": 1.0, "answer_every": answer_every, "lm_weight": lm_weight}
    denoiser = tiny_denoiser(tiny_lm(), span=2, carry="hidden", **settings)
    for step in range(2):
        batch = collator(denoiser)(random_records(3, seed=4), range(8 * step, 8 * step + 3))
        without = collator(denoiser, lm_weight=0.0)(random_records(3, seed=4), range(8 * step, 8 * step + 3), with_answer=False)
        assert batch.first is not None
        for name in ("position", "limit", "copy"):
            assert torch.equal(getattr(batch.first.layout, name), getattr(without.layout, name))
        assert batch.first.layout.copy.shape[1] < batch.layout.copy.shape[1]


def test_a_first_pass_is_part_of_its_share_of_steps_and_of_every_validation() -> None:
    denoiser = tiny_denoiser(tiny_lm(), span=2, carry="hidden", carry_probability=0.25, carry_own_rollout=0.5)
    records = random_records(2, seed=1)
    batches = [collator(denoiser)(records, [8 * step, 8 * step + 5]) for step in range(400)]
    assert 0.17 < np.mean([batch.carry_t is not None for batch in batches]) < 0.33
    later = collator(denoiser)(records[1:], [8 * 7 + 5])  # another micro batch of the same step
    assert (later.carry_t is None) == (batches[7].carry_t is None)
    held_out = collator(denoiser)(records, [0, 1], training=False)
    assert held_out.carry_t is not None
    assert torch.equal(held_out.carry_t, held_out.t)
    moved = []
    for batch in batches:
        if batch.carry_t is not None:
            assert bool((batch.carry_t >= batch.t).all())
            assert bool((batch.carry_t <= 1).all())
            assert bool((batch.carry_t == batch.t)[batch.t == 0].all())
            moved += (batch.carry_t > batch.t)[(batch.t > 0) & (batch.t < 1)].tolist()
    assert 0.45 < np.mean(moved) < 0.55


def test_a_carry_draws_nothing_that_others_draw() -> None:
    denoiser, records = tiny_denoiser(tiny_lm(), span=2), random_records(3, seed=2)
    plain, carried = (collator(denoiser, carry=carry, carry_own_rollout=0.5)(records, range(3)) for carry in ("none", "hidden"))
    assert torch.equal(plain.eps, carried.eps)
    assert torch.equal(plain.t, carried.t)


def test_a_fresh_carry_changes_nothing_and_learns() -> None:
    fresh = Denoiser(Backbone(tiny_lm()), tiny_denoiser(tiny_lm(), carry="hidden").settings, 2, torch.zeros(3), torch.ones(3))
    records = random_records(3, seed=4)
    with_state = collator(fresh, carry_probability=1.0)(records, range(3))
    without = replace(with_state, carry_t=None)
    ours, our_gradients = losses_and_gradients(fresh, lambda: fresh(with_state))
    theirs, _ = losses_and_gradients(fresh, lambda: fresh(without))
    assert ours == theirs
    assert float(our_gradients["carry_in.weight"].abs().max()) > 1e-6
    _, null_gradients = losses_and_gradients(fresh, lambda: fresh(without))
    assert float(null_gradients["carry_in.weight"].abs().max()) == 0.0
    assert fresh.carry_in is not None
    assert fresh.carry_in.weight.grad is not None  # zeros: under ZeRO-3 a missing gradient would be the last one again


@pytest.mark.parametrize("carry", ["none", "hidden"])
def test_lora_trains_the_adapters_alone_and_equals_the_reference(carry: str) -> None:
    denoiser = tiny_denoiser(tiny_lm(), lora=LoraSettings(rank=2, alpha=4.0), draws=2, carry=carry, carry_probability=1.0)
    randomise_adapters(denoiser, seed=3)
    assert_one_pass_is_the_reference(denoiser, random_records(2, seed=3), range(2))
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad and name.startswith("backbone")}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("carry", ["none", "hidden"])
def test_activation_checkpointing_changes_no_gradient(carry: str) -> None:
    records = random_records(3, seed=4)
    results = []
    for checkpointing in (False, True):
        denoiser = tiny_denoiser(tiny_lm(), draws=2, carry=carry, carry_probability=1.0).train()
        if checkpointing:
            denoiser.backbone.enable_activation_checkpointing()
        batch = collator(denoiser)(records, [0, 1, 2])
        results.append(losses_and_gradients(denoiser, lambda d=denoiser, b=batch: d(b)))  # type: ignore[misc]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same_gradients(results[1][1], results[0][1], 1e-6)


def test_counts_are_the_labels_that_the_sums_run_over() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, token_weight=0.5)
    records = random_records(5, seed=5)
    batch = collator(denoiser)(records, list(range(5)))
    blocks = sum(len(record.blocks) for record in records)
    assert batch.counts == {
        "flow": blocks * 2 * 2 * 3,
        "answer": sum(len(record.answer) + 1 for record in records),
        "stop": blocks,
        "token": 2 * sum(min(len(block), 3) for record in records for block in record.blocks),
    }
    assert batch.num_tokens == int((batch.layout.copy != PAD).sum())
    assert batch.to("meta").layout.copy.device.type == "meta"


# --- perturbations -----------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    """Everything a forward pass predicts."""

    noisy: Tensor  # [K, M, L, d]
    stop: Tensor
    answer: Tensor
    token: Tensor  # [K, M, P, V]


@contextmanager
def listening(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def outputs(denoiser: Denoiser, batch: DenoiserBatch) -> Outputs:
    noisy: list[Tensor] = []
    stop: list[Tensor] = []
    answer: list[Tensor] = []
    token: list[Tensor] = []
    assert denoiser.token_head is not None
    with (
        listening(denoiser.latent_out, noisy),
        listening(denoiser.stop_head, stop),
        listening(denoiser.backbone.base.get_output_embeddings(), answer),
        listening(denoiser.token_head, token),
    ):
        denoiser(batch)
    return Outputs(noisy[-1], stop[-1], answer[-1], token[-1])


def perturbed(tensor: Tensor, *places: Any) -> Tensor:
    changed = tensor.clone()
    for place in places:
        changed[place] = changed[place] + 0.3
    return changed


def differs(before: Tensor, after: Tensor) -> Tensor:
    """Per leading index, whether anything changed: bit-identical or clearly different, nothing in between."""
    change = (before - after).abs().flatten(1).max(1).values
    assert bool(((change == 0) | (change > 1e-6)).all()), change
    return change > 0


class Case:
    """Records with 3 and 1 blocks (the second is padded), two draws; rows 0..2 are the blocks of the first."""

    def __init__(
        self, attention: str = "eager", span: int = 1, carry: str = "none", context: str = "latents", **changes: Any
    ) -> None:
        settings: dict[str, Any] = {"span": span, "carry": carry, "context": context}
        lm = tiny_lm("llama", attention=attention)
        self.denoiser = tiny_denoiser(lm, draws=2, token_weight=0.5, condition_dropout=0.0, **settings)
        rng = np.random.default_rng(0)
        zeros = [torch.from_numpy(rng.standard_normal((count, 2, 3), dtype=np.float32)) for count in (3, 1)]
        self.records = [
            LatentRecord([5, 6, 7], [[8, 9], [10], [11, 12]], [13, 14], zeros[0], zeros[0]),
            LatentRecord([15], [[16]], [17], zeros[1], zeros[1]),
        ]
        self.batch = collator(self.denoiser, **changes)(self.records, [0, 1])
        self.before = outputs(self.denoiser, self.batch)

    def effect(self, **changes: Tensor) -> dict[str, list[Any]]:
        """What a changed batch changes: noisy [K][M], stop per <EOT> (rows 0..2, then 3), answer per label."""
        after = outputs(self.denoiser, replace(self.batch, **cast(Any, changes)))
        noisy = differs(self.before.noisy.flatten(0, 1), after.noisy.flatten(0, 1)).view(-1, 2)
        token = differs(self.before.token.flatten(0, 1), after.token.flatten(0, 1)).view(-1, 2)
        assert torch.equal(noisy, token)
        return {
            "noisy": noisy.tolist(),
            "stop": differs(self.before.stop, after.stop).tolist(),
            "answer": differs(self.before.answer, after.answer).tolist(),
        }


NO, YES = [False, False], [True, True]
SILENT = {"noisy": [NO] * 4, "stop": [False] * 4, "answer": [False] * 5}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_noise_and_time_reach_their_own_copy_alone(attention: str) -> None:
    case = Case(attention)
    for name, tensor in (("eps", case.batch.eps), ("t", case.batch.t)):
        effect = case.effect(**{name: perturbed(tensor, (1, 0))})
        assert effect == {**SILENT, "noisy": [NO, [True, False], NO, NO]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_noise_and_time_reach_the_whole_copy_of_their_span(attention: str) -> None:
    """Rows 0..3 are the first record's spans of two blocks (there is no fourth block), 4 and 5 the second record's."""
    case = Case(attention, span=2, independent_levels=1.0)
    nothing = [NO] * 6
    for name, tensor in (("eps", case.batch.eps), ("t", case.batch.t)):
        for place in (0, 1, 3, 5):
            effect = case.effect(**{name: perturbed(tensor, (place, 0))})
            first = place - place % 2
            copies = [[True, False] if row in (first, first + 1) else NO for row in range(6)]
            assert effect == {**SILENT, "noisy": copies}
    behind = case.effect(z0=perturbed(case.batch.z0, 3))  # a block that the record does not have is in its noisy copies only
    assert behind == {**SILENT, "noisy": [*nothing[:2], YES, YES, *nothing[4:]]}


def test_a_first_passs_time_reaches_its_own_copy_alone_and_nothing_clean() -> None:
    case = Case(carry="hidden", carry_probability=1.0)
    assert case.batch.carry_t is not None
    effect = case.effect(carry_t=perturbed(case.batch.carry_t, (1, 0)))
    assert effect == {**SILENT, "noisy": [NO, [True, False], NO, NO]}
    for name, tensor in (("eps", case.batch.eps), ("t", case.batch.t)):
        assert case.effect(**{name: perturbed(tensor, (1, 1))}) == {**SILENT, "noisy": [NO, [False, True], NO, NO]}
    span = Case(carry="hidden", carry_probability=1.0, span=2, independent_levels=1.0)
    assert span.batch.carry_t is not None
    effect = span.effect(carry_t=perturbed(span.batch.carry_t, (0, 0)))
    assert effect == {**SILENT, "noisy": [[True, False], [True, False], *[NO] * 4]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_clean_block_reaches_later_blocks_and_the_answer(attention: str) -> None:
    case = Case(attention)
    layout, table = case.batch.layout, case.batch.table_index
    latents_of_block_1 = (layout.copy == CLEAN) & ((layout.position == 8) | (layout.position == 9))  # behind 3 + 4 tokens, <BOT>
    assert latents_of_block_1.sum(1).tolist() == [2, 0]
    effect = case.effect(table_index=torch.where(latents_of_block_1, 0, table))
    assert effect == {
        "noisy": [NO, NO, YES, NO],  # block 1's own copies never see its clean latents
        "stop": [False, True, True, False],
        "answer": [True, True, True, False, False],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answer_question_and_neighbours(attention: str) -> None:
    case = Case(attention)
    ids = case.batch.text_ids  # 5 6 7 | 13 14 | 15 | 17

    def change(place: int) -> Tensor:
        return torch.where(torch.arange(len(ids)) == place, 20, ids)

    first_answer_token, second = case.effect(text_ids=change(3)), case.effect(text_ids=change(4))
    assert first_answer_token == {**SILENT, "answer": [False, True, True, False, False]}
    assert second == {**SILENT, "answer": [False, False, True, False, False]}
    for place in range(3):
        effect = case.effect(text_ids=change(place))
        assert effect == {"noisy": [YES] * 3 + [NO], "stop": [True] * 3 + [False], "answer": [True] * 3 + [False] * 2}
    neighbour = case.effect(text_ids=change(5))
    assert neighbour == {"noisy": [NO] * 3 + [YES], "stop": [False] * 3 + [True], "answer": [False] * 3 + [True] * 2}


def test_a_hidden_question_is_really_hidden() -> None:
    case = Case(condition_dropout=1.0)
    ids = case.batch.text_ids
    questions = torch.tensor([True, True, True, False, False, True, False])
    assert case.effect(text_ids=torch.where(questions, 20, ids)) == SILENT
    answers = case.effect(text_ids=torch.where(questions, ids, 20))
    assert answers == {**SILENT, "answer": [False, True, True, False, True]}
    shown = outputs(case.denoiser, collator(case.denoiser, condition_dropout=0.0)(case.records, [0, 1]))
    assert differs(case.before.noisy, shown.noisy).all()


def test_a_block_that_stands_as_text_is_seen_as_its_words_alone() -> None:
    """By later blocks and the answer; its clean latents reach its own noisy copies alone, which are made of them."""
    case = Case(context="text")
    assert case.batch.text_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    words = case.batch.text_ids.clone()
    words[3] = 20  # of the first record's first block
    changed = case.effect(text_ids=words)
    assert changed["noisy"] == [[False, False], [True, True], [True, True], [False, False]]
    assert changed["stop"] == [True, True, True, False] and changed["answer"] == [True, True, True, False, False]
    moved = case.effect(z0=perturbed(case.batch.z0, 0))
    assert moved["noisy"] == [[True, True], *[[False, False]] * 3]
    assert moved["stop"] == SILENT["stop"] and moved["answer"] == SILENT["answer"]


def test_what_padding_holds_changes_nothing() -> None:
    case = Case()
    padding = case.batch.layout.copy == PAD
    assert padding.any()
    table = torch.where(padding, 12, case.batch.table_index)
    assert case.effect(table_index=table) == SILENT


@pytest.mark.parametrize(
    ("span", "bidirectional", "context"), [(1, False, "latents"), (2, False, "latents"), (2, True, "latents"), (2, True, "text")]
)
@pytest.mark.parametrize("kind", SHAPES)
def test_any_token_reaches_exactly_the_tokens_that_see_it(kind: str, span: int, bidirectional: bool, context: str) -> None:
    """Every token's input vector is moved in turn; the rule is transitive, so layers widen nothing."""
    denoiser = tiny_denoiser(tiny_lm(kind), draws=2, span=span, bidirectional_question=bidirectional, context=context)
    layout = collator(denoiser)(random_records(2, seed=6), [0, 1]).layout
    visible, width = layout.visible(), layout.copy.shape[1]
    generator = torch.Generator().manual_seed(0)
    for row in range(2):
        inputs = torch.randn(1, width, 16, generator=generator, dtype=torch.float64).expand(width + 1, -1, -1).clone()
        inputs[torch.arange(width), torch.arange(width)] += 0.5
        with torch.no_grad():
            hidden = denoiser.backbone(inputs, visible[row].expand(width + 1, -1, -1), layout.position[row].expand(width + 1, -1))
        change = (hidden[:width] - hidden[width]).abs().max(-1).values
        assert torch.equal(change > 1e-9, visible[row].T)
        assert float(change[~visible[row].T].max()) == 0.0


# --- randomness and splitting ------------------------------------------------------------------------------------------


@given(st.integers(-5, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_a_stream_that_is_wound_on_draws_what_a_new_generator_does(seed: int, numbers: list[int]) -> None:
    streams = Streams(seed)
    for number in numbers:
        wound, new = streams.at(number), generator(seed, number)
        for rng in (wound, new):
            rng.integers(0, 7)  # leaves half a word over, which must not reach the next number
        assert np.array_equal(wound.standard_normal(3, dtype=np.float32), new.standard_normal(3, dtype=np.float32))


def test_micro_batches_add_up_to_the_batch() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, token_weight=0.5)
    records = random_records(6, seed=7)
    collate = collator(denoiser, condition_dropout=0.5, sample_latents=True)
    numbers = [16, 17, 18, 19, 20, 21]
    whole, whole_gradients = losses_and_gradients(denoiser, lambda: denoiser(collate(records, numbers)))
    for cuts in ([0, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
        parts = [collate(records[a:b], numbers[a:b]) for a, b in itertools.pairwise(cuts)]
        summed, summed_gradients = losses_and_gradients(
            denoiser,
            lambda parts=parts: {name: torch.stack([denoiser(p)[name] for p in parts]).sum() for name in whole},  # type: ignore[misc]
        )
        assert summed == pytest.approx(whole, rel=TOLERANCE)
        assert_same_gradients(summed_gradients, whole_gradients, TOLERANCE)
        assert sum(p.counts["flow"] for p in parts) == collate(records, numbers).counts["flow"]


def test_a_samples_noise_follows_from_its_number_alone() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=3)
    records = random_records(3, seed=8)
    collate = collator(denoiser, sample_latents=True)
    batch, alone = collate(records, [5, 9, 2]), collate(records[1:2], [9])
    first = len(records[0].blocks)
    own = slice(first, first + len(records[1].blocks))
    for name in ("eps", "t", "z0"):
        assert torch.equal(getattr(batch, name)[own], getattr(alone, name))
    assert not torch.equal(alone.eps, collate(records[1:2], [10]).eps)
    assert not torch.equal(alone.eps, collator(denoiser, seed=12)(records[1:2], [9]).eps)


def test_latents_are_standardised_and_sampled_only_when_asked() -> None:
    denoiser = tiny_denoiser(tiny_lm())
    record = random_records(1, seed=9)[0]
    standard = (record.mu - denoiser.latent_mean) / denoiser.latent_std
    assert torch.allclose(collator(denoiser)([record], [0]).z0, standard, atol=1e-6)
    drawn = collator(denoiser, sample_latents=True)
    assert torch.allclose(drawn([record], [0], training=False).z0, standard, atol=1e-6)
    samples = torch.stack([drawn([record], [n]).z0 for n in range(3000)])
    posterior = torch.exp(0.5 * record.logvar) / denoiser.latent_std
    assert torch.allclose(samples.mean(0), standard, atol=0.2)
    assert torch.allclose(samples.std(0) / posterior, torch.ones_like(standard), atol=0.06)


def test_question_dropout_has_its_rate_in_training_and_none_in_validation() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=1)
    record = random_records(1, seed=10)[0]
    numbers = range(400)
    hidden = hidden_questions(denoiser, [record] * 400, numbers, condition_dropout=0.25)
    assert 0.25 - 0.065 < np.mean(hidden) < 0.25 + 0.065  # three standard errors
    collate = collator(denoiser, condition_dropout=1.0)
    shown = collator(denoiser, condition_dropout=0.0)
    assert torch.equal(collate([record], [0], False).table_index, shown([record], [0]).table_index)


def test_timesteps_follow_their_distribution() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=50)
    records = random_records(1, seed=11) * 40
    uniform = collator(denoiser)(records, list(range(40))).t.flatten()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert torch.allclose(uniform.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.05)
    normal = collator(denoiser, timesteps="logit_normal", timestep_mean=1.0, timestep_std=0.5)(records, list(range(40))).t
    logits = torch.logit(normal.flatten())
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.06)
    assert float(logits.std()) == pytest.approx(0.5, abs=0.05)


def test_levels_of_a_span_are_independent_or_ordered() -> None:
    """Three blocks in spans of two: the second span's own block may be the one that is drawn, the place behind it may not."""
    denoiser = tiny_denoiser(tiny_lm(), draws=40, span=2, token_weight=0.5)
    record = LatentRecord([5], [[6], [7, 8], [9]], [10], torch.ones(3, 2, 3), torch.zeros(3, 2, 3))
    for share in (0.0, 0.25, 1.0):
        batch = collator(denoiser, independent_levels=share)([record] * 50, list(range(50)))
        first, second, third, behind = batch.t.view(50, 4, 40).unbind(1)
        ordered = (first == 0) | (second == 1)
        assert float(ordered.float().mean()) == pytest.approx(1 - share, abs=0.04)
        assert float(((first == 0) & (second < 1)).float().mean()) == pytest.approx((1 - share) / 2, abs=0.04)
        assert float((behind == 1).float().mean()) == pytest.approx(1 - share, abs=0.04)
        assert bool((third > 0).all()) and bool((behind > 0).all())
        assert batch.counts["flow"] == 6 * int((batch.t > 0).sum())
        tokens = torch.tensor([1, 2, 1, 0])[None, :, None] * (batch.t.view(50, 4, 40) > 0)
        assert batch.counts["token"] == int(tokens.sum())
        assert float(batch.z0.view(50, 4, 6)[:, 3].abs().max()) == 0.0


def test_nothing_is_learned_from_a_finished_block() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, span=2, token_weight=0.5)
    batch = collator(denoiser)(random_records(4, seed=14), [0, 1, 2, 3])
    assert (batch.t == 0).any()
    finished = replace(batch, t=torch.zeros_like(batch.t))
    losses = denoiser(finished)
    assert float(losses["flow"].detach()) == 0.0 == float(losses["token"].detach())
    assert all(float(losses[f"metric/flow_t{low}"][1]) == 0 for low in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"))


def test_the_answer_is_part_of_every_nth_step_only() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, answer_every=3)
    records = random_records(2, seed=12)
    collate = collator(denoiser, samples_per_step=2)
    whole = collate(records, [0, 1])
    assert whole.counts["answer"] > 0
    for step in range(1, 7):
        batch = collate(records, [2 * step, 2 * step + 1])
        assert (batch.counts["answer"] > 0) == (batch.counts["stop"] > 0) == (step % 3 == 0)
        assert batch.counts["flow"] == whole.counts["flow"]
    short = collate(records, [2, 3])
    losses = denoiser(short)
    assert losses["answer"].item() == 0.0 == losses["stop"].item()
    total({name: losses[name] for name in ("flow", "answer", "stop")}).backward()  # the unused heads are in the graph
    validation = collate(records, [2, 3], False)
    assert validation.counts["answer"] == whole.counts["answer"]


def test_unlabelled_positions_never_reach_the_vocabulary() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=4)
    seen: list[Tensor] = []
    batch = collator(denoiser)(random_records(3, seed=13), [0, 1, 2])
    with listening(denoiser.backbone.base.get_output_embeddings(), seen):
        denoiser(batch)
    assert [tuple(logits.shape) for logits in seen] == [(int(batch.counts["answer"]), 29)]


def test_time_conditions_the_noisy_latents_and_starts_without_effect() -> None:
    fresh = Denoiser(Backbone(tiny_lm()), tiny_denoiser(tiny_lm()).settings, 2, torch.zeros(3), torch.ones(3))
    t = torch.tensor([0.1, 0.9])
    assert torch.equal(fresh.time_embedding(t), torch.zeros(2, 16, dtype=torch.float64))
    trained = tiny_denoiser(tiny_lm())
    assert not torch.allclose(*trained.time_embedding(t))


def test_a_time_token_carries_the_time_of_its_own_block_alone() -> None:
    denoiser = tiny_denoiser(tiny_lm(), time_token=True)
    z, t = torch.randn(2, 2, 3, dtype=torch.float64), torch.tensor([0.1, 0.9])
    with_it = denoiser.noisy_block(z, t, denoiser.null_state(z))
    denoiser.settings.time_token = False
    without = denoiser.noisy_block(z, t, denoiser.null_state(z))
    assert torch.equal(with_it[:, 1:], without[:, 1:])
    assert torch.allclose(with_it[:, 0] - without[:, 0], denoiser.time_embedding(t))


def test_the_vaes_maps_start_the_denoisers() -> None:
    vae, denoiser = tiny_vae(), tiny_denoiser(tiny_lm(), objective="x0")
    denoiser.init_from_vae(vae)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    standard = (z - denoiser.latent_mean) / denoiser.latent_std
    assert torch.allclose(denoiser.clean_inputs(standard), vae.from_latent(z.double()), atol=1e-5)
    hidden = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    predicted = denoiser.predict(hidden) * denoiser.latent_std + denoiser.latent_mean
    assert torch.allclose(predicted, vae.to_mean(hidden).float(), atol=1e-5)
    other = tiny_denoiser(tiny_lm(), objective="velocity")
    before = other.latent_out.weight.clone()
    other.init_from_vae(vae)
    assert torch.equal(other.latent_out.weight, before)  # the mean head gives z_0, not eps - z_0


def test_marks_start_as_the_words_that_stand_in_their_places() -> None:
    denoiser = tiny_denoiser(tiny_lm())
    before = denoiser.marks.weight.clone()
    denoiser.init_marks({Mark.BOT: [3], Mark.SOA: [4, 5]})
    words = denoiser.backbone.embed(torch.tensor([3, 4, 5]))
    assert torch.equal(denoiser.marks.weight[Mark.BOT], words[0])
    assert torch.allclose(denoiser.marks.weight[Mark.SOA], words[1:].mean(0))
    others = [Mark.EOT, Mark.NULL]
    assert torch.equal(denoiser.marks.weight[others], before[others])


def test_flow_target_of_the_loss_is_the_objectives() -> None:
    with pytest.raises(ValueError, match="velocity, x0, epsilon, v"):
        flow.target("velocty", torch.zeros(1), torch.zeros(1), torch.zeros(1))
