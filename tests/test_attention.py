"""Every attention backend against eager attention under the dense mask: outputs and gradients, over random layouts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from transformers import PreTrainedModel

from ladir.config import LoraSettings
from ladir.data.batches import DenoiserBatch, VaeBatch, VaeCollator
from ladir.errors import UnusableError
from ladir.inference.cache import Prefix
from ladir.layout import Layout
from ladir.models import attention
from ladir.models.attention import (
    BLOCK,
    CPU,
    FLASH,
    FLEX,
    NARROWEST_FLEX,
    SHORTEST_SDPA,
    BlockMasks,
    attend,
    block_mask,
    set_attention,
)
from ladir.models.backbone import Backbone, with_activation_checkpointing
from ladir.models.vae import Vae
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

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT TESTED: the compiled attention kernels run on CUDA only, and there is no GPU here"
)


def denoiser_batch(seed: int, pack_tokens: int, count: int = 3) -> DenoiserBatch:
    denoiser = tiny_denoiser(tiny_lm(), draws=2, bidirectional_question=seed % 2 == 1)  # every second seed's questions
    collate = collator(denoiser, condition_dropout=0.3)
    return replace(collate, pack_tokens=pack_tokens)(random_records(count, seed=seed), list(range(count)))


def vae_batch(vae: Vae, seed: int, pack_tokens: int) -> VaeBatch:
    rng = np.random.default_rng(seed)
    sentences = [tokens(rng, 1, 7) for _ in range(5)]
    return VaeCollator(vae.settings, range(VOCAB), EOS, seed=3, pack_tokens=pack_tokens)(sentences, list(range(5)))


def losses_and_gradients(model: nn.Module, batch: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    losses = {name: value for name, value in model(batch).items() if "/" not in name}
    torch.stack([value.double() for value in losses.values()]).sum().backward()
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(model)


def assert_same(model: nn.Module, other: nn.Module, batch: Any) -> None:
    ours, theirs = losses_and_gradients(model, batch), losses_and_gradients(other, batch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert_same_gradients(ours[1], theirs[1], 1e-5)


# --- FlexAttention -----------------------------------------------------------------------------------------------------


@contextmanager
def plain_flex() -> Iterator[list[Layout]]:
    """FlexAttention's own plain arithmetic, for rows of any width; yields the layouts that got a BlockMask.

    On a CPU PyTorch refuses gradients, because its compiled kernel has none there; the operator itself has.
    """
    made: list[Layout] = []
    make = attention.block_mask

    def watched(layout: Layout) -> Any:
        made.append(layout)
        return make(layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)
        patch.setattr(attention, "NARROWEST_FLEX", 1)
        patch.setattr(attention, "block_mask", watched)
        yield made


def assert_pytorch_makes(mask: torch_flex.BlockMask) -> None:
    """PyTorch's own maker, which goes by the whole dense mask, makes this one of the same rule."""
    rows, _, *widths = mask.shape
    made = torch_flex.create_block_mask(mask.mask_mod, rows, None, *widths, device="cpu", BLOCK_SIZE=BLOCK)
    for ours, theirs in zip(mask.as_tuple(flatten=False), made.as_tuple(flatten=False), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else callable(ours) or ours == theirs


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 60, 10000]))
def test_a_block_mask_is_the_dense_mask(seed: int, pack_tokens: int) -> None:
    for layout in (denoiser_batch(seed, pack_tokens).layout, vae_batch(tiny_vae(), seed, pack_tokens).encoder.layout):
        rows, width = layout.copy.shape
        mask = block_mask(layout.padded_to(BLOCK * (width // BLOCK + 1)))
        full = torch_flex.create_mask(mask.mask_mod, rows, 1, *mask.shape[2:], device="cpu")[:, 0]
        assert torch.equal(full[:, :width, :width], layout.visible())
        assert torch.equal(full[:, width:], torch.eye(full.shape[1], dtype=torch.bool)[None, width:].expand(rows, -1, -1))
        squares = full.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).any(4).any(2)
        assert torch.equal(mask.to_dense()[:, 0] != 0, squares)  # what nobody sees is skipped
        assert_pytorch_makes(mask)


def test_a_block_mask_of_many_squares_is_pytorch_s_own() -> None:
    """Long samples, one to a row and two: some squares are seen whole, and some by two stretches that meet."""
    [record] = random_records(1, seed=3)
    record = replace(record, question=[5] * 300)
    collate = collator(tiny_denoiser(tiny_lm(), draws=50), condition_dropout=0.0)
    for pack_tokens in (0, 4000):
        layout = replace(collate, pack_tokens=pack_tokens)([record, replace(record, question=[5] * 40)], [0, 1]).layout
        width = -(-layout.copy.shape[1] // BLOCK) * BLOCK
        mask = block_mask(layout.padded_to(width))
        full = torch_flex.create_mask(mask.mask_mod, len(layout.copy), 1, width, width, device="cpu")[:, 0]
        assert torch.equal(full, layout.padded_to(width).visible())
        assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.sum() > 0
        assert_pytorch_makes(mask)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 60, 10000]), st.sampled_from(sorted(SHAPES)))
