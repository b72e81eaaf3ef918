"""Every architecture of docs/models.md as a tiny random LM: fast paths equal the obvious ones, and refusals name their reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ladir.config import BackboneSettings, DenoiserSettings, LoraSettings, SampleSettings
from ladir.errors import UnusableError
from ladir.inference.cache import Prefix
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from ladir.models import architectures
from ladir.models.adapters import with_lora
from ladir.models.architectures import refuse_unusable
from ladir.models.attention import causal, set_attention
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.folders import save_lm
from ladir.models.loading import check_lm, load_lm
from ladir.reference import reference_blocks
from tests.test_denoiser import assert_one_pass_is_the_reference
from tests.tiny import COMMON, VOCAB, random_records, randomise, tiny_denoiser

_COMMON: dict[str, Any] = {**COMMON, "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_BOTH = ["sliding_attention", "full_attention"]
#: scales, caps and windows are such that leaving them out, or getting them wrong, shows
TESTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": _BOTH,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": _BOTH, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "granite": {"logits_scaling": 5.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.2},
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, "layer_types": _BOTH, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_inner": 40},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def lm_of(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**_COMMON, **TESTED.get(kind, {}), **changes})
    config._experts_implementation = "eager"
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(lm, seed=3)
    return lm.to(dtype).eval()


#: none of a tested architecture's settings as they come: sizes and kinds of layers that change what a mask does
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_5_text": ({}, "linear_attention"),
    "qwen3_next": ({}, "linear_attention"),
    "lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    "granitemoehybrid": ({"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}, "carry state"),
    "falcon_h1": ({}, "carry state"),
    "mamba": ({}, "carry state"),
    "bloom": ({}, "ALiBi"),
    "mpt": ({}, "ALiBi"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "t5": ({}, "an encoder with a decoder"),
    "gemma3n_text": ({}, "embeddings of token ids of their own"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "place in the row"),
}


def texts(seed: int = 2, length: int = 15) -> Tensor:
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def read(backbone: Backbone, ids: Tensor) -> Tensor:
    """Hidden states of causal text."""
    length = ids.shape[1]
    return backbone(backbone.embed(ids), causal(length, ids.device), torch.arange(length)[None])


def assert_own_logits(lm: PreTrainedModel) -> None:
    """Logits and cross-entropy are transformers' own, over more tokens than a window has."""
    backbone, ids = Backbone(lm), texts()
    with torch.no_grad():
        theirs = lm(input_ids=ids, use_cache=False).logits
        hidden = read(backbone, ids)
        assert torch.allclose(backbone.logits(hidden), theirs, rtol=1e-6, atol=1e-8)
        losses, right = backbone.label_losses(hidden[0, :-1], ids[0, 1:])
        expected = torch.nn.functional.cross_entropy(theirs[0, :-1].float(), ids[0, 1:], reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-5) and torch.equal(right, theirs[0, :-1].argmax(-1) == ids[0, 1:])


def assert_one_pass(lm: PreTrainedModel) -> None:
    """Losses and gradients of the training pass are the reference's, and every weight of the text part has one."""
    denoiser = tiny_denoiser(lm, draws=2, span=2, token_weight=0.5)
    records = random_records(2, seed=1, max_blocks=3)
    assert_one_pass_is_the_reference(denoiser, records, range(2), condition_dropout=0.5)
    still = [name for name, p in lm.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)]
    assert not [name for name in still if "router" not in name and "gate.weight" not in name and "experts" not in name], still


