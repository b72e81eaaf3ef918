"""The demo's driver: jobs that are watched and stopped, stages that are skipped, continued or reported as failed."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from ladir.config.loader import parse_args
from ladir.evaluation.results import QuestionResult, Trajectory
from training.demo import Demo, Stage, Track, _add_arguments, main, refused
from training.jobs import LAUNCHER, Job, launcher_command, run_job, tail, threads_of
from training.runtime.files import write_json
from training.runtime.preemption import INTERRUPTED_STATUS

ROOT = Path(__file__).parents[1]
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


def demo(folder: Path, *overrides: str, ranks: int = 1) -> tuple[Demo, io.StringIO]:
    arguments = [f"--ranks={ranks}", "--seconds=100", f"run.folder={folder}", "run.name=d", *overrides]
    config, arguments = parse_args(arguments, "demo", _add_arguments)
    output = io.StringIO()
    return Demo(config, arguments, Console(file=output, width=100)), output


@pytest.mark.parametrize(
    ("target", "config", "seconds"), [("demo", "configs/demo.yaml", 580.0), ("prose", "configs/gsm_symbolic.yaml", 3000.0)]
)
def test_what_make_starts_is_read_as_it_is_meant(target: str, config: str, seconds: float) -> None:
    """The command that a target expands to, with the settings that the guide gives behind it."""
    if shutil.which("make") is None:
        pytest.skip("NOT TESTED: there is no make")
    given = ["SEED=3", "RANKS=1", "ARGS=gym.templates=[6,16,48,72] gym.held_out_templates=0 data.test_held_out=null"]
    said = subprocess.run(["make", "--dry-run", target, *given], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    (line,) = [line for line in said.replace("\\\n", " ").splitlines() if "training.demo" in line]
    words = shlex.split(line)
    found, arguments = parse_args(words[words.index("training.demo") + 1 :], "demo", _add_arguments)
    assert (arguments.config, arguments.ranks, arguments.seconds) == (config, 1, seconds)
    assert (found.run.name, found.run.seed) == (f"{target}-seed3", 3)
    assert (found.gym.templates, found.gym.held_out_templates, found.data.test_held_out) == ([6, 16, 48, 72], 0, None)
    assert found.demo.data == ("gym" if target == "prose" else "countdown")
    assert found.data.train == f"{found.run.folder}/{found.run.name}/data/train.jsonl"


def test_commands_that_are_printed_can_be_pasted(tmp_path: Path) -> None:
    made, _ = demo(tmp_path / "my runs [1]")
    asked = [QuestionResult("3 $x \"a\" 'b' -> 4", (Trajectory("x", False, "x"),))]
    ask, board, _ = [shlex.split(command) for command, _ in made._next_commands(asked)]
    assert ask[3] == asked[0].question and ask[5] == str(tmp_path / "my runs [1]" / "d" / "export")
    assert board[2] == str(tmp_path / "my runs [1]" / "d" / "tensorboard")


def test_a_job_reports_status_time_and_memory_and_keeps_its_output(tmp_path: Path) -> None:
    code = "import sys; print('hello'); print('  '); sys.stderr.write('bye\\n'); x = bytearray(50_000_000); sys.exit(3)"
    result = run_job(python(code), tmp_path / "logs" / "a.log", 1)
    assert result.status == 3
    assert result.seconds > 0
    assert {"hello", "bye"} <= set((tmp_path / "logs" / "a.log").read_text().split())


def test_an_interrupted_job_may_save_before_it_ends(tmp_path: Path) -> None:
    log, saved = tmp_path / "a.log", tmp_path / "saved"
    job = Job(python(FAMILY, str(saved), LAUNCHER), log, 1)
    while tail(log, 1) != ["ready"]:
        assert job.poll() is None
        time.sleep(0.05)
    job.stop()
    assert saved.read_text() == "saved"
    assert not [child for child in psutil.Process().children(recursive=True) if str(saved) in child.cmdline()]


def test_cores_are_divided_among_processes() -> None:
    cores = threads_of(1)
    assert cores >= 1
    assert threads_of(cores) == 1 and threads_of(10 * cores) == 1


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
    def plan(self: Demo) -> list[list[Track]]:
        write_json(self.folder.outcome_file("vae"), {**OUTCOME, "seconds": 1.0})
        return [
            [[Stage("vae", "trains", lambda: python("print('x')"), trains=True)]],
            [[Stage("evaluate", "asks", lambda: python("print('y')"))]],
        ]

    def skipped(*overrides: str) -> list[str]:
        run, output = demo(tmp_path, *overrides)
        run.run()
        return [line.split(":")[0] for line in output.getvalue().splitlines() if "done before" in line]

    def seconds(stage: str) -> float:
        return json.loads(record.read_text())[stage]["seconds"]

    record = tmp_path / "d" / "demo.json"
    monkeypatch.setattr(Demo, "plan", plan)
    assert skipped() == []
    assert skipped() == ["[1/2] trains", "[2/2] asks"]
    stages = json.loads(record.read_text())
    record.write_text(json.dumps({name: {**stage, "seconds": 1000.0} for name, stage in stages.items()}))
    assert skipped("sample.num_steps=3") == ["[1/2] trains"]
    assert seconds("vae") == 1000.0
    assert seconds("evaluate") < 1000.0  # all of it was done anew
    assert skipped("sample.num_steps=3", "vae.beta=0.5") == []
    assert skipped("sample.num_steps=3", "vae.beta=0.5") == ["[1/2] trains", "[2/2] asks"]


@pytest.mark.parametrize("code", ["print('the reason'); raise SystemExit(4)", "print('the reason')"])
def test_a_failed_stage_shows_the_end_of_its_log_and_is_not_recorded(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training phase that ends well but leaves no outcome has failed, too."""
    monkeypatch.setattr(Demo, "plan", lambda self: [[[Stage("a", "trains", lambda: python(code), trains=True)]]])
    failing, output = demo(tmp_path)
    with pytest.raises(SystemExit) as caught:
        failing.run()
    assert caught.value.code == 1
    assert "the reason" in output.getvalue()
    assert "a.log" in output.getvalue()
    assert json.loads((tmp_path / "d" / "demo.json").read_text())["a"]["settings"] is None


