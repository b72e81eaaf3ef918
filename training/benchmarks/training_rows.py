"""Training against the obvious way: one pass, labelled logits, packing, attention kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladir.config import Config
from ladir.layout import PAD, Layout, block_length, template
from ladir.models.attention import BlockMasks, flash, flash_lacks, flex, whole_squares
from ladir.reference import reference_passes
from training.benchmarks.setup import Bench, Row, backward, gradient_norm, released
from training.phases.denoiser import denoiser_weights
from training.planning.models import Lengths

#: (median, sigma) of log-normal lengths in tokens, close to GSM8K's; shares of its records that have 2 to 8 blocks
_SENTENCE, _QUESTION, _ANSWER = (20.0, 0.5), (55.0, 0.4), (3.0, 0.3)
_BLOCK_SHARES = (0.26, 0.28, 0.22, 0.13, 0.06, 0.03, 0.02)
#: a denoiser's sample is longer than a sentence, and so are its rows
_DENOISER_ROWS = 2
#: (record, draws, rows) whose rows are FlexAttention's: of about 4096 tokens; of other lengths, as many tokens in all; for a CPU.
#: The first shape has a kernel of its own, the others share one, in the end for rows as long as the first ones.
_LONG, _LONG_DRAWS = Lengths(question=512, blocks=32, block=1, answer=32), 21
_FLEX_ROWS = (
    (_LONG, _LONG_DRAWS, 4),
    (Lengths(question=128, blocks=8, block=1, answer=32), 4, 44),
    (Lengths(question=128, blocks=14, block=1, answer=32), 4, 26),
    (Lengths(question=128, blocks=40, block=1, answer=32), 4, 13),
    (Lengths(question=128, blocks=80, block=1, answer=32), 4, 7),
    (_LONG, _LONG_DRAWS, 3),
)
_SMOKE_FLEX_ROWS = ((Lengths(question=460, blocks=4, block=1, answer=8), 4, 2),)

#: calls of an attention kernel that are timed together: one takes microseconds
_KERNEL_CALLS = 20

#: what labelled logits stand against
_FULL = "logits of all positions"
_AT_ONCE = "all at once"
#: labels of a loss whose logits are made in parts
_MANY_LABELS, _PARTS = 128, 8
#: the vocabulary of Llama 3: what full logits cost grows with it
VOCABULARY = 128256


def one_pass(bench: Bench, draws: int) -> Row:
    """All blocks and draws of a record in one forward and backward against one of each per block and draw."""
    lengths, latents = bench.size.lengths, bench.size.latents
    model = bench.denoiser().train()
    [record] = records = bench.records([lengths])
    batch = bench.denoiser_batch(records, draws)
    weights = denoiser_weights(bench.config.denoiser)

    def ours() -> Tensor:
        model.zero_grad()
        return backward(model, model(batch), weights)

    def obvious() -> Tensor:
        model.zero_grad()
        passes = reference_passes(model, [record], batch, hidden=[False])
        return torch.stack([backward(model, losses, weights) for losses in passes]).sum()

    found = [torch.stack([way(), gradient_norm(model)]) for way in (ours, obvious)]
    bench.check_equal(f"one pass, {draws} draws", found[0][:1], found[1][:1])
    bench.check_equal(f"one pass, {draws} draws, gradients", found[0][1:], found[1][1:])
    seconds = bench.in_turn({"ours": ours, "obvious": obvious}, warm_up=False)
    block, clean = block_length(latents), lengths.question + lengths.blocks * block_length(latents) + 1 + lengths.answer
    separate = clean + draws * sum(lengths.question + b * block + latents + 1 for b in range(lengths.blocks))
    tokens = len(template(lengths.question, lengths.blocks, latents, draws, lengths.answer))
    return Row(
        f"one_pass_m{draws}",
        f"one pass, {lengths.blocks} blocks x {draws} draws",
        "one per block and draw",
        seconds["ours"],
        seconds["obvious"],
        at_most=separate / tokens,
        details={"draws_per_second": lengths.blocks * draws / seconds["ours"], "examples_per_second": 1 / seconds["ours"]},
    )


def labelled_logits(bench: Bench) -> list[Row]:
    """The answer's loss from logits of its own positions against logits of the whole sequence: peak memory, and time."""

    def one_layer(config: Config) -> None:
        config.backbone.scratch.update(num_hidden_layers=1, vocab_size=VOCABULARY)

    backbone = bench.denoiser(one_layer).backbone
    batch = bench.denoiser_batch(bench.records([bench.size.lengths]), bench.config.denoiser.draws)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch.layout.copy.numel(), backbone.hidden_size, generator=generator)
    states = states.to(bench.device, backbone.dtype).requires_grad_()
    labels = torch.full((len(states),), -100, device=bench.device).index_copy(0, batch.answer_at, batch.answer_labels)

    def labelled() -> Tensor:
        logits = backbone.logits(states[batch.answer_at]).float()
        return _gradient(F.cross_entropy(logits, batch.answer_labels, reduction="sum"), states)

    def full() -> Tensor:
        logits = backbone.logits(states).float()
        return _gradient(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), states)

    bench.check_equal("labelled logits", labelled(), full())
    seconds = bench.in_turn({"ours": labelled, "obvious": full}, warm_up=False)
    known = [states, labels, *backbone.parameters()]
    memory = {name: bench.peak_bytes(way, known) / 2**20 for name, way in (("ours", labelled), ("obvious", full))}
    at_most = len(states) / len(batch.answer_at)
    title = f"logits of labelled positions, vocabulary {VOCABULARY}"
    return [
        Row("labelled_logits_memory", f"{title}: peak memory", _FULL, memory["ours"], memory["obvious"], "MiB", at_most),
        Row("labelled_logits", f"{title}: time", _FULL, seconds["ours"], seconds["obvious"], at_most=at_most),
    ]


