"""What the installed DeepSpeed accepts in a configuration file, in the form of ``training/runtime/ds_schema.json``.

``python -m tests.ds_schema`` writes that file anew; a test says when it is not fresh.  The program itself reads the file, because
``slurm/settings.py`` is to answer without loading torch and DeepSpeed.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling import constants as profiling
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

FILE = Path(__file__).parents[1] / "training" / "runtime" / "ds_schema.json"

_TYPES = {bool: "boolean", int: "whole number", float: "number", str: "text", Path: "text", type(None): "null", list: "list"}
_BOUNDS = {"ge": "at_least", "gt": "above", "le": "at_most", "lt": "below"}


def schema() -> dict[str, Any]:
    """The file's content."""
    return {
        "deepspeed": deepspeed.__version__,
        "keys": {
            "zero_optimization": {"keys": _model(DeepSpeedZeroConfig)},
            "comms_logger": {"keys": _model(CommsLoggerConfig)},
            "timers": {"keys": {"throughput": {"keys": _model(DeepSpeedThroughputTimerConfig)}}},
            "flops_profiler": {"keys": _flops_profiler()},
        },
        "read": sorted(keys_read()),
    }


def _model(model: type[BaseModel]) -> dict[str, Any]:
    found = {}
    for name, entry in model.model_fields.items():
        if not (entry.json_schema_extra or {}).get("deprecated"):
            found[entry.alias or name] = _entry(entry.annotation, entry.metadata, entry.get_default(call_default_factory=True))
    return found


def _entry(annotation: Any, metadata: Iterable[Any], default: Any) -> dict[str, Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(annotation))
    else:
        kinds = [annotation]
    model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    if model is not None:
        return {"keys": _model(model), **({"null": True} if type(None) in kinds else {})}
    choices = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)), None)
    bounds = {name: getattr(rule, short) for rule in metadata for short, name in _BOUNDS.items() if hasattr(rule, short)}
    shown = {} if isinstance(default, list) else {"default": default}
    if choices is not None:
        return {"choices": [choice.value for choice in choices if choice.name != "max_stage"], **shown}
    return {"types": sorted(_TYPES[typing.get_origin(kind) or kind] for kind in kinds), **bounds, **shown}


def _flops_profiler() -> dict[str, Any]:
    found = {}
    for constant, name in vars(profiling).items():
        default = vars(profiling).get(f"{constant}_DEFAULT", ...)
        if constant.startswith("FLOPS_PROFILER_") and default is not ...:
            kinds = ["null", "text"] if default is None else [_TYPES[type(default)]]
            found[name] = {"types": kinds, "default": default}
    return found


class _Watched(dict[str, Any]):
    """A configuration that notes which of its keys are asked for."""

    asked: typing.ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, of: _Watched) -> None:
        self.of = of

    def __contains__(self, key: object) -> bool:
        return key in self.of

    def __iter__(self) -> Any:
        return dict.__iter__(self.of)


def keys_read() -> set[str]:
    """The top-level keys that DeepSpeed looks for in a configuration."""
    _Watched.asked.clear()
    DeepSpeedConfig(_Watched({"train_batch_size": 1}))
    return set(_Watched.asked)


if __name__ == "__main__":
    FILE.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
