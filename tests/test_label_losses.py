"""The loss of labels from logits that are made part by part, against all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ladir.data.packing import IGNORE
from ladir.models.backbone import Backbone
from tests.tiny import SHAPES, VOCAB, tiny_lm


def inputs(backbone: Backbone, count: int, ignored: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, backbone.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(VOCAB, (count,), generator=generator)
    labels[[place for place in ignored if place < count]] = IGNORE
    return hidden, labels


def gradients(backbone: Backbone, hidden: Tensor, losses: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum, so that every label counts differently."""
    weights = torch.arange(1.0, len(losses) + 1)
    head = backbone.base.get_output_embeddings().weight
    return torch.autograd.grad((losses * weights).sum(), (hidden, head))


@pytest.mark.parametrize("kind", SHAPES)
@given(count=st.integers(0, 9), parts=st.integers(1, 12), ignored=st.lists(st.integers(0, 8), max_size=4))
def test_parts_give_the_losses_and_gradients_of_all_at_once(kind: str, count: int, parts: int, ignored: list[int]) -> None:
    backbone = Backbone(tiny_lm(kind))
    backbone.logits_parts = parts
    hidden, labels = inputs(backbone, count, ignored)
    losses, right = backbone.label_losses(hidden, labels)
    logits = backbone.logits(hidden)
    expected = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    assert losses.dtype == torch.float32 and losses.shape == labels.shape
    torch.testing.assert_close(losses, expected)
    assert right.tolist() == [bool(row.argmax() == label) for row, label in zip(logits, labels, strict=True)]
    for ours, theirs in zip(gradients(backbone, hidden, losses), gradients(backbone, hidden, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_more_logits_are_kept_than_those_of_a_part() -> None:
    backbone = Backbone(tiny_lm())
    hidden, labels = inputs(backbone, 12, [])
    largest = []
    for parts in (1, 4):
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(len(tensor) if tensor.shape[1:] == (VOCAB,) and len(tensor) == len(labels) else 0)
            return tensor

        backbone.logits_parts = parts
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses, _ = backbone.label_losses(hidden, labels)
        largest.append(max(kept))
        losses.sum().backward()
    assert largest == [12, 0]
