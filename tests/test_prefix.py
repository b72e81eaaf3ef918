"""Rows behind a shared prefix against rows with copies of it: same numbers, and no copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ladir.config import SampleSettings
from ladir.inference.ar import complete
from ladir.inference.cache import SHORTEST_SHARED, Prefix
from ladir.inference.decode import decode
from ladir.inference.sampler import BlockSampler, FinishedTrajectories, TrajectoryNoise
from ladir.models.backbone import Backbone
from tests.tiny import EOS, SHAPES, tiny_denoiser, tiny_lm

LENGTHS = torch.tensor([9, SHORTEST_SHARED, 1])
OWNERS = {
    "as many each": [0, 0, 1, 1, 2, 2],
    "ragged": [0, 0, 0, 0, 1, 2, 2],
    "one prefix unread": [0, 0, 2, 2, 2],
    "one row": [1],
}


def start(backbone: Backbone, lengths: Tensor = LENGTHS, seed: int = 0) -> Prefix:
    inputs = torch.randn(len(lengths), int(lengths.max()), backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return Prefix.start(backbone, inputs.to(backbone.dtype), lengths)[0]


def shared_and_copied(backbone: Backbone, owner: list[int], lengths: Tensor = LENGTHS) -> tuple[Prefix, Prefix]:
    rows = torch.tensor(owner)
    shared, copied = start(backbone, lengths).share(rows), start(backbone, lengths).select(rows)
    assert (shared.shared is not None) == (len(owner) > len(lengths)) and copied.shared is None
    return shared, copied


def new_tokens(prefix: Prefix, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(prefix), length, prefix.backbone.hidden_size, generator=generator).to(prefix.backbone.dtype)


@torch.no_grad()
def assert_same(shared: Prefix, copied: Prefix, seed: int) -> None:
    """Reading (nothing kept), then growing."""
    noisy = new_tokens(shared, 3, seed)
    seen = []
    for prefix in (shared, copied):
        with prefix.cache.read_only():
            seen.append(prefix.backbone(noisy, prefix.visible(3), prefix.positions(torch.arange(3)), prefix.cache))
    assert torch.allclose(seen[0], seen[1], rtol=0, atol=1e-5)
    block = new_tokens(shared, 4, seed + 1)
    assert torch.allclose(shared.append(block), copied.append(block), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, torch.full((3,), SHORTEST_SHARED + 1)], ids=["mixed", "equal"])
@pytest.mark.parametrize("kind", SHAPES)
def test_shared_prefixes_give_what_copies_give(kind: str, lengths: Tensor) -> None:
    for attention in ("eager", "sdpa"):
        backbone = Backbone(tiny_lm(kind, dtype=torch.float32, attention=attention))
        for owner in OWNERS.values():
            shared, copied = shared_and_copied(backbone, owner, lengths)
            for seed in (1, 3):
                assert_same(shared, copied, seed)
        assert backbone.base.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_texts_of_different_lengths_may_stand_behind_a_shared_prefix(kind: str) -> None:
    """Then their padding stands among the rows' own tokens; rows that leave take what is theirs."""
    backbone, sizes = Backbone(tiny_lm(kind, dtype=torch.float32)), torch.tensor([4, 1, 2, 4, 1, 3, 2])
    prefixes = shared_and_copied(backbone, OWNERS["ragged"])
    kept = torch.tensor([0, 2, 4, 5])
    for seed, rows in ((1, torch.arange(7)), (2, torch.arange(7)), (3, kept)):
        if len(rows) < len(prefixes[0]):
            prefixes = (prefixes[0].select(rows), prefixes[1].select(rows))
        text = new_tokens(prefixes[0], 4, seed)
        with torch.no_grad():
            ours, theirs = (prefix.append_text(text, (sizes * seed % 4 + 1)[rows]) for prefix in prefixes)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
        assert prefixes[0].shared is not None and torch.equal(prefixes[0].next_position, prefixes[1].next_position)
        assert_same(*prefixes, seed=10 * seed)
    text = new_tokens(prefixes[0], 4, 7)
    with torch.no_grad():  # what stands where padding does is seen by nobody
        other = torch.where(torch.arange(4)[:, None] < sizes[kept][:, None, None], text, 100 * text)
        seen = [prefix.select(torch.arange(4)) for prefix in prefixes for _ in range(2)]
        for prefix, inputs in zip(seen, (text, other, text, other), strict=True):
            prefix.append_text(inputs, sizes[kept])
        behind = [prefix.append(new_tokens(prefix, 2, 8)) for prefix in seen]
    assert all(torch.allclose(one, behind[0], rtol=0, atol=1e-5) for one in behind[1:])


def test_rows_may_leave_in_any_number() -> None:
    backbone = Backbone(tiny_lm("qwen3", dtype=torch.float32))
    prefixes = shared_and_copied(backbone, [0] * 4 + [1] * 3 + [2] * 2)
    assert_same(*prefixes, seed=1)
    for rows in ([0, 2, 3, 4, 7, 8], [0, 1, 4, 5], [2, 3], [1]):  # the second leaves question 1 without rows
        prefixes = (prefixes[0].select(torch.tensor(rows)), prefixes[1].select(torch.tensor(rows)))
        assert prefixes[0].shared is not None
        assert_same(*prefixes, seed=len(rows))
    assert len(prefixes[0].shared.valid) == 1  # type: ignore[union-attr]


