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

from ladir.data.latent_parts import join_parts, write_part
from ladir.data.latents import LatentForm
from ladir.models.folders import save_denoiser
from ladir.models.store import folder_fingerprint
from ladir.report.status import STOPPED
from tests.distributed import ProcessGroup
from tests.test_loop import assert_identical, run_with, toy_settings
from tests.tiny import tiny_denoiser, tiny_lm
from tests.toy_phase import ToyPhase, toy_config
from training.runtime import files
from training.runtime.alarm import Alarm
from training.runtime.alone import GiveWay, alone, apart
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.preemption import BrokenOff, StopRequest
from training.runtime.run import Run, RunFolder, open_run
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


def test_work_without_pieces_is_left_to_itself_where_a_stop_is_asked_for() -> None:
    """Else what it returns, or raises, comes back; it sees what the run around it has set."""
    with files.digests_kept():
        assert apart(files._known.get, lambda: None) is files._known.get() is not None
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0, lambda: None)
    released, stop = threading.Event(), StopRequest("USR2")

    def work() -> None:
        stop.requested = True
        released.wait()

    with pytest.raises(BrokenOff):
        apart(work, stop.give_way)
    released.set()


def met_while_a_model_is_loaded(world: World) -> bool:
    """Transformers change the default dtype of the whole process while they build a model; here rank 1 is left doing so."""
    with StopRequest("USR2") as stop:
        alarm = Alarm(world, stop)
        stop.requested = bool(world.rank)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if world.rank else before)
        try:
            return alarm.meet()
        finally:
            torch.set_default_dtype(before)


@pytest.mark.distributed
def test_ranks_meet_while_one_is_left_building_a_model(two_processes: ProcessGroup) -> None:
    assert two_processes.run(met_while_a_model_is_loaded) == [True, True]


class SamplingPhase(ToyPhase):
    """Shows samples that take a hundred passes on all ranks; the last rank is asked to stop at its third.

    ``gathered``: every pass needs all ranks.  Counts passes, and sums over the ranks while they are made.
    """

    def __init__(self, world: World, gathered: bool, stop_at: int | None = 3) -> None:
        super().__init__()
        self.world, self.gathered, self.stop_at = world, gathered, stop_at
        self.passes = self.sums = 0

    def on_validate(self, model: Any, telemetry: Any, step: int) -> None:
        with telemetry.passes(self.gathered) as give_way, pytest.MonkeyPatch.context() as patch:
            summed = World.sum
            patch.setattr(World, "sum", lambda *about: self._count() or summed(*about))
            for _ in range(100):
                if self.gathered:
                    self.world.barrier()
                else:
                    time.sleep(0.03 * (1 + self.world.rank) if self.stop_at else 0.0)  # each at its own pace
                self.passes += 1
                if self.passes == self.stop_at and self.world.rank == 1:
                    os.kill(os.getpid(), signal.SIGUSR2)
                give_way()

    def _count(self) -> None:
        self.sums += 1


def in_sampling(
    world: World, folder: Path, settings: dict[str, Any], gathered: bool, stop_at: int | None = 3
) -> tuple[str, int, int, int]:
    phase = SamplingPhase(world, gathered, stop_at)
    with open_run(toy_config(folder, **settings), "ar", world) as run:
        outcome = train(run, phase)
    return outcome.status, outcome.steps, phase.passes, phase.sums


@pytest.mark.parametrize("gathered", [False, True])
def test_a_stop_is_obeyed_between_two_passes_of_sampling(two_processes: ProcessGroup, tmp_path: Path, gathered: bool) -> None:
    """On all ranks, of which one was asked: behind the same pass where passes need all of them, else where each hears of it."""
    settings = toy_settings(validate_every=3)
    (*first, passes, _), (*second, at, _) = two_processes.run(in_sampling, tmp_path / "parts", settings, gathered)
    assert first == second == ["interrupted", 3] and at == 3 and (passes == 3 if gathered else passes < 100)
    two_processes.run(run_with, tmp_path / "parts", 3, "float32", settings)
    two_processes.run(run_with, tmp_path / "whole", 3, "float32", settings)
    assert_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("gathered", [False, True])
def test_ranks_ask_one_another_after_passes_that_need_all_of_them_alone(
    two_processes: ProcessGroup, tmp_path: Path, gathered: bool
) -> None:
    settings = toy_settings(validate_every=None, max_steps=1)
    for status, steps, passes, sums in two_processes.run(in_sampling, tmp_path, settings, gathered, None):
        assert (status, steps) == ("finished", 1) and passes >= 100 and sums == (passes if gathered else 0)


