"""Rank 0's own work, and sampling on all ranks: a stop that any rank is asked for breaks them off."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ladir.models.folders import save_denoiser
from ladir.models.store import folder_fingerprint
from tests.distributed import ProcessGroup
from tests.test_loop import assert_identical, run_with, toy_settings
from tests.tiny import tiny_denoiser, tiny_lm
from tests.toy_phase import ToyPhase, toy_config
from training.runtime.alarm import Alarm
from training.runtime.alone import GiveWay, alone
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.preemption import BrokenOff, StopRequest
from training.runtime.run import Outcome, open_run
from training.runtime.stages import fingerprint


def work_alone(world: World, signalled: int | None) -> tuple[Any, Any, bool]:
    """Rank ``signalled`` is asked to stop while rank 0 works; then undisturbed work; whether this rank has worked itself."""
    worked: list[int] = []

    def work(give_way: GiveWay) -> str:
        worked.append(1)
        for _ in range(2000):
            give_way()
            if signalled is None:
                break
            time.sleep(0.01)
        return "done"

    with StopRequest("USR2") as stop:
        if world.rank == signalled:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        first = alone(world, stop, work)
        stop.requested = False
        signalled = None
        return first, alone(world, stop, work), bool(worked)


@pytest.mark.parametrize("signalled", [0, 1, None])
def test_rank_0_works_alone_and_any_rank_can_break_it_off(two_processes: ProcessGroup, signalled: int | None) -> None:
    first = "done" if signalled is None else None
    assert two_processes.run(work_alone, signalled) == [(first, "done", True), (first, "done", False)]


def meet_early(world: World, signalled: int | None) -> tuple[bool, bool]:
    """Rank 1 waits for rank 0, which works on until it hears of a stop; whether it did, and what all agree on."""
    broken_off = False
    with StopRequest("USR2") as stop:
        alarm = Alarm(world, stop)
        if world.rank == signalled:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        for _ in range(0 if world.rank else 3000 if signalled is not None else 30):
            try:
                alarm.give_way()
            except BrokenOff:
                broken_off = True
                break
            time.sleep(0.01)
        return broken_off, alarm.meet()


@pytest.mark.parametrize("signalled", [0, 1, None])
def test_who_waits_for_the_others_tells_them_that_it_was_asked_to_stop(
    two_processes: ProcessGroup, signalled: int | None
) -> None:
    stopped = signalled is not None
    assert two_processes.run(meet_early, signalled) == [(stopped, stopped), (False, stopped)]


def lose_one(world: World) -> None:
    """Rank 1 dies while rank 0 waits for it."""
    if world.rank:
        time.sleep(0.2)
        os._exit(1)
    world.meet(lambda: None)


def test_who_waits_for_a_rank_that_dies_does_not_wait_for_ever() -> None:
    group = ProcessGroup()
    (_, first), (_, second) = group.outcomes(lose_one, timeout=60)
    group.close()
    assert second == "the process died" and first is not None and "gloo" in first


class SamplingPhase(ToyPhase):
    """Shows samples that take a hundred passes on all ranks; the last rank is asked to stop at its third."""

    passes = 0
    stop_at = 3

    def on_validate(self, model: Any, telemetry: Any, step: int) -> None:
        for _ in range(100):
            self.passes += 1
            if self.passes == self.stop_at and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR2)
            telemetry.give_way()


def stopped_in_sampling(world: World, folder: Path, settings: dict[str, Any]) -> tuple[Outcome, int]:
    phase = SamplingPhase()
    with open_run(toy_config(folder, **settings), "ar", world) as run:
        return train(run, phase), phase.passes


def test_a_stop_is_obeyed_between_two_passes_of_sampling(two_processes: ProcessGroup, tmp_path: Path) -> None:
    settings = toy_settings(validate_every=3)
    for outcome, passes in two_processes.run(stopped_in_sampling, tmp_path / "parts", settings):
        assert (outcome.status, outcome.steps) == ("interrupted", 3) and passes <= SamplingPhase.stop_at + 1
    two_processes.run(run_with, tmp_path / "parts", 3, "float32", settings)
    two_processes.run(run_with, tmp_path / "whole", 3, "float32", settings)
    assert_identical(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_is_obeyed_while_a_models_weights_are_hashed(tmp_path: Path) -> None:
    save_denoiser(tiny_denoiser(tiny_lm()), tmp_path / "denoiser")
    stop = StopRequest("USR2")
    world, model = World(0, 1, 0, torch.device("cpu")), tmp_path / "denoiser"
    found = {fingerprint(world, asked, model, "denoiser") for asked in (stop, None)}
    assert found == {folder_fingerprint(model, "denoiser")}
    stop.requested = True
    with pytest.raises(BrokenOff):
        fingerprint(world, stop, model, "denoiser")
