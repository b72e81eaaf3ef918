"""Which architectures can be trained here: what LaDiR asks of an LM, tried on a miniature before any weight is read.

A pass gives input vectors, positions and a mask of its own; a block is denoised behind cached keys and values.  An LM whose
layers ignore the mask, carry state along the row, or go by a token's place in the row would train on what it must not see, and
fail only when it is asked.  docs/models.md has the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ladir.errors import UnusableError
from ladir.models.attention import causal
from ladir.models.backbone import Backbone
from ladir.models.miniature import NoMiniatureError, miniature

logger = logging.getLogger(__name__)

_STATE = "its layers carry state from token to token, which no mask hides and no cache of keys and values holds"
_ALIBI = "its attention goes by a token's place in the row (ALiBi), where LaDiR gives positions of its own"
_TWO_PARTS = "it is an encoder with a decoder, not one causal LM"
_NO_LM = (
    "transformers makes no causal LM of it (most that see or hear are none, nor are encoders, and code that comes with a model "
    "is not run)"
)
_PER_LAYER = "its layers read embeddings of token ids of their own, where LaDiR gives vectors that are no token's"

#: kinds of layers, as configs list them, that are no attention
_STATEFUL_LAYERS = frozenset({"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "mamba2", "recurrent"})
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")

#: architectures with such layers whose configs may not list them
_STATEFUL = frozenset({"falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "rwkv", "xlstm", "zamba", "zamba2"})

#: relative difference from which on two passes are not the same (rounding: 1e-6)
_DIFFERENT = 1e-3
_TOKENS = 12


def refuse_unusable(config: PretrainedConfig, name: str) -> None:
    """UnusableError in one line for an LM ``name`` of an architecture that cannot be trained here; a second or less.

    Nothing but the config is needed.  One of which no miniature can be made is warned of and let through.
    """
    _refuse_padding(config, name)
    _refuse_quantized(config, name)
    if fault := _known_fault(config) or _found_fault(_Kind(config)):
        raise UnusableError(
            f"the LM {name!r} ({config.model_type}) cannot be used: {fault}; choose an LM of an architecture that docs/models.md "
            "lists as tested"
        )


def _known_fault(config: PretrainedConfig) -> str:
    """Why an architecture that is known by its config cannot be used; empty where nothing is known against it."""
    text = config.get_text_config()
    kinds = {str(kind) for name in _LAYER_LISTS for kind in getattr(text, name, None) or ()}
    if stateful := sorted(kinds & _STATEFUL_LAYERS):
        return f"{_STATE} (layers of kind {', '.join(stateful)})"
    if text.model_type in _STATEFUL:
        return _STATE
    alibi = getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False)
    if text.model_type == "bloom" or alibi:
        return _ALIBI
    if getattr(text, "hidden_size_per_layer_input", 0):
        return _PER_LAYER
    if config.is_encoder_decoder:
        return _TWO_PARTS
    return "" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else _NO_LM


def _refuse_padding(config: PretrainedConfig, name: str) -> None:
    """Embeddings cannot be made with a padding token that they do not have."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise UnusableError(
            f"the LM {name!r} has pad_token_id={pad} in its config.json, but embeddings for the ids up to {rows - 1} only; set "
            "it to null there"
        )


def _refuse_quantized(config: PretrainedConfig, name: str) -> None:
    """Weights of a few bits cannot be trained, and transformers reads them as such or as others, by the machine."""
    settings = next((found for part in (config, config.get_text_config()) if (found := _quantization(part))), None)
    if settings is not None:
        method = settings.get("quant_method") or "a method that it does not name"
        raise UnusableError(
            f"the LM {name!r} is quantized ({getattr(method, 'value', method)}: quantization_config in its config.json), and "
            "such weights cannot be trained; take the LM as it was before, or write it so: transformers' from_pretrained, "
            "dequantize() where it is quantized still, and save_pretrained"
        )


def _quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def has_position_table(config: PretrainedConfig) -> bool:
    """Whether positions are rows of a table, learned or not, behind whose last one there is none: found out in a miniature.

    False for rotary positions, which go on, and where no miniature can be made.
    """
    return _ends_with_a_table(_Kind(config))


