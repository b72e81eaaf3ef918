"""LMs from a folder, from the Hub or new: what cannot work is refused before weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from ladir.config import BackboneSettings
from ladir.errors import UnusableError
from ladir.models.adapters import adapter_targets, with_lora
from ladir.models.architectures import refuse_unusable
from ladir.models.attention import set_attention
from ladir.models.backbone import DTYPES, Backbone, choose_dtype, for_training
from ladir.models.pairing import adapter_base, find_base
from ladir.models.weights import check_weights
from ladir.names import check_name
from ladir.tokens import check_vocabulary

logger = logging.getLogger(__name__)

#: so many weights are named in a message
_NAMED = 3


def check_lm(
    settings: BackboneSettings, tokenizer: PreTrainedTokenizerBase | None = None, name_or_path: str | None = None
) -> PretrainedConfig:
    """The config of the LM; UnusableError in one line for one that cannot be trained as set; no weight is read.

    By its config: architectures whose layers cannot do what LaDiR asks, ids of ``tokenizer`` that its embedding does not have;
    by its files: weights that are missing or of another size; by its layers: LoRA targets that match nothing.
    To be called before sharded loading, in which an LM without weights cannot be made.
    """
    name = _named(settings, name_or_path)
    if (base := adapter_base(name)) is not None:
        name = find_base(Path(name), base)
    with _one_line(name, Exception):  # of any kind: what is read is the user's, by code that checks little
        config = AutoConfig.from_pretrained(name)
    refuse_unusable(config, name)
    if tokenizer is not None:
        check_vocabulary(tokenizer, int(config.get_text_config().vocab_size), name)
    lm = _without_weights(name)
    if settings.lora.rank:
        adapter_targets(lm, settings.lora.targets)
    return config


def _without_weights(name: str) -> PreTrainedModel:
    """The LM on the meta device.  UnusableError where its files lack weights that its config asks for, or have other sizes."""
    if Path(name).is_dir():
        check_weights(Path(name))
    with _one_line(name, Exception), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            attn_implementation="eager",
            use_safetensors=True,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        lm, found = loaded
    _refuse_missing(name, found["missing_keys"])
    if other := sorted(found["mismatched_keys"]):
        sizes = [f"{key} is {_size(there)} instead of {_size(wanted)}" for key, there, wanted in other]
        raise UnusableError(
            f"the LM {name!r} has weights of other sizes than its config.json asks for: {_some(sizes)}; copy it again"
        )
    if found["unexpected_keys"]:
        logger.warning(
            "%s: weights that its config.json does not ask for are left out: %s", name, _some(found["unexpected_keys"])
        )
    return lm


def _refuse_missing(name: str, keys: Sequence[str]) -> None:
    if keys:
        raise UnusableError(
            f"the LM {name!r} lacks weights, which would start from random ones: {_some(keys)}; copy it again (an LM whose head "
            "is its embedding has tie_word_embeddings=true in its config.json)"
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _some(names: Sequence[str]) -> str:
    """The first few of some names."""
    listed = sorted(names)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _named(settings: BackboneSettings, name_or_path: str | None) -> str:
    name = name_or_path or settings.name_or_path
    if name is None:
        raise UnusableError("backbone.name_or_path is not set: name a folder or a Hub id of a causal LM")
    check_name(name, "LM", "backbone.name_or_path")
    return name


@contextmanager
def _one_line(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """What transformers raises for an LM that it cannot read becomes an UnusableError of one line."""
    try:
        yield
    except kinds as error:
        reason = " ".join(f"{'' if isinstance(error, OSError | ValueError) else type(error).__name__} {error}".split())
        raise UnusableError(
            f"the LM {name!r} cannot be loaded: {reason}; set backbone.name_or_path to a folder written by save_pretrained "
            "(a finished phase's model lies in runs/<name>/models/<phase>), or to a Hub id. Weights must be safetensors; "
            "pytorch_model.bin is not read: load it with transformers, if you trust it, and save_pretrained converts it"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on weights and its progress bar: they are looked at here, and come again with the weights."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def load_lm(
    settings: BackboneSettings, device_type: str, name_or_path: str | None = None, onto: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal LM from a local folder or the Hub, in the settings' dtype and attention; only its text part is trained.

    ``onto``: the device that takes every tensor as it is read, so that the host never holds the LM; not given: the host, or the
    ranks that share it (sharded loading).

    Raises UnusableError when no name is set, it cannot be loaded, or :func:`check_lm` finds fault with it (under sharded loading
    for weights that are missing alone).  Weights must be safetensors: others would be unpickled, and could not be copied into an
    export.
    """
    name = _named(settings, name_or_path)
    if not is_deepspeed_zero3_enabled():
        check_lm(BackboneSettings(), name_or_path=name)
    with _one_line(name, OSError, ValueError, SafetensorError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[choose_dtype(settings.dtype, device_type)],
            attn_implementation="eager",
            use_safetensors=True,
            device_map={"": onto} if onto is not None and onto.type != "cpu" else None,
            output_loading_info=True,
        )
    lm, found = loaded
    _refuse_missing(name, found["missing_keys"])
    set_attention(lm, settings.attention, device_type)
    return _text_alone(lm)


def _text_alone(lm: PreTrainedModel) -> PreTrainedModel:
    """The same LM; parts that see or hear, which no pass here runs through, are frozen."""
    text = [lm.get_decoder(), lm.get_input_embeddings(), lm.get_output_embeddings()]
    trained = {id(parameter) for part in text for parameter in part.parameters()}
    for parameter in lm.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    return lm


def scratch_config(settings: BackboneSettings, vocab_size: int, special_ids: dict[str, int | None]) -> PretrainedConfig:
    """The config of a new LM of the architecture ``backbone.scratch``.  UnusableError for one that cannot be trained."""
    arguments = {**settings.scratch, "vocab_size": vocab_size, **special_ids}
    if "model_type" not in arguments:
        raise UnusableError("backbone.scratch needs model_type (llama, qwen3, mistral, ...) and the sizes of a new LM")
    try:
        config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    except Exception as error:  # of any kind: each architecture checks its own
        raise UnusableError(f"backbone.scratch describes no LM: {' '.join(str(error).split())}") from error
    refuse_unusable(config, "backbone.scratch")
    return config


def new_lm(settings: BackboneSettings, vocab_size: int, special_ids: dict[str, int | None], device_type: str) -> PreTrainedModel:
    """A new causal LM of :func:`scratch_config` with random weights, in the settings' dtype.

    The weights are drawn in fp32 and then cast, so that the dtype does not change the draw.
    """
    config = scratch_config(settings, vocab_size, special_ids)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    lm = lm.to(DTYPES[choose_dtype(settings.dtype, device_type)])
    set_attention(lm, settings.attention, device_type)
    return lm


def build_backbone(settings: BackboneSettings, device_type: str, name_or_path: str | None = None) -> Backbone:
    """Load the LM, add adapters, activation checkpointing and compilation as set."""
    return for_training(Backbone(with_lora(load_lm(settings, device_type, name_or_path), settings.lora)), settings)
