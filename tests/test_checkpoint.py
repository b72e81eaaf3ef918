"""Checkpoints: whole or not there, verified, readable by other ranks and stages."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ladir.config import DeepSpeedSettings, TrainSettings
from tests.distributed import ProcessGroup
from tests.test_loop import assert_close, assert_identical, run_with, toy_settings
from tests.toy_phase import ToyModel, ToyPhase, toy_config
from training.runtime import checkpoint
from training.runtime.checkpoint import CheckpointError, steps_in
from training.runtime.distributed import World
from training.runtime.engine import Engine
from training.runtime.loop import train
from training.runtime.run import open_run

KINDS = ("ema", "exp_avg", "exp_avg_sq", "master")
FILES = [(0, "buffer"), *((rank, kind) for rank in (0, 1) for kind in KINDS)]
SETTINGS = toy_settings(checkpoint_every=2, micro_batch=2, ema=0.9, keep_checkpoints=2)


def checkpoints(folder: Path) -> list[Path]:
    return steps_in(folder / "toy" / "checkpoints" / "ar")


def unfinish(folder: Path) -> None:
    """Take back the end of a run, as if it had died after its last periodic checkpoint."""
    (folder / "toy" / "outcome-ar.json").unlink()
    shutil.rmtree(checkpoints(folder)[0])
    assert checkpoints(folder)[0].name == "step-00000004"


@pytest.fixture(scope="module")
def finished(two_processes: ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run of two ranks; copy before use."""
    folder = tmp_path_factory.mktemp("finished")
    two_processes.run(run_with, folder, 3, "float32", SETTINGS)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_last_n_are_kept_and_latest_names_the_newest(finished: Path) -> None:
    assert [path.name for path in checkpoints(finished)] == ["step-00000006", "step-00000004"]
    assert (checkpoints(finished)[0].parent / "latest").read_text() == "step-00000006\n"
    assert sorted(path.name for path in checkpoints(finished)[0].iterdir()) == [
        "manifest.json",
        *(f"rank-0000{rank}-{kind}.safetensors" for rank, kind in FILES),
        "state.json",
    ]  # fmt: skip


def test_other_numbers_of_ranks_and_stages_continue(
    two_processes: ProcessGroup, one_process: ProcessGroup, finished: Path, tmp_path: Path
) -> None:
    """Two ranks of ZeRO-3 continue as one rank of any stage, and that one as two ranks again; a line says so."""
    for stage in (3, 2, 0):
        folder = Path(shutil.copytree(finished, tmp_path / f"stage-{stage}"))
        unfinish(folder)
        (said,) = one_process.run(run_listening, folder, stage, logging.INFO)
        assert len(said) == 1 and "written by 2 ranks: its state is redistributed to 1, no conversion is needed" in said[0]
        assert_close(folder, finished, 2e-5)
        shutil.rmtree(checkpoints(folder)[0])
        (folder / "toy" / "outcome-ar.json").unlink()
        two_processes.run(run_with, folder, 3, "float32", {**SETTINGS, "max_steps": 6})
        assert_close(folder, finished, 2e-5)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        flip_byte(path / "rank-00001-ema.safetensors")
    elif how == "truncated":
        shard = path / "rank-00000-exp_avg.safetensors"
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "missing":
        (path / "rank-00001-ema.safetensors").unlink()
    elif how == "state":
        (path / "state.json").write_text("{}")
    else:
        (path / "manifest.json").write_text('{"rank')


def run_listening(world: World, folder: Path, stage: int = 3, level: int = logging.WARNING) -> list[str]:
    """Train to the end; returns what the checkpoint code logged, from ``level`` on."""
    heard: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    run_with(world, folder, stage, "float32", SETTINGS)
    checkpoint.logger.removeHandler(handler)
    return heard


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "state", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    two_processes: ProcessGroup, finished: Path, copy: Path, how: str
) -> None:
    (copy / "toy" / "outcome-ar.json").unlink()
    newest = checkpoints(copy)[0]
    damage(newest, how)
    said, others = two_processes.run(run_listening, copy)
    assert len(said) == 1 and others == []
    assert f"{newest} is damaged" in said[0] and "going back to step-00000004" in said[0]
    assert_identical(copy, finished)
    assert all(json.loads((path / "manifest.json").read_text()) for path in checkpoints(copy))