def test_a_stop_is_obeyed_while_a_models_weights_are_hashed(tmp_path: Path) -> None:
    save_denoiser(tiny_denoiser(tiny_lm()), tmp_path / "denoiser")
    stop = StopRequest("USR2")
    world, model = World(0, 1, 0, torch.device("cpu")), tmp_path / "denoiser"
    found = {fingerprint(world, asked, model, "denoiser") for asked in (stop, None)}
    assert found == {folder_fingerprint(model, "denoiser")}
    stop.requested = True
    with pytest.raises(BrokenOff):
        fingerprint(world, stop, model, "denoiser")


def slow_digest(path: Path, give_way: GiveWay) -> str:
    """Of a file so large that a signal comes meanwhile."""
    for _ in range(2000):
        give_way()
        time.sleep(0.01)
    return "00"


def begin(world: World, folder: Path, signalled: int | None) -> bool:
    """Open a run on a data file; rank ``signalled`` is asked to stop as rank 0 begins to hash it.  Whether that broke it off."""
    config = toy_config(folder)
    config.data.train = str(folder / "train.jsonl")
    occupy = Run.occupy

    def then_signalled(run: Run) -> None:
        occupy(run)
        if world.rank == signalled:
            os.kill(os.getpid(), signal.SIGUSR2)

    with pytest.MonkeyPatch.context() as patch:
        if signalled is not None:
            patch.setattr(files, "sha256", slow_digest)
        patch.setattr(Run, "occupy", then_signalled)
        try:
            with open_run(config, "ar", world):
                return False
        except BrokenOff:
            return True


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_stop_is_obeyed_while_what_a_phase_is_begun_on_is_hashed(
    two_processes: ProcessGroup, signalled: int, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text("1\n")
    folder = RunFolder(toy_config(tmp_path))
    assert two_processes.run(begin, tmp_path, signalled) == [True, True]
    assert folder.interrupted.is_file() and not folder.config("ar").exists() and not folder.inputs("ar").exists()
    assert files.read_json(folder.status())["state"] == STOPPED
    assert two_processes.run(begin, tmp_path, None) == [False, False]
    assert not folder.interrupted.exists() and folder.inputs("ar").is_file()


def test_who_waits_for_the_run_folder_can_be_stopped_and_leaves_the_others_marks(tmp_path: Path) -> None:
    config, world = toy_config(tmp_path), World(0, 1, 0, torch.device("cpu"))
    with open_run(config, "ar", world) as first:
        second = Run(config, "ar", world)
        second.stop.requested = True
        with pytest.raises(BrokenOff):
            second.occupy()
        second.interrupt()
        assert not first.folder.interrupted.exists()


def test_a_file_that_stays_as_it_is_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "weights", []
    sha256 = files.sha256

    def counted(path: Path, give_way: GiveWay | None = None) -> str:
        read.append(path)
        return sha256(path, give_way)

    monkeypatch.setattr(files, "sha256", counted)
    file.write_text("one")
    with files.digests_kept():
        assert files.known_sha256(file) == files.known_sha256(file) == sha256(file)
        assert len(read) == 2  # written just now, it might be written again unseen
        monkeypatch.setattr(files, "_SETTLED_SECONDS", -60.0)
        assert files.known_sha256(file) == files.known_sha256(file) == sha256(file)
        assert len(read) == 3
        file.write_text("another")
        assert files.known_sha256(file) == sha256(file)
    for _ in range(2):  # a run begins with none, and outside of one nothing is kept
        with files.digests_kept():
            assert files.known_sha256(file) == sha256(file)
        assert files.known_sha256(file) == sha256(file)
    assert len(read) == 4 + 4


def test_a_stop_between_two_files_or_parts_leaves_what_can_be_gone_on_with(tmp_path: Path) -> None:
    form = LatentForm(1, 1, "float32", logvar=False)
    parts = tmp_path / "parts"
    for first in range(3):
        write_part(parts, first, [{"question": [1], "blocks": [[1]], "answer": [1], "mu": [0.5]}], "vae", form)
    asked = 0

    def at_the_second() -> None:
        nonlocal asked
        asked += 1
        if asked % 2 == 0:
            raise BrokenOff

    before = sorted(parts.iterdir())
    with pytest.raises(BrokenOff):
        join_parts(parts, range(3), tmp_path / "joined", at_the_second)
    assert sorted(parts.iterdir()) == before and not (tmp_path / "joined").exists()
    with pytest.raises(BrokenOff):
        files.remove_folder(parts, at_the_second)
    assert len(list(parts.iterdir())) == len(before) - 1
    files.remove_folder(parts, lambda: None)
    assert not parts.exists()
