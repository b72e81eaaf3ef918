"""Records, lines, signals and the environment of processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import math
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ladir.config import Config
from ladir.config.checks import validate
from tests.toy_phase import toy_config
from training.runtime import job as job_module
from training.runtime import run as run_module
from training.runtime.distributed import LaunchError, World, complete_environment
from training.runtime.meters import Meters
from training.runtime.preemption import StopRequest
from training.runtime.run import Run, RunConflict, RunFolder, open_run, relevant_settings
from training.runtime.telemetry import Telemetry, withdraw
from training.runtime.validation import share

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = toy_config(tmp_path)
    config.telemetry.loggers = ["tensorboard"]
    run = Run(config, "ar", ALONE)
    run.occupy()
    run.prepare()
    return run


def steps(file: Path, phase: str = "ar") -> list[int]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["step"] for row in rows if row["phase"] == phase]


def tensorboard_steps(folder: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def age(folder: Path) -> None:
    """Give event files names of long ago: TensorBoard reads them by name, in which a process counts those of a second."""
    for file in folder.rglob("events*"):
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.1.", 1)))


def test_resuming_withdraws_later_records_everywhere(run: Run) -> None:
    run.folder.metrics.write_text('{"phase": "vae", "kind": "train", "step": 9, "loss": 1}\n')
    with Telemetry(run, 0) as telemetry:
        for step in range(1, 6):
            telemetry.record("train", step, {"loss": 1.0 / step})
    with run.folder.metrics.open("a") as file:
        file.write('{"phase": "ar", "ste')  # torn by a kill
    age(run.folder.tensorboard("ar"))
    with Telemetry(run, 3) as telemetry:
        telemetry.record("train", 4, {"loss": 0.5})
        telemetry.text("sample", "a thought", 4)
        telemetry.histogram("latents", torch.randn(8), 4)
    assert steps(run.folder.metrics) == [1, 2, 3, 4]
    assert steps(run.folder.metrics, "vae") == [9]
    assert tensorboard_steps(run.folder.tensorboard("ar"), "1 losses/ar/loss") == [1, 2, 3, 4]


def drawn_steps(folder: Path) -> dict[str, list[int]]:
    """The steps of every tag as TensorBoard shows them: it takes all kinds of values for tensors."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def draw_validation(telemetry: Telemetry, step: int) -> None:
    """What a validation draws: text, histogram, picture, and scalars."""
    telemetry.text("samples", "a thought", step)
    telemetry.histogram("mean", torch.randn(8), step)
    telemetry.image("block", np.zeros((2, 2, 3), dtype=np.uint8), step)
    telemetry.record("validation", step, {"loss": 2.0 / step})


def draw(telemetry: Telemetry, steps: Iterable[int]) -> None:
    for step in steps:
        telemetry.record("train", step, {"loss": 1.0 / step, "grad_norm": math.nan})
        draw_validation(telemetry, step)


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "to-be-validated"])
@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_a_restart_draws_nothing_twice(run: Run, killed: bool, validated: bool) -> None:
    """Whatever is drawn, however the process before ended, and whether or not it had validated at its checkpoint of step 3."""
    folder = run.folder.tensorboard("ar")
    with Telemetry(run, 0) as telemetry:
        draw(telemetry, range(1, 6))
        telemetry._loggers.write(lambda one: one.flush())  # type: ignore[attr-defined]
        written = {file: file.read_bytes() for file in folder.rglob("events*")}
        assert len(written) == 2  # of training and validation
    for file, content in written.items() if killed else ():
        file.write_bytes(content[:-7])  # nothing was closed, and the last event is torn
    age(folder)
    with Telemetry(run, 3, validated) as telemetry:
        if not validated:
            draw_validation(telemetry, 3)
        draw(telemetry, range(4, 7))
    shown = drawn_steps(folder)
    validation = drawn_steps(folder / "validation")
    for tag in ("1 losses/ar/loss", "4 optimizer/ar/grad_norm"):
        assert (tag, shown[tag]) == (tag, [1, 2, 3, 4, 5, 6])
    for tag in ("1 losses/ar/loss", "samples/text_summary", "3 latents/ar/mean", "block"):
        assert (tag, validation[tag]) == (tag, [1, 2, 3, 4, 5, 6])


