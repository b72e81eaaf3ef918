"""Texts as they are written: a text setting keeps ``007``, ``no``, ``1E3`` and ``1:30``, which YAML takes for other things."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import yaml

_NULL = "tag:yaml.org,2002:null"


def is_texts(annotation: Any) -> bool:
    """Whether a setting of this type is a text or a list of texts: OmegaConf has no such type, they are declared as Any."""
    return annotation is Any


def is_text(annotation: Any) -> bool:
    """Whether a setting of this type is, or may be, a text (which may be left unset)."""
    if is_texts(annotation):
        return True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return all(inner in (str, type(None)) for inner in typing.get_args(annotation))
    return annotation is str


def is_text_list(annotation: Any) -> bool:
    """Whether a setting of this type is, or may be, a list of texts."""
    if is_texts(annotation):
        return True
    return typing.get_origin(annotation) is list and typing.get_args(annotation) == (str,)


def written(node: yaml.Node | None, name: str = "") -> dict[str, Any]:
    """The text of every scalar, and the texts of every list of scalars, below ``node`` by full name; nulls are left out.

    ``name``: that of ``node`` itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return {} if node.tag == _NULL else {name: node.value}
    if isinstance(node, yaml.SequenceNode):
        plain = all(isinstance(item, yaml.ScalarNode) and item.tag != _NULL for item in node.value)
        return {name: [item.value for item in node.value]} if plain else {}
    found: dict[str, Any] = {}
    for key, value in _pairs(node):
        found |= written(value, f"{name}.{key}" if name else key)
    return found


def _pairs(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """Keys and values of a mapping; what is merged into it (``<<``) comes first, so that its own keys win."""
    if not isinstance(node, yaml.MappingNode):
        return []
    merged, own = [], []
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            merged += [pair for source in reversed(sources) for pair in _pairs(source)]
        else:
            own.append((str(key.value), value))
    return merged + own


def window(text: Any) -> list[int] | None:
    """First and last of ``10:13``, which YAML takes for minutes and seconds; None where it is written otherwise."""
    ends = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    return None if ends is None else [int(end) for end in ends.groups()]


def plainly(text: str) -> str | None:
    """The value that a command line gives a text setting: the text itself; None where it has to be read as YAML.

    Quoted texts, lists, mappings and null are YAML; whatever else YAML would make of a text (a number, a date, a comment behind
    ``#``, an anchor) is not what was typed.
    """
    text = text.strip()
    return None if text[:1] in ("'", '"', "[", "{") or text in ("", "~", "null", "Null", "NULL") else text
