"""The language model behind encoder, decoder and denoiser: a causal LM of transformers, whole or with LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ladir.config import BackboneSettings
from ladir.data.packing import IGNORE, Rows
from ladir.layout import Layout, stacked
from ladir.models.attention import BlockMasks, Visibility, attend
from ladir.models.lean import lean_layers
from ladir.models.logits import LogitScale
from ladir.models.prefix_attention import has_plain_attention
from ladir.models.sliding import SlidingWindow

if TYPE_CHECKING:
    from peft import PeftModel  # seconds to import, and only adapters need it

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

#: what a CPU that multiplies bfloat16 says it can do (x86 and Arm); others emulate it, more than ten times slower than float32
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
#: on Intel's these instructions alone, as a virtual machine without AMX has them, are half as fast as float32 (docs/log.md)
_SLOW_ON_INTEL = "avx512_bf16"

#: every n-th layer is recomputed, by ``backbone.activation_checkpointing``
_RECOMPUTED_LAYERS = {"full": 1, "selective": 2}


def choose_dtype(setting: str, device_type: str) -> str:
    """``backbone.dtype``, with ``auto`` settled: bfloat16 where the device multiplies it faster, else float32."""
    if setting != "auto":
        return setting
    return "bfloat16" if device_type != "cpu" or _multiplies_bfloat16(torch.cpu.get_capabilities()) else "float32"


def _multiplies_bfloat16(cpu: Mapping[str, Any]) -> bool:
    """Whether a CPU of these capabilities is faster with bfloat16."""
    slow = _SLOW_ON_INTEL if str(cpu.get("cpu_name")).startswith("Intel") else None
    return any(cpu.get(name) for name in _CPU_BFLOAT16 if name != slow)


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
        self._window = SlidingWindow.of(self.base.config)
        self._logit_scale = LogitScale.of(self.base.config)
        lean_layers(self.base)

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

    def embeddings_of(self, ids: Sequence[int]) -> Tensor:
        """What :meth:`embed` gives [n, H] of ``ids``, from embeddings that may be split over the ranks."""
        embedding: Any = self.base.get_input_embeddings()
        with whole(embedding.weight), torch.no_grad():
            return self.embed(torch.tensor(ids, device=embedding.weight.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., H], as the LM itself makes them."""
        return self._logit_scale(self.base.get_output_embeddings()(hidden))

    def label_losses(self, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy, fp32 [n], and whether the likeliest token is right, bool [n], of ``labels`` [n] at ``hidden`` [n, H].

        ``IGNORE`` costs nothing and is never right.  Logits are made in ``logits_parts`` parts; their number and not their
        size is fixed, so that the ranks of a sharded LM gather its head as often as one another.  ``temperature``: of the
        distribution whose cross-entropy it is.
        """
        if self.logits_parts == 1:
            return self._label_losses(hidden, labels, temperature)
        parts = zip(hidden.tensor_split(self.logits_parts), labels.tensor_split(self.logits_parts), strict=True)
        found = [
            checkpoint(self._label_losses, *part, temperature, use_reentrant=False, context_fn=self._recompute_contexts)
            for part in parts
        ]
        losses, right = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(right)

    def _label_losses(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return losses, logits.detach().argmax(-1) == labels

    def forward(self, inputs: Tensor, visible: Visibility, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [N, T, H].

        ``inputs`` [N, T, H] input vectors; ``visible`` bool [N or 1, T, P + T] where P is the cache's length, or what says
        the same: a layout, a whole prefix, a shared prefix; ``positions`` int64 [N or 1, T].
        """
        implementation = self.base.config._attn_implementation
        how = attend(visible, implementation, inputs.dtype, self._block_masks, positions, self._window)
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

    def together(self, parts: Sequence[tuple[Tensor, Layout]]) -> list[Tensor]:
        """Last hidden states [N_i, T_i, H] of several inputs with their layouts, whose rows go through the LM as one batch."""
        if len(parts) == 1:
            ((inputs, layout),) = parts
            return [self(inputs, layout, layout.position)]
        layout, width = stacked([own for _, own in parts]), max(inputs.shape[1] for inputs, _ in parts)
        rows = torch.cat([F.pad(inputs, (0, 0, 0, width - inputs.shape[1])) for inputs, _ in parts])
        hidden = self(rows, layout, layout.position).split([len(inputs) for inputs, _ in parts])
        return [own[:, : inputs.shape[1]] for own, (inputs, _) in zip(hidden, parts, strict=True)]

    def read(self, table: Tensor, rows: Rows) -> Tensor:
        """Last hidden states [n, H] at ``rows.at``; input vectors are taken from ``table`` [m, H]."""
        hidden = self(F.embedding(rows.index, table), rows.layout, rows.layout.position)
        return hidden.flatten(0, 1).index_select(0, rows.at)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a :class:`SharedPrefix` may be passed to :meth:`forward`."""
        return has_plain_attention(self.base.config) and self._window is None

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

    @contextmanager
    def adapter_on(self) -> Iterator[None]:
        """The weights with their adapters again, inside :meth:`adapter_off` as well."""
        if not self._adapter_is_off:
            yield
            return
        tuner: Any = self.lm.base_model
        self._adapter_is_off = False
        tuner.enable_adapter_layers()
        try:
            yield
        finally:
            tuner.disable_adapter_layers()
            self._adapter_is_off = True

    def embedding_std(self) -> float:
        """Standard deviation of what :meth:`embed` gives: the scale of new input vectors.

        Without weights (meta device) the one of the architecture's own initialisation.
        """
        embedding: Any = self.base.get_input_embeddings()
        # Gemma's own class of embeddings multiplies, and a few others' do.
        scale = float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))
        if embedding.weight.is_meta:
            return float(self.base.config.get_text_config().initializer_range) * scale
        with whole(embedding.weight), torch.no_grad():
            return float(embedding.weight.float().std()) * scale

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
        decoder = self.base.get_decoder()
        layers = list(getattr(decoder, "layers", None) or decoder.h)  # GPT-2 and Falcon have the short name
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
