"""The language model behind encoder, decoder and denoiser: any causal LM of transformers, whole or with LoRA adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from ladir.config import BackboneSettings, LoraSettings
from ladir.data.packing import IGNORE, Rows
from ladir.errors import UnusableError
from ladir.models.attention import BlockMasks, Visibility, attend, set_attention
from ladir.models.prefix_attention import has_plain_attention
from ladir.models.weights import check_weights

if TYPE_CHECKING:
    from peft import PeftModel  # seconds to import, and only adapters need it

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

#: what a CPU that multiplies bfloat16 says it can do (x86 and Arm); others emulate it, more than ten times slower than float32
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")

#: every n-th layer is recomputed, by ``backbone.activation_checkpointing``
_RECOMPUTED_LAYERS = {"full": 1, "selective": 2}


def choose_dtype(setting: str, device_type: str) -> str:
    """``backbone.dtype``, with ``auto`` settled: bfloat16 where the device multiplies it in hardware, else float32."""
    if setting != "auto":
        return setting
    able = device_type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in _CPU_BFLOAT16)
    return "bfloat16" if able else "float32"


def is_split(parameter: nn.Parameter) -> bool:
    """Whether an engine has split this parameter over its ranks and gathers it for each use."""
    return hasattr(parameter, "all_gather")


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Inside, a parameter that an engine has split over its ranks is there in full, to be read (by all ranks together).

    Split parameters bring the two methods used here; any other parameter is whole already.
    """
    if not is_split(parameter):
        yield
        return
    split: Any = parameter
    split.all_gather()
    try:
        yield
    finally:
        split.partition()


