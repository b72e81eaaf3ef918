"""Several samples in a row against one to a row: where tokens lie, the same losses and gradients, nothing seen across samples."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladir.config import LoraSettings
from ladir.data.batches import DenoiserBatch, VaeBatch, VaeCollator
from ladir.data.packing import Rows, decoder_rows, encoder_rows, place, text_rows
from ladir.layout import CLEAN, PAD, Layout
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae, encode_sentences
from tests.tiny import (
    EOS,
    SHAPES,
    VOCAB,
    assert_same_gradients,
    collator,
    gradients,
    random_records,
    tiny_denoiser,
    tiny_lm,
    tiny_vae,
    tokens,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
BUDGETS = st.sampled_from([0, 1, 7, 16, 100])


# --- where tokens lie --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(LENGTHS, BUDGETS)
def test_every_document_lies_whole_in_one_row_within_the_budget(lengths: list[int], budget: int) -> None:
    places = place(lengths, budget)
    assert places.width <= max(budget, max(lengths))
    taken = np.zeros(places.rows * places.width, dtype=int)
    for first, length in zip(places.first, lengths, strict=True):
        assert first // places.width == (first + length - 1) // places.width
        taken[first : first + length] += 1
    assert taken.max() == 1 and taken.reshape(places.rows, places.width).any(1).all()
    if budget == 0:
        assert places.rows == len(lengths) and not places.packed
    if budget >= sum(lengths):
        assert places.rows == 1 and places.width == sum(lengths)


def documents(rows: Rows, sizes: list[int], budget: int) -> list[tuple[list[int], Layout]]:
    """Each document's table rows and its own part of the layout."""
    places = place(sizes, budget)
    flat = {name: getattr(rows.layout, name).flatten() for name in ("position", "limit", "copy")}
    found = []
    for first, size in zip(places.first, sizes, strict=True):
        part = slice(first, first + size)
        found.append((rows.index.flatten()[part].tolist(), Layout(*(flat[name][part][None] for name in flat))))
    return found


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 3), BUDGETS)
def test_rows_are_the_written_out_sequences(lengths: list[int], latents: int, budget: int) -> None:
    starts, total = np.cumsum([0, *lengths]).tolist(), sum(lengths)
    text = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    queries = list(range(total, total + latents))
    expected = {
        "text": (text_rows(lengths, [1] * len(lengths), budget), text),
        "encoder": (encoder_rows(lengths, latents, budget), [row + queries for row in text]),
        "decoder": (
            decoder_rows(lengths, latents, budget),
            [[total + i * latents + j for j in range(latents)] + row for i, row in enumerate(text)],
        ),
    }
    read = {"text": 1, "encoder": latents}
    for name, (rows, sequences) in expected.items():
        sizes = [len(sequence) for sequence in sequences]
        taken = rows.index.flatten()[rows.at].tolist()
        ends = [s[-read.get(name, length + 1) :] for s, length in zip(sequences, lengths, strict=True)]
        assert taken == [index for end in ends for index in end]
        for (index, layout), sequence in zip(documents(rows, sizes, budget), sequences, strict=True):
            assert index == sequence
            assert layout.position[0].tolist() == list(range(len(sequence)))
            assert torch.equal(layout.visible()[0], torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril())
        assert_boundaries(rows.layout)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=6), BUDGETS)
def test_a_bidirectional_question_is_seen_whole_and_the_rest_stays_causal(shapes: list[tuple[int, int]], budget: int) -> None:
    sizes, read = [question + rest for question, rest in shapes], [rest + 1 for _, rest in shapes]
    causal, rows = text_rows(sizes, read, budget), text_rows(sizes, read, budget, bidirectional_question=True)
    assert torch.equal(rows.index, causal.index) and torch.equal(rows.at, causal.at) and rows.layout.boundaries is None
    for (_, layout), (question, rest) in zip(documents(rows, sizes, budget), shapes, strict=True):
        expected = torch.ones(question + rest, question + rest, dtype=torch.bool).tril()
        expected[:question, :question] = True
        assert torch.equal(layout.visible()[0], expected)


def assert_boundaries(layout: Layout) -> None:
    """The stretches between boundaries are the documents, and padding apart."""
    assert layout.boundaries is not None
    copies, position = layout.copy.flatten(), layout.position.flatten()
    ends = layout.boundaries.tolist()
    assert ends[0] == 0 and ends[-1] == copies.numel() and layout.longest == max(np.diff(ends))
    for start, end in itertools.pairwise(ends):
        kind = copies[start:end].unique().tolist()
        assert kind in ([CLEAN], [PAD])
        if kind == [CLEAN]:
            assert position[start:end].tolist() == list(range(end - start))


# --- the denoiser ------------------------------------------------------------------------------------------------------


def denoiser_and_batches(
    budget: int, seed: int, kind: str = "llama", count: int = 5
) -> tuple[Denoiser, DenoiserBatch, DenoiserBatch]:
    reads: dict[str, Any] = {"context": "text", "lm_weight": 0.5} if seed % 3 == 1 else {}
    carries = seed % 5 > 2
    reads |= {"carry": "hidden", "carry_probability": 1.0, "carry_own_rollout": 0.5, "span": 2} if carries else {}
    denoiser = tiny_denoiser(tiny_lm(kind), draws=2, token_weight=0.5, bidirectional_question=seed % 2 == 1, **reads)
    records = random_records(count, seed=seed)
    collate = collator(denoiser, prefix=(3,), suffix=(6, 2) if carries else (), condition_dropout=0.3)
    return denoiser, replace(collate, pack_tokens=budget)(records, list(range(count))), collate(records, list(range(count)))


