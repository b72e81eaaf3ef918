"""``python -m ladir status`` beside real trainings that run, are stopped, killed and started again; slow ranks; traces."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ladir.__main__ import main
from ladir.config.loader import ConfigError, load_config
from ladir.errors import UnusableError
from ladir.files import is_locked
from ladir.report.status import (
    CRASHED,
    FAILED,
    FINISHED,
    RUNNING,
    SILENT,
    STOPPED,
    JobStatus,
    Queue,
    duration,
    lines,
    news,
    read_status,
)
from tests.distributed import ProcessGroup
from tests.toy_phase import ToyBatch, ToyModel, ToyPhase, toy_config
from training.runtime.distributed import World, start
from training.runtime.files import try_lock, write_json
from training.runtime.loop import train
from training.runtime.ranks import RankWatch, Slowest, seconds_for_the_same, slowest_rank
from training.runtime.run import RunConflict, open_run
from training.runtime.status import Pace, Status, say

ALONE = World(0, 1, 0, torch.device("cpu"))


def words_said(patch: pytest.MonkeyPatch) -> list[str]:
    """What every status says from now on."""
    said, say = [], Status.say

    def heard(status: Status, doing: str | None = None, /, **facts: Any) -> None:
        said.append(doing or "")
        say(status, doing, **facts)

    patch.setattr(Status, "say", heard)
    return said


def train_toy(world: World, folder: Path, phase: ToyPhase, profile: list[int] | None = None, **settings: Any) -> None:
    config = toy_config(folder, **settings)
    config.telemetry.status_every_seconds = 0.02
    config.telemetry.profile_steps = profile or []
    with open_run(config, "ar", world) as run:
        train(run, phase)


def train_for_long(folder: Path, checkpoint_every: int = 2, slurm: bool = False, fails: bool = False) -> None:
    """A process of its own, Slurm's job 7 perhaps, which makes a step every hundredth of a second."""
    phase = ToyPhase()

    def wait(numbers: list[int]) -> None:
        if fails:
            raise RuntimeError("this training fails")
        time.sleep(0.01)

    phase.before_collate = wait
    if slurm:
        os.environ["SLURM_JOB_ID"] = "7"
    config = toy_config(folder)
    train_toy(start(config.deepspeed), folder, phase, max_steps=100_000, checkpoint_every=checkpoint_every)


def forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_status", "deepspeed"])
    return context


def until_it_trains(folder: Path, process: multiprocessing.process.BaseProcess) -> JobStatus:
    while process.is_alive():
        with suppress(UnusableError):
            (job,) = read_status(folder).jobs
            if job.facts["process"] == process.pid and job.facts.get("seconds_left") and job.facts.get("checkpoint_step"):
                return job
        time.sleep(0.2)
    pytest.fail("the training has ended")


def test_a_training_runs_is_killed_started_again_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "toy"
    context = forkserver()
    for number, (end, state, status) in enumerate(((signal.SIGKILL, CRASHED, 1), (signal.SIGTERM, STOPPED, 0))):
        process = context.Process(target=train_for_long, args=(tmp_path,))
        process.start()
        try:
            job = until_it_trains(folder, process)
            assert (job.state, job.facts["phase"]) == (RUNNING, "ar")
            assert 0 < job.facts["fraction"] < 1 and job.facts["loss"] > 0 and abs(job.facts["total_steps"] - 100_000) <= 1
            assert main(["status", str(folder)]) == 0
            shown = capsys.readouterr().out
            for words in ("ar is running", "ETA", "loss", "tokens/s", "MFU", "data wait", "GiB", "now: ", "last checkpoint:"):
                assert words in shown
            assert ("restarts: 1" in shown) == (number == 1)
            assert process.pid is not None
            os.kill(process.pid, end)
            process.join()
        finally:
            process.kill()
        assert read_status(folder).jobs[0].state == state
        assert main(["status", str(folder)]) == status
        shown = capsys.readouterr().out
        assert ("CRASHED" if number == 0 else "stopped") in shown and "ETA" not in shown


