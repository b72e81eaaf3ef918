"""What is told of a training that is looked into: named ranges, and what lay in memory when it ran out."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import ProcessGroup
from tests.toy_phase import ToyPhase, toy_config
from training.runtime import loop
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.profiling import MemorySnapshot, Ranges
from training.runtime.run import open_run


def test_ranges_are_pytorchs_with_cuda_and_nothing_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: nullcontext(name))
    for wanted, cuda in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        with Ranges(wanted)("forward") as name:
            assert name == ("forward" if wanted and cuda else None)


def test_what_lay_in_memory_is_written_where_the_error_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: recorded.append(max_entries))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"what lay there"))
    file = tmp_path / "memory" / "rank-00000.pickle"
    (note,) = MemorySnapshot(0, file, torch.device("cuda")).dumped()
    assert str(file) in note and file.read_bytes() == b"what lay there" and not recorded
    MemorySnapshot(100, file, torch.device("cuda"))
    assert recorded == [100]
    assert not list(MemorySnapshot(100, file, torch.device("cpu")).dumped()) and recorded == [100]

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    (note,) = MemorySnapshot(0, file, torch.device("cuda")).dumped()
    assert "cannot be written" in note and "No space left" in note


def looked_into(world: World, folder: Path) -> tuple[list[str], list[str]]:
    """The ranges of two steps, and what is said of a third one's error."""
    names: list[str] = []
    phase, before = ToyPhase(), (loop.Ranges.__call__, MemorySnapshot.dumped)

    @contextmanager
    def named(self: Ranges, name: str) -> Any:
        names.append(name)
        yield
        if names.count("forward") == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loop.Ranges.__call__ = named  # type: ignore[method-assign, assignment]
    MemorySnapshot.dumped = lambda self: iter([str(self._file)])  # type: ignore[method-assign]
    try:
        with open_run(toy_config(folder, 0, max_steps=4, micro_batch=64), "ar", world) as run:
            train(run, phase)
    except torch.OutOfMemoryError as error:
        return names, error.__notes__
    finally:
        loop.Ranges.__call__, MemorySnapshot.dumped = before  # type: ignore[method-assign]
    return names, []


def test_a_training_names_its_parts_and_says_what_lay_in_memory(one_process: ProcessGroup, tmp_path: Path) -> None:
    ((names, notes),) = one_process.run(looked_into, tmp_path)
    assert [name for name in names if name in ("forward", "backward", "optimizer step")] == [
        *("forward", "backward", "optimizer step") * 2,
        "forward",
    ]
    assert notes[-1].endswith("toy/memory/ar/rank-00000.pickle") and "micro_batch" in notes[0]