def expect_no_whole_checkpoint(world: World, folder: Path) -> str:
    try:
        run_with(world, folder, 3, "float32", SETTINGS)
    except CheckpointError as error:
        return str(error)
    return ""


def test_without_a_whole_checkpoint_nothing_is_trained_over_it(two_processes: ProcessGroup, copy: Path) -> None:
    (copy / "toy" / "outcome-ar.json").unlink()
    for path in checkpoints(copy):
        flip_byte(path / "rank-00000-exp_avg.safetensors")
    for message in two_processes.run(expect_no_whole_checkpoint, copy):
        assert "no checkpoint in" in message and "start over" in message


def full_disk_on_rank_one(world: World, folder: Path, in_background: bool) -> str:
    real, calls = checkpoint.write_tensors, []

    def write_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> dict[str, Any]:
        calls.append(path)
        entry = real(tensors, path, metadata)
        if world.rank == 1 and len(calls) == len(KINDS) + 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return entry

    checkpoint.write_tensors = write_tensors
    try:
        run_with(world, folder, 3, "float32", {**SETTINGS, "checkpoint_in_background": in_background})
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint.write_tensors = real
    return ""


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_stops_the_run_with_the_checkpoint_before_whole(
    two_processes: ProcessGroup, finished: Path, tmp_path: Path, in_background: bool
) -> None:
    messages = two_processes.run(full_disk_on_rank_one, tmp_path, in_background)
    assert len(set(messages)) == 1
    assert "step-00000004" in messages[0] and "rank 1" in messages[0] and "No space left" in messages[0]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    two_processes.run(run_with, tmp_path, 3, "float32", SETTINGS)
    assert_identical(tmp_path, finished)


def save_after_a_damaged_one(world: World, folder: Path) -> Path | None:
    """Steps 5 and 6 are saved, 6 is damaged, 5 is saved again, as by a run that has gone back to 4 and is stopped there."""
    engine = Engine(ToyModel(), TrainSettings(), "float32", DeepSpeedSettings(), world)
    for step in (5, 6):
        checkpoint.save(folder, engine, {"step": step}, keep=1)
    flip_byte(folder / "step-00000006" / "rank-00000-master.safetensors")
    checkpoint.save(folder, engine, {"step": 5}, keep=1)
    return checkpoint.find(folder, world)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(one_process: ProcessGroup, tmp_path: Path) -> None:
    assert one_process.run(save_after_a_damaged_one, tmp_path) == [tmp_path / "step-00000005"]
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000005"]


def load_into_others(world: World, path: Path) -> list[str]:
    """Errors for models with other frozen weights, with one more output and without a head."""
    frozen_changed, widened, headless = ToyModel(), ToyModel(), ToyModel()
    with torch.no_grad():
        frozen_changed.frozen.weight.mul_(2)
    widened.even_head = nn.Linear(8, 2)
    headless.odd_head = nn.Identity()  # type: ignore[assignment]
    messages = []
    for model in (frozen_changed, widened, headless):
        engine = Engine(model, TrainSettings(ema=0.9), "float32", DeepSpeedSettings(), world)
        try:
            checkpoint.load(path, engine)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_checkpoint_of_another_model_is_refused(two_processes: ProcessGroup, finished: Path) -> None:
    for messages in two_processes.run(load_into_others, checkpoints(finished)[0]):
        assert "other frozen weights" in messages[0]
        assert "another model" in messages[1] and "even_head.bias has 1 elements there, 2 here" in messages[1]
        assert "odd_head.bias has 1 elements there, none here" in messages[2]


def train_at_once(world: World, folder: Path) -> str:
    """A checkpoint at the first step, when AdamW's state is one step old."""
    with open_run(toy_config(folder, max_steps=1), "ar", world) as run:
        return train(run, ToyPhase()).status


def test_nothing_is_pickled(one_process: ProcessGroup, finished: Path, tmp_path: Path) -> None:
    assert one_process.run(train_at_once, tmp_path) == ["finished"]
    files = [path for folder in (finished, tmp_path) for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".json", ".jsonl", ".yaml", ".safetensors", ""}


def test_what_a_cut_off_save_left_goes_with_the_next_one(two_processes: ProcessGroup, finished: Path, copy: Path) -> None:
    unfinish(copy)
    torn = checkpoints(copy)[0].parent / ".step-00000137.tmp"
    torn.mkdir()
    two_processes.run(run_with, copy, 3, "float32", SETTINGS)
    assert not torn.exists()
    assert_identical(copy, finished)