def test_a_stage_that_was_interrupted_and_has_saved_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else asked it to stop; another start continues it."""
    stage = Stage("a", "trains", lambda: python("raise SystemExit(75)"), trains=True)
    monkeypatch.setattr(Demo, "plan", lambda self: [[[stage]]])
    stopped, output = demo(tmp_path)
    with pytest.raises(SystemExit) as caught:
        stopped.run()
    assert caught.value.code == INTERRUPTED_STATUS == 75
    assert "failed" not in output.getvalue() and "the same command continues" in output.getvalue()
    assert json.loads((tmp_path / "d" / "demo.json").read_text())["a"]["settings"] is None


#: makes the file named first and waits for the other
MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.02)
"""


def test_tracks_run_side_by_side_and_a_failure_in_one_lets_the_other_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, saved = tmp_path / "a", tmp_path / "b", tmp_path / "saved"

    def meet(mine: Path, other: Path) -> Stage:
        return Stage(mine.name, mine.name, lambda: python(MEET, str(mine), str(other)))

    def fail() -> list[str]:
        ready = f"import time, pathlib\nwhile 'ready' not in pathlib.Path({str(tmp_path)!r}, 'd/logs/saves.log').read_text(): "
        return python(ready + "time.sleep(0.02)\nraise SystemExit(3)")

    saving = Stage("saves", "saves", lambda: python(FAMILY, str(saved), LAUNCHER))
    ends: list[float] = []
    stop = Job.stop

    def noted(job: Job) -> None:
        stop(job)
        ends.append(job.seconds)

    monkeypatch.setattr(Job, "stop", noted)
    parts = [[[meet(a, b)], [meet(b, a)]], [[saving], [Stage("fails", "fails", fail)]]]
    monkeypatch.setattr(Demo, "plan", lambda self: parts)
    run, output = demo(tmp_path, ranks=2)
    with pytest.raises(SystemExit):
        run.run()
    assert "[1/4] a" in output.getvalue() and "[4/4] fails: failed with status 3" in output.getvalue()
    assert saved.read_text() == "saved"
    record = json.loads((tmp_path / "d" / "demo.json").read_text())
    assert record["a"]["settings"] and record["saves"]["settings"] is None
    assert record["saves"]["seconds"] >= ends[0]  # the time to save included


