"""The block layout against the design's rules, written out token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladir.data.batches import DenoiserCollator
from ladir.data.latents import LatentRecord
from ladir.layout import Layout, Mark, Source, _template, template
from tests.tiny import tiny_denoiser, tiny_lm

SHAPE = st.tuples(
    st.integers(1, 4),  # question tokens
    st.integers(1, 4),  # blocks
    st.integers(1, 3),  # latents
    st.integers(1, 3),  # draws
    st.none() | st.integers(1, 3),  # answer tokens
    st.integers(1, 3),  # blocks of a span
    st.booleans(),  # the question's tokens see each other
)
Shape = tuple[int, int, int, int, int | None, int, bool]


@dataclass(frozen=True)
class Token:
    kind: str  # question, answer, BOT, EOT, SOA, latent
    stream: str  # clean, noisy
    place: int  # position in the clean stream
    block: int | None = None
    draw: int | None = None
    span: int | None = None


def written_out(
    question: int, blocks: int, latents: int, draws: int, answer: int | None, span: int = 1, _bidirectional: bool = False
) -> list[Token]:
    """``question [<BOT> z*L <EOT>]*B <SOA> answer`` and the noisy copies of every span at the same positions."""
    clean: list[Token] = []
    noisy: list[Token] = []

    def add(kind: str, block: int | None = None) -> None:
        clean.append(Token(kind, "clean", len(clean), block))

    for _ in range(question):
        add("question")
    for block in range(-(-blocks // span) * span):  # the last span may reach beyond the last block
        for draw in range(draws):
            for offset, kind in enumerate(["BOT", *["latent"] * latents]):
                noisy.append(Token(kind, "noisy", question + block * (latents + 2) + offset, block, draw, block // span))
        needed = block < blocks if answer is not None else block // span < (blocks - 1) // span
        for kind in ["BOT", *["latent"] * latents, "EOT"] if needed else []:
            add(kind, block)
    if answer is not None:
        add("SOA")
        for _ in range(answer):
            add("answer")
    return clean + sorted(noisy, key=lambda token: (token.span, token.draw, token.place))


def sees(viewer: Token, other: Token, span: int = 1, bidirectional_question: bool = False) -> bool:
    """The design: a clean token sees the clean tokens before it and its own block; a noisy token sees the question, the
    clean blocks before its span, and its own copy; nothing clean sees anything noisy."""
    if bidirectional_question and viewer.kind == other.kind == "question":
        return True
    if viewer.stream == "clean":
        own_block = viewer.block is not None and viewer.block == other.block
        return other.stream == "clean" and (other.place <= viewer.place or own_block)
    if other.stream == "noisy":
        return (viewer.span, viewer.draw) == (other.span, other.draw)
    assert viewer.span is not None
    return other.kind == "question" or (other.block is not None and other.block < viewer.span * span)


@settings(max_examples=60, deadline=None)
@given(SHAPE)
def test_visibility_is_the_written_out_rule(shape: Shape) -> None:
    expected = written_out(*shape)
    layout = template(*shape)
    assert len(layout) == len(expected)
    assert layout.position.tolist() == [token.place for token in expected]
    batch = Layout(*(torch.from_numpy(a)[None] for a in (layout.position, layout.limit, layout.copy)))
    rule = [[sees(viewer, other, *shape[-2:]) for other in expected] for viewer in expected]
    assert batch.visible()[0].tolist() == rule


def test_layouts_of_one_shape_are_made_once_and_few_are_kept() -> None:
    """Few: a layout of a long record takes tens of kilobytes, and long sentences have lengths of their own."""
    assert template(3, 2, 2, 1, 4) is template(3, 2, 2, 1, 4)
    assert template(3, 2, 2, 1, 4, sentences=[5, 6]) is template(3, 2, 2, 1, 4, sentences=[5, 6])
    assert len(template(3, 2, 2, 1, 4, sentences=[5, 6])) > len(template(3, 2, 2, 1, 4, sentences=[5, 5]))
    assert 0 < (_template.cache_info().maxsize or 0) < 10_000


@pytest.mark.parametrize("sentences", [None, [5, 6, 1]])
def test_the_last_blocks_can_stand_without_an_answer(sentences: list[int] | None) -> None:
    """They are what stands before the answer."""
    given_answer, last = (template(3, 3, 2, 2, answer, 2, sentences=sentences, last=True) for answer in (4, None))
    answer = given_answer.answer
    for name in ("position", "limit", "copy", "source", "index"):
        assert np.array_equal(np.delete(getattr(given_answer, name), answer), getattr(last, name))
    assert np.array_equal(last.ends, given_answer.ends)
    assert np.array_equal(last.words, given_answer.words)
    assert not len(last.answer)


@settings(max_examples=60, deadline=None)
@given(SHAPE)
def test_sources_and_places_of_the_losses(shape: Shape) -> None:
    question, blocks, latents, draws, _, span, _ = shape
    layout, expected = template(*shape), written_out(*shape)
    places = {kind: [i for i, token in enumerate(expected) if token.kind == kind] for kind in ("BOT", "EOT", "SOA", "answer")}
    for i, token in enumerate(expected):
        if token.kind in ("BOT", "EOT", "SOA"):
            assert (layout.source[i], layout.index[i]) == (Source.MARK, Mark[token.kind])
    text = np.flatnonzero(layout.source == Source.TEXT)
    assert text.tolist() == [i for i, token in enumerate(expected) if token.kind in ("question", "answer")]
    for source, stream in ((Source.CLEAN_LATENT, "clean"), (Source.NOISY_LATENT, "noisy")):
        at = np.flatnonzero(layout.source == source)
        assert at.tolist() == [i for i, token in enumerate(expected) if (token.kind, token.stream) == ("latent", stream)]
        assert sorted(layout.index[at]) == list(range(len(at)))
    assert layout.index[text].tolist() == list(range(len(text)))
    noisy = [expected[i] for i in layout.noisy]
    numbered = range(-(-blocks // span) * span)
    assert [(t.block, t.draw) for t in noisy] == [(b, m) for b in numbered for m in range(draws) for _ in range(latents)]
    assert layout.index[layout.noisy].tolist() == list(range(len(noisy)))
    assert layout.ends.tolist() == places["EOT"]
    assert layout.answer.tolist() == places["SOA"] + places["answer"]
    assert layout.question_length == question


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4), st.booleans())
def test_padding_sees_and_is_seen_by_itself_only(shapes: list[tuple[int, int, int]], with_answer: bool) -> None:
    latents, draws = 2, 2
    denoiser_settings = tiny_denoiser(tiny_lm(), draws=draws, answer_every=2).settings
    collate = DenoiserCollator(denoiser_settings, np.zeros(3), np.ones(3), eos_id=1, seed=0, samples_per_step=8)
    records = [
        LatentRecord([5] * q, [[6]] * b, [7] * a, torch.zeros(b, latents, 3), torch.zeros(b, latents, 3)) for q, b, a in shapes
    ]
    first = 0 if with_answer else 8
    batch = collate(records, list(range(first, first + len(records))))
    visible = batch.layout.visible()
    for row, (q, b, a) in enumerate(shapes):
        expected = written_out(q, b, latents, draws, a if with_answer else None)
        size, width = len(expected), visible.shape[1]
        rule = np.eye(width, dtype=bool)
        rule[:size, :size] = [[sees(viewer, other) for other in expected] for viewer in expected]
        assert visible[row].numpy().tolist() == rule.tolist()
