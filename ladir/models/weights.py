"""Weight files: safetensors that all may read who may read their configs, and that are looked at before they are loaded.

Their format (8 bytes: length of the header; the header, JSON; the tensors' bytes) is described at
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ladir.errors import UnusableError

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_REMEDY = "copy it again, or train or export it anew"
_LFS_POINTER = b"version https://git-lfs"
_SHARDS = "model-*-of-*.safetensors"
_LENGTH_BYTES = 8
_SAMPLE_BYTES = 64


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file there; safetensors itself lets its owner alone read it."""
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=dict(metadata) if metadata else None)
    with suppress(PermissionError):  # a file system that knows no permissions
        file.chmod(mode)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of an LM folder, by name; empty where it has no safetensors.

    UnusableError for an index that is missing or cannot be read, and for a shard that it names and that is missing.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not index.is_file():
        if parts := sorted(folder.glob(_SHARDS)):
            raise UnusableError(f"{index} is missing, without which the parts ({parts[0].name}, ...) cannot be read; {_REMEDY}")
        return []
    shards = sorted({folder / shard for shard in read_index(index).values()})
    for shard in shards:
        if not shard.is_file():
            raise UnusableError(f"{shard} is missing, and {index.name} names it; {_REMEDY}")
    return shards


def read_index(index: Path) -> dict[str, str]:
    """The shard of every tensor, by its name.  UnusableError for a file that is no such index."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"{index} cannot be read ({error}); {_REMEDY}") from error


def check_weights(folder: Path) -> None:
    """UnusableError for a weight file of an LM folder that is missing, cut short or lacks what the index says it has.

    Reads the headers alone.
    """
    headers = {file.name: _header(file)[0] for file in weight_files(folder)}
    if SAFE_WEIGHTS_NAME in headers or not headers:
        return
    for name, shard in read_index(folder / SAFE_WEIGHTS_INDEX_NAME).items():
        if name not in headers[shard]:
            raise UnusableError(f"{folder / shard} has no tensor {name}, and {SAFE_WEIGHTS_INDEX_NAME} says so; {_REMEDY}")


def check_file(file: Path) -> None:
    """UnusableError for a safetensors file that is missing or not whole; reads its header alone."""
    if not file.is_file():
        raise UnusableError(f"{file} is missing; {_REMEDY}")
    _header(file)


def check_lm_files(folder: Path) -> None:
    """UnusableError for an LM folder, or one of adapters, that lacks a file or has one that is not whole."""
    configs = [name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) if (folder / name).is_file()]
    if ADAPTER_CONFIG_NAME in configs or (folder / ADAPTER_WEIGHTS_NAME).is_file():
        check_file(folder / ADAPTER_WEIGHTS_NAME)
    else:
        check_weights(folder)
        if not weight_files(folder):
            raise UnusableError(f"{folder / SAFE_WEIGHTS_NAME} is missing; {_REMEDY}")
    if not configs:
        name = ADAPTER_CONFIG_NAME if (folder / ADAPTER_WEIGHTS_NAME).is_file() else CONFIG_NAME
        raise UnusableError(f"{folder / name} is missing; {_REMEDY}")


def sampled_fingerprint(folder: Path) -> str:
    """A hash (16 hex digits) of every tensor's name, type, shape and first and middle bytes, however they are split into files.

    It tells an LM from one that was trained on, in milliseconds; it does not notice a few bytes that were changed by hand.
    """
    entries = sorted(entry for file in weight_files(folder) for entry in _samples(file))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _samples(file: Path) -> Iterator[list[Any]]:
    header, start = _header(file)
    with file.open("rb") as opened:
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            parts = []
            for place in (first, (first + end) // 2):
                opened.seek(start + place)
                parts.append(opened.read(min(_SAMPLE_BYTES, end - place)).hex())
            yield [name, entry["dtype"], entry["shape"], *parts]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Type, shape and place of a file's tensors, by name, and where their bytes begin.  UnusableError where it is not whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(len(_LFS_POINTER))
            if head == _LFS_POINTER:
                raise UnusableError(f"{file} is a Git LFS pointer, not the weights: git lfs pull fetches them")
            start = _LENGTH_BYTES + int.from_bytes(head[:_LENGTH_BYTES], "little")
            if len(head) < _LENGTH_BYTES or start > size:
                raise UnusableError(f"{file} is cut short, or no safetensors file ({size} bytes); {_REMEDY}")
            opened.seek(_LENGTH_BYTES)
            header = dict(json.loads(opened.read(start - _LENGTH_BYTES)))
        header.pop("__metadata__", None)
        whole = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"{file} cannot be read ({error}); {_REMEDY}") from error
    if size != whole:
        raise UnusableError(f"{file} is {'cut short' if size < whole else 'too long'}: {size} of {whole} bytes; {_REMEDY}")
    return header, start