class Watch:
    """``status --watch`` as a process that writes into a file or to a terminal, and what it has written."""

    def __init__(self, folder: Path, file: Path | None) -> None:
        self._file, self._shown, self._told = file, bytearray(), 0
        command = [sys.executable, "-m", "ladir", "status", str(folder), "--watch", "0.05"]
        if file is None:
            self._terminal, output = pty.openpty()
            threading.Thread(target=self._read, daemon=True).start()
        else:
            output = os.open(file, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TERM": "xterm"})
        os.close(output)

    def _read(self) -> None:
        with suppress(OSError):  # nobody writes to the terminal any more
            while part := os.read(self._terminal, 4096):
                self._shown += part

    @property
    def shown(self) -> str:
        return self._file.read_text() if self._file else self._shown.decode(errors="replace")

    def until(self, words: str) -> None:
        """Wait until it has written ``words``, behind those that it was waited for before."""
        while (place := self.shown.find(words, self._told)) < 0:
            if self.process.poll() is not None and words not in self.shown[self._told :]:
                pytest.fail(f"{words!r} never came: {self.shown}")
            time.sleep(0.02)
        self._told = place + len(words)


def test_watches_in_a_file_and_on_a_terminal_beside_a_real_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "toy"
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm" / "jobs").write_text("7 train_ar\n")
    stub_squeue(tmp_path, monkeypatch, "7 PD Priority")
    watches = [Watch(folder, tmp_path / "watched"), Watch(folder, None)]
    for watch in watches:
        watch.until("waits in the queue: job 7 train_ar (Priority)")
    for end, words in ((signal.SIGKILL, "has CRASHED"), (signal.SIGTERM, "was stopped"), (None, "has FAILED")):
        arguments = (tmp_path, 30, True, end is None)
        process = forkserver().Process(target=train_for_long, args=arguments)
        process.start()
        try:
            if end is not None:
                for watch in watches:
                    watch.until("is running")
                until_it_trains(folder, process)
                os.kill(process.pid or 0, end)
            process.join()
        finally:
            process.kill()
        for watch in watches:
            watch.until(words)
    assert [watch.process.wait() for watch in watches] == [1, 1]
    told = [re.findall(r"(?:is|was|has) \w+|\d+ %|checkpoint: step \S+", line) for line in watches[0].shown.splitlines()]
    assert all(line != after for line, after in pairwise(told)) and "has FAILED" in told[-1]


def train_to_the_end(world: World, folder: Path) -> list[str]:
    """What the status says meanwhile."""
    phase, seen = ToyPhase(), []

    def look(numbers: list[int]) -> None:
        seen.append(read_status(folder / "toy").jobs[0].state)

    phase.before_collate = look
    train_toy(world, folder, phase, profile=[2, 3])
    return seen


def test_a_training_that_ends_and_the_trace_of_its_steps(one_process: ProcessGroup, tmp_path: Path) -> None:
    (seen,) = one_process.run(train_to_the_end, tmp_path)
    assert set(seen) == {RUNNING}
    status = read_status(tmp_path / "toy")
    (job,) = status.jobs
    assert (job.state, job.facts["step"], job.facts["seconds_left"], status.finished) == (FINISHED, 6, 0.0, ["ar (6 steps)"])
    assert "ar has finished, step 6 of about 6, 100 %" in lines(status)[0]
    (trace,) = (tmp_path / "toy" / "profile" / "ar").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert trace.name == "rank-00000.json.gz" and any(event.get("name") == "aten::linear" for event in events)


def fail(world: World, folder: Path) -> None:
    try:
        train_toy(world, folder, ToyPhase(poison=9))
    except RuntimeError:
        return


def test_a_training_that_fails_says_why(one_process: ProcessGroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_process.run(fail, tmp_path)
    assert read_status(tmp_path / "toy").jobs[0].state == FAILED
    assert main(["status", str(tmp_path / "toy")]) == 1
    assert "NonFiniteError: phase ar, step 2: not finite: loss on rank 0" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose status says that it is running."""
    with Status("vae", 1, tmp_path / "status.json") as status:
        status.say("step 4: forward and backward", step=3, fraction=0.25, seconds_left=90.0)
    facts = json.loads((tmp_path / "status.json").read_text())
    write_json(tmp_path / "status.json", {**facts, "state": RUNNING, "doing": "step 4"})
    return tmp_path


def test_where_locks_are_unknown_age_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_status(folder).jobs[0].state == CRASHED
    held = try_lock(folder / ".lock", "us")
    assert held is not None and is_locked(folder / ".lock") is True
    assert read_status(folder).jobs[0].state == RUNNING
    held.close()
    monkeypatch.setattr("ladir.report.status.is_locked", lambda path: None)
    assert read_status(folder).jobs[0].state == RUNNING
    facts = json.loads((folder / "status.json").read_text())
    write_json(folder / "status.json", {**facts, "written": facts["written"] - 3600})
    (job,) = read_status(folder).jobs
    assert job.state == SILENT and "last seen, 1:00:0" in "\n".join(lines(read_status(folder)))


def test_jobs_in_the_queue(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "slurm").mkdir()
    (folder / "slurm" / "jobs").write_text("7 train_vae\n8 train_denoiser stage=rollout\n")
    asked = stub_squeue(tmp_path, monkeypatch, "7 R None", "8 PD Dependency")
    status = read_status(folder)
    assert "--jobs=7,8" in asked.read_text()
    queued = ["waits in the queue: job 8 train_denoiser stage=rollout (Dependency)", "begins: job 7 train_vae"]
    assert lines(status)[-2:] == queued and not status.is_over
    (folder / "status.json").unlink()
    assert [line for _, _, line in news(read_status(folder))] == ["; ".join(queued)]


def stub_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> Path:
    """A ``squeue`` that answers so; the file in which it writes how it was called, a line each time."""
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text('#!/bin/sh\necho "$@" >> "${0%/*}/asked"\n' + "".join(f'echo "{row}"\n' for row in rows))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=os.pathsep)
    return squeue.parent / "asked"


def test_the_queue_is_asked_once_a_minute(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((folder / "status.json").read_text())
    write_json(folder / "status.json", {**facts, "job": "7", "state": STOPPED})
    asked, times = stub_squeue(tmp_path, monkeypatch, "7 PD Priority"), iter((0.0, 0.0, 2.0, 59.0, 61.0, 61.0))
    queue = Queue(lambda: next(times))
    for _ in range(4):
        assert read_status(folder, queue).queued == ["job 7 vae (Priority)"]
    assert len(asked.read_text().splitlines()) == 2


def test_watching_into_a_file_writes_what_is_new_and_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((folder / "status.json").read_text())
    changes = iter(({"step": 4, "doing": "step 5", "fraction": 0.254}, {"fraction": 0.26}, {"state": FINISHED, "doing": ""}))

    def sleep(_: float) -> None:
        facts.update(next(changes))
        write_json(folder / "status.json", facts)

    monkeypatch.setattr("ladir.cli.status.time.sleep", sleep)
    assert main(["status", str(folder), "--watch", "1"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert "vae has CRASHED" in first and "step 3, 25 %, step 4" in first and "26 %, step 5" in second
    assert last.endswith("vae has finished, step 4, 26 %")


@pytest.mark.parametrize("watch", [[], ["--watch", "1"]])
def test_jobs_that_were_cancelled_before_they_began_are_said_to_be_gone(
    watch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "run" / "slurm" / "jobs"
    jobs.parent.mkdir(parents=True)
    jobs.write_text("7 train_ar\n8 evaluate\n")
    command = ["status", str(tmp_path / "run"), *watch]
    squeue = stub_squeue(tmp_path, monkeypatch).with_name("squeue")
    assert main(command) == 0
    (told,) = capsys.readouterr().out.splitlines()
    assert "none of the jobs that were submitted has begun" in told
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert main(command) == 1
    assert "squeue does not answer: ask again" in capsys.readouterr().err


def test_a_queue_that_once_does_not_answer_still_has_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch goes on, before the first job begins as well."""
    jobs = tmp_path / "run" / "slurm" / "jobs"
    jobs.parent.mkdir(parents=True)
    jobs.write_text("7 train_ar\n8 evaluate\n")
    squeue = stub_squeue(tmp_path, monkeypatch, "7 PD Priority").with_name("squeue")
    queue = Queue(count(0, 100).__next__)  # a minute later at every look
    assert read_status(tmp_path / "run", queue).queued == ["job 7 train_ar (Priority)"]
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert read_status(tmp_path / "run", queue).queued == ["job 7 train_ar (Priority)"] and queue.is_silent


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "none")]) == 1
    assert "no job has left a status.json there" in capsys.readouterr().err