def test_flex_gives_the_denoisers_losses_and_gradients(seed: int, pack_tokens: int, kind: str) -> None:
    batch = denoiser_batch(seed, pack_tokens)
    with plain_flex() as made:
        assert_same(*(tiny_denoiser(tiny_lm(kind, attention=name), draws=2) for name in (FLEX, "eager")), batch)
    assert len(made) == 1 and made[0].copy.shape[1] % BLOCK == 0


@pytest.mark.parametrize(("shortest", "taken"), [(1, "sdpa"), (10_000, "eager")])
def test_a_cpu_takes_eager_or_sdpa_by_the_length_of_the_rows(shortest: int, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORTEST_SDPA", shortest)
    batch = denoiser_batch(5, 60)
    assert attend(batch.layout, CPU, torch.float64, BlockMasks(), batch.layout.position).implementation == taken
    assert_same(*(tiny_denoiser(tiny_lm("llama", attention=name), draws=2) for name in (CPU, "eager")), batch)


def vae_with(name: str, lora: LoraSettings | None = None) -> Vae:
    vae = tiny_vae(lora=lora, latent_noise=0.5)
    for backbone in {vae.encoder, vae.thought_decoder.backbone}:
        backbone.base.set_attn_implementation(name)
    return vae


def test_flex_gives_the_vaes_losses_and_gradients() -> None:
    with plain_flex() as made:
        assert_same(vae_with(FLEX), vae_with("eager"), vae_batch(tiny_vae(), 1, pack_tokens=20))
    assert len(made) == 2


def test_layers_are_recomputed_with_the_attention_they_had() -> None:
    """Inside one model some passes go through flash, others through SDPA: the backward pass must not mix them up."""
    results = []
    for checkpointing in (False, True):
        with flash_stand_in() as calls:
            vae = vae_with(FLASH).train()
            assert vae.own_decoder is not None
            if checkpointing:
                vae.encoder.enable_activation_checkpointing()
                vae.own_decoder.enable_activation_checkpointing()
            results.append(losses_and_gradients(vae, vae_batch(vae, 2, pack_tokens=20)))
            assert len(calls) == (8 if checkpointing else 4)
    assert_same_gradients(results[1][1], results[0][1], 1e-6)


def test_block_masks_are_made_once_per_content_and_few_are_kept() -> None:
    masks, layout = BlockMasks(), denoiser_batch(1, 60).layout
    again = denoiser_batch(1, 60).layout
    assert layout.digest() == again.digest() != denoiser_batch(2, 60).layout.digest()
    assert masks(layout, BLOCK * 4) is masks(again, BLOCK * 4)
    for seed in range(2, 20):
        masks(denoiser_batch(seed, 60, count=1).layout, BLOCK * 4)
    assert len(masks._masks) == attention._CACHED_MASKS
    moved = replace(layout, key=layout.digest())
    assert moved.digest() == layout.digest()  # on another device nothing is copied back for it


def test_narrow_rows_go_through_sdpa() -> None:
    layout = denoiser_batch(1, 0).layout
    how = attend(layout, FLEX, torch.float32, BlockMasks(), layout.position)
    assert how.implementation == "sdpa" and isinstance(how.mask, Tensor) and how.width == 0


# --- flash-attn, by a stand-in with its documented functions -----------------------------------------------------------


@contextmanager
def flash_stand_in() -> Iterator[list[tuple[Any, ...]]]:
    """A ``flash_attn`` in plain PyTorch; yields what was called: (function, causal, number of documents)."""
    calls: list[tuple[Any, ...]] = []
    module: Any = ModuleType("flash_attn")

    def one(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale).transpose(0, 1)

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
    ) -> Tensor:
        assert softmax_scale is not None and dropout_p == 0.0
        calls.append(("whole", causal, len(q)))
        return torch.stack([one(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        sizes = cu_seqlens_q.diff().tolist()
        assert isinstance(max_seqlen_q, int) and max(sizes) == max_seqlen_q == max_seqlen_k and sum(sizes) == len(q)
        assert softmax_scale is not None and dropout_p == 0.0
        calls.append(("documents", causal, len(sizes)))
        parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([one(*part, softmax_scale, causal) for part in parts])

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", module)
        yield calls


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4.0)], ids=["full", "lora"])
@pytest.mark.parametrize("pack_tokens", [0, 20])
def test_flash_gives_the_vaes_losses_and_gradients(pack_tokens: int, lora: LoraSettings | None) -> None:
    with flash_stand_in() as calls:
        assert_same(vae_with(FLASH, lora), vae_with("eager", lora), vae_batch(tiny_vae(), 3, pack_tokens))
    assert len(calls) == 4 and all(name == "documents" and causal for name, causal, _ in calls)  # two layers, twice


