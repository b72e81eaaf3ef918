"""What an entry point's process says, how it ends, and what it names to come next."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from ladir.__main__ import main as ladir_main
from ladir.config import Config
from tests.toy_phase import toy_config
from training.runtime import ending
from training.runtime.chain import chain, following
from training.runtime.distributed import World
from training.runtime.logs import configure_logging
from training.runtime.run import Outcome, Run
from training.runtime.schedule import Progress

#: an object that aborts the process once the interpreter takes its module apart, as gloo's threads do now and then
SCRIPT = """
import atexit, os, sys
from training.runtime.distributed import run_as_program

class Threads:
    def __del__(self, abort=os.abort):
        abort()

groups = Threads()
atexit.register(sys.stdout.write, "at exit\\n")

def main():
    sys.stdout.write("work done\\n")
    {body}

{ending}
"""


def run(body: str, ending: str = "run_as_program(main)") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body, ending=ending)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "RANK": "0"})


def test_without_it_the_interpreters_end_fails_a_process_whose_work_is_done() -> None:
    assert run("pass", "main()").returncode == -signal.SIGABRT


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such run')", 1, "no such run"),
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_a_process_ends_with_the_status_of_its_work(body: str, status: int, said: str) -> None:
    done = run(body)
    assert (done.returncode, done.stdout) == (status, "work done\nat exit\n"), done.stderr
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == ("ValueError" in said)


TRAININGS = ("train_vae", "encode_latents", "train_denoiser", "train_rl", "train_verifier", "train_ar")
ENTRIES = (*TRAININGS, "export", "evaluate", "plan", "benchmark", "demo")


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_works_and_a_wrong_argument_is_answered_by_one_line(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"training.{entry}").main
    for argument, status in (("--help", 0), ("--frobnicate", 2)):
        with pytest.raises(SystemExit) as caught:
            main([*(["--gpus=2", "--gpu-memory=40"] if entry == "plan" else []), argument])
        assert caught.value.code == status
        output, errors = capsys.readouterr()
        lines = (errors if status else output).splitlines()
        assert len(lines) == 1 and argument in lines[0] if status else len(lines) > 5 and not errors


@pytest.mark.parametrize("arguments", [["inspect"], ["countdown"], ["gym"], ["report"], ["report", "x", "--questions=many"]])
def test_commands_answer_wrong_arguments_by_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ladir_main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.endswith("; see --help") and "overrides" not in line and "section" not in line


#: what two ranks write, one after the other, of lines that are logged twice
LINES = """
import logging, os, warnings
from training.runtime.logs import configure_logging
from transformers.utils import logging as transformers_logging

for rank in range(2):
    if os.fork() == 0:
        configure_logging(rank, 2)
        for _ in range(2):
            for name in ("__main__", "ladir.x", "training.y", "other"):
                logging.getLogger(name).info("%s info", name)
                logging.getLogger(name).warning("%s warning", name)
            transformers_logging.get_logger("transformers.z").warning("z warning")
            warnings.warn("a class is old", FutureWarning, stacklevel=1)
        os._exit(0)
    os.wait()
"""


def test_every_line_is_said_once_and_what_libraries_say_by_rank_0_alone() -> None:
    """A program logs as ``__main__``; libraries log the same on every rank."""
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]  # without the time
    ours = ("__main__", "ladir.x", "training.y")
    first = [f"[rank 0] {line}" for name in ours for line in (f"{name} info", f"{name} warning")]
    assert lines[:8] == [*first, "[rank 0] other warning", "[rank 0] z warning"]
    assert lines[8].startswith("[rank 0] FutureWarning: a class is old (<string>:")
    assert lines[9:] == [f"[rank 1] {name} warning" for name in ours]


def test_a_line_whose_arguments_do_not_fit_is_written_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """As transformers has them: a kind of warning stands where an argument for the text should."""
    configure_logging(0, 1)
    try:
        logging.getLogger("other").warning("an argument is old", FutureWarning)
        logging.getLogger("other").warning("%d things", "no")
        assert caplog.messages == ["an argument is old (<class 'FutureWarning'>,)", "%d things ('no',)"]
        configure_logging(0, 1)  # another run in the same process says its lines anew
        logging.getLogger("other").warning("%d things", "no")
        assert len(caplog.messages) == 3
    finally:
        caplog.handler.filters.clear()


def test_the_chain_has_every_phase_and_goes_on_behind_what_is_finished() -> None:
    config = Config()
    config.evaluate.methods = ["ar", "ladir"]
    steps = [step.phase for step in chain(config)]
    assert steps == ["vae", "latents", "denoiser", "rollout", "ar", "export", "evaluate"]
    done = {"latents", "denoiser"}
    for phase, expected in (("vae", "rollout"), ("rollout", "ar"), ("export", "evaluate"), ("evaluate", None), ("own", "vae")):
        step = following(config, phase, done.__contains__)
        assert (step.phase if step else None) == expected
    third = following(config, "rl", done.__contains__)  # trained by hand
    assert third is not None and third.phase == "ar"


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that ``training/train_vae.py`` trains, in one process started by hand."""
    for name in ("INTERRUPTED_MARK", "LADIR_QUEUED", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["training/train_vae.py"])
    run = Run(toy_config(tmp_path / "my runs"), "vae", World(0, 1, 0, torch.device("cpu")))
    run.given = ["--config", "my own.yaml", "stage=teacher", 'data.answer_prefixes=["Answer:"]']
    return run