@torch.no_grad()
def assert_sampling_by_cache(lm: PreTrainedModel) -> None:
    """Blocks denoised from the cache are those of the whole sequence run anew at every step."""
    denoiser = tiny_denoiser(lm)
    denoiser.stop_head.bias.fill_(-1e4)
    settings = SampleSettings(num_steps=2, max_blocks=2)
    noise = TrajectoryNoise(0, [("q", 0), ("r", 0)])
    question = denoiser.backbone.embed(torch.cat([texts(3, 9), texts(4, 9)]))
    prefix, _ = Prefix.start(denoiser.backbone, question, torch.tensor([9, 9]))
    sampled = list(BlockSampler(denoiser, settings, noise).sample(prefix, torch.arange(2)))
    expected = reference_blocks(denoiser, question, settings, TrajectoryNoise(0, [("q", 0), ("r", 0)]))
    assert torch.allclose(torch.cat([group.latents for group in sampled]), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def assert_padding_changes_nothing(lm: PreTrainedModel) -> None:
    """A question padded on the left, and text behind it from the cache, are what they are alone."""
    backbone, ids = Backbone(lm), texts()
    inputs = torch.cat([torch.full((1, 4, backbone.hidden_size), 3.0, dtype=backbone.dtype), backbone.embed(ids[:, :10])], dim=1)
    prefix, last = Prefix.start(backbone, inputs, torch.tensor([10]))
    states = [last, *(prefix.append(backbone.embed(ids[:, i : i + 1]))[:, 0] for i in range(10, 15))]
    assert torch.allclose(torch.stack(states, dim=1), read(backbone, ids)[:, 9:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def assert_every_kernel(lm: PreTrainedModel) -> None:
    """Whatever auto takes, here and on a GPU, gives what eager attention gives."""
    backbone, ids = Backbone(lm), texts()
    expected = read(backbone, ids)
    for device in ("cpu", "cuda"):
        set_attention(lm, "auto", device)
        # Some LMs compute parts in float32, whatever their dtype is: the last digits differ between processors.
        assert torch.allclose(read(backbone, ids), expected, rtol=1e-5, atol=1e-5)
    if not lm._supports_sdpa:
        assert lm.config._attn_implementation == "eager"
        with pytest.raises(UnusableError, match=r"attention=sdpa cannot be used: .* models compute what it does not"):
            set_attention(lm, "sdpa", "cuda")
    lm.set_attn_implementation("eager")


@torch.no_grad()
def assert_plain(lm: PreTrainedModel) -> None:
    """Rows behind a shared prefix are what copies of it give: the attention has no extras."""
    backbone = Backbone(lm)
    prefix, _ = Prefix.start(backbone, backbone.embed(torch.cat([texts(3, 17), texts(4, 17)])), torch.tensor([17, 12]))
    owner, new = torch.tensor([0, 0, 1]), backbone.embed(texts(5, 9).view(3, 3))
    shared, copied = prefix.share(owner), prefix.select(owner)
    assert shared.shared is not None
    assert torch.allclose(shared.append(new), copied.append(new), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TESTED)
def test_a_tested_architecture_does_what_is_asked(kind: str, tmp_path: Path) -> None:
    lm = lm_of(kind)
    refuse_unusable(lm.config, kind)
    assert_own_logits(lm)
    assert_padding_changes_nothing(lm)
    assert_sampling_by_cache(lm)
    assert_every_kernel(lm)
    assert_one_pass(lm)
    if Backbone(lm).shares_prefixes:
        assert_plain(lm)
    save_lm(Backbone(lm.float()), tmp_path / "lm")
    loaded = load_lm(BackboneSettings(dtype="float32", attention="eager"), "cpu", str(tmp_path / "lm"))
    with torch.no_grad():
        assert torch.allclose(read(Backbone(loaded), texts()), read(Backbone(lm), texts()), rtol=1e-4, atol=1e-5)


def test_table_of_plain_attention_is_tested() -> None:
    from ladir.models.prefix_attention import _PLAIN_ATTENTION

    assert {"gemma", *TESTED} >= _PLAIN_ATTENTION


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_by_their_config(kind: str) -> None:
    changes, reason = REFUSED[kind]
    config = AutoConfig.for_model(kind, **changes)
    with pytest.raises(UnusableError, match=reason) as refused:
        refuse_unusable(config, "some/model")
    message = str(refused.value)
    assert "\n" not in message and "'some/model'" in message and "docs/models.md" in message


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "of_next_year"])
def test_a_quantized_lm_is_refused_before_its_weights_are_read(method: str, tmp_path: Path) -> None:
    """On a CPU some would be trained as floats, and the same command would fail or freeze them on a GPU."""
    config = lm_of("llama").config
    config.quantization_config = {"quant_method": method, "bits": 4}
    config.save_pretrained(tmp_path / "lm")
    with pytest.raises(UnusableError, match=rf"is quantized \({method}: .*dequantize\(\) .* save_pretrained") as refused:
        check_lm(BackboneSettings(name_or_path=str(tmp_path / "lm")))
    assert "\n" not in str(refused.value) and str(tmp_path / "lm") in str(refused.value)


@pytest.mark.parametrize("place", ["whole", "text part"])
def test_so_is_one_that_also_sees_wherever_its_config_says_it(place: str) -> None:
    config = AutoConfig.for_model("gemma3", text_config={**_COMMON, **TESTED["gemma3_text"]})
    (config if place == "whole" else config.text_config).quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnusableError, match=r"is quantized \(gptq"):
        refuse_unusable(config, "some/model")


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "clip"])
def test_what_transformers_makes_no_causal_lm_of_is_told_in_short(kind: str) -> None:
    """Its own message lists every class that it has, some kilobytes."""
    with pytest.raises(UnusableError, match=rf"\({kind}\) cannot be used: transformers makes no causal LM of it") as refused:
        refuse_unusable(AutoConfig.for_model(kind), "some/model")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mpt", "place in the row"),
        ("bloom", "does not run"),
        ("lfm2", "their mask hides"),
        ("qwen3_next", "their mask hides"),
    ],
)
def test_behaviour_alone_shows_what_cannot_work(kind: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_known_fault", lambda _: "")
    with pytest.raises(UnusableError, match=reason):
        refuse_unusable(AutoConfig.for_model(kind, **REFUSED.get(kind, ({}, ""))[0]), kind)


def test_an_lm_that_also_sees_is_trained_in_its_text_part_alone(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 28, "boi_token_index": 27, "eoi_token_index": 26, "mm_tokens_per_image": 4}
    text = {**_COMMON, **TESTED["gemma3_text"]}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **tokens)
    lm = lm_of_config(config)
    randomise(lm, seed=3)
    save_lm(Backbone(lm), tmp_path / "lm")
    loaded = load_lm(BackboneSettings(dtype="float32"), "cpu", str(tmp_path / "lm"))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if name.startswith("model.language_model.")}
    assert_own_logits(loaded)
    assert_sampling_by_cache(loaded)
    for targets in (["all-linear"], ["q_proj"]):
        adapted = with_lora(lm_of_config(config), LoraSettings(rank=2, targets=targets))
        adapters = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert adapters and all("lora_" in name and "language_model" in name for name in adapters)