def test_both_train_for_the_same_seconds_after_the_base(tmp_path: Path) -> None:
    for ranks, parts in ((1, 6), (2, 5), (4, 5)):
        built, _ = demo(tmp_path, "rollout.train.max_seconds=30", ranks=ranks)
        for phase, seconds in {"base": 100.0, "vae": 20.0, "latents": 3.5}.items():
            write_json(built.folder.outcome_file(phase), {**OUTCOME, "seconds": seconds})
        plan = built.plan()
        assert len(plan) == parts
        stages = {stage.name: stage for part in plan for track in part for stage in track}
        assert "ar.train.max_seconds=100.0" in stages["ar"].command()
        assert "denoiser.train.max_seconds=46.5" in stages["denoiser"].command()
        assert all("deepspeed.launcher.runner" in stage.command() for stage in stages.values() if stage.trains)
        counts = [stages[name].command()[4] for name in ("base", "evaluate", "vae", "denoiser", "ar")]
        assert counts == [str(ranks)] * 2 + [str(max(1, ranks // 2))] * 3


def test_seconds_that_leave_the_denoiser_none_are_refused(tmp_path: Path) -> None:
    built, output = demo(tmp_path, "rollout.train.max_seconds=30")
    write_json(built.folder.outcome_file("vae"), {**OUTCOME, "seconds": 69.5})
    stages = {stage.name: stage for part in built.plan() for track in part for stage in track}
    with pytest.raises(SystemExit) as caught:
        stages["denoiser"].command()
    assert caught.value.code == 1
    assert "--seconds=100 leaves the denoiser none: VAE, latents and later stages take 100" in " ".join(output.getvalue().split())


def test_stages_are_chosen_and_records_of_another_kind_are_asked_by_themselves(tmp_path: Path) -> None:
    def names(*overrides: str, ranks: int = 1) -> list[list[list[str]]]:
        built, _ = demo(tmp_path, *overrides, ranks=ranks)
        return [[[stage.name for stage in track] for track in part] for part in built.plan()]

    own = ["demo.stages=[vae,latents,denoiser,export,evaluate]", "backbone.name_or_path=some/lm"]
    stages = ["vae", "latents", "denoiser", "rollout", "export"]
    assert names(*own, ranks=2) == [[stages], [["evaluate"]]]
    assert names(*own, "rollout.enabled=false")[0] == [[stage for stage in stages if stage != "rollout"]]
    built, _ = demo(tmp_path, "demo.data=gym", "data.test_held_out=other.jsonl")
    plan = built.plan()
    assert plan[0][0][0].command()[1:4] == ["-m", "ladir", "gym"]
    first, held_out = plan[-2][0]
    assert first.name == "evaluate" and held_out.name == "evaluate-held-out"
    assert held_out.command()[-2:] == ["evaluate.split=test_held_out", "evaluate.name=held-out"]


RL = ("rl.enabled=true", "rl.train.max_seconds=10")


@pytest.mark.parametrize(
    ("own", "trained", "denoiser", "baseline"),
    [
        (("rl.answers=2",), {"rl", "ar-rl"}, 60.0, 90.0),
        (("rl.enabled=false",), set(), 70.0, 100.0),
        (("rl.policy=text",), {"ar-rl"}, 70.0, 90.0),
        (("demo.stages=[vae,latents,denoiser,rl,export,ar,evaluate]",), {"rl"}, 60.0, 100.0),
    ],
)
def test_stage_3_takes_its_seconds_from_its_own_lane_and_is_asked(
    own: tuple[str, ...], trained: set[str], denoiser: float, baseline: float, tmp_path: Path
) -> None:
    """Both lanes train for 100 seconds, whatever of stage 3 is a part of the run; VAE and rollout have taken 30 of LaDiR's."""
    overrides = (*RL, "rollout.train.max_seconds=10", "evaluate.methods=[ar,ladir]", "data.test_held_out=o.jsonl")
    built, _ = demo(tmp_path, *overrides, *own, ranks=2)
    write_json(built.folder.outcome_file("vae"), {**OUTCOME, "seconds": 20.0})
    tracks = [track for part in built.plan() for track in part]
    stages = {stage.name: stage for track in tracks for stage in track}
    assert trained == {"rl", "ar-rl"} & stages.keys()
    assert f"denoiser.train.max_seconds={denoiser}" in stages["denoiser"].command()
    assert f"ar.train.max_seconds={baseline}" in stages["ar"].command()
    names = [[stage.name for stage in track] for track in tracks]
    assert [*(["rl"] if "rl" in trained else []), "export"] == next(track for track in names if "export" in track)[4:]
    assert next(track for track in names if "ar" in track) == ["ar", *(["ar-rl"] if "ar-rl" in trained else [])]
    completing = ["rl.policy=text", "rl.answers=1", "rl.algorithm=nft"]  # behind all that is given, and so in force
    assert {name: stages[name].command()[-3:] == completing for name in trained} == {name: name == "ar-rl" for name in trained}
    rows = ["ar", "ladir", *(row for stage, row in (("rl", "ladir-rl"), ("ar-rl", "ar-rl")) if stage in trained)]
    for name in ("evaluate", "evaluate-held-out"):
        *_, methods = (word for word in stages[name].command() if word.startswith("evaluate.methods="))
        assert methods == f"evaluate.methods=[{','.join(rows)}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.enabled=true"], "rl.enabled=true: both lanes train for the same seconds, and those of stage 3 are not known"),
        ([*RL, "demo.stages=[vae,denoiser]"], "rl.enabled=true: demo.stages leaves stage 3 out; add rl or ar-rl to it"),
        ([*RL, "rl.policy=text", "demo.stages=[rl]"], "rl.enabled=true (rl.policy=text): demo.stages leaves stage 3 out"),
        ([*RL, "--seconds=40", "rollout.train.max_seconds=30"], "--seconds=40: stages 2 and 3 alone take 40"),
        (["--seconds=40", "rollout.train.max_seconds=50"], "--seconds=40: stages 2 and 3 alone take 50"),
    ],
)
def test_later_stages_that_could_not_be_run_are_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([f"run.folder={tmp_path}", *overrides])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_lane_needs_seconds_for_its_own_later_stages_alone(tmp_path: Path) -> None:
    """Stage 2 is LaDiR's; with rl.policy=text stage 3 is the baseline's."""
    stages = ("rollout.train.max_seconds=60", "rl.enabled=true", "rl.train.max_seconds=60")
    assert not refused(demo(tmp_path, *stages, "rl.policy=text")[0].config, 100.0)
    assert refused(demo(tmp_path, *stages)[0].config, 100.0)