def denoiser_losses(denoiser: Denoiser, batch: DenoiserBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    denoiser.zero_grad()
    losses = {name: value for name, value in denoiser(batch).items() if "/" not in name}
    torch.stack([value.double() for value in losses.values()]).sum().backward()
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(denoiser)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 40, 90, 10000]), st.sampled_from(sorted(SHAPES)))
@example(3, 90, "llama")
@example(4, 10000, "qwen2")
def test_a_packed_denoiser_batch_has_the_same_losses_and_gradients(seed: int, budget: int, kind: str) -> None:
    denoiser, packed, plain = denoiser_and_batches(budget, seed, kind)
    assert packed.counts == plain.counts and packed.num_tokens == plain.num_tokens == int((packed.layout.copy != PAD).sum())
    ours, theirs = denoiser_losses(denoiser, packed), denoiser_losses(denoiser, plain)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert_same_gradients(ours[1], theirs[1], 1e-5)


def test_only_the_places_of_tokens_differ() -> None:
    _, packed, plain = denoiser_and_batches(60, seed=1)
    assert packed.layout.copy.numel() < plain.layout.copy.numel() and len(packed.layout.copy) < 5
    for name in ("text_ids", "z0", "eps", "t", "stop_labels", "answer_labels", "word_labels", "block_tokens"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    for name in ("noisy_at", "end_at", "answer_at", "words_at"):
        taken, wanted = (batch.table_index.flatten()[getattr(batch, name)] for batch in (packed, plain))
        assert torch.equal(taken, wanted)


def assert_documents_are_apart(backbone: Backbone, layout: Layout) -> None:
    """Every document's input vectors are moved in turn: hidden states of all others are the same to the last bit."""
    assert layout.document is not None and layout.copy.shape[0] == 1
    inputs = torch.randn(1, layout.copy.shape[1], 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = backbone(inputs, layout, layout.position)
    for document in range(5):
        mine = layout.document[0] == document
        change = (backbone(inputs + 0.5 * mine[None, :, None], layout, layout.position) - before).abs().amax(-1)[0]
        assert float(change[~mine].max()) == 0.0
        assert float(change[mine].min()) > 1e-9
    seen = layout.visible()[0]
    assert not seen[layout.document[0][:, None] != layout.document[0][None, :]].any()


@torch.no_grad()
def test_a_sample_reaches_no_other_sample_of_its_row() -> None:
    denoiser, batch, _ = denoiser_and_batches(10000, seed=2)
    assert_documents_are_apart(denoiser.backbone, batch.layout)


# --- the VAE -----------------------------------------------------------------------------------------------------------


def vae_batches(vae: Vae, budget: int, seed: int) -> tuple[VaeBatch, VaeBatch]:
    rng = np.random.default_rng(seed)
    sentences = [tokens(rng, 1, 7) for _ in range(6)]
    collate = VaeCollator(vae.settings, range(VOCAB), EOS, seed=3)
    return replace(collate, pack_tokens=budget)(sentences, list(range(6))), collate(sentences, list(range(6)))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4.0)], ids=["full", "lora"])
@pytest.mark.parametrize("budget", [1, 20, 10000])
def test_a_packed_vae_batch_has_the_same_losses_and_gradients(budget: int, lora: LoraSettings | None) -> None:
    vae = tiny_vae(lora=lora, latent_noise=0.5)
    results = []
    for batch in vae_batches(vae, budget, seed=budget):
        vae.zero_grad()
        outputs = vae(batch)
        (outputs["reconstruction"].double() + outputs["kl"].double()).backward()
        results.append(({name: value.tolist() for name, value in outputs.items()}, gradients(vae), batch.counts))
    (ours, our_gradients, our_counts), (theirs, their_gradients, their_counts) = results
    assert our_counts == their_counts and ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5), name
    assert_same_gradients(our_gradients, their_gradients, 1e-5)


@torch.no_grad()
def test_a_sentence_reaches_no_other_in_the_rows_of_encoder_and_decoder() -> None:
    vae = tiny_vae()
    batch, _ = vae_batches(vae, 10000, seed=2)
    for rows in (batch.encoder, batch.decoder):
        assert_documents_are_apart(vae.encoder, rows.layout)


@torch.no_grad()
def test_a_sentence_is_encoded_the_same_beside_any_other() -> None:
    vae = tiny_vae()
    rng = np.random.default_rng(0)
    rows = [tokens(rng, 2, 7) for _ in range(5)]
    others = [rows[0], *([row[0], (row[1] + 1 - 2) % (VOCAB - 2) + 2, *row[2:]] for row in rows[1:])]
    together, beside = (encode_sentences(vae, sentences, pack_tokens=10000)[0] for sentences in (rows, others))
    assert torch.equal(together[0], beside[0])
    assert not torch.isclose(together[1:], beside[1:]).all(-1).any()
    assert torch.allclose(together, encode_sentences(vae, rows)[0], atol=1e-6)
