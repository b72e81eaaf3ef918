"""Reads, checks, explains and stores the settings declared in :mod:`ladir.config`.

A configuration is one YAML file plus ``section.key=value`` overrides; both may use OmegaConf interpolation
(``${run.name}``).  Reading is strict: unknown names, wrong types, invalid choices, numbers out of range and impossible
combinations are all reported together, each with where it stands and the remedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ladir.arguments import LineParser
from ladir.config import Config
from ladir.config.checks import validate
from ladir.config.texts import is_text, is_text_list, is_texts, plainly, window, written

__all__ = [
    "ConfigError",
    "Setting",
    "declared_settings",
    "describe",
    "load_config",
    "parse_args",
    "save_config",
    "setting_names",
    "show_value",
    "validate",
]


#: settings that may be written first:last, too
_WINDOWS = ("telemetry.profile_steps",)


class ConfigError(ValueError):
    """The configuration cannot be used; the message holds all errors, one per line, ``errors`` (one at least) the same."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        first, *others = self.errors
        listed = [f"the configuration has {len(self.errors)} errors:", *(f"  - {error}" for error in self.errors)]
        super().__init__("\n".join(listed) if others else first)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run: defaults, then the YAML file ``path`` (if any), then ``overrides`` in their order.

    Raises :class:`ConfigError` with every error found in all three.
    """
    tree: DictConfig = OmegaConf.structured(Config)
    errors: list[str] = []
    if path is not None:
        _merge_file(tree, path, errors)
    for override in overrides:
        _merge_override(tree, override, errors)
    config = _resolve(tree, errors)
    errors += [*_choice_errors(config), *validate(config)]
    if errors:
        raise ConfigError(errors)
    return config


def with_settings(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of ``config`` with other values of some settings, given by their full names.  Raises ConfigError as loading does."""
    tree, errors = OmegaConf.structured(config), list[str]()
    for name, value in changes.items():
        _merge(tree, _nested(name, value), {}, lambda _: "there", errors)
    changed = _resolve(tree, errors)
    errors += [*_choice_errors(changed), *validate(changed)]
    if errors:
        raise ConfigError(errors)
    return changed


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting of ``config`` to ``path`` as YAML; :func:`load_config` reads the same configuration back."""
    OmegaConf.save(OmegaConf.structured(config), path)


def parse_args(
    argv: Sequence[str] | None,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The configuration that a command line names (``[--config FILE] [section.key=value ...]``), and its raw arguments.

    ``argv``: the arguments without the program's name; None: those of this process.  ``add_arguments`` may declare options
    of a program's own.  ``--help`` explains every setting.  The ``--local_rank`` that launchers add is accepted and ignored.
    Errors are printed, all at once, and end the process with status 2 before anything is loaded.
    """
    parser = LineParser(
        description=description,
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings as YAML (see configs/)")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="settings that beat the file's")
    if add_arguments is not None:
        add_arguments(parser)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    errors = [_option_error(option) for option in unknown]
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        errors += error.errors
    if errors:
        problem = ConfigError(errors)
        sys.stderr.write(f"{parser.prog}: {problem}\n")
        raise SystemExit(2) from problem
    return config, arguments


def describe() -> str:
    """Every setting with its default, type, valid values and meaning, by section: what ``--help`` prints."""
    lines = ["settings (section.key=value; in a YAML file: section:, and below it key: value):"]
    previous = ""
    for entry in declared_settings():
        section, _, _ = entry.name.rpartition(".")
        if section != previous:
            lines += ["", f"{section}: {entry.section_help}"]
            previous = section
        lines.append(f"  {entry.name}={show_value(entry.default)}  ({_type_name(entry.annotation)})")
        meaning = entry.help + (f" [{', '.join(entry.choices)}]" if entry.choices else "")
        lines += textwrap.wrap(meaning, 112, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def setting_names() -> list[str]:
    """The full name of every setting, e.g. ``vae.train.lr``."""
    return [entry.name for entry in declared_settings()]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as it is declared: full name, default, type, meaning, valid values, and the meaning of its section."""

    name: str
    default: Any
    annotation: Any
    help: str
    choices: tuple[str, ...] | None
    section_help: str


def declared_settings(group: Any = None, prefix: str = "", section_help: str = "") -> Iterator[Setting]:
    """Every declared setting, depth first; a section's own settings come before those of its sub-sections."""
    group = Config() if group is None else group
    annotations = typing.get_type_hints(type(group))
    subsections = []
    for field in dataclasses.fields(group):
        name, value, meaning = f"{prefix}{field.name}", getattr(group, field.name), field.metadata["help"]
        if dataclasses.is_dataclass(value):
            subsections.append((value, f"{name}.", meaning))
        else:
            yield Setting(name, value, annotations[field.name], meaning, field.metadata["choices"], section_help)
    for subsection in subsections:
        yield from declared_settings(*subsection)


def _merge_file(tree: DictConfig, path: str, errors: list[str]) -> None:
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        mapping = isinstance(root, yaml.MappingNode)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if mapping else None
    except OSError as error:
        errors.append(f"{path}: cannot be read ({error.strerror}); check --config")
        return
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        errors.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        return
    if root is None:  # an empty file, or comments only
        return
    if not isinstance(content, dict):
        errors.append(f"{path}: must hold sections (run:, backbone:, ...), each with its settings")
        return
    lines = _line_numbers(root)
    _merge(tree, content, written(root), lambda name: f"{path}:{lines[name]}" if name in lines else path, errors)


def _merge_override(tree: DictConfig, override: str, errors: list[str]) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        file = "; a file of settings stands behind --config" if override.endswith((".yaml", ".yml")) else ""
        errors.append(f"{override!r}: an override is section.key=value, e.g. vae.train.lr=1e-4{file}")
        return
    entry = next((entry for entry in declared_settings() if entry.name == name), None)
    as_typed = plainly(text) if entry is not None and is_text(entry.annotation) else None
    try:
        content, texts = (as_typed, {}) if as_typed is not None else _parse_override(name, text)
    except (yaml.YAMLError, OmegaConfBaseException):
        quoted = shlex.quote(f"{name}={json.dumps(text)}")
        errors.append(f"command line: {name}: {text!r} is not valid YAML; quote it, e.g. {quoted}")
        return
    _merge(tree, _nested(name, content), texts, lambda _: "command line", errors)


def _parse_override(name: str, text: str) -> tuple[Any, dict[str, Any]]:
    """The value of an override, and the texts in it as they are written."""
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    value = typing.cast("dict[str, Any]", parsed)["value"]
    return "" if value is None and not text else value, written(yaml.compose(text, Loader=yaml.SafeLoader), name)


def _merge(
    tree: DictConfig, content: Mapping[Any, Any], texts: Mapping[str, Any], where: Callable[[str], str], errors: list[str]
) -> None:
    """Put each value of ``content`` into ``tree``; what does not fit is added to ``errors``, the rest still goes in.

    ``texts``: what YAML has read as something else where a setting is a text, as it is written.
    """
    known = {entry.name: entry for entry in declared_settings()}
    sections = {name[: i + 1].rstrip(".") for name in known for i, mark in enumerate(name) if mark == "."}

    def descend(group: Mapping[Any, Any], prefix: str) -> None:
        for key, value in group.items():
            name = f"{prefix}{key}"
            if name in known:
                put(known[name], value)
            elif name not in sections:
                unknown(name)
            elif isinstance(value, Mapping):
                descend(value, f"{name}.")
            elif value is not None:
                errors.append(f"{where(name)}: {name} is a section with settings of its own, not a value")

    def put(entry: Setting, value: Any) -> None:
        as_written = texts.get(entry.name)
        if as_written is not None and (is_text if isinstance(as_written, str) else is_text_list)(entry.annotation):
            value = as_written
        if entry.name in _WINDOWS:
            value = window(as_written) or value
        if entry.annotation == list[Any] and isinstance(value, str):
            value = [value]
        try:
            OmegaConf.update(tree, entry.name, value, merge=True)
            # OmegaConf lets containers into a list of texts.
            plain = not isinstance(value, list) or not any(isinstance(item, (list, Mapping)) for item in value)
            fits = plain or entry.annotation == list[Any]
            fits &= not is_texts(entry.annotation) or value is None or _are_texts(value)
        except OmegaConfBaseException:
            fits = False
        if not fits:
            expected = _type_name(entry.annotation)
            listed = typing.get_origin(entry.annotation) is list and not isinstance(value, (list, Mapping)) and value is not None
            example = f", e.g. {entry.name}=[{show_value(value)}]" if listed else ""
            errors.append(f"{where(entry.name)}: {entry.name}={show_value(value)}: must be {expected}{example}")

    def unknown(name: str) -> None:
        owner = next((entry for entry in known if name.startswith(f"{entry}.")), None)
        if owner is not None and typing.get_origin(known[owner].annotation) is dict:
            put(known[owner], _nested(name.removeprefix(f"{owner}."), values[name]))
            return
        errors.append(f"{where(name)}: unknown setting {name}{_closest(name, [*known, *sections])}")

    values = _flatten(content)
    descend(content, "")


def _nested(name: str, value: Any) -> Any:
    """``value`` inside one mapping per part of ``name``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every value and every mapping in ``content`` by its full name."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _line_numbers(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """The line (from 1) on which each key of a YAML mapping stands, by full name."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            lines |= _line_numbers(value, f"{name}.")
    return lines


def _resolve(tree: DictConfig, errors: list[str]) -> Config:
    """The finished dataclasses; an interpolation that leads nowhere or to another type is an error."""
    for entry in declared_settings():
        try:
            value = OmegaConf.select(tree, entry.name)
            if OmegaConf.is_config(value):
                OmegaConf.resolve(value)
        except OmegaConfBaseException as error:
            errors.append(f"{entry.name}: cannot be resolved: {str(error).splitlines()[0]}")
            OmegaConf.update(tree, entry.name, entry.default)
    return typing.cast(Config, OmegaConf.to_object(tree))


def _choice_errors(config: Config) -> Iterator[str]:
    for entry in declared_settings(config):
        if entry.choices is None or entry.default is None:
            continue
        for value in entry.default if isinstance(entry.default, list) else [entry.default]:
            if value not in entry.choices:
                hint = _closest(value, entry.choices)
                yield f"{entry.name}={value}: must be one of {', '.join(entry.choices)}{hint}"


def _closest(name: str, candidates: Sequence[str]) -> str:
    """``"; did you mean X?"`` with the most similar candidate: by full name, else by the last part of the name."""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if not found:
        by_leaf: dict[str, str] = {}
        for candidate in candidates:
            by_leaf.setdefault(candidate.rpartition(".")[2], candidate)
        found = [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {found[0]}?" if found else "; --help lists every setting" if "." in name else ""


def _option_error(option: str) -> str:
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    if name in setting_names():
        return f"{option}: settings are written without dashes: {name}=VALUE"
    return f"{option}: unknown option{_closest(name, ['config', *setting_names()])}"


def _are_texts(value: Any) -> bool:
    """Whether a value is a text, or a list of some."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value))


def _type_name(annotation: Any) -> str:
    """A type in words, e.g. "a whole number, or null" for ``int | None``."""
    if is_texts(annotation):
        return "text, or a list of some, or null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
        return f"{inner}, or null" if type(None) in arguments else inner
    if annotation == list[Any]:
        return "a list of names and mappings"
    if origin is list:
        return f"a list, each {_type_name(arguments[0])}"
    return "a mapping" if origin is dict else str(annotation)


def show_value(value: Any) -> str:
    """A value as one would write it in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(show_value, value)) + "]"
    return str(value)
