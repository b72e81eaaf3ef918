"""SIGKILL at any moment, saves included, and a disk that fills up: the run resumes and ends with the same weights."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import ProcessGroup
from tests.test_loop import assert_identical, run_with, toy_settings
from tests.test_telemetry import drawn_steps
from tests.toy_phase import ToyPhase, toy_config
from training.runtime import checkpoint
from training.runtime.checkpoint import CheckpointError, steps_in
from training.runtime.distributed import World, start
from training.runtime.loop import Trainer, train
from training.runtime.run import RunConflict, open_run

ROUNDS = 20
SETTINGS = toy_settings(max_steps=100, checkpoint_every=1, keep_checkpoints=3, ema=0.9, log_every=10)
ALONE = World(0, 1, 0, torch.device("cpu"))


def train_and_report(folder: Path, pipe: Connection) -> None:
    """A process of its own: says when the first batch is made, and how the run ended."""
    config, phase = toy_config(folder, **SETTINGS), ToyPhase()
    config.telemetry.loggers = ["tensorboard"]
    world = start(config.deepspeed)
    torch.set_num_threads(1)
    told: list[int] = []

    def tell(numbers: list[int]) -> None:
        if not told:
            told.extend(numbers)
            pipe.send("training")

    phase.before_collate = tell
    with open_run(config, "ar", world) as run:
        pipe.send(train(run, phase).status)


def run_for(context: ForkServerContext, folder: Path, seconds: float | None) -> str:
    """Continue the run in ``folder`` and kill it ``seconds`` after its first batch (None: never); how it ended."""
    ours, theirs = context.Pipe()
    process = context.Process(target=train_and_report, args=(folder, theirs))
    process.start()
    theirs.close()
    ended = ours.recv()
    if ended == "training":  # a run that the last kill found finished has no batch to make
        if seconds is None:
            ended = ours.recv()
        else:
            time.sleep(seconds)
            process.kill()
    process.join()
    return "killed" if process.exitcode == -signal.SIGKILL else "finished" if ended == "training" else str(ended)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_random_moments_loses_nothing(one_process: ProcessGroup, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    one_process.run(run_with, whole, 3, "float32", SETTINGS)
    context = multiprocessing.get_context("forkserver")  # children start from a process that has imported everything
    context.set_forkserver_preload(["tests.test_kill", "deepspeed"])
    moments, steps, kills, run = random.Random(0), [0], 0, tmp_path / "run-0"
    while kills < ROUNDS:
        if run_for(context, run, moments.uniform(0.0, 0.4)) == "finished":  # a fast machine: kill another run
            assert_identical(run, whole)
            run, steps = tmp_path / f"run-{kills}", [0]
            continue
        kills += 1
        found = checkpoint.find(run / "toy" / "checkpoints" / "ar", ALONE)
        steps.append(int(found.name.removeprefix("step-")) if found else 0)
        assert steps == sorted(steps)
    assert run_for(context, run, None) == "finished"
    assert_identical(run, whole)
    assert drawn_steps(run / "toy" / "tensorboard" / "ar")["1 losses/ar/loss"] == list(range(10, 101, 10))


BACKGROUND = toy_settings(max_steps=8, checkpoint_every=2, ema=0.9, log_every=1, checkpoint_in_background=True)


def train_beside_a_slow_disk(folder: Path, pipe: Connection) -> None:
    """A process of its own: the disk takes the files of step 4 for ever; says when two steps more are made."""
    config, phase, write = toy_config(folder, **BACKGROUND), ToyPhase(), checkpoint.write_tensors
    world = start(config.deepspeed)

    def slow(tensors: Any, path: Path, metadata: Any) -> dict[str, Any]:
        if "00000004" in path.parent.name and "exp_avg" in path.name:
            time.sleep(3600)
        return write(tensors, path, metadata)

    advance = Trainer.advance

    def told(trainer: Trainer, *arguments: Any) -> None:
        advance(trainer, *arguments)
        if trainer.progress.step == 5:
            pipe.send("training")

    checkpoint.write_tensors, Trainer.advance = slow, told  # type: ignore[method-assign]
    with open_run(config, "ar", world) as run:
        train(run, phase)


def test_a_kill_while_a_checkpoint_is_written_in_the_background(one_process: ProcessGroup, tmp_path: Path) -> None:
    """The last whole one is there, and the training that goes on from it ends as one that was left alone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train_beside_a_slow_disk, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "training"
    process.kill()
    process.join()
    folder = tmp_path / "run" / "toy" / "checkpoints" / "ar"
    assert [path.name for path in steps_in(folder)] == ["step-00000002"] and list(folder.glob(".step-00000004.tmp/*"))
    one_process.run(run_with, tmp_path / "run", 3, "float32", BACKGROUND)
    one_process.run(run_with, tmp_path / "whole", 3, "float32", {**BACKGROUND, "checkpoint_in_background": False})
    assert_identical(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 1 MiB; skips where this machine does not let us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def train_on_full_disk(world: World, folder: Path) -> str:
    """Fill the disk while step 4 is collated; the checkpoint of that step then has no room."""
    phase = ToyPhase()

    def fill(numbers: list[int]) -> None:
        if 24 in numbers:
            with (folder / "ballast").open("wb") as file:
                for size in (1 << 14, 1 << 10):
                    try:
                        while True:
                            file.write(bytes(size))
                            file.flush()
                    except OSError:
                        continue

    phase.before_collate = fill
    try:
        with open_run(toy_config(folder, checkpoint_every=3, log_every=100), "ar", world) as run:
            train(run, phase)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """Makes the folder of checkpoints read-only, even for root, and writable again; skips where mounting is not permitted."""
    folder = str(tmp_path / "run" / "toy" / "checkpoints" / "ar")

    def seal(closed: bool) -> None:
        commands = [["--bind", folder, folder], ["-o", "remount,bind,ro", folder]] if closed else []
        for arguments in commands:
            subprocess.run(["mount", *arguments], check=True, capture_output=True)
        if not closed:
            subprocess.run(["umount", folder], check=False, capture_output=True)

    Path(folder).mkdir(parents=True)
    try:
        seal(True)
    except subprocess.CalledProcessError:
        pytest.skip("mounting is not permitted here")
    seal(False)
    yield seal
    seal(False)


def test_a_folder_that_becomes_unwritable(one_process: ProcessGroup, sealed: Callable[[bool], None], tmp_path: Path) -> None:
    settings = toy_settings(checkpoint_every=3)
    one_process.run(run_with, tmp_path / "run", 3, "float32", settings, 24)  # stops in step 4 or before
    before = [path.name for path in steps_in(tmp_path / "run" / "toy" / "checkpoints" / "ar")]
    sealed(True)
    message = one_process.run(expect_unwritable, tmp_path / "run", settings)[0]
    assert "could not be written" in message and "Read-only" in message and "permissions" in message
    sealed(False)
    assert [path.name for path in steps_in(tmp_path / "run" / "toy" / "checkpoints" / "ar")] == before != []
    one_process.run(run_with, tmp_path / "run", 3, "float32", settings)
    one_process.run(run_with, tmp_path / "whole", 3, "float32", settings)
    assert_identical(tmp_path / "run", tmp_path / "whole")


def expect_unwritable(world: World, folder: Path, settings: dict[str, Any]) -> str:
    try:
        run_with(world, folder, 3, "float32", settings)
    except (CheckpointError, RunConflict) as error:
        return str(error)
    return ""


def test_a_run_folder_that_cannot_be_made_is_refused_on_all_ranks(two_processes: ProcessGroup, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in two_processes.run(expect_unwritable, tmp_path / "file", {}):
        assert "cannot be written" in message and "choose another run.folder" in message


def test_a_really_full_disk(one_process: ProcessGroup, small_disk: Path, tmp_path: Path) -> None:
    settings = toy_settings(checkpoint_every=3, log_every=100)
    message = one_process.run(train_on_full_disk, small_disk)[0]
    assert "could not be written" in message and "No space left" in message
    checkpoints = steps_in(small_disk / "toy" / "checkpoints" / "ar")
    assert [path.name for path in checkpoints] in (["step-00000003"], [])
    (small_disk / "ballast").unlink()
    time.sleep(0.1)
    one_process.run(run_with, small_disk, 3, "float32", settings)
    one_process.run(run_with, tmp_path / "whole", 3, "float32", settings)
    assert_identical(small_disk, tmp_path / "whole")