def test_the_demos_own_file_has_all_that_stage_3_needs(tmp_path: Path) -> None:
    built, _ = demo(tmp_path, "--config=configs/demo.yaml", "rl.enabled=true")
    names = [stage.name for part in built.plan() for track in part for stage in track]
    assert {"rl", "ar-rl"} <= set(names) and built.config.rl.train.max_steps is None
    assert not refused(built.config, seconds=580.0)


def test_what_runs_side_by_side_takes_the_longest_track_and_the_memory_of_all(tmp_path: Path) -> None:
    built, _ = demo(tmp_path, "rollout.enabled=false", ranks=2)
    ladir = {"vae": (20, 1.5), "latents": (5, 1.0), "denoiser": (60, 2.0), "export": (1, 0.5)}
    costs = {"data": (1, 0.5), "base": (10, 1.0), **ladir, "ar": (84, 1.25), "evaluate": (30, 3.0), "report": (3, 0.5)}
    built.record = {name: {"seconds": seconds, "peak_gib": peak} for name, (seconds, peak) in costs.items()}
    assert built._cost() == (1 + 10 + 86 + 30 + 3, 2.0 + 1.25)


def test_the_commands_it_ends_with_are_what_a_shell_takes(tmp_path: Path) -> None:
    built, _ = demo(tmp_path / "my runs")
    (ask, _), (look, _), _ = built._next_commands([])
    assert shlex.split(ask)[-5:] == ["ladir", "3 7 12 -> 45", "--model", str(tmp_path / "my runs" / "d" / "export"), "--trace"]
    assert shlex.split(look)[-2:] == ["--logdir", str(tmp_path / "my runs" / "d" / "tensorboard")]
