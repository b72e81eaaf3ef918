"""A miniature of an LM: the same classes and settings with few, narrow layers, so that how it behaves is known in a moment."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

#: the most that a size may be in a miniature (by its name in transformers' configs); smaller ones stay
_SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "rotary_dim": 16,
    "sliding_window": 5,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_head_dim"), 16),
}
#: extensions of the rotary positions that come as a list for the real size of a head
_SIZED_POSITIONS = "longrope"
_MOST_LAYERS = 6
_MOST_PARAMETERS = 20_000_000


class NoMiniatureError(Exception):
    """A miniature of this architecture cannot be made by what is known of its sizes."""


def miniature(config: PretrainedConfig) -> PreTrainedModel:
    """A miniature with random weights (fp32, on the CPU, eager attention) of the text LM that ``config`` describes.

    It draws from no global generator.  NoMiniatureError where that fails, or where not even its own forward pass runs.
    """
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NoMiniatureError(f"{text.model_type} is no LM of its own in transformers")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    try:
        small = _shrunk(text)
        with torch.device("meta"):
            numel = sum(parameter.numel() for parameter in model_class(small).parameters())
        if numel > _MOST_PARAMETERS:
            raise NoMiniatureError(f"its smallest size known has {numel / 1e6:.0f} million parameters")
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            lm = _randomised(model_class(small).float().eval())
            lm(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    except NoMiniatureError:
        raise
    except Exception as error:  # foreign code, given sizes that nobody tried: what it raises is not known
        raise NoMiniatureError(f"{type(error).__name__}: {error}") from error
    return lm


def _shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The same settings with small sizes, and one layer of each kind (two where all are alike)."""
    small = copy.deepcopy(config)
    layers = int(small.num_hidden_layers)
    per_layer: dict[str, Any] = {
        name: value for name, value in vars(small).items() if isinstance(value, list | tuple) and len(value) == layers
    }
    kept = _kinds([repr([value[i] for value in per_layer.values()]) for i in range(layers)])
    for name, values in per_layer.items():
        setattr(small, name, [values[i] for i in kept])
    small.num_hidden_layers = len(kept)
    heads, groups = (getattr(small, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    rotary = getattr(small, "qk_rope_head_dim", None)
    for name, most in _SIZES.items():
        value = getattr(small, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(small, name, most)
    if hasattr(small, "num_key_value_heads"):
        small.num_key_value_heads = min(small.num_attention_heads, 4 if groups in (heads, None) else 2 if groups > 1 else 1)
    if hasattr(small, "head_dim") and small.head_dim is None:
        small.head_dim = small.hidden_size // small.num_attention_heads
    if isinstance(rotary, int) and isinstance(getattr(small, "head_dim", None), int):
        small.head_dim = small.qk_rope_head_dim
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    _shrink_positions(small)
    small._attn_implementation = "eager"
    return small


def _kinds(layers: list[str]) -> list[int]:
    """The first layer of every kind, two at least: of one kind the first, twice."""
    first: dict[str, int] = {}
    for number, kind in enumerate(layers):
        first.setdefault(kind, number)
    kept = sorted(first.values())[:_MOST_LAYERS]
    return kept if len(kept) > 1 else kept * 2


def _shrink_positions(small: PretrainedConfig) -> None:
    """Rotary positions with a factor for every pair of a real head's elements lose these: what a mask does is the same."""
    parameters: Any = getattr(small, "rope_parameters", None)
    if isinstance(parameters, dict) and parameters.get("rope_type") == _SIZED_POSITIONS:
        kept = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
        small.rope_parameters = {"rope_type": "default", **kept}


def _randomised(lm: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random, the norms' around 1: fresh ones of zero or one would hide what a layer does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lm.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.25
        parameter.copy_(noise + 1.0 if "norm" in name and parameter.ndim == 1 else noise)
    return lm