def test_the_end_is_foreseen_from_the_pace_since_the_start() -> None:
    clock = iter((100.0, 110.0, 120.0, 130.0))
    pace = Pace(lambda: next(clock))
    assert [pace.seconds_left(fraction) for fraction in (0.5, 0.5, 0.6, 1.0)] == [None, None, pytest.approx(80.0), 0.0]
    assert duration(3725.4) == "1:02:05"


def test_a_disk_that_is_full_costs_the_status_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with Status("vae", 1, tmp_path / "file" / "status.json") as status:
        status.say("step 1")
    assert "cannot be written" in caplog.text


def test_from_its_lock_on_a_job_is_what_the_status_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path)
    config.telemetry.status_every_seconds = 0.02
    with open_run(config, "vae", ALONE):
        pass
    seen = []

    def look(*about: object) -> dict[str, str]:
        while not (facts := read_status(tmp_path / "toy").jobs[0].facts)["doing"].startswith("looking at"):
            time.sleep(0.01)
        seen.append((facts["phase"], facts["state"]))
        return {}

    monkeypatch.setattr("training.runtime.run.input_digests", look)
    with open_run(config, "ar", ALONE) as run:
        run.folder.checkpoints("ar").mkdir(parents=True)
    config.ar.train.lr = 3.0
    with pytest.raises(RunConflict), open_run(config, "ar", ALONE):
        pass
    (job,) = read_status(tmp_path / "toy").jobs
    assert seen == [("ar", RUNNING)] * 2 and job.state == FAILED and "ar.train.lr" in job.facts["message"]


