"""LoRA adapters: which linear layers of an LM get one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ladir.config import LoraSettings
from ladir.errors import UnusableError

if TYPE_CHECKING:
    from peft import PeftModel  # seconds to import, and only adapters need it

#: in ``backbone.lora.targets``: every linear layer but the LM head
ALL_LINEAR = "all-linear"


def with_lora(lm: PreTrainedModel, settings: LoraSettings) -> PreTrainedModel | PeftModel:
    """The LM with trainable adapters and frozen weights, or unchanged when the rank is 0."""
    if settings.rank == 0:
        return lm
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=adapter_targets(lm, settings.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


def adapter_targets(lm: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The targets as PEFT takes them: names of layers, whole ones where an LM has parts that are not text.

    Raises UnusableError where a target matches no layer: a part of the LM would go untrained in silence.
    """
    linear = _layers(lm.get_decoder(), lm, nn.Linear, Conv1D)
    wanted = sorted({name.rpartition(".")[2] for name in linear}) if list(targets) == [ALL_LINEAR] else list(targets)
    able = [*linear, *_layers(lm.get_decoder(), lm, nn.Embedding), *_layers(lm.get_output_embeddings(), lm, nn.Linear)]
    missed = [target for target in wanted if not any(_matches(name, target) for name in able)]
    if missed or not wanted:
        have = sorted({name.rpartition(".")[2] for name in linear})
        raise UnusableError(
            f"backbone.lora.targets: {', '.join(missed) or 'none given'}: no such linear layer in this {lm.config.model_type} "
            f"model, which has {', '.join(have) or 'none'}; name those, or set 'backbone.lora.targets=[{ALL_LINEAR}]'"
        )
    matched = [name for name, _ in lm.named_modules() if any(_matches(name, target) for target in wanted)]
    return wanted if set(matched) <= set(able) else [name for name in matched if name in able]


def _matches(name: str, target: str) -> bool:
    """As PEFT compares them."""
    return name == target or name.endswith(f".{target}")


def _layers(part: nn.Module, lm: PreTrainedModel, *kinds: type[nn.Module]) -> list[str]:
    """Names in the whole LM of the layers of some kinds in a part of it."""
    inside = {id(module) for module in part.modules()}
    return [name for name, module in lm.named_modules() if id(module) in inside and isinstance(module, kinds)]