class Backbone(nn.Module):
    """A causal LM seen as: token embeddings, a decoder over input vectors with a boolean mask, and an LM head."""

    def __init__(self, lm: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.lm = lm
        self.logits_parts = 1
        self._adapter_is_off = False
        self._is_compiled = False
        self._block_masks = BlockMasks()

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM itself, without PEFT's wrapper (its linear layers hold the adapters)."""
        return self.lm if isinstance(self.lm, PreTrainedModel) else self.lm.get_base_model()

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT's wrapper is around the LM."""
        return not isinstance(self.lm, PreTrainedModel)

    @property
    def hidden_size(self) -> int:
        return int(self.base.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Input vectors [..., H] of token ids [...]."""
        return self.base.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., H]."""
        return self.base.get_output_embeddings()(hidden)

    def label_losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, fp32 [n], and whether the likeliest token is right, bool [n], of ``labels`` [n] at ``hidden`` [n, H].

        ``IGNORE`` costs nothing and is never right.  Logits are made in ``logits_parts`` parts; their number and not their
        size is fixed, so that the ranks of a sharded LM gather its head as often as one another.
        """
        if self.logits_parts == 1:
            return self._label_losses(hidden, labels)
        parts = zip(hidden.tensor_split(self.logits_parts), labels.tensor_split(self.logits_parts), strict=True)
        found = [
            checkpoint(self._label_losses, *part, use_reentrant=False, context_fn=self._recompute_contexts) for part in parts
        ]
        losses, right = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(right)

    def _label_losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden).float()
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return losses, logits.detach().argmax(-1) == labels

    def forward(self, inputs: Tensor, visible: Visibility, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [N, T, H].

        ``inputs`` [N, T, H] input vectors; ``visible`` bool [N or 1, T, P + T] where P is the cache's length, or what says
        the same: a layout, a whole prefix, a shared prefix; ``positions`` int64 [N or 1, T].
        """
        how = attend(visible, self.base.config._attn_implementation, inputs.dtype, self._block_masks)
        length = inputs.shape[1]
        if how.width > length:
            inputs = F.pad(inputs, (0, 0, 0, how.width - length))
            positions = F.pad(positions, (0, how.width - length))
        as_written = torch.compiler.set_stance("force_eager") if self._is_compiled and cache is not None else nullcontext()
        with self._attention(how.implementation), as_written:
            output = self.base.get_decoder()(
                inputs_embeds=inputs,
                attention_mask=how.mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **how.arguments,
            )
        return output.last_hidden_state[:, :length]

    def read(self, table: Tensor, rows: Rows) -> Tensor:
        """Last hidden states [n, H] at ``rows.at``; input vectors are taken from ``table`` [m, H]."""
        hidden = self(F.embedding(rows.index, table), rows.layout, rows.layout.position)
        return hidden.flatten(0, 1).index_select(0, rows.at)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a :class:`SharedPrefix` may be passed to :meth:`forward`."""
        return has_plain_attention(self.base.config)

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        """Another attention of transformers, for the calls inside."""
        config = self.base.config
        before = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base weights alone: with LoRA this is the frozen decoder, one copy of the LM instead of two."""
        if isinstance(self.lm, PreTrainedModel):
            yield
            return
        before, self._adapter_is_off = self._adapter_is_off, True
        try:
            with self.lm.disable_adapter():
                yield
        finally:
            self._adapter_is_off = before

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: the scale of new input vectors.

        Without weights (meta device) the one of the architecture's own initialisation.
        """
        weight = self.base.get_input_embeddings().get_parameter("weight")
        if weight.is_meta:
            return float(self.base.config.get_text_config().initializer_range)
        with whole(weight), torch.no_grad():
            return float(weight.float().std())

    def enable_activation_checkpointing(self, every_n_layers: int = 1) -> None:
        """Recompute every n-th layer's activations in the backward pass, with adapters and attention as they were before."""
        self.base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": self._recompute_contexts},
            every_n_layers=every_n_layers,
        )

    @contextmanager
    def activations_stored(self) -> Iterator[None]:
        """Within, no layer recomputes: one that does reads no cache.  Who needs both recomputes a pass as a whole."""
        layers: list[Any] = [layer for layer in self.base.modules() if getattr(layer, "gradient_checkpointing", False)]
        for layer in layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = True

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile every decoder layer when it first runs; all layers share what was compiled.

        Where layers were set to recompute their activations (before this call), each one's parts (attention, MLP, norms):
        recomputing cannot be compiled with them.  Passes with a cache run as they are written: its every layer and every length
        would be compiled by itself, a minute each.
        """
        self._is_compiled = True
        layers = list(self.base.get_decoder().layers)
        recomputed = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        for part in [part for layer in layers for part in layer.children()] if recomputed else layers:
            part.compile(backend=backend)

    def _recompute_contexts(self) -> tuple[Any, Any]:
        """Contexts of the forward pass and of its repetition: the latter comes when ours are closed."""
        return nullcontext(), self._again(self._adapter_is_off, self.base.config._attn_implementation)

    @contextmanager
    def _again(self, adapter_is_off: bool, implementation: str) -> Iterator[None]:
        with self._attention(implementation), self.adapter_off() if adapter_is_off else nullcontext():
            yield


def load_lm(
    settings: BackboneSettings, device_type: str, name_or_path: str | None = None, onto: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal LM from a local folder or the Hub, in the settings' dtype and attention.

    ``onto``: the device that takes every tensor as it is read, so that the host never holds the LM; not given: the host, or the
    ranks that share it (sharded loading).

    Raises UnusableError when no name is set or it cannot be loaded.  Weights must be safetensors: others would be unpickled, and
    could not be copied into an export.  A sliding window is not kept: blocks see their whole past.
    """
    name = name_or_path or settings.name_or_path
    if name is None:
        raise UnusableError("backbone.name_or_path is not set: name a folder or a Hub id of a causal LM")
    if Path(name).is_dir():
        check_weights(Path(name))
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[choose_dtype(settings.dtype, device_type)],
            attn_implementation="eager",
            use_safetensors=True,
            device_map={"": onto} if onto is not None and onto.type != "cpu" else None,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UnusableError(
            f"the LM {name!r} cannot be loaded: {error}; set backbone.name_or_path to a folder written by save_pretrained "
            "(a finished phase's model lies in runs/<name>/models/<phase>), or to a Hub id. Weights must be safetensors; "
            "pytorch_model.bin is not read: load it with transformers, if you trust it, and save_pretrained converts it"
        ) from error
    set_attention(lm, settings.attention, device_type)
    window = getattr(lm.config.get_text_config(), "sliding_window", None)
    if window is not None and getattr(lm.config.get_text_config(), "use_sliding_window", True):
        logger.warning("%s was trained with a sliding window of %d tokens; here every token sees its whole past", name, window)
    return lm


def new_lm(settings: BackboneSettings, vocab_size: int, special_ids: dict[str, int | None], device_type: str) -> PreTrainedModel:
    """A new causal LM of the architecture ``backbone.scratch`` with random weights, in the settings' dtype.

    The weights are drawn in fp32 and then cast, so that the dtype does not change the draw.
    """
    if "model_type" not in settings.scratch:
        raise ValueError("backbone.scratch needs model_type (llama, qwen3, mistral, ...) and the sizes of a new LM")
    arguments = {**settings.scratch, "vocab_size": vocab_size, **special_ids}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    lm = lm.to(DTYPES[choose_dtype(settings.dtype, device_type)])
    set_attention(lm, settings.attention, device_type)
    return lm


def with_lora(lm: PreTrainedModel, settings: LoraSettings) -> PreTrainedModel | PeftModel:
    """The LM with trainable adapters and frozen weights, or unchanged when the rank is 0."""
    if settings.rank == 0:
        return lm
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


def build_backbone(settings: BackboneSettings, device_type: str, name_or_path: str | None = None) -> Backbone:
    """Load the LM, add adapters, activation checkpointing and compilation as set."""
    return for_training(Backbone(with_lora(load_lm(settings, device_type, name_or_path), settings.lora)), settings)


def for_training(backbone: Backbone, settings: BackboneSettings) -> Backbone:
    """The same backbone, set to recompute its layers' activations, to compile them and to split logits as ``settings`` say."""
    backbone.logits_parts = settings.logits_parts
    with_activation_checkpointing(backbone, settings.activation_checkpointing)
    if settings.compile:
        backbone.compile_layers()
    return backbone


def with_activation_checkpointing(backbone: Backbone, setting: str) -> Backbone:
    """The same backbone, set to recompute what ``backbone.activation_checkpointing`` says."""
    if setting != "none":
        backbone.enable_activation_checkpointing(_RECOMPUTED_LAYERS[setting])
    return backbone
