"""LoRA adapters merged into the weights they stand on: W + scale B A, one shard after another, no model in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ladir.errors import UnusableError
from ladir.models.store import ShardWriter, load_tensors, names_damage
from ladir.models.weights import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, check_weights, weight_files

#: what PEFT can do besides and our training never sets: each would have to be merged in a way of its own
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge_adapter(adapter: Path, base: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the LM of the folder ``base`` with the adapters of the folder ``adapter`` in its matrices to the folder ``target``.

    At most one shard and the adapters are in memory.  ``dtype``: what the LM was trained and is asked in.  UnusableError for
    adapters that are no plain LoRA or stand on another LM.
    """
    check_weights(base)
    deltas = LoraDeltas(adapter)
    writer = ShardWriter(target)
    for name, weight in _tensors(base):
        kept = weight.to(dtype) if weight.is_floating_point() else weight
        writer.add(name, deltas.added_to(name, kept))
    writer.close()
    deltas.check_all_used(base)
    _write_configs(base, target, dtype)


class LoraDeltas:
    """The low-rank matrices of an adapter folder, by the name of the weight that they change."""

    def __init__(self, folder: Path) -> None:
        from peft import PeftConfig

        with names_damage(folder / ADAPTER_CONFIG_NAME):
            config = PeftConfig.from_pretrained(str(folder))
        given = {name: getattr(config, name, plain) for name, plain in _PLAIN.items()}
        other = [f"{name}={value!r}" for name, value in given.items() if value not in (_PLAIN[name], None)]
        if other or config.peft_type != "LORA":
            kind = ", ".join(other) or config.peft_type
            raise UnusableError(f"{folder}: adapters with {kind} cannot be merged; export without export.merge_lora")
        self.folder = folder
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        matrices = load_tensors(folder / ADAPTER_WEIGHTS_NAME)
        self._matrices = {name.removeprefix(_PREFIX): matrix for name, matrix in matrices.items()}
        self._left = {name.removesuffix(_A) for name in self._matrices if name.endswith(_A)}
        strange = [name for name in self._matrices if not name.endswith((_A, _B))]
        if strange:
            raise UnusableError(f"{folder}: {strange[0]} is no matrix of LoRA on a linear layer, and cannot be merged")

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """The weight ``name`` [out, in] with its change, which is computed and added in fp32; others are returned as they are."""
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in self._left:
            return weight
        self._left.remove(layer)
        a, b = (self._matrices[layer + part].float() for part in (_A, _B))
        if weight.shape != (b.shape[0], a.shape[1]):
            sizes = f"{[b.shape[0], a.shape[1]]}, not {list(weight.shape)}"
            raise UnusableError(f"{self.folder}: its adapters are for a {name} of {sizes}: they stand on another LM")
        return (weight.float() + self.scale * (b @ a)).to(weight.dtype)

    def check_all_used(self, base: Path) -> None:
        """UnusableError where there are matrices for weights that the LM does not have."""
        if self._left:
            raise UnusableError(
                f"{base} has no weight for {len(self._left)} adapters of {self.folder} ({min(self._left)}): it is another LM, or "
                "names its weights in its files otherwise; export without export.merge_lora"
            )


def _tensors(base: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(base):
        with names_damage(file), safe_open(file, framework="pt") as opened:
            names: Any = opened.keys()
            for name in names:
                yield name, opened.get_tensor(name)


def _write_configs(base: Path, target: Path, dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(str(base))
    config.dtype = dtype
    config.save_pretrained(str(target))
    if (base / GENERATION_CONFIG_NAME).is_file():
        GenerationConfig.from_pretrained(str(base)).save_pretrained(str(target))
