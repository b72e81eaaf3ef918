"""The demo's driver: jobs that are watched and stopped, stages that are skipped, continued or reported as failed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from ladir.config_loader import parse_args
from training.demo import Demo, Stage, _add_arguments
from training.jobs import LAUNCHER, launcher_command, run_job, tail
from training.runtime.files import write_json

OUTCOME: dict[str, Any] = {"status": "finished", "steps": 1, "samples": 1, "metrics": {}}

# A launcher that dies at once when asked to stop, and below it a rank, with a helper of its own, that first saves.
FAMILY = """
import subprocess, sys
rank = '''
import pathlib, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]])
def save(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    helper.kill()
    helper.wait()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
'''
subprocess.run([sys.executable, "-c", rank, sys.argv[1]])
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def demo(folder: Path, *overrides: str) -> tuple[Demo, io.StringIO]:
    config, arguments = parse_args(["--ranks=1", f"run.folder={folder}", "run.name=d", *overrides], "demo", _add_arguments)
    output = io.StringIO()
    return Demo(config, arguments, Console(file=output, width=100)), output


def test_a_job_reports_status_time_and_memory_and_keeps_its_output(tmp_path: Path) -> None:
    seen: list[float] = []
    code = "import sys; print('hello'); print('  '); sys.stderr.write('bye\\n'); x = bytearray(50_000_000); sys.exit(3)"
    result = run_job(python(code), tmp_path / "logs" / "a.log", 1, seen.append)
    assert result.status == 3
    assert 0 <= max(seen) <= result.seconds
    assert {"hello", "bye"} <= set((tmp_path / "logs" / "a.log").read_text().split())


def test_an_interrupted_job_may_save_before_it_ends(tmp_path: Path) -> None:
    log, saved = tmp_path / "a.log", tmp_path / "saved"

    def interrupt(_: float) -> None:
        if tail(log, 1) == ["ready"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(python(FAMILY, str(saved), LAUNCHER), log, 1, interrupt)
    assert saved.read_text() == "saved"
    assert not [child for child in psutil.Process().children(recursive=True) if str(saved) in child.cmdline()]


def test_the_tail_of_a_log_leaves_out_the_launcher_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("")
    assert tail(path, 3) == []
    path.write_text("é" * 20_000 + "\nstep 1\rstep 2\n\n[2026-01-31 12:00:00,123] [INFO] [launch.py] spawned\n")
    assert tail(path, 1) == ["step 2"]
    assert tail(path, 2) == ["step 1", "step 2"]


def test_the_launcher_runs_the_entry_point_on_as_many_ranks_on_a_port_of_its_own() -> None:
    commands = [launcher_command("x.py", 2, ["a.b=1"]) for _ in range(2)]
    for command in commands:
        assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
        assert command[-2:] == ["x.py", "a.b=1"]
        assert int(command[command.index("--master_port") + 1]) > 1023


def test_a_stage_runs_once_and_again_when_its_settings_or_an_earlier_stage_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(self: Demo) -> list[Stage]:
        write_json(self.folder.outcome_file("vae"), {**OUTCOME, "seconds": 1.0})
        return [
            Stage("vae", "trains", lambda: python("print('x')"), trains=True),
            Stage("evaluate", "asks", lambda: python("print('y')")),
        ]

    def skipped(*overrides: str) -> list[str]:
        run, output = demo(tmp_path, *overrides)
        run.run()
        return [line.split(":")[0] for line in output.getvalue().splitlines() if "done before" in line]

    def seconds(stage: str) -> float:
        return json.loads((tmp_path / "d" / "demo.json").read_text())[stage]["seconds"]

    monkeypatch.setattr(Demo, "stages", stages)
    assert skipped() == []
    assert skipped() == ["[1/2] trains", "[2/2] asks"]
    before = seconds("vae"), seconds("evaluate")
    assert skipped("sample.num_steps=3") == ["[1/2] trains"]
    assert seconds("vae") == before[0]
    assert seconds("evaluate") > before[1]  # what it cost in all
    assert skipped("sample.num_steps=3", "vae.beta=0.5") == []
    assert skipped("sample.num_steps=3", "vae.beta=0.5") == ["[1/2] trains", "[2/2] asks"]


@pytest.mark.parametrize("code", ["print('the reason'); raise SystemExit(4)", "print('the reason')"])
def test_a_failed_stage_shows_the_end_of_its_log_and_is_not_recorded(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training phase that ends well but leaves no outcome was interrupted from outside, which is a failure, too."""
    monkeypatch.setattr(Demo, "stages", lambda self: [Stage("a", "trains", lambda: python(code), trains=True)])
    failing, output = demo(tmp_path)
    with pytest.raises(SystemExit) as caught:
        failing.run()
    assert caught.value.code == 1
    assert "the reason" in output.getvalue()
    assert "a.log" in output.getvalue()
    assert json.loads((tmp_path / "d" / "demo.json").read_text())["a"]["settings"] is None


def test_the_baseline_gets_the_seconds_ladir_had_after_the_base(tmp_path: Path) -> None:
    built, _ = demo(tmp_path)
    for phase, seconds in {"base": 100.0, "vae": 20.0, "latents": 3.5, "denoiser": 40.0}.items():
        write_json(built.folder.outcome_file(phase), {**OUTCOME, "seconds": seconds})
    command = next(stage for stage in built.stages() if stage.name == "ar").command()
    assert "ar.train.max_seconds=63.5" in command
    assert all("deepspeed.launcher.runner" in stage.command() for stage in built.stages() if stage.trains)
