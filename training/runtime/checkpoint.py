"""Checkpoints: atomic, verified, readable by any number of ranks.

``checkpoints/<phase>/step-00000123/`` holds a safetensors file per rank and kind (its parts of master weights, moments
and averages, by parameter), ``state.json`` (where the training stands) and ``manifest.json`` (sizes and hashes of all).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ladir.files import sync_file
from ladir.models.weights import save_tensors
from training.runtime.distributed import World
from training.runtime.engine import Engine, StateReader
from training.runtime.files import publish_folder, sha256, write_json, write_text

logger = logging.getLogger(__name__)

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
_NAMED = "step-"
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there can be read."""


def save(folder: Path, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of step ``state["step"]`` under ``folder`` (all ranks together); keep the newest ``keep``.

    It appears under its name only when every rank's file is on disk, and older ones go only after that.  Raises
    :class:`CheckpointError` on all ranks when any of them fails; the older checkpoints are then untouched.
    """
    world = engine.world
    target = folder / f"{_NAMED}{state['step']:08d}"
    aside = folder / f".{target.name}.tmp"

    def prepare() -> None:
        if world.is_main:
            for torn in folder.glob(f".{_NAMED}*"):  # of any step: one process group at a time works here
                shutil.rmtree(torn, ignore_errors=True)
            aside.mkdir(parents=True)

    def write_shard() -> dict[str, Any]:
        return _write_shard(aside, engine)

    def finish() -> None:
        if world.is_main:
            write_json(aside / STATE, {**state, "frozen": frozen, "ranks": world.size})
            entries = {**dict(shards), STATE: _entry(aside / STATE)}
            write_json(aside / MANIFEST, entries)
            publish_folder(aside, target)
            write_text(folder / LATEST, target.name + "\n")
            _prune(folder, target, keep)

    _together(world, target, prepare)
    frozen = engine.frozen_fingerprint()
    shards = [item for entry in _together(world, target, write_shard) for item in entry.items()]
    _together(world, target, finish)
    return target


def _write_shard(folder: Path, engine: Engine) -> dict[str, Any]:
    """Write this rank's tensors; returns their manifest entries by file name (none where it has nothing of its own)."""
    entries = {}
    for kind, tensors, places in engine.state():  # one kind at a time: on a GPU each is copied to the host
        if not tensors:  # safetensors writes a file it cannot read for no tensors and no metadata
            continue
        path = folder / f"rank-{engine.world.rank:05d}-{kind}.safetensors"
        save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=places)
        sync_file(path)
        entries[path.name] = _entry(path)
    return entries


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _together(world: World, target: Path, action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank; returns all results, or raises on every rank what failed on any."""
    result, error = None, ""
    try:
        result = action()
    except (OSError, SafetensorError) as caught:
        error = f"rank {world.rank}: {caught}"
    answers = world.gather((result, error))
    errors = [error for _, error in answers if error]
    if errors:
        raise CheckpointError(
            f"{target} could not be written ({'; '.join(errors)}); checkpoints written before it are intact. "
            "Make room or check the permissions, then start the same command again"
        )
    return [result for result, _ in answers]


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep ``newest``, just written, and those before it; later ones were damaged, else the run would have continued there."""
    there = steps_in(folder)
    later = [path for path in there if path.name > newest.name]
    for path in [*later, *there[len(later) + max(keep, 1) :]]:
        shutil.rmtree(path, ignore_errors=True)


def steps_in(folder: Path) -> list[Path]:
    """Folders of the checkpoints under ``folder``, newest first."""
    return sorted(folder.glob(_NAMED + "[0-9]" * 8), reverse=True)


def find(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint under ``folder`` (None where there is none at all), agreed by all ranks.

    Torn or altered ones are skipped with a warning.  Raises :class:`CheckpointError` when none of those there is whole.
    """
    candidates = [Path(path) for path in world.broadcast([str(path) for path in steps_in(folder)])]
    for number, path in enumerate(candidates):
        problems = [problem for found in world.gather(_problems(path, world)) for problem in found]
        if not problems:
            return path
        older = f"going back to {candidates[number + 1].name}" if number + 1 < len(candidates) else "no older one is left"
        if world.is_main:
            logger.warning("checkpoint %s is damaged (%s): %s", path, "; ".join(problems), older)
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: restore one from a backup, or delete the folder to start over"
        )
    return None


def _problems(path: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks share the hashing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = sorted(manifest.items())[world.rank :: world.size]
        return [problem for name, entry in files for problem in _file_problems(path / name, entry)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {error}"]


def _file_problems(file: Path, entry: dict[str, Any]) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    size = file.stat().st_size
    if size != entry["size"]:
        return [f"{file.name} has {size} of {entry['size']} bytes"]
    return [] if sha256(file) == entry["sha256"] else [f"{file.name} has changed (its hash differs)"]


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Bring ``engine`` to the checkpoint ``path`` and return its ``state.json``.

    Any number of ranks and any ZeRO stage may read what any other wrote.  Raises :class:`CheckpointError` when it does
    not belong to this model.
    """
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    frozen = engine.frozen_fingerprint()
    if frozen != state["frozen"]:
        raise CheckpointError(
            f"{path} was trained on other frozen weights (their hash is {frozen}, the checkpoint's {state['frozen']}): "
            "put back the model it started from, or start a new run (run.name=...)"
        )
    if engine.world.is_main and state["ranks"] != engine.world.size:
        # What DeepSpeed needs its "universal" format and a conversion for: our files name the parts of every parameter.
        logger.info(
            "%s was written by %d ranks: its state is redistributed to %d, no conversion is needed",
            path, state["ranks"], engine.world.size,
        )  # fmt: skip
    error = ""
    try:
        shards = Shards(path)
        shards.check(engine.trainable_sizes())
        engine.load_state(shards, state["step"])
    except (CheckpointError, OSError, SafetensorError) as caught:
        error = str(caught)
    errors = [error for error in engine.world.gather(error) if error]
    if errors:
        raise CheckpointError(errors[0])
    engine.publish()
    return state


class Shards(StateReader):
    """The tensors of a checkpoint, whatever rank wrote them; only the parts asked for are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sizes: dict[str, int] = {}
        self._parts: dict[str, list[tuple[Any, int]]] = {}
        """By ``kind/parameter``: the files that hold a part of it, and which element that part starts with."""
        self._buffers: Any = None
        # The manifest's, because a folder's listing may be out of date on a network file system.
        for name in sorted(json.loads((path / MANIFEST).read_text(encoding="utf-8")).keys() - {STATE}):
            kind, file = Path(name).stem.split("-")[2], safe_open(path / name, framework="pt")
            if kind == "buffer":
                self._buffers = file
                continue
            for parameter, place in (file.metadata() or {}).items():
                start, self._sizes[parameter] = map(int, place.split("/"))
                self._parts.setdefault(f"{kind}/{parameter}", []).append((file, start))

    def check(self, sizes: dict[str, int]) -> None:
        """Raise :class:`CheckpointError` unless these are the trained parameters, and their sizes, of the checkpoint."""
        both = self._sizes.keys() | sizes.keys()
        wrong = sorted(name for name in both if self._sizes.get(name) != sizes.get(name))
        if wrong:
            first = f"{wrong[0]} has {self._sizes.get(wrong[0], 'no')} elements there, {sizes.get(wrong[0], 'none')} here"
            raise CheckpointError(
                f"{self._path} is the checkpoint of another model: {len(wrong)} trained parameters differ ({first})"
            )

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` from the parts that overlap ``[start, start + out.numel())``; raises CheckpointError on a gap."""
        filled, end = 0, start + out.numel()
        for file, first in self._parts.get(f"{kind}/{name}", []) if out.numel() else []:
            part = file.get_slice(name)
            low, high = max(start, first), min(end, first + part.get_shape()[0])
            if low < high:
                out[low - start : high - start].copy_(part[low - first : high - first])
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{self._path}: {filled} of {out.numel()} elements of {kind} {name} found")

    def buffer(self, name: str) -> Tensor:
        """A persistent buffer of the model."""
        if self._buffers is None or name not in self._buffers.keys():  # noqa: SIM118 (not a dict)
            raise CheckpointError(f"{self._path} is the checkpoint of another model: it has no buffer {name}")
        return torch.as_tensor(self._buffers.get_tensor(name))
