"""Writing files so that a crash at any moment leaves the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ladir.files import replace_folder, sync_file

#: bytes that are hashed and written at a time
_CHUNK = 1 << 24
#: seconds between two tries to get a lock
_TRY_SECONDS = 0.1
#: what was written less long ago may be written again and keep its size and times
_SETTLED_SECONDS = 2.0
#: digests of files that were read whole, by place, size and times; of the run around the work, which keeps them while it is open
_known: ContextVar[dict[tuple[str | int, ...], str] | None] = ContextVar("digests of the run", default=None)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def lacks_room(error: Exception) -> bool:
    """Whether a file could not be written for want of space, quota or write access to the disk."""
    if isinstance(error, SafetensorError):  # has the number in its text only
        return any(f"os error {number})" in str(error) for number in _NO_ROOM)
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_file(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Replace ``path`` atomically by JSON, indented for people unless ``indent`` is None."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file to disk; returns its ``size`` and ``sha256``, of what was to be written, not of what a disk gives
    back."""
    content = memoryview(save(tensors, metadata or None))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, len(content), _CHUNK):
            digest.update(content[start : start + _CHUNK])
            file.write(content[start : start + _CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": digest.hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; empty where the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def try_lock(path: Path, owner: str) -> TextIO | None:
    """An open file that keeps other processes out until it is closed or this process ends, however; None where another has it.

    ``owner`` is written into it for people to read.  Where the file system knows no locks everybody gets one.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file
    file.truncate(0)
    file.write(owner)
    file.flush()
    return file


@contextmanager
def locked(path: Path, give_way: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, other processes that ask for the same wait; where the file system knows no locks nobody does.

    ``give_way`` is called again and again while this one waits, and may raise.  The folder is made where it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as file:
        with suppress(OSError):
            _lock(file, give_way)
        yield


def _lock(file: TextIO, give_way: Callable[[], None] | None) -> None:
    if give_way is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            give_way()
            time.sleep(_TRY_SECONDS)
        else:
            return


def publish_folder(aside: Path, folder: Path) -> None:
    """Give the finished folder ``aside`` its real name; whatever had that name before is removed."""
    for file in sorted(aside.rglob("*"), reverse=True):
        sync_file(file)
    sync_file(aside)
    replace_folder(aside, folder)


def sha256(path: Path, give_way: Callable[[], None] | None = None) -> str:
    """Hex digest of a file; ``give_way`` is called between its pieces and may raise."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if give_way is not None:
                give_way()
    return digest.hexdigest()


@contextmanager
def digests_kept() -> Iterator[None]:
    """Inside, :func:`known_sha256` reads a file that stays as it is once."""
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def known_sha256(path: Path, give_way: Callable[[], None] | None = None) -> str:
    """:func:`sha256`; inside :func:`digests_kept` found once for a file that stays as it is."""
    if (known := _known.get()) is None:
        return sha256(path, give_way)
    facts, now = path.stat(), time.time()
    key = (str(path.resolve()), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    digest = known.get(key) or sha256(path, give_way)
    if now - max(facts.st_mtime, facts.st_ctime) > _SETTLED_SECONDS:
        known[key] = digest
    return digest


def remove_folder(folder: Path, give_way: Callable[[], None]) -> None:
    """Remove a folder with all in it; ``give_way`` is called before every file, and may raise: the rest can be removed later."""
    for file in [path for path in folder.rglob("*") if not path.is_dir()]:
        give_way()
        file.unlink(missing_ok=True)
    shutil.rmtree(folder)


def code_digest(*modules: ModuleType) -> str:
    """Stands for the source of some modules, of a package's with all in it."""
    digest = hashlib.sha256()
    for module in modules:
        path = Path(str(module.__file__))
        for file in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def digests(names: Sequence[str], give_way: Callable[[], None] | None = None) -> list[str]:
    """What stands for the content of data sets: of a file its digest, of a Hub set its name, with the commit."""
    return [known_sha256(Path(name), give_way) if Path(name).is_file() else name for name in names]
