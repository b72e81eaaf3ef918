"""The DeepSpeed configuration file, completed with what our own settings decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladir.config import BackboneSettings, DeepSpeedSettings, TrainSettings

if TYPE_CHECKING:
    import torch  # seconds to import, and slurm/settings.py only wants the checks

REPOSITORY = Path(__file__).resolve().parents[2]

#: elements up to which ZeRO-3 keeps a weight whole, where the file does not say (DeepSpeed's own value)
PERSISTENCE_THRESHOLD = 100_000

OURS = {
    "train_batch_size": "<phase>.train.global_batch",
    "train_micro_batch_size_per_gpu": "<phase>.train.micro_batch",
    "gradient_accumulation_steps": "<phase>.train.global_batch and micro_batch, from which it follows",
    "optimizer": "<phase>.train.lr, weight_decay, beta1, beta2, eps",
    "scheduler": "<phase>.train.schedule, warmup_fraction, decay_fraction, min_lr_ratio",
    "gradient_clipping": "<phase>.train.max_grad_norm",
    "bf16": "backbone.dtype",
    "fp16": "backbone.dtype",
    "checkpoint": "<phase>.train.checkpoint_every",
}
"""Keys a file must not set, and the setting of ours that decides instead."""


class DeepSpeedConfigError(ValueError):
    """The DeepSpeed configuration file cannot be used."""


def read_ds_config(path: str) -> dict[str, Any]:
    """The file at ``path`` (relative to the working directory, else to the repository), checked.

    Raises :class:`DeepSpeedConfigError` with everything that is wrong with it.
    """
    file = Path(path) if Path(path).is_file() else REPOSITORY / path
    if not file.is_file():
        known = ", ".join(sorted(f"ds_configs/{found.name}" for found in (REPOSITORY / "ds_configs").glob("*.json")))
        raise DeepSpeedConfigError(f"deepspeed.config={path}: no such file; there are {known}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    problems = [f"'{key}' is decided by {setting}: remove it" for key, setting in OURS.items() if key in config]
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 2, 3):
        problems.append(f"zero_optimization.stage={zero['stage']} is not supported: use 0, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            problems.append(f"zero_optimization.{key}.device=nvme is not supported: use cpu")
    if problems:
        raise DeepSpeedConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return config


def complete_ds_config(config: dict[str, Any], train: TrainSettings, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given: the file's settings, our precision and clipping, and neutral batch sizes.

    The loop normalises by the global number of labels and marks the accumulation boundary itself, so DeepSpeed must
    not scale by batch sizes: one micro batch per step is all it is told.
    """
    import torch

    completed = {"wall_clock_breakdown": False, **config}
    completed["train_batch_size"] = world_size
    completed["train_micro_batch_size_per_gpu"] = 1
    completed["gradient_accumulation_steps"] = 1
    completed["gradient_clipping"] = train.max_grad_norm
    # The loop looks at every gradient's norm before it steps; DeepSpeed would look at each parameter's in turn, and wait.
    completed["bf16"] = {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False}
    completed.setdefault("steps_per_print", None)
    completed.setdefault("zero_force_ds_cpu_optimizer", torch.cuda.is_available())
    if zero_stage(config):  # without ZeRO DeepSpeed accumulates in the model's dtype only
        completed.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return completed


def check_ds_config(backbone: BackboneSettings, deepspeed: DeepSpeedSettings) -> None:
    """Raise :class:`DeepSpeedConfigError` where the file cannot be used, or layers are to be compiled under ZeRO-3."""
    if zero_stage(read_ds_config(deepspeed.config)) == 3 and backbone.compile:
        raise DeepSpeedConfigError(
            f"backbone.compile=true does not go with ZeRO stage 3 ({deepspeed.config}), which gathers weights by hooks inside "
            "the layers: take deepspeed.config=ds_configs/zero2.json or ds_configs/zero0.json, or backbone.compile=false"
        )


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
