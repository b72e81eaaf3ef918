"""The DeepSpeed configuration file, completed with what our own settings decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladir.config import BackboneSettings, TrainSettings
from training.runtime.ds_checks import problems

if TYPE_CHECKING:
    import torch  # seconds to import, and slurm/settings.py only wants the checks

REPOSITORY = Path(__file__).resolve().parents[2]

#: elements up to which ZeRO-3 keeps a weight whole, where the file does not say (DeepSpeed's own value)
PERSISTENCE_THRESHOLD = 100_000


class DeepSpeedConfigError(ValueError):
    """The DeepSpeed configuration file cannot be used."""


def read_ds_config(path: str) -> dict[str, Any]:
    """The file at ``path`` (relative to the working directory, else to the repository), checked.

    Raises :class:`DeepSpeedConfigError` with everything that is wrong with it.
    """
    file = Path(path) if Path(path).exists() else REPOSITORY / path
    if not file.exists() or file.is_dir():
        known = ", ".join(sorted(f"ds_configs/{found.name}" for found in (REPOSITORY / "ds_configs").glob("*.json")))
        what = "is a folder" if file.is_dir() else "no such file"
        raise DeepSpeedConfigError(f"{path}: {what}; deepspeed.config and <phase>.train.deepspeed may name {known}")
    config = _loaded(file)
    if found := problems(config):
        raise DeepSpeedConfigError("\n".join(f"{file}: {problem}" for problem in found))
    return config


def _loaded(file: Path) -> dict[str, Any]:
    """The object that a file holds."""
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(
            f"{file}:{error.lineno}: not JSON: {error.msg} (no comments, no comma before a bracket)"
        ) from error
    except OSError as error:
        raise DeepSpeedConfigError(f"{file}: cannot be read ({error.strerror}); correct its permissions") from error
    except RepeatedKey as error:
        raise DeepSpeedConfigError(f"{file}: key {str(error)!r} stands in one object twice: remove one of the two") from error
    except (ValueError, RecursionError) as error:
        raise DeepSpeedConfigError(f"{file}: not JSON in UTF-8 ({error}); write it as the files in ds_configs/") from error
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f'{file}: must hold a JSON object, e.g. {{"zero_optimization": {{"stage": 3}}}}')
    return config


class RepeatedKey(ValueError):
    """A key stands twice in an object, of which JSON would keep the last one in silence."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise RepeatedKey(repeated)
    return dict(pairs)


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


def check_ds_config(backbone: BackboneSettings, path: str) -> None:
    """Raise :class:`DeepSpeedConfigError` where the file cannot be used, or layers are to be compiled under ZeRO-3."""
    if zero_stage(read_ds_config(path)) == 3 and backbone.compile:
        raise DeepSpeedConfigError(
            f"backbone.compile=true does not go with ZeRO stage 3 ({path}), which gathers weights by hooks inside "
            "the layers: take ds_configs/zero2.json or ds_configs/zero0.json (deepspeed.config, or the phase's train.deepspeed) "
            "or backbone.compile=false"
        )


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