class Tracker:
    """Stands in for the package wandb."""

    Error = type("Error", (Exception,), {})
    Html = Histogram = Image = staticmethod(lambda value: value)

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.full = False

    def init(self, **given: Any) -> Any:
        self.started.append(given)
        return SimpleNamespace(id="abc", define_metric=lambda *_, **__: None, log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any]) -> None:
        if self.full:
            raise self.Error("quota")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_is_told_everything_and_left_where_it_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)  # type: ignore[arg-type]
    run.config.telemetry.loggers = ["wandb"]
    for number in range(2):
        with Telemetry(run, number) as telemetry:
            telemetry.record("train", number + 1, {"loss": 0.5})
            draw_validation(telemetry, number + 1)
    first, second = tracker.started
    assert (first["group"], first["name"], first["id"], first["resume"]) == ("toy", "toy/ar", None, None)
    assert (second["id"], second["resume"], first["config"]["ar.train.max_steps"]) == ("abc", "allow", 6)
    assert [set(values) - {"step"} for values in tracker.logged[:5]] == [
        {"train/loss"}, {"samples"}, {"latents/mean"}, {"block"}, {"validation/loss"},
    ]  # fmt: skip
    assert [values["step"] for values in tracker.logged] == [1] * 5 + [2] * 5 and tracker.finished == 2
    tracker.full = True
    with Telemetry(run, 2) as telemetry:
        draw(telemetry, [3, 4])
        assert not telemetry.shows_samples
    assert caplog.text.count("wandb cannot be written (quota)") == 1 and tracker.finished == 2
    assert steps(run.folder.metrics) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_mlflow_writes_to_a_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = importlib.import_module("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run.config.telemetry.loggers = ["mlflow"]
    for number in range(2):
        with Telemetry(run, number) as telemetry:
            telemetry.record("train", number + 1, {"loss": 0.5 / (number + 1), "pass@1/ladir": 1.0})
            draw_validation(telemetry, number + 1)
    client = mlflow.MlflowClient(f"sqlite:///{run.folder.path.resolve()}/mlflow/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert found.info.run_name == "toy/ar" and found.info.status == "FINISHED"
    assert found.data.params["ar.train.max_steps"] == "6" and found.data.metrics["train/pass_1/ladir"] == 1.0
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.5), (2, 0.25)]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"samples", "block"}


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ladir.config.checks.find_spec", lambda name: None if name == "wandb" else object())
    config = Config()
    config.telemetry.loggers = ["tensorboard", "wandb"]
    assert validate(config) == ["telemetry.loggers: the package wandb is not installed; pip install wandb, or leave it out"]


def test_a_last_line_that_lacks_only_its_end_is_kept(run: Run) -> None:
    run.folder.metrics.write_text('{"phase": "ar", "kind": "train", "step": 1, "loss": 1}')
    with Telemetry(run, 1) as telemetry:
        telemetry.record("train", 2, {"loss": 0.5})
    assert steps(run.folder.metrics) == [1, 2]


def test_values_that_are_not_numbers_stay_valid_json(run: Run) -> None:
    with Telemetry(run, 0) as telemetry:
        telemetry.record("train", 1, {"loss": math.nan, "norm": math.inf, "lr": 0.5})
    row = json.loads(run.folder.metrics.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["loss"], row["norm"], row["lr"]) == (None, None, 0.5)


