"""Data sets of the Hub: fetched once on every node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ladir.data.rows import data_files
from training.runtime.distributed import World

T = TypeVar("T")


def fetched_once(world: World, named: str | Sequence[str] | None, read: Callable[[], T]) -> T:
    """What ``read`` returns, on every rank; where a set ``named`` is no file, one process of each node goes first, and the others
    find what it has fetched (collective)."""
    local = world.broadcast(all(Path(name).exists() for name in data_files(named)))
    return read() if local else world.first_on_node(read)
