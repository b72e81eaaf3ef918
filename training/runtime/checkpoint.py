"""Checkpoints: atomic, verified, readable by any number of ranks.

``checkpoints/<phase>/step-00000123/`` holds a safetensors file per rank and kind (its parts of master weights, moments
and averages, by parameter), ``state.json`` (where the training stands) and ``manifest.json`` (sizes and hashes of all, and which
file has which part of which parameter).
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ladir.threads import in_thread
from training.runtime.distributed import World
from training.runtime.engine import Engine, StateReader
from training.runtime.files import publish_folder, sha256, write_json, write_tensors, write_text
from training.runtime.host_room import HostRoom, Kind

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
    return Writing(folder, engine, state, keep).finish()


class Writing:
    """A checkpoint under way: begun, and finished, by all ranks together."""

    def __init__(self, folder: Path, engine: Engine, state: dict[str, Any], keep: int, room: HostRoom | None = None) -> None:
        """``room``: a copy is made there, which a thread writes while the training goes on; it holds nothing else meanwhile.

        Raises :class:`CheckpointError` on all ranks where the folder cannot be written, or the copy has no room.
        """
        self._folder, self._world, self._keep = folder, engine.world, keep
        self.step = int(state["step"])
        self._target = folder / f"{_NAMED}{self.step:08d}"
        self._aside = folder / f".{self._target.name}.tmp"
        self._together(self._prepare)
        self._state = {**state, "frozen": engine.frozen_fingerprint(), "ranks": engine.world.size}
        kinds = engine.state()
        self._entries: Future[dict[str, Any]] | None = None
        if room is not None:
            copies: list[Kind] = []
            self._together(lambda: copies.extend(room.copies(kinds)))
            self._state = copy.deepcopy(self._state)
            self._entries = in_thread(lambda: _write_shard(self._aside, engine.world.rank, copies))
        else:
            self._kinds = kinds

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on disk."""
        return self._entries is None or self._entries.done()

    def finish(self) -> Path:
        """Wait until all is on disk, then give it its name.  Raises :class:`CheckpointError` on all ranks where any failed."""
        shards = [item for entry in self._together(self._shard) for item in entry.items()]

        def publish() -> None:
            if self._world.is_main:
                write_json(self._aside / STATE, self._state)
                entries = {**dict(shards), STATE: _entry(self._aside / STATE)}
                write_json(self._aside / MANIFEST, entries, indent=None)
                publish_folder(self._aside, self._target)
                write_text(self._folder / LATEST, self._target.name + "\n")
                _prune(self._folder, self._target, self._keep)

        self._together(publish)
        return self._target

    def _prepare(self) -> None:
        if self._world.is_main:
            for torn in self._folder.glob(f".{_NAMED}*"):  # of any step: one process group at a time works here
                shutil.rmtree(torn, ignore_errors=True)
            self._aside.mkdir(parents=True)

    def _shard(self) -> dict[str, Any]:
        """This rank's entries of the manifest."""
        return _write_shard(self._aside, self._world.rank, self._kinds) if self._entries is None else self._entries.result()

    def _together(self, action: Callable[[], T]) -> list[T]:
        return _together(self._world, self._target, action)


def _write_shard(folder: Path, rank: int, kinds: Iterable[Kind]) -> dict[str, Any]:
    """Write a rank's tensors; returns their manifest entries by file name (none where it has nothing of its own).

    Of a shard the entry holds the parts, too, so that who wants some of them opens no other files.
    """
    entries = {}
    for kind, tensors, places in kinds:  # one kind at a time: on a GPU each is copied to the host
        if not tensors:  # safetensors writes a file it cannot read for no tensors and no metadata
            continue
        path = folder / f"rank-{rank:05d}-{kind}.safetensors"
        there = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        entry = write_tensors(there, path, metadata=places)
        parts = {name: [int(number) for number in places[name].split("/")] + [there[name].numel()] for name in places}
        entries[path.name] = {**entry, **({"parts": parts} if parts else {})}
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


def states(folder: Path) -> list[dict[str, Any]]:
    """``state.json`` of the checkpoints under ``folder``, newest first, of those that have one."""
    files = [path / STATE for path in steps_in(folder)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


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
        self._parts: dict[str, list[tuple[str, int, int]]] = {}
        """By ``kind/parameter``: the files that hold a part of it, which element that part starts with, and where it ends."""
        self._buffers = ""
        self._opened: dict[str, Any] = {}
        # The manifest's, because a folder's listing may be out of date on a network file system.
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in sorted(manifest.keys() - {STATE}):
            kind = Path(name).stem.split("-")[2]
            if kind == "buffer":
                self._buffers = name
                continue
            for parameter, (start, size, count) in (manifest[name].get("parts") or self._parts_of(name)).items():
                self._sizes[parameter] = size
                self._parts.setdefault(f"{kind}/{parameter}", []).append((name, start, start + count))

    def _file(self, name: str) -> Any:
        """A file of the checkpoint; it is opened when it is needed: of a thousand ranks' files one rank needs few."""
        if name not in self._opened:
            self._opened[name] = safe_open(self._path / name, framework="pt")
        return self._opened[name]

    def _parts_of(self, name: str) -> dict[str, list[int]]:
        """What a file of a checkpoint of before, whose manifest does not say it, holds."""
        file = self._file(name)
        places = (file.metadata() or {}).items()
        return {key: [*map(int, place.split("/")), file.get_slice(key).get_shape()[0]] for key, place in places}

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
        for file, first, last in self._parts.get(f"{kind}/{name}", []) if out.numel() else []:
            low, high = max(start, first), min(end, last)
            if low < high:
                part = self._file(file).get_slice(name)
                out[low - start : high - start].copy_(part[low - first : high - first])
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{self._path}: {filled} of {out.numel()} elements of {kind} {name} found")

    def buffer(self, name: str) -> Tensor:
        """A persistent buffer of the model."""
        if not self._buffers or name not in self._file(self._buffers).keys():  # noqa: SIM118 (not a dict)
            raise CheckpointError(f"{self._path} is the checkpoint of another model: it has no buffer {name}")
        return torch.as_tensor(self._file(self._buffers).get_tensor(name))