class Ancestor:
    """A process above this one."""

    def __init__(self, *line: str) -> None:
        self._line = list(line)

    def cmdline(self) -> list[str]:
        return self._line


SCRIPT_LINE = ("training/train_vae.py", "--config", "my own.yaml")


@pytest.mark.parametrize(
    ("ancestors", "words"),
    [
        ([], [ending._python()]),
        ([("bash", "-c", "python training/train_vae.py")], [ending._python()]),
        ([("/x/python", "-m", "torch.distributed.run", "--nproc-per-node", "2", *SCRIPT_LINE)],
         ["/x/python", "-m", "torch.distributed.run", "--nproc-per-node", "2"]),
        ([("/x/python", "-m", "deepspeed.launcher.launch", "--world_info=x", *SCRIPT_LINE),
          ("/x/python", __file__, "--num_gpus", "8", *SCRIPT_LINE), ("bash",)],
         ["tests/test_program.py", "--num_gpus", "8"]),
    ],
    ids=["plain", "shell", "module", "console-script"],
)  # fmt: skip
def test_the_next_command_starts_as_this_one_was_started(
    ancestors: list[tuple[str, ...]], words: list[str], run_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [Ancestor(*line) for line in ancestors])
    found = shlex.split(ending.next_command(run_of))
    settings = ["--config", "my own.yaml", 'data.answer_prefixes=["Answer:"]']
    assert found == [*words, "training/encode_latents.py", *settings]


def test_the_next_command_on_a_cluster(run_of: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERRUPTED_MARK", "mark")
    for name, value in (("JOB_NUM_NODES", "2"), ("JOB_PARTITION", "gpu"), ("GPUS_ON_NODE", "8")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    expected = "sbatch --nodes=2 --partition=gpu --gres=gpu:8 slurm/encode_latents.sbatch 'my own.yaml' "
    assert ending.next_command(run_of).startswith(expected)
    monkeypatch.setenv("LADIR_QUEUED", "1")
    assert ending.next_command(run_of) == "encode_latents, which is queued"


@pytest.mark.parametrize(
    ("launcher", "known", "asked"),
    [
        ("torchrun", {"SLURM_CPUS_PER_TASK": "64", "SRUN_CPUS_PER_TASK": "64"}, "--gres=gpu:8 --cpus-per-task=64 "),
        ("torchrun", {"SLURM_CPUS_PER_TASK": "64"}, "--gres=gpu:8 --cpus-per-task=64 "),
        ("srun", {"SLURM_CPUS_PER_TASK": "8", "SRUN_CPUS_PER_TASK": "64"}, "--gres=gpu:8 --cpus-per-task=64 "),
        ("srun", {"SLURM_CPUS_PER_TASK": "8"}, "--gres=gpu:8 "),
        ("srun", {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_CPUS_PER_NODE": "64(x2),32"}, "--gres=gpu:8 --cpus-per-task=64 "),
        ("torchrun", {"SLURM_JOB_CPUS_PER_NODE": "48"}, "--gres=gpu:8 --cpus-per-task=48 "),
    ],
)
def test_the_next_command_asks_for_the_cpus_that_this_job_asked_for(
    launcher: str, known: dict[str, str], asked: str, run_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a rank's share of them, which a step of srun's own ranks is told; for those it got where it asked for none."""
    for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_JOB_CPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"INTERRUPTED_MARK": "mark", "SLURM_GPUS_ON_NODE": "8", "LAUNCHER": launcher, **known}.items():
        monkeypatch.setenv(name, value)
    assert f"{asked}slurm/encode_latents.sbatch" in ending.next_command(run_of)


def test_a_training_ends_with_one_line(run_of: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        metrics = {"loss": 3.0, "validation/loss": 0.51234, "validation/token_accuracy": 1.0}
        ending.tell_trained(run_of, Outcome("finished", 7, 56, 12.3, metrics), "max_steps=7")
    (line,) = caplog.messages
    begin = "vae finished: 7 steps in 12 s, ended by vae.train.max_steps=7; validation: loss 0.5123, token accuracy 1; wrote "
    assert line.startswith(begin + str(run_of.folder.model("vae")) + "; next: ")


def test_what_ends_a_training_is_the_limit_that_is_reached_first() -> None:
    settings = toy_config(Path(), max_steps=100, max_epochs=3.0, max_seconds=60.0).ar.train
    for progress, limit in (
        (Progress(100, 10, 1.0), "max_steps=100"),
        (Progress(10, 60, 1.0), "max_epochs=3"),
        (Progress(10, 10, 61.0), "max_seconds=60"),
    ):
        assert progress.fraction(settings, 20) >= 1 and progress.limit(settings, 20) == limit
