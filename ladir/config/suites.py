"""Suites of benchmarks: several data sets that one evaluation asks, each under settings of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: data sets by suite, with the task that judges their answers
SUITES: Mapping[str, Mapping[str, str]] = {
    "maths7": dict.fromkeys(
        ("gsm8k", "math", "gaokao2023-en", "deepmind-mathematics", "college-math", "olympiadbench", "theoremqa"), "maths"
    ),
    "code4": dict.fromkeys(("humaneval", "humaneval+", "mbpp", "mbpp+"), "code"),
    "countdown": dict.fromkeys(("countdown-4", "countdown-5"), "countdown"),
}

#: how a set's authors judge its answers, where the task has another rule
_RULES: Mapping[str, Mapping[str, Any]] = {"theoremqa": {"evaluate.tolerance": 0.04}}

#: settings that a data set may have of its own (by section), and those in these sections that are the evaluation's
_OWN_SECTIONS = ("data.", "evaluate.", "sample.")
_SHARED = tuple(f"evaluate.{name}" for name in ("suite", "suite_folder", "name", "snapshot", "methods", "lane", "split"))


@dataclass(frozen=True)
class DataSetEntry:
    """A data set of a suite: its name, and settings of its own by their full names."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def entries(suite: Sequence[Any]) -> list[DataSetEntry]:
    """The data sets of ``evaluate.suite``, a list of names (of suites or sets) and mappings."""
    found: list[DataSetEntry] = []
    for part in map(_spelled, suite):
        if isinstance(part, Mapping):
            own = {str(name): value for name, value in part.items()}
            found.append(DataSetEntry(str(own.pop("name", "")), own))
        elif isinstance(part, str) and part in SUITES:
            found += [_entry(name, task) for name, task in SUITES[part].items()]
        else:
            task = next((sets[part] for sets in SUITES.values() if isinstance(part, str) and part in sets), None)
            found.append(_entry(str(part), task))
    return found


def _entry(name: str, task: str | None) -> DataSetEntry:
    return DataSetEntry(name, {} if task is None else {"evaluate.task": task, **_RULES.get(name, {})})


def _spelled(part: Any) -> Any:
    """The name of a suite or data set in its own spelling: ``gsm8k`` for ``GSM8K``."""
    known = {file_key(name): name for name in _names()}
    return known.get(file_key(part), part) if isinstance(part, str) else part


def _names() -> list[str]:
    return sorted({*SUITES, *(name for sets in SUITES.values() for name in sets)})


def suite_errors(suite: Sequence[Any]) -> Iterator[str]:
    """What is wrong with ``evaluate.suite``, a sentence each; the values of a set's settings are checked when it is opened."""
    known = _names()
    for part in map(_spelled, suite):
        if not isinstance(part, Mapping) and part not in known:
            yield (
                f"evaluate.suite: {part!r} is no suite or data set known by name; valid: {', '.join(known)}, or a mapping "
                "{name: NAME, data.test: FILE, evaluate.task: TASK, ...}"
            )
    for name, count in Counter(entry.name for entry in entries(suite)).items():
        if count > 1:
            yield f"evaluate.suite: two data sets are named {name!r}; give one another name"
    for entry in entries(suite):
        if not entry.name or entry.name.isdecimal() or re.search(r"[/\\\0]", entry.name):
            yield f"evaluate.suite: name={entry.name!r}: a data set's name must be a part of a file's name, and not a number"
        for setting in entry.settings:
            if not setting.startswith(_OWN_SECTIONS) or setting in _SHARED:
                yield (
                    f"evaluate.suite: {entry.name}: {setting} cannot be a data set's own; what can: name, and settings of data, "
                    "evaluate and sample by their full names (data.test, evaluate.task, sample.max_blocks, ...)"
                )


def file_key(name: str) -> str:
    """What names of a data set's file have in common: ``MbppPlus`` and ``mbpp+``, ``college_math`` and ``college-math``."""
    return re.sub(r"[^a-z0-9+]", "", name.lower().replace("plus", "+"))
