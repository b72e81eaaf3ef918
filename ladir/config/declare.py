"""How a setting is declared: a dataclass field that knows its meaning and its valid values."""

from __future__ import annotations

from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its meaning and, for enumerations, its valid values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type[T], help: str, **defaults: Any) -> T:
    """A nested group of settings; ``defaults`` override the group's own."""
    return field(default_factory=lambda: cls(**defaults), metadata={"help": help})