class _Kind:
    """A text LM's config; equal to another where all that shapes the LM is, so that what was found of one is known of both."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config.get_text_config()
        self._values = str(self.config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


@lru_cache(maxsize=64)
def _found_fault(kind: _Kind) -> str:
    """What is found wrong in a miniature; empty where nothing is."""
    try:
        lm = miniature(kind.config)
    except NoMiniatureError as error:
        reason = " ".join(str(error).split())
        logger.warning(
            "%s is no architecture that is tested, and whether it can be trained here was not found out (%s): docs/models.md",
            kind.config.model_type,
            reason[:200],
        )
        return ""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return next((fault for check, fault in _CHECKS if not check(Backbone(lm))), "")
        except Exception as error:  # foreign code, asked for what nobody tried
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"it does not run on input vectors under a mask with cached keys and values ({reason[:200]})"


@lru_cache(maxsize=64)
def _ends_with_a_table(kind: _Kind) -> bool:
    try:
        backbone = Backbone(miniature(kind.config))
    except NoMiniatureError:
        return False
    behind = torch.tensor([[backbone.base.config.max_position_embeddings]])
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            backbone(backbone.embed(torch.tensor([[1]])), causal(1, torch.device("cpu")), behind)
        except IndexError:
            return True
    return False


def _inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, input vectors and who sees whom: text, behind it a block whose three tokens see each other, and text again."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, backbone.vocab_size, (1, _TOKENS), generator=generator)
    visible = causal(_TOKENS, torch.device("cpu")).clone()
    visible[:, 8:11, 8:11] = True
    visible[:, 5:, :5] = False  # another sample
    return ids, backbone.embed(ids), visible


def _positions() -> Tensor:
    return torch.cat([torch.arange(5), torch.arange(_TOKENS - 5)])[None]


def _changed(inputs: Tensor, place: int) -> Tensor:
    """The same inputs with another vector at ``place``."""
    other = inputs.clone()
    other[:, place] = torch.randn(inputs.shape[-1], generator=torch.Generator().manual_seed(place)) * inputs.std()
    return other


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _DIFFERENT * other.abs().max())


def _hides(backbone: Backbone) -> bool:
    """A token that others do not see changes nothing for them."""
    _, inputs, visible = _inputs(backbone)
    before, after = (backbone(x, visible, _positions()) for x in (inputs, _changed(inputs, 3)))
    blind = [place for place in range(_TOKENS) if place not in (3, 4)]
    return _same(after[:, blind], before[:, blind])


def _shows(backbone: Backbone) -> bool:
    """The tokens of a block see those behind them."""
    _, inputs, visible = _inputs(backbone)
    before, after = (backbone(x, visible, _positions()) for x in (inputs, _changed(inputs, 10)))
    return not _same(after[:, 8], before[:, 8])


def _goes_by_positions(backbone: Backbone) -> bool:
    """Where in the row a token stands does not matter, as long as its position and who sees whom stay."""
    _, inputs, visible = _inputs(backbone)
    order = torch.randperm(_TOKENS, generator=torch.Generator().manual_seed(3))
    moved = backbone(inputs[:, order], visible[:, order][:, :, order], _positions()[:, order])
    return _same(moved, backbone(inputs, visible, _positions())[:, order])


def _caches(backbone: Backbone) -> bool:
    """A block behind cached tokens is what it is in the whole pass."""
    _, inputs, _ = _inputs(backbone)
    visible = causal(_TOKENS, torch.device("cpu")).clone()
    visible[:, 9:, 9:] = True
    places, cache = torch.arange(_TOKENS)[None], Cache(layer_class_to_replicate=DynamicLayer)
    first = backbone(inputs[:, :9], visible[:, :9, :9], places[:, :9], cache)
    rest = backbone(inputs[:, 9:], visible[:, 9:], places[:, 9:], cache)
    return _same(torch.cat([first, rest], dim=1), backbone(inputs, visible, places))


def _gives_its_own_logits(backbone: Backbone) -> bool:
    """Causal text has the logits that transformers gives it."""
    ids, inputs, _ = _inputs(backbone)
    hidden = backbone(inputs, causal(_TOKENS, torch.device("cpu")), torch.arange(_TOKENS)[None])
    return _same(backbone.logits(hidden), backbone.base(input_ids=ids, use_cache=False).logits)


#: what is asked of an LM, and what it is told that it lacks
_CHECKS: tuple[tuple[Callable[[Backbone], bool], str], ...] = (
    (_hides, "tokens change what their mask hides them from: its layers ignore the mask or carry state from token to token"),
    (_goes_by_positions, "its layers go by a token's place in the row, where LaDiR gives positions of its own"),
    (_shows, "the tokens of a block cannot see those behind them: its attention is causal whatever the mask says"),
    (_caches, "a pass behind cached keys and values is not the whole pass"),
    (_gives_its_own_logits, "its logits are not made of token embeddings, a mask and its LM head alone"),
)