def lm_of_config(config: PretrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize(
    ("kind", "missed", "have"),
    [
        ("phi3", "q_proj, k_proj, v_proj, gate_proj, up_proj", "down_proj, gate_up_proj, o_proj, qkv_proj"),
        ("glm4", "gate_proj, up_proj", "gate_up_proj"),
        ("gpt2", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", "c_attn, c_fc, c_proj"),
    ],
)
def test_adapters_that_match_nothing_are_refused_and_all_linear_is_offered(kind: str, missed: str, have: str) -> None:
    with pytest.raises(UnusableError, match=rf"targets: {missed}: no such linear layer .* which has .*{have}.*\[all-linear\]"):
        with_lora(lm_of(kind), LoraSettings(rank=2))
    adapted = with_lora(lm_of(kind, torch.float32), LoraSettings(rank=2, targets=["all-linear"]))
    trained = {name.rpartition(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert set(have.split(", ")) <= trained and not {"lm_head", "embed_tokens"} & trained


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_new_input_vectors_have_the_scale_of_what_embeddings_give(kind: str) -> None:
    backbone = Backbone(lm_of(kind, hidden_size=64, head_dim=16))
    given = float(backbone.embed(torch.arange(VOCAB)).detach().std())
    assert backbone.embedding_std() == pytest.approx(given, rel=1e-3)
    marks = tiny_denoiser_marks(backbone)
    assert 0.8 < marks / given < 1.25


def tiny_denoiser_marks(backbone: Backbone) -> float:
    torch.manual_seed(0)
    return float(Denoiser(backbone, DenoiserSettings(), 2, torch.zeros(3), torch.ones(3)).marks.weight.detach().std())
