"""Tiny random models and records, the same for every test that asks with the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ladir.config import DenoiserSettings, LoraSettings, VaeSettings
from ladir.data.batches import DenoiserCollator, flat_ids
from ladir.data.latents import LatentRecord
from ladir.data.packing import decoder_rows
from ladir.models.adapters import with_lora
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.vae import ThoughtDecoder, Vae

VOCAB = 29
EOS = 1
PAD = 0

COMMON: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
#: transformers configs by name: grouped-query attention everywhere, tied embeddings, biases, a head size of its own
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


def tiny_lm(
    kind: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    vocab: int = VOCAB,
    **changes: Any,
) -> PreTrainedModel:
    """A random causal LM whose every parameter matters: biases and norms are random too."""
    arguments = {**COMMON, **SHAPES[kind], **changes, "vocab_size": vocab}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    randomise(lm, seed)
    return lm.to(dtype).eval()


def randomise(module: nn.Module, seed: int, std: float = 0.25) -> None:
    """Every trainable parameter normal with ``std``, around 1 for the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.copy_(noise + 1.0 if "norm" in name and parameter.ndim == 1 else noise)


def tiny_denoiser(
    lm: PreTrainedModel, latents: int = 2, dim: int = 3, seed: int = 5, lora: LoraSettings | None = None, **settings: Any
) -> Denoiser:
    """A denoiser with random heads and a standardisation that is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(dim, generator=generator), torch.rand(dim, generator=generator) + 0.5
    settings = {"timestep_features": 8, "token_rank": 4, "token_positions": 3, **settings}
    backbone = Backbone(with_lora(lm, lora) if lora else lm)
    denoiser = Denoiser(backbone, DenoiserSettings(**settings), latents, mean, std)
    for place, head in enumerate(denoiser.heads().values()):
        randomise(head, seed + place, std=0.4)
    return denoiser.eval()


def tiny_vae(
    kind: str = "llama",
    latents: int = 2,
    dim: int = 3,
    seed: int = 7,
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.float64,
    bos: tuple[int, ...] = (),
    separator: tuple[int, ...] = (),
    **settings: Any,
) -> Vae:
    """A VAE whose encoder is whole or has random adapters; the decoder is its own unless it can be shared."""
    encoder = Backbone(with_lora(tiny_lm(kind, seed, dtype), lora) if lora else tiny_lm(kind, seed, dtype))
    vae_settings = VaeSettings(latent_dim=dim, latents_per_block=latents, **settings)
    shares = lora is not None and vae_settings.decoder == "frozen"
    vae = Vae(encoder, None if shares else Backbone(tiny_lm(kind, seed, dtype)), vae_settings, bos, separator)
    for place, head in enumerate((vae.queries, vae.to_mean, vae.to_logvar, vae.from_latent)):
        randomise(head, seed + place, std=0.4)
    if lora:
        randomise_adapters(vae, seed)
    return vae.eval()


def randomise_adapters(module: nn.Module, seed: int) -> None:
    """Random LoRA matrices: fresh ones are zero and change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def tokens(rng: np.random.Generator, low: int, high: int) -> list[int]:
    """``low`` to ``high`` random token ids that are neither <pad> nor <eos>."""
    return rng.integers(2, VOCAB, rng.integers(low, high + 1)).tolist()


def random_records(
    count: int, seed: int = 0, latents: int = 2, dim: int = 3, max_question: int = 5, max_blocks: int = 3, max_answer: int = 4
) -> list[LatentRecord]:
    """Records of random lengths with random latents."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        blocks = [tokens(rng, 1, 5) for _ in range(rng.integers(1, max_blocks + 1))]
        shape = (len(blocks), latents, dim)
        mu, logvar = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
        records.append(LatentRecord(tokens(rng, 1, max_question), blocks, tokens(rng, 1, max_answer), mu, logvar))
    return records


def collator(
    denoiser: Denoiser,
    seed: int = 11,
    samples_per_step: int = 8,
    prefix: tuple[int, ...] = (),
    suffix: tuple[int, ...] = (),
    **changes: Any,
) -> DenoiserCollator:
    """The collator that belongs to a denoiser."""
    settings = replace(denoiser.settings, **changes)
    mean, std = denoiser.latent_mean.numpy(), denoiser.latent_std.numpy()
    return DenoiserCollator(settings, mean, std, EOS, seed, samples_per_step, prefix, suffix=suffix)


def teacher_forced(decoder: ThoughtDecoder, z: Tensor, sentences: Sequence[Sequence[int]]) -> Tensor:
    """Logits [n + N, V] for ``sentences`` of n tokens and the <eos> behind each, given latents ``z`` [N, L, d]."""
    rows = decoder_rows([len(sentence) for sentence in sentences], decoder.marks + z.shape[1], budget=0)
    return decoder.logits(z, flat_ids(sentences), rows)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of all trainable parameters (zeros where there is none), by name."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest gradient; names the parameter that differs."""
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        difference = float((actual[name] - gradient).abs().max())
        assert difference <= tolerance * largest, f"{name}: {difference} against {tolerance} * {largest}"