class Slow(nn.Linear):
    """A linear layer whose products take ``seconds``, or what comes behind them."""

    seconds = 0.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(inputs)


def watch_ranks(world: World, sharded: bool) -> tuple[list[dict[str, float]], list[dict[str, str]], list[str]]:
    layer, watch, said = Slow(8, 8), RankWatch(world, 1.3, sharded), []
    layer.seconds = 0.03 if world.rank == 1 else 0.001
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("training.runtime.ranks").addHandler(handler)
    rows = []
    for _ in range(4):
        watch.waited(0.5 * world.rank)
        with watch.timed(layer, "gold", 2):
            layer(torch.zeros(2, 8))
        rows.append(watch.figures(1.0 + world.rank, 2.0, {"gold": 64.0 + 640 * world.rank}))  # mostly padding at first
    logging.getLogger("training.runtime.ranks").removeHandler(handler)
    return [row[0] for row in rows], [row[1] for row in rows], said


@pytest.mark.parametrize("sharded", [True, False])
def test_the_slow_rank_has_a_name(sharded: bool, two_processes: ProcessGroup) -> None:
    (figures, names, said), (_, _, others) = two_processes.run(watch_ranks, sharded)
    for row, named in zip(figures, names, strict=True):
        assert (row["rank_slowest"], row["memory_gib"], row["memory_rank"], row["data_wait_worst"]) == (1.0, 2.0, 1.0, 0.25)
        assert (
            row["rank_slowdown"] > 1.3 and named["slow_rank"].startswith("rank 1 (") and named["memory_rank"].startswith("rank 1")
        )
        assert named["data_wait_rank"].startswith("rank 1 (")
    assert len(said) == 1 and "rank 1 (" in said[0] and "is slow" in said[0] and not others
    assert ("matrix products" if sharded else "forward passes") in said[0]