def test_gradients_reach_prefix_and_rows() -> None:
    backbone = Backbone(tiny_lm("mistral"))
    question = torch.randn(2, SHORTEST_SHARED, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for way in (Prefix.share, Prefix.select):
        backbone.zero_grad()
        inputs = question.clone().requires_grad_()
        prefix = way(Prefix.start(backbone, inputs, torch.tensor([SHORTEST_SHARED, 2]))[0], torch.tensor([0, 0, 0, 1]))
        block = new_tokens(prefix, 3, 5).requires_grad_()
        prefix.append(block).sin().sum().backward()
        weights = [p.grad for p in backbone.base.get_decoder().layers.parameters() if p.grad is not None]
        found.append([inputs.grad, block.grad, *weights])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


def copying(function: Callable[[], Any]) -> Any:
    """What ``function`` returns when prefixes are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefix, "share", Prefix.select)
        return function()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_thinking_and_answering_from_the_same_cache(guidance: float) -> None:
    denoiser = tiny_denoiser(tiny_lm("llama", dtype=torch.float32))
    with torch.no_grad():
        denoiser.stop_head.weight.mul_(3.0)
    settings = SampleSettings(num_steps=3, max_blocks=3, guidance_scale=guidance)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    rows = torch.cat([owner, owner + 3]) if guidance != 1.0 else owner
    lengths = LENGTHS.repeat(2) if guidance != 1.0 else LENGTHS

    @torch.no_grad()
    def run() -> list[tuple[FinishedTrajectories, list[list[int]]]]:
        noise = TrajectoryNoise(0, [(str(q), i) for i, q in enumerate(owner.tolist())])
        groups = list(BlockSampler(denoiser, settings, noise).sample(start(denoiser.backbone, lengths).share(rows), owner))
        uniform = torch.rand(len(owner), 6, generator=torch.Generator().manual_seed(0))
        hidden = [group.prefix.append(new_tokens(group.prefix, 1, 7))[:, 0] for group in groups]
        return [
            (group, decode(group.prefix, states, EOS, 6, 1.0, uniform[: len(states)]))
            for group, states in zip(groups, hidden, strict=True)
        ]

    shared, copied = run(), copying(run)
    assert len(shared) == len(copied) > 1
    for (ours, our_answers), (theirs, their_answers) in zip(shared, copied, strict=True):
        assert (ours.rows, ours.stopped, our_answers) == (theirs.rows, theirs.stopped, their_answers)
        assert torch.allclose(ours.latents, theirs.latents, rtol=0, atol=1e-4)
        assert ours.prefix.shared is not None and theirs.prefix.shared is None


def test_completions_are_the_same() -> None:
    backbone = Backbone(tiny_lm("qwen2", dtype=torch.float32))

    def run() -> list[list[list[int]]]:
        return complete(backbone, [[4, 5, 6, 7] * 5, [7]], ["a", "b"], 5, EOS, max_tokens=8, temperature=1.0, seed=3)

    texts = run()
    assert texts == copying(run)
    assert len({tuple(text) for group in texts for text in group}) > 2


def test_a_row_costs_its_own_tokens_only() -> None:
    backbone = Backbone(tiny_lm("llama", dtype=torch.float32))
    per_token = 2 * 2 * 2 * 4 * 4  # layers, keys and values, kv heads, head size, bytes
    for count in (3, 50):
        prefix = start(backbone).share(torch.arange(3).repeat_interleave(count))
        with torch.no_grad():
            prefix.append(new_tokens(prefix, 4, 0))
            prefix = prefix.select(torch.arange(0, 3 * count, 3))
            prefix.append(new_tokens(prefix, 4, 1))
        assert prefix.shared is not None
        own = [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
        shared = [*prefix.shared.keys, *prefix.shared.values]
        assert storage(own) == len(prefix) * 8 * per_token
        assert storage(shared) == 3 * SHORTEST_SHARED * per_token


def storage(tensors: list[Tensor]) -> int:
    """Bytes of memory behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_selecting_all_prefixes_copies_none_of_them() -> None:
    prefix = start(Backbone(tiny_lm())).share(torch.tensor([0, 0, 1, 1, 2, 2]))
    kept = prefix.select(torch.tensor([0, 2, 3, 5]))
    assert prefix.shared is not None and kept.shared is not None
    assert all(a is b for a, b in zip(prefix.shared.keys, kept.shared.keys, strict=True))


def test_a_short_prefix_is_copied() -> None:
    prefix = start(Backbone(tiny_lm()), torch.tensor([SHORTEST_SHARED - 1, 2])).share(torch.tensor([0, 0, 1]))
    assert prefix.shared is None and len(prefix) == 3


def test_an_attention_with_extras_gets_copies() -> None:
    backbone = Backbone(tiny_lm())
    backbone.base.config.model_type = "gemma2"
    prefix = start(backbone).share(torch.tensor([0, 0, 1, 2]))
    assert prefix.shared is None and len(prefix) == 4