def test_flash_leaves_the_denoisers_training_pass_to_the_others() -> None:
    batch = denoiser_batch(4, 60)
    with flash_stand_in() as calls:
        assert_same(*(tiny_denoiser(tiny_lm(attention=name), draws=2) for name in (FLASH, "eager")), batch)
        with plain_flex() as made:
            assert_same(*(tiny_denoiser(tiny_lm(attention=name), draws=2) for name in (FLASH, "eager")), batch)
    assert not calls and len(made) == 1


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_flash_reads_a_cached_prefix_in_both_directions(kind: str, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    question, block, noisy = (torch.randn(3, n, 16, dtype=torch.float64, generator=generator) for n in (5, 4, 3))
    lengths = torch.tensor([5, 5 - 2 * padded, 5])

    def states(name: str) -> tuple[Tensor, Tensor]:
        prefix, _ = Prefix.start(Backbone(tiny_lm(kind, attention=name)), question, lengths)
        prefix.append(block)
        with prefix.cache.read_only():
            step = prefix.backbone(noisy, prefix.visible(3), prefix.positions(torch.arange(3)), prefix.cache)
        return step, prefix.append(noisy[:, :1])

    with flash_stand_in() as calls:
        ours, theirs = states(FLASH), states("eager")
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert calls == ([] if padded else [("whole", False, 3)] * 6)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0, 60, 10000]), st.sampled_from(sorted(SHAPES)), st.sampled_from(["sdpa", CPU, FLASH])
)
def test_every_kernel_gives_the_losses_and_gradients_of_eager_attention(
    seed: int, pack_tokens: int, kind: str, name: str
) -> None:
    with flash_stand_in():
        denoisers = (tiny_denoiser(tiny_lm(kind, attention=kernel), draws=2) for kernel in (name, "eager"))
        assert_same(*denoisers, denoiser_batch(seed, pack_tokens))
        assert_same(vae_with(name), vae_with("eager"), vae_batch(tiny_vae(), seed, pack_tokens))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 60, 10000]),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(["sdpa", FLEX, FLASH]),
)
@example(521394, 0, "llama", FLASH)  # one rounding amplified: four times as wrong in a tensor
def test_in_bfloat16_no_kernel_is_much_further_from_the_truth_than_eager_attention(
    seed: int, pack_tokens: int, kind: str, name: str
) -> None:
    layouts = [denoiser_batch(seed, pack_tokens).layout, vae_batch(tiny_vae(), seed, pack_tokens).encoder.layout]
    for layout in layouts:
        # Several inputs: the errors of one, of a few tokens, differ by more than the bound now and then, by chance.
        shape = (8, *layout.copy.shape, 16)
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ways = ((name, torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float64))
        with flash_stand_in(), plain_flex():
            results = [together(Backbone(tiny_lm(kind, attention=n, dtype=d)), inputs.to(d), layout) for n, d in ways]
        assert_close(*results, inputs=8)