def test_lines_are_not_written_more_often_than_asked(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Telemetry(run, 0) as telemetry:
        for step in range(1, 11):
            telemetry.progress(step / 10, step, {"loss": 1234.5, "lr": 1e-5})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "step 1 " in lines[0] and "100% step 10 loss 1234 lr 1e-05" in lines[1]


def test_other_ranks_write_nothing(run: Run) -> None:
    other = Run(run.config, "ar", World(1, 2, 1, torch.device("cpu")))
    with Telemetry(other, 0) as telemetry:
        telemetry.record("train", 1, {"loss": 1.0})
        telemetry.progress(1.0, 1, {"loss": 1.0})
        telemetry.text("sample", "text", 1)
    assert not run.folder.metrics.exists() and not run.folder.tensorboard("ar").exists()
    withdraw(run.folder.metrics, "ar", 0)


def test_meters_average_over_labels_and_survive_a_checkpoint() -> None:
    meters = Meters({"flow": 5.0, "stop": 1.0})
    assert meters.add_losses({"flow": 6.0, "stop": 0.0}, {"flow": 3.0, "stop": 0.0}) == 10.0
    meters.add_metrics({"metric/accuracy": torch.tensor([3.0, 4.0]), "flow": torch.tensor(1.0)})
    meters.collect(ALONE)
    resumed = Meters({"flow": 5.0, "stop": 1.0})
    resumed.load(json.loads(json.dumps(meters.state())))
    for meter in (meters, resumed):
        meter.add_losses({"flow": 2.0, "stop": 4.0}, {"flow": 1.0, "stop": 4.0})
        assert meter.averages() == {"flow": 2.0, "stop": 1.0, "loss": 10.5, "accuracy": 0.75}
    meters.clear()
    assert meters.averages() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_only_set_a_flag_and_are_given_back(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged by the handler itself, which may interrupt the logging of something else."""
    before = signal.getsignal(number)
    with caplog.at_level(logging.INFO), StopRequest("USR1") as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and caplog.messages == []
        stop.announce()
        stop.announce()
        assert caplog.messages == [f"{number.name} received: stopping after this step"]
    assert signal.getsignal(number) == before
    with pytest.raises(ValueError, match="stop_signal=USR9"):
        StopRequest("USR9")


def test_ctrl_c_answers_at_once_on_one_rank_and_the_second_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with StopRequest("USR2") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert capfd.readouterr().err.count("once more ends at once") == told
        assert signal.getsignal(signal.SIGINT) == before


def test_what_runs_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    """A shell starts it so, and Ctrl-C means another program."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest("USR2") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_plain_python_is_one_process() -> None:
    environment: dict[str, str] = {}
    complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


def test_srun_tasks_are_ranks_and_a_batch_step_is_one_process() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    environment = {**step, "SLURM_JOB_ID": "123", "MASTER_ADDR": "node7"}
    complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node7", "20123")
    batch = {"SLURM_JOB_ID": "123", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    complete_environment(batch)
    assert batch["WORLD_SIZE"] == "1"


def test_a_process_that_sees_its_own_gpu_only_uses_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1: local rank 3 has one GPU, number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    address = {"MASTER_ADDR": "node7", "MASTER_PORT": "1"}
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **address}
    complete_environment(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("3", "0")


@pytest.mark.parametrize("fails", [False, True])
def test_only_a_job_without_error_takes_leave_of_the_others(fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leaving takes all ranks; after an error on one of them the others are somewhere else."""
    left: list[bool] = []
    given = Namespace(config=None, overrides=[])
    monkeypatch.setattr(job_module, "parse_args", lambda argv, description: (toy_config(tmp_path), given))
    monkeypatch.setattr(job_module, "start", lambda settings: ALONE)
    monkeypatch.setattr(job_module, "stop", lambda: left.append(True))
    with contextlib.suppress(RuntimeError), job_module.job([], "", lambda config: "ar"):
        if fails:
            raise RuntimeError
    assert left == ([] if fails else [True])


def test_a_job_that_was_interrupted_waits_for_all_ranks_and_ends_with_status_75(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Launchers end the other ranks as soon as one ends with another status than 0: nobody may still be writing then."""
    done: list[str] = []
    arguments = Namespace(config="my run.yaml", overrides=["vae.beta=0"])
    monkeypatch.setattr(job_module, "parse_args", lambda argv, description: (toy_config(tmp_path), arguments))
    monkeypatch.setattr(job_module, "start", lambda settings: ALONE)
    monkeypatch.setattr(job_module, "stop", lambda: done.append("left"))
    monkeypatch.setattr(World, "barrier", lambda self: done.append("all ranks here"))
    monkeypatch.setenv("INTERRUPTED_MARK", str(tmp_path / "mark"))
    with pytest.raises(SystemExit) as caught, job_module.job([], "", lambda config: "ar") as run:
        assert run.given == ["--config", "my run.yaml", "vae.beta=0"]
        run.interrupt()
        done.clear()
    assert caught.value.code == 75 and done == ["all ranks here", "left"]
    assert (tmp_path / "mark").is_file() and run.folder.interrupted.is_file()


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE, MASTER_ADDR"):
        complete_environment({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"})


def test_only_settings_that_change_a_phase_conflict() -> None:
    config = Config()
    before = {phase: relevant_settings(dataclasses.asdict(config), phase) for phase in ("vae", "denoiser", "ar")}
    config.telemetry.progress, config.vae.train.log_every, config.denoiser.train.micro_batch = "lines", 1, 1
    config.backbone.activation_checkpointing = "full"
    config.sample.num_steps, config.deepspeed.config, config.run.name = 3, "other.json", "other"
    assert before == {phase: relevant_settings(dataclasses.asdict(config), phase) for phase in before}
    config.vae.train.lr, config.vae.latent_dim = 9.0, 7
    after = {phase: relevant_settings(dataclasses.asdict(config), phase) for phase in before}
    assert after["ar"] == before["ar"]
    assert after["vae"]["vae.train.lr"] == 9.0 and "vae.train.lr" not in after["denoiser"]
    assert after["denoiser"]["vae.latent_dim"] == 7


def test_folders_appear_whole_or_not_at_all(run: Run) -> None:
    target = run.folder.model("ar")
    with pytest.raises(RuntimeError), run.new_folder(target) as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert not target.exists()
    for content in ("first", "second"):
        with run.new_folder(target) as folder:
            (folder / "weights").write_text(content)
        assert (target / "weights").read_text() == content
    assert [path.name for path in target.parent.iterdir()] == ["ar"]


def test_two_jobs_never_work_in_one_run_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0.0)
    with pytest.raises(RunConflict, match=rf"is in use by phase ar, process {os.getpid()} on \S+: wait for it or end it"):
        Run(run.config, "vae", ALONE).occupy()
    run.release()
    with open_run(run.config, "vae", ALONE):
        pass
    run.occupy()
    run.prepare()


def test_jobs_that_write_other_files_may_share_a_folder_where_that_is_wished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0.0)
    run.release()
    run.config.run.exclusive = False

    def opened(phase: str, **evaluate: object) -> contextlib.AbstractContextManager[Run]:
        config = copy.deepcopy(run.config)
        config.evaluate = dataclasses.replace(config.evaluate, **evaluate)
        return open_run(config, phase, ALONE)

    others = [opened("ar"), opened("evaluate", name="long"), opened("evaluate", snapshot=20), opened("evaluate", snapshot=30)]
    with opened("denoiser"), opened("ar-rl"), others[0], others[1], others[2], others[3]:
        for taken in (opened("evaluate", name="long"), opened("evaluate", snapshot=20), opened("evaluate"), opened("vae")):
            with pytest.raises(RunConflict, match="is in use by phase"):
                taken.__enter__()


def test_the_run_folder_records_where_it_comes_from(run: Run) -> None:
    environment = json.loads((run.folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "commit" in environment
    assert RunFolder(run.config).config("ar").read_text() == (run.folder.path / "config.yaml").read_text()


@pytest.mark.parametrize(("samples", "micro", "ranks"), [(8, 4, 2), (9, 4, 2), (3, 4, 2), (1, 1, 3)])
def test_validation_shares_cover_each_sample_once_in_equal_rounds(samples: int, micro: int, ranks: int) -> None:
    shares = [share(samples, micro, World(rank, ranks, rank, torch.device("cpu"))) for rank in range(ranks)]
    assert len({len(part) for part in shares}) == 1
    counted = [index for part in shares for (indices, _), real in part if real for index in indices]
    assert sorted(counted) == list(range(samples))