class SlowPasses(ToyModel):
    """Its passes take long outside of its layers."""

    def forward(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        time.sleep(0.2)
        return super().forward(batch)


def train_with_a_slow_rank(world: World, folder: Path, stage: int) -> list[str]:
    phase, said = ToyPhase(), list[str]()
    if world.rank == 1:
        phase.model.__class__ = SlowPasses
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("training.runtime.ranks").addHandler(handler)
    config = toy_config(folder, stage, max_steps=8)
    config.telemetry.loggers = ["tensorboard"]
    with open_run(config, "ar", world) as run:
        train(run, phase)
    logging.getLogger("training.runtime.ranks").removeHandler(handler)
    return said


@pytest.mark.parametrize("stage", [0, 2])
def test_the_slow_rank_of_a_training_is_named_in_log_record_board_and_status(
    stage: int, two_processes: ProcessGroup, tmp_path: Path
) -> None:
    """Both ranks' steps take equally long: one waits for the other in the collectives."""
    said, _ = two_processes.run(train_with_a_slow_rank, tmp_path, stage)
    run = tmp_path / "toy"
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "rank_slowest" in row]
    assert rows and {row["rank_slowest"] for row in rows} == {1.0} and min(row["rank_slowdown"] for row in rows) > 1.3
    assert len([line for line in said if line.startswith("rank 1 (") and "forward passes" in line]) == 1
    events = EventAccumulator(str(run / "tensorboard" / "ar")).Reload()
    assert {event.value for event in events.Scalars("5 speed/ar/rank_slowest")} == {1.0}
    assert any(line.startswith("  slowest: rank 1 (") for line in lines(read_status(run)))


def test_what_a_token_costs_is_the_same_on_all_ranks_and_not_what_the_first_batch_had_of_padding() -> None:
    costs = [{"gold": 2.0}, {"gold": 4.0, "own": 9.0}]
    assert seconds_for_the_same([6.0, 6.0], [{"gold": 2}, {"gold": 2}], costs) == (1.0, 1.0)
    assert seconds_for_the_same([6.0, 15.0, 1.0], [{"gold": 2}, {"gold": 2, "own": 1}, {}], [*costs, {}]) == (1.0, 1.0, None)
    assert seconds_for_the_same([6.0, 9.0], [{"FLOPs": 3.0}, {"FLOPs": 3.0}], costs) == (2.0, 3.0)


def test_a_rank_is_slow_beside_the_median_one() -> None:
    assert slowest_rank((1.0, 3.0, 2.0, 1.0)) == Slowest(1, 3.0)
    assert slowest_rank((1.0, None)) is None and slowest_rank(()) is None


def test_a_window_that_is_none_is_refused() -> None:
    for wrong in ("[3]", "[0,2]", "[5,4]", "13:10"):
        with pytest.raises(ConfigError, match=r"telemetry\.profile_steps=.*: must be \[first, last\]"):
            load_config(None, [f"telemetry.profile_steps={wrong}"])


def test_a_window_is_written_as_a_list_or_with_a_colon(tmp_path: Path) -> None:
    for written in ("10:13", "[10,13]", "10:99"):
        last = int(written.strip("]")[-2:])
        (tmp_path / "a.yaml").write_text(f"telemetry:\n  profile_steps: {written}\n")
        for config in (load_config(None, [f"telemetry.profile_steps={written}"]), load_config(str(tmp_path / "a.yaml"))):
            assert config.telemetry.profile_steps == [10, last]


def test_work_that_is_handed_no_run_speaks_to_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Status, str]] = []
    monkeypatch.setattr(Status, "say", lambda status, doing, /: heard.append((status, doing)))
    outer, inner = Status("vae", 1), Status("vae", 1)
    say("nobody hears this")
    with outer:
        say("loading")
        with inner:
            say("hashing")
        say("loading more")
    say("nor this")
    assert heard == [(outer, "loading"), (inner, "hashing"), (outer, "loading more")]