# --- the setting -------------------------------------------------------------------------------------------------------


def wide_lm(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """Heads of 16."""
    return tiny_lm(dtype=dtype, hidden_size=64, **changes)


def test_a_kernel_that_is_missing_is_one_clear_line() -> None:
    lm = wide_lm()
    with pytest.raises(
        UnusableError, match=r"^backbone\.attention=flex cannot be used: it trains on CUDA only, .*cpu; auto takes"
    ):
        set_attention(lm, "flex", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.importlib.util, "find_spec", lambda name: object())
        patch.setitem(sys.modules, "flash_attn", None)
        with pytest.raises(UnusableError, match=r"flash cannot be used: flash-attn cannot be imported .*requirements-cuda\.txt"):
            set_attention(lm, "flash", "cuda")
        set_attention(lm, "flex", "cuda")
        assert lm.config._attn_implementation == FLEX
        with pytest.raises(UnusableError, match=r"it is for backbone\.dtype=bfloat16"):
            set_attention(wide_lm(torch.float32), "flex", "cuda")
        with pytest.raises(UnusableError, match=r"attention_dropout=0\.1"):
            set_attention(wide_lm(attention_dropout=0.1), "flex", "cuda")
        with pytest.raises(UnusableError, match=r"heads of at least 16, the model's are of 4"):
            set_attention(tiny_lm(dtype=torch.bfloat16), "flex", "cuda")


@pytest.mark.parametrize(
    ("device", "triton", "flash", "taken", "name"),
    [
        ("cpu", True, True, f"eager, and sdpa for rows of {SHORTEST_SDPA} tokens and more", CPU),
        ("cuda", False, True, "sdpa", "sdpa"),
        ("cuda", True, False, f"flex, and sdpa for rows of less than {NARROWEST_FLEX} tokens", FLEX),
        ("cuda", True, True, f"flash, and sdpa for rows of less than {NARROWEST_FLEX} tokens", FLASH),
    ],
)
def test_auto_takes_the_fastest_that_is_there_and_says_which(
    device: str,
    triton: bool,
    flash: bool,
    taken: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if flash else None)
    lm = wide_lm()
    with caplog.at_level(logging.INFO, logger="ladir"):
        set_attention(lm, "auto", device)
    assert lm.config._attn_implementation == name
    assert caplog.messages == [f"backbone.attention=auto: {taken}"]
    assert "ladir" not in str(lm.config.to_dict())  # a saved model asks for no kernel


# --- compiled layers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("recomputing", "graphs"), [("none", 1), ("full", 3), ("selective", 3)])
def test_compiled_layers_give_the_same_losses_and_gradients(recomputing: str, graphs: int) -> None:
    """The traced graphs run as they are (no kernels are made of them); all layers share one, or attention's, MLP's and norm's."""
    batch, models = denoiser_batch(5, 60), [tiny_denoiser(tiny_lm(num_hidden_layers=12), draws=2).train() for _ in range(2)]
    torch._dynamo.reset()
    with_activation_checkpointing(models[0].backbone, recomputing).compile_layers(backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(models[0], models[1], batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs


@torch.no_grad()
def test_a_pass_with_a_cache_compiles_nothing() -> None:
    torch._dynamo.reset()
    plain, compiled = (Backbone(tiny_lm()) for _ in range(2))
    compiled.compile_layers(backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    question, found = torch.randn(2, 5, 16), []
    for backbone in (plain, compiled):
        prefix, last = Prefix.start(backbone, question, torch.tensor([5, 5]))
        found.append(prefix.append(last[:, None]))
    assert torch.equal(*found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


# --- the compiled kernels ----------------------------------------------------------------------------------------------


def gpu_lm(name: str, dtype: torch.dtype, head: int = 32) -> Backbone:
    """Heads of 32: the kernels take none below 16."""
    shape = {"hidden_size": 4 * head, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Backbone(tiny_lm(attention=name, dtype=dtype, max_position_embeddings=2048, **shape).cuda())


def assert_close(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], inputs: int = 1) -> None:
    """No further from float64 than three times eager attention in the same dtype is, in the mean square of every tensor.

    Of their largest errors the ratio is now and then above 3, by chance; so is that of one of several ``inputs``, which tensors
    then begin with, where a rounding is amplified: of those it is the median's.
    """
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        error = [(x.double() - truth).reshape(inputs, -1).norm(dim=1) for x in (one, other)]
        wrong, allowed = (float((x / truth.reshape(inputs, -1).norm(dim=1)).median()) for x in error)
        assert wrong <= 3 * allowed + 1e-4


def together(backbone: Backbone, inputs: Tensor, layout: Layout) -> list[Tensor]:
    """Outputs and gradients for each of several inputs, stacked."""
    each = [outputs_and_gradients(backbone, one, layout, layout.copy >= -1) for one in inputs]
    return [torch.stack(same) for same in zip(*each, strict=True)]


def outputs_and_gradients(backbone: Backbone, inputs: Tensor, layout: Layout, real: Tensor) -> list[Tensor]:
    inputs = inputs.detach().requires_grad_()
    hidden = backbone(inputs, layout, layout.position)[real]
    weights = [p for p in backbone.parameters() if p.ndim == 2 and p.requires_grad]
    # The mean square of what a norm has made is nearly constant: its gradient would be little more than rounding.
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hidden.device)
    used = torch.autograd.grad((hidden.double() * direction).mean(), [inputs, *weights], allow_unused=True)
    return [hidden.detach(), *(g for g in used if g is not None)]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("name", "head"), [(FLEX, 32), (FLEX, 64), (FLASH, 32)])
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(0, 0)
@example(1, 600)
@example(2, 10000)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 600, 2000, 10000]))
def test_compiled_kernels_equal_eager_attention(name: str, head: int, seed: int, pack_tokens: int) -> None:
    if name == FLASH:
        pytest.importorskip("flash_attn", reason="NOT TESTED: flash-attn is not installed")
    layouts = [denoiser_batch(seed, pack_tokens, count=40).layout, vae_batch(tiny_vae(), seed, pack_tokens).encoder.layout]
    for layout in (layout.to("cuda") for layout in layouts):
        real = layout.copy >= -1
        shape = (*layout.copy.shape, 4 * head)
        inputs = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        ways = ((name, torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float64))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "NARROWEST_FLEX", 2 * BLOCK)
            results = [outputs_and_gradients(gpu_lm(n, d, head), inputs.to(d), layout, real) for n, d in ways]
        assert_close(*results)


@pytest.mark.gpu
@NEEDS_GPU
def test_flex_is_compiled_a_few_times_whatever_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NARROWEST_FLEX", 2 * BLOCK)
    backbone = gpu_lm(FLEX, torch.bfloat16)
    attention._compiled_flex.cache_clear()
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(12):
        layout = denoiser_batch(seed, pack_tokens=300 + 100 * seed, count=30).layout.to("cuda")
        inputs = torch.randn(*layout.copy.shape, 128, device="cuda", dtype=torch.bfloat16)
        outputs_and_gradients(backbone, inputs, layout, layout.copy >= -1)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert compiled <= 4, f"{compiled} graphs for 12 shapes"
