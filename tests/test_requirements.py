"""The environment is the one that the pins describe: every package, those that packages bring included."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]

#: what tests, training and the server run with; requirements-cuda.txt is for CUDA machines alone
INSTALLED = (
    "requirements.txt",
    "requirements-examples.txt",
    "requirements-eval.txt",
    "requirements-loggers.txt",
    "requirements-serve.txt",
    "requirements-dev.txt",
)


def lines(file: str) -> list[Requirement]:
    """The packages of a requirements file, without its comments and options."""
    text = (ROOT / file).read_text()
    return [Requirement(line.split(" #")[0]) for line in text.splitlines() if line.strip() and line[0] not in "#-"]


def pins(file: str) -> dict[str, str]:
    """Version by name; every line is of the form name==version."""
    found = {}
    for requirement in lines(file):
        (only,) = requirement.specifier
        assert only.operator == "==" and not requirement.extras, f"{file}: {requirement}"
        found[canonicalize_name(requirement.name)] = only.version
    return found


def needed() -> dict[str, str]:
    """Installed version, without the build's mark (+cpu), of every package that the requirements need, by name."""
    left = [requirement for file in INSTALLED for requirement in lines(file)]
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        requirement = left.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        found[name] = Version(distribution.version).public
        for text in distribution.requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                left.append(inner)
    return found


def test_every_package_that_is_needed_is_pinned_and_installed_as_pinned() -> None:
    pinned = pins("constraints.txt")
    installed = needed()
    assert {name: pinned.get(name) for name in installed} == installed
    cuda = {name for name in pinned if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert pinned.keys() - installed.keys() - cuda == {"pip"}  # nothing that is not needed any more


@pytest.mark.parametrize("file", [*INSTALLED, "requirements-cuda.txt"])
def test_requirements_and_constraints_agree(file: str) -> None:
    pinned = pins("constraints.txt")
    for name, version in pins(file).items():
        assert name == "flash-attn" or pinned[name] == version
    text = (ROOT / file).read_text()
    assert file == "requirements.txt" or "-c constraints.txt" in text  # pyproject.toml reads that one, which takes no option


def test_the_makefile_gives_the_pins_to_every_pip() -> None:
    """To the one that makes the package itself, too, which is built."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    calls = [line for line in text.splitlines() if "-m pip" in line or "$(PIP)" in line]
    assert len(calls) >= 6
    for call in calls:
        assert "--constraint $(PINS)" in call or "$(PIP)" in call, call
        assert "$(PIP)" not in call or "--build-constraint $(PINS)" in call or call.endswith("$(PIP) pip setuptools"), call


def test_every_wheel_for_a_machine_without_network_is_pinned() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (names,) = [line.partition(":=")[2].split() for line in text.splitlines() if line.startswith("WHEEL_NAMES")]
    assert len(names) > 30 and {canonicalize_name(name) for name in names} <= pins("constraints.txt").keys()