def logits_in_parts(bench: Bench) -> list[Row]:
    """A loss of many labels from logits made in parts (``backbone.logits_parts``) against all at once: peak memory, and time."""

    def one_layer(config: Config) -> None:
        config.backbone.scratch.update(num_hidden_layers=1, vocab_size=VOCABULARY)

    backbone = bench.denoiser(one_layer).backbone
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_MANY_LABELS, backbone.hidden_size, generator=generator).to(bench.device, backbone.dtype)
    states.requires_grad_()
    labels = torch.randint(VOCABULARY, (_MANY_LABELS,), generator=generator).to(bench.device)

    def made_in(parts: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            backbone.logits_parts = parts
            return _gradient(backbone.label_losses(states, labels)[0].sum(), states)

        return loss

    ways = {"ours": made_in(_PARTS), "obvious": made_in(1)}
    bench.check_equal("logits in parts", ways["ours"](), ways["obvious"]())
    seconds = bench.in_turn(ways, warm_up=False)
    known = [states, labels, *backbone.parameters()]
    memory = {name: bench.peak_bytes(way, known) / 2**20 for name, way in ways.items()}
    title = f"logits of {_MANY_LABELS} labels in {_PARTS} parts, vocabulary {VOCABULARY}"
    return [
        Row("logits_parts_memory", f"{title}: peak memory", _AT_ONCE, memory["ours"], memory["obvious"], "MiB", _PARTS),
        Row("logits_parts", f"{title}: time", _AT_ONCE, seconds["ours"], seconds["obvious"]),
    ]


def packing(bench: Bench) -> Iterator[Row]:
    """Packed against padded micro batches, lengths as in GSM8K."""
    rng = np.random.default_rng(0)
    budget = bench.size.pack_tokens
    with released():
        words = bench.token_ids(_gsm8k_like(rng, _SENTENCE, bench.size.sentences))
        vae_batches = [bench.vae_batch(words, pack_tokens) for pack_tokens in (budget, 0)]
        copies = [batch.encoder.layout.copy for batch in vae_batches]
        weights = {"reconstruction": 1.0, "kl": bench.config.vae.beta}
        yield _packed(bench, "packing", "VAE", bench.vae().train(), vae_batches, copies, weights)
    with released():
        questions, answers = (_gsm8k_like(rng, spread, bench.size.sentences // 2 + 1) for spread in (_QUESTION, _ANSWER))
        blocks = rng.choice(np.arange(2, 2 + len(_BLOCK_SHARES)), len(questions), p=_BLOCK_SHARES).tolist()
        lengths = [Lengths(q, b, 1, a) for q, b, a in zip(questions, blocks, answers, strict=True)]
        records, draws = bench.records(lengths), bench.config.denoiser.draws
        batches = [bench.denoiser_batch(records, draws, pack_tokens) for pack_tokens in (_DENOISER_ROWS * budget, 0)]
        copies = [batch.layout.copy for batch in batches]
        model = bench.denoiser().train()
        yield _packed(bench, "packing_denoiser", "denoiser", model, batches, copies, denoiser_weights(bench.config.denoiser))


def _gsm8k_like(rng: np.random.Generator, spread: tuple[float, float], count: int) -> list[int]:
    """Lengths in tokens, log-normal: (median, sigma)."""
    median, sigma = spread
    return np.maximum(1, rng.lognormal(math.log(median), sigma, count).round().astype(int)).tolist()


def _packed(
    bench: Bench,
    key: str,
    name: str,
    model: nn.Module,
    batches: Sequence[Any],
    copies: Sequence[Tensor],
    weights: dict[str, float],
) -> Row:
    """A forward and backward of ``batches`` (packed, padded); ``copies``: their layouts' fields that mark padding."""

    def way(batch: Any) -> Tensor:
        model.zero_grad()
        return backward(model, model(batch), weights)

    found = [torch.stack([way(batch), gradient_norm(model)]) for batch in batches]
    bench.check_equal(f"{key}: loss", found[0][:1], found[1][:1])
    bench.check_equal(f"{key}: gradients", found[0][1:], found[1][1:])
    ways = {turn: lambda batch=batch: way(batch) for turn, batch in zip(("ours", "obvious"), batches, strict=True)}
    seconds = bench.in_turn(ways, warm_up=False)
    real = [float((copy != PAD).float().mean()) for copy in copies]
    return Row(
        key,
        f"packed rows, lengths as in GSM8K: {name}",
        "a row per sample, padded",
        seconds["ours"],
        seconds["obvious"],
        at_most=copies[1].numel() / copies[0].numel(),
        details={"real_tokens": real[0], "real_tokens_padded": real[1]},
    )


def attention(bench: Bench) -> Iterator[Row]:
    """The compiled kernels alone against SDPA with a dense mask; flash-attn's where it is installed."""
    for number, (sizes, draws, rows) in enumerate(_SMOKE_FLEX_ROWS if bench.size.name == "smoke" else _FLEX_ROWS):
        layout = bench.denoiser_batch(bench.records([sizes] * rows), draws).layout
        with released():
            yield _flex_row(bench, f"attention_{number}" if number else "attention", layout)
    if bench.device.type == "cuda" and not flash_lacks():
        words = bench.token_ids(_gsm8k_like(np.random.default_rng(0), _SENTENCE, bench.size.sentences))
        yield _flash_row(bench, bench.vae_batch(words, bench.size.pack_tokens).decoder.layout)
        yield _flash_prefix_row(bench)


def _flex_row(bench: Bench, key: str, layout: Layout) -> Row:
    """FlexAttention on a training layout, also a narrow one; forward only where there is no backward pass of it."""
    rows, length = layout.position.shape
    width = whole_squares(length)
    mask = BlockMasks()(layout, width)
    return _against_dense(
        bench,
        key,
        f"FlexAttention, {rows} rows of {width} tokens",
        _attention_states(bench, rows, width, width, trained=bench.device.type == "cuda"),
        layout.padded_to(width).visible(),
        lambda query, key, value: flex(nn.Identity(), query, key, value, mask, query.shape[-1] ** -0.5)[0],
    )


def _flash_row(bench: Bench, layout: Layout) -> Row:
    """flash-attn on packed causal sentences."""
    rows, width = layout.position.shape
    return _against_dense(
        bench,
        "attention_flash",
        f"flash-attn, {rows} rows of packed sentences, {width} tokens each",
        _attention_states(bench, rows, width, width, trained=True),
        layout.visible(),
        lambda query, key, value: flash(nn.Identity(), query, key, value, None, query.shape[-1] ** -0.5, documents=layout)[0],
    )


def _flash_prefix_row(bench: Bench) -> Row:
    """flash-attn on the denoising step of every trajectory: a block sees its whole prefix and itself."""
    size = bench.size
    block = size.latents + 1
    seen = size.lengths.question + (size.lengths.blocks - 1) * block_length(size.latents) + block
    states = _attention_states(bench, size.trajectories, block, seen, trained=False)
    return _against_dense(
        bench,
        "attention_flash_prefix",
        f"flash-attn, {size.trajectories} blocks of {block} tokens that see {seen}",
        states,
        torch.ones(size.trajectories, block, seen, dtype=torch.bool, device=bench.device),
        lambda query, key, value: flash(nn.Identity(), query, key, value, None, query.shape[-1] ** -0.5)[0],
    )


def _attention_states(bench: Bench, rows: int, queries: int, keys: int, trained: bool) -> list[Tensor]:
    """Random query [rows, heads, queries, head], key and value [rows, kv heads, keys, head] of the size's model.

    A token's heads lie together, as the layers make them.
    """
    scratch, generator = bench.size.scratch, torch.Generator(bench.device).manual_seed(0)
    head = scratch["hidden_size"] // scratch["num_attention_heads"]
    shapes = [(rows, queries, scratch["num_attention_heads"], head), *[(rows, keys, scratch["num_key_value_heads"], head)] * 2]
    states = [torch.randn(shape, generator=generator, device=bench.device, dtype=bench.dtype) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_(trained) for tensor in states]


def _against_dense(
    bench: Bench, key: str, title: str, states: list[Tensor], visible: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Row:
    """A kernel that gives [N, T, heads, head] beside SDPA with the mask ``visible`` [N, T, keys], forward and backward."""

    def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible[:, None], enable_gqa=True).transpose(1, 2)

    def run(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        output = attention(*states)
        if not states[0].requires_grad:
            return output
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(output.sum(), states)])

    bench.check_equal(title, run(kernel), run(dense))
    ways = {
        name: lambda attention=attention: [run(attention) for _ in range(_KERNEL_CALLS)]
        for name, attention in (("ours", kernel), ("obvious", dense))
    }
    ours, obvious = (seconds / _KERNEL_CALLS for seconds in bench.in_turn(ways).values())
    return Row(key, title, "SDPA, dense mask", ours, obvious, details={"visible": float(visible.float().mean())})


def _gradient(loss: Tensor, states: Tensor) -> Tensor:
    return torch.autograd.grad(loss, states)[0]
