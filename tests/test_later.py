"""Weights' gradients of a group of passes, computed together, against those that every pass computes by itself."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ladir.models.later import LaterWeights, PassGroup


def network(seed: int, width: int, bias: bool, frozen: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(width, 5, bias=bias), nn.Tanh(), nn.Linear(5, width, bias=bias)).double()
    layers[0].weight.requires_grad_(not frozen)
    return layers


def gradients(layers: nn.Module, rows: list[int], groups: list[int] | None, recompute: bool) -> dict[str, Tensor]:
    """Of passes that read one another's outputs, and of the first input; ``groups``: which each of them is in."""
    layers = copy.deepcopy(layers)
    later, made = LaterWeights(layers), {number: PassGroup() for number in groups or []}
    x = torch.linspace(-1, 1, max(rows) * layers[0].in_features, dtype=torch.float64).view(max(rows), -1).requires_grad_()
    z, loss = x, torch.zeros(())
    for number, count in enumerate(rows):
        group = made[groups[number]] if groups is not None else None

        def run(z: Tensor, group: PassGroup | None = group) -> Tensor:
            with later.within(group) if group is not None else nullcontext():
                return layers(z)

        z = checkpoint(run, z[:count], use_reentrant=False) if recompute else run(z[:count])
        loss = loss + (z * torch.arange(z.numel()).view_as(z).cos()).sum()
        z = torch.cat([z, x[count:]])
    loss.backward()
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad for name, p in layers.named_parameters() if p.grad is not None}}


@settings(max_examples=25)
@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=6),
)
def test_together_they_are_what_each_pass_gives(
    seed: int, width: int, bias: bool, frozen: bool, recompute: bool, passes: list[tuple[int, int]]
) -> None:
    layers, rows = network(seed, width, bias, frozen), [count for count, _ in passes]
    expected = gradients(layers, rows, None, recompute=False)
    actual = gradients(layers, rows, sorted(group for _, group in passes), recompute)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_a_group_multiplies_once_and_keeps_nothing() -> None:
    layers, group = network(0, 3, bias=True), PassGroup()
    later = LaterWeights(layers)
    with torch.profiler.profile() as profile:
        with later.within(group):
            loss = sum((layers(torch.ones(2, 3, dtype=torch.float64) * step).sum() for step in range(4)), torch.zeros(()))
        loss.backward()
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert len(products) == 4 + 2  # the second layer's input in each pass; both weights once
    assert all(not kept.inputs and not kept.gradients for _, kept in group._layers.values())


def test_nothing_is_kept_without_gradient_or_outside_a_group() -> None:
    layers, group = network(0, 3, bias=True), PassGroup()
    later, x = LaterWeights(layers), torch.ones(2, 3, dtype=torch.float64)
    with later.within(group), torch.no_grad():
        layers(x)
    layers(x).sum().backward()
    assert not group._layers and layers[0].weight.grad is not None


def test_a_copy_and_a_pickle_know_groups_of_their_own() -> None:
    layers = network(0, 3, bias=True)
    later, group = LaterWeights(layers), PassGroup()
    for again in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):  # noqa: S301, our own
        with later.within(group):
            again(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        assert not group._layers
        assert again[0].weight.grad is not None


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_named_and_stored_as_before(bias: bool) -> None:
    layers = network(0, 3, bias)
    names = list(layers.state_dict())
    LaterWeights(layers)
    assert list(layers.state_dict()) == names and all(isinstance(layers[n], nn.Linear) for n in (0, 2))
    LaterWeights(layers)  # a second one takes them over
