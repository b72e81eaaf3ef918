"""What the batch scripts rely on and needs no cluster: settings in short, signals that wait (the rest: ``make test-slurm``)."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from training.runtime.distributed import FIRST_PORT, NUM_PORTS, PORT_STEP, complete_environment
from training.runtime.topology import CPUS_PER_PROCESS, MEMORY_UNKNOWN

ROOT = Path(__file__).parents[1]

STOPPED_WHILE_STARTING = """
import os, signal
print("starting", flush=True)
input()
from training.runtime.preemption import StopRequest
with StopRequest("USR2") as stop:
    print(stop.requested, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_held_signal_is_obeyed_as_soon_as_the_process_can_and_does_not_kill_it_afterwards(number: int) -> None:
    command = [sys.executable, "slurm/hold_signals.py", "TERM", "SIGusr2", "--", sys.executable, "-c", STOPPED_WHILE_STARTING]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    process.send_signal(number)
    output, _ = process.communicate("go\n")
    assert output.split() == ["True", "saved"]
    assert process.returncode == 0


RANKS = r"""
for RANK in 0 1; do
    export RANK
    setsid bash -c 'echo $$ >"$RANK_PIDS/$RANK"; exec "$1" -c "$2"' - "$1" "$2" &
done
wait
exit 7
"""
RANK_PROGRAM = """
import os, time
from training.runtime.preemption import StopRequest
with StopRequest("USR2") as stop:
    os.write(1, b"running\\n")  # in one piece: two write to the same pipe
    end = time.monotonic() + 240  # nobody else ends it where the test fails
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.05)
assert stop.requested
os.write(1, b"saved\\n")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("early", [False, True])
def test_a_signal_for_the_launcher_reaches_processes_in_sessions_of_their_own(number: int, early: bool) -> None:
    """As Slurm sends it, to the process that it started itself; ``early``: before the others have."""
    launcher = ["bash", "-c", "read -r; " + RANKS, "-", sys.executable, RANK_PROGRAM]
    held = [sys.executable, "slurm/hold_signals.py", "TERM", "USR2", "--"]
    command = [*held, sys.executable, "slurm/pass_signals.py", *launcher]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    if early:
        until(lambda: bool(psutil.Process(process.pid).children()))
        process.send_signal(number)
    process.stdin.write("go\n")
    process.stdin.flush()
    said = [process.stdout.readline() for _ in range(2)]
    if not early:
        assert said == ["running\n"] * 2
        process.send_signal(number)
    assert sorted(said + process.stdout.readlines()) == ["running\n"] * 2 + ["saved\n"] * 2
    assert process.wait() == 7  # the launcher was told nothing


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def test_scripts_and_programs_choose_the_same_port_and_none_that_may_be_taken() -> None:
    script = (ROOT / "slurm" / "common.sh").read_text()
    found = re.findall(r"\b(?:FIRST_PORT|NUM_PORTS|PORT_STEP)=(\d+)", script)
    assert tuple(map(int, found)) == (FIRST_PORT, NUM_PORTS, PORT_STEP)
    (formula,) = re.findall(r"MASTER_PORT:-(\$\(\(.*?\)\))\}", script)
    facts = {"SLURM_JOB_ID": "12345", "SLURM_RESTART_COUNT": "3"}
    given = {**facts, "restarts": "3", "FIRST_PORT": str(FIRST_PORT), "NUM_PORTS": str(NUM_PORTS), "PORT_STEP": str(PORT_STEP)}
    printed = subprocess.run(["bash", "-c", f"echo {formula}"], env={**os.environ, **given}, capture_output=True, text=True)
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "a"}
    environment = {**facts, **step}
    complete_environment(environment)
    assert printed.stdout.strip() == environment["MASTER_PORT"]
    assert FIRST_PORT + NUM_PORTS <= 32768  # where Linux's ip_local_port_range starts


def settings(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "slurm/settings.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})


def test_settings_name_run_folder_signal_and_the_phases_a_configuration_needs() -> None:
    first, second = settings("configs/demo.yaml", "run.name=x", "deepspeed.stop_signal=USR1").stdout.splitlines()
    assert (first, second) == (str(ROOT / "runs" / "x"), "USR1")
    phases = settings("--phases", "configs/demo.yaml").stdout.splitlines()[2:]
    beside = "run.exclusive=false"
    assert phases == [
        "- train_ar ar.phase=base ar.from_scratch=true",
        "0 train_vae",
        "1 encode_latents",
        "2 train_denoiser",
        "3 train_denoiser stage=rollout",
        f"0 train_ar ar.copy_fraction=0 {beside}",
        "4 export",
        f"6 evaluate evaluate.lane=ladir {beside}",
        f"5 evaluate evaluate.lane=ar {beside}",
        "7:8 table",
    ]
    assert all((ROOT / "slurm" / f"{phase.split()[1]}.sbatch").is_file() for phase in phases)
    phases = settings("--phases", "configs/gsm8k.yaml", "evaluate.methods=[ladir]").stdout.splitlines()[2:]
    ladir = ["train_vae", "encode_latents", "train_denoiser", "train_denoiser stage=rollout", "export", "evaluate"]
    assert phases == [f"{number - 1 if number else '-'} {words}" for number, words in enumerate(ladir)]
    more = settings("--phases", "configs/gsm8k.yaml", "evaluate.methods=[ladir]", "rl.enabled=true").stdout.splitlines()[2:]
    assert [line.split(" ", 1)[1] for line in more] == [*ladir[:4], "train_rl", *ladir[4:]]


def test_stage_3_of_the_baseline_stands_behind_it_and_ladirs_evaluation_waits_for_neither() -> None:
    given = ("configs/gsm8k.yaml", "evaluate.methods=[ladir,ar-rl]", "rl.enabled=true", "rl.policy=text")
    phases = settings("--phases", *given).stdout.splitlines()[2:]
    assert phases[4:] == [
        "- train_ar run.exclusive=false",
        "4 train_rl run.exclusive=false",
        "3 export",
        "6 evaluate evaluate.lane=ladir run.exclusive=false",
        "5 evaluate evaluate.lane=ar run.exclusive=false",
        "7:8 table",
    ]
    phases = settings("--phases", given[0], "evaluate.methods=[ladir]", *given[2:]).stdout.splitlines()[2:]
    assert phases[4:] == ["- train_ar run.exclusive=false", "4 train_rl run.exclusive=false", "3 export", "6 evaluate"]


def test_who_keeps_others_out_of_the_folder_is_queued_beside_none() -> None:
    """Two jobs that want the folder for themselves at the same time: one would be refused."""

    def begins(phases: str, methods: str = "[ar,ladir]") -> list[str]:
        given = ("configs/gsm8k.yaml", f"evaluate.methods={methods}", "rollout.enabled=false")
        return [line.split()[0] for line in settings("--phases", *given, PHASES=phases).stdout.splitlines()[2:]]

    phases = "train_vae; encode_latents; train_denoiser; train_ar; export; evaluate"
    assert begins(phases) == ["-", "0", "1", "2", "3", "3:4"]
    assert begins(phases.replace("train_ar", "train_ar run.exclusive=false")) == ["-", "0", "1", "-", "2", "3:4"]
    lanes = "evaluate evaluate.lane=ladir; evaluate evaluate.lane=ar; table"
    assert begins(lanes) == ["-", "0", "1"]
    assert begins(lanes.replace(";", " run.exclusive=false;")) == ["-", "-", "0:1"]
    assert begins("", "[ar]") == ["-", "0", "1", "-", "2", "3:4"]


def test_snapshots_are_asked_beside_the_training_that_keeps_them() -> None:
    kept = ("denoiser.train.snapshot_every=100", "ar.train.snapshot_every=200", "evaluate.methods=[ar,ladir]")
    own = "--nodes=1 --gres=gpu:2 evaluate.num_questions=20"
    phases = settings("--phases", "configs/gsm8k.yaml", *kept, SNAPSHOTS=own).stdout.splitlines()[2:]
    assert [line for line in phases if "evaluate_snapshots" in line] == [
        f"+2:denoiser evaluate_snapshots {own}",
        f"+5:ar evaluate_snapshots {own}",
    ]
    assert phases[4] == "2 train_denoiser stage=rollout" and phases[7] == "4 export"  # nothing waits for them
    named = "train_vae; train_denoiser; train_ar; evaluate_snapshots --nodes=1"
    assert settings("--phases", "configs/gsm8k.yaml", kept[0], PHASES=named).stdout.splitlines()[-1].startswith("+1:denoiser ")
    result = settings("--phases", "configs/gsm8k.yaml", SNAPSHOTS=own)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: SNAPSHOTS: no training of the chain keeps any")
    result = settings("--phases", "configs/gsm8k.yaml", PHASES=named)
    assert result.returncode == 2 and "no training before it keeps snapshots" in result.stderr
    result = settings("--phases", "configs/gsm8k.yaml", *kept, SNAPSHOTS="evaluate.num_question=20")
    assert result.returncode == 2 and result.stderr.count("unknown setting evaluate.num_question;") == 1


def next_snapshots(*arguments: str, **variables: str) -> list[str]:
    environment = {**os.environ, "SNAPSHOTS_OF": "", **variables}
    command = [sys.executable, "slurm/snapshots.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()


def test_every_snapshot_is_asked_once_under_a_name_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "a"
    for name in ("denoiser-20", "denoiser-100", "denoiser-best-7", "ar-20", "rollout-5", "denoiser-300"):
        (run / "models" / name).mkdir(parents=True)
        if name != "denoiser-300":  # its training is still at it
            (run / f"outcome-{name}.json").write_text("{}")
    given = ("configs/gsm8k.yaml", f"run.folder={tmp_path}", "run.name=a", "evaluate.methods=[ar,ladir,ladir-best,ar-greedy]")
    of_denoiser = {"SNAPSHOTS_OF": "denoiser"}

    def line(phase: str, step: int, methods: str) -> str:
        own = f"evaluate.snapshot={step} evaluate.name={phase} evaluate.methods=[{methods}] evaluate.lane=all"
        return f"{phase} {step} {own} run.exclusive=false"

    assert next_snapshots(*given) == next_snapshots(*given, **of_denoiser) == [line("denoiser", 20, "ladir")]
    assert next_snapshots(*given, SNAPSHOTS_OF="ar") == [line("ar", 20, "ar,ar-greedy")]
    assert next_snapshots(*given, SNAPSHOTS_OF="rollout") == [line("rollout", 5, "ladir-rollout")]
    failed = run / "slurm" / "failed-snapshots"
    failed.parent.mkdir()
    failed.write_text("denoiser 20 job 7 2026-01-01 00:00:00 an error\n")
    assert next_snapshots(*given, **of_denoiser) == [line("denoiser", 100, "ladir")]
    (run / "results-denoiser-100.json").write_text("{}")
    assert next_snapshots(*given, **of_denoiser) == [line("denoiser", 20, "ladir")]
    failed.write_text(2 * failed.read_text())
    assert next_snapshots(*given, **of_denoiser) == []
    assert next_snapshots("--given-up", *given, **of_denoiser) == ["denoiser 20"]
    assert next_snapshots("--given-up", *given, SNAPSHOTS_OF="ar") == []
    suite = [*given, "evaluate.suite=maths7", "evaluate.name=x"]
    assert next_snapshots(*suite, SNAPSHOTS_OF="ar")[0].split()[3] == "evaluate.name=x-ar"
    (run / "suite-x-ar-20.json").write_text("{}")
    assert next_snapshots(*suite, SNAPSHOTS_OF="ar") == []


def test_what_jobs_beside_a_job_save_is_none_of_its_progress(tmp_path: Path) -> None:
    saved = {
        "train_denoiser": ("checkpoints/rollout/latest", "outcome-denoiser-20.json", "latents/train.parts-1/3.json"),
        "train_ar": ("checkpoints/ar/latest", "checkpoints/rl-mine/latest", "outcome-ar-20.json"),
        "evaluate evaluate.lane=ar": ("evaluation/answers-x/ar-12-float32/ar.00000.jsonl",),
        "evaluate evaluate.lane=ladir": ("evaluation/answers/ladir-12-float32/ladir.00000.jsonl",),
    }
    program = 'source slurm/common.sh; entry=$1 lane=${2#evaluate.lane=}; echo "$(saved_so_far)"'

    def marks() -> dict[str, str]:
        environment = {**os.environ, "RUN_FOLDER": str(tmp_path)}
        commands = {words: ["bash", "-c", program, "-", *words.split(), ""] for words in saved}
        run = {words: subprocess.run(line, cwd=ROOT, env=environment, capture_output=True) for words, line in commands.items()}
        return {words: done.stdout.decode() for words, done in run.items()}

    before = marks()
    for words, files in saved.items():
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("something\n")
            after = marks()
            assert [name for name in saved if before[name] != after[name]] in ([words], ["train_denoiser", words])
            assert file == "checkpoints/rl-mine/latest" or before["train_denoiser"] == after["train_denoiser"] or "deno" in words
            before = after


def test_help_of_the_submission_names_its_variables() -> None:
    told = subprocess.run(["slurm/submit.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("Queue the whole chain") and "PHASES " in told and "SNAPSHOTS " in told and "set -" not in told


def test_a_chain_that_would_lack_its_test_records_in_the_end_is_refused_in_the_beginning() -> None:
    result = settings("--phases", "configs/gsm8k.yaml", "data.test=null", "data.train=null")
    assert result.returncode == 2
    assert [line.split(" is")[0] for line in result.stderr.splitlines()] == ["error: data.train", "error: data.test"]
    assert settings("configs/gsm8k.yaml", "data.test=null").returncode == 0  # one phase alone


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_names_what_its_chain_reads(config: Path) -> None:
    result = settings("--phases", "--gres=gpu:1", str(config))
    assert (result.returncode, result.stderr) == (0, f"warning: {MEMORY_UNKNOWN}\n")


def test_what_is_wrong_with_the_deepspeed_file_is_said_before_anything_is_queued(tmp_path: Path) -> None:
    result = settings("--phases", "configs/gsm8k.yaml", "deepspeed.config=ds_configs/zero9.json", "data.test=null")
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ds_configs/zero9.json: no such file; deepspeed.config") and "data.test is not set" in second
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_com": true}}')
    result = settings("configs/gsm8k.yaml", f"deepspeed.config={tmp_path}/ds.json")
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count(f"error: {tmp_path}/ds.json: ") == 2
    result = settings("configs/gsm8k.yaml", "deepspeed.config=ds_configs/zero3.json", "backbone.compile=true")
    assert result.returncode == 2 and "does not go with ZeRO stage 3" in result.stderr


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """submit.sh with an sbatch that only counts."""
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir(exist_ok=True)
    sbatch.write_text("#!/bin/sh\necho 17\n")
    sbatch.chmod(0o755)
    environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", **variables}
    return subprocess.run(["slurm/submit.sh", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_a_chain_that_cannot_run_on_what_is_asked_for_is_not_queued(tmp_path: Path) -> None:
    run = ["configs/math_8b.yaml", f"run.folder={tmp_path}", "run.name=a"]
    result = submit(tmp_path, "--nodes=4", "--gres=gpu:8", "--cpus-per-task=4", *run)
    assert (result.returncode, result.stdout) == (2, "") and not (tmp_path / "a").exists()
    *others, batch = sorted(result.stderr.splitlines())
    assert batch.startswith("error: train_vae: 4 CPUs on a node for 8 processes")
    assert any(
        "train_denoiser stage=rollout: rollout.train.global_batch=16 cannot be shared equally by 32" in line for line in others
    )
    phases = "train_vae; train_denoiser --nodes=2 stage=rollout;\n train_ar ar.train.global_batch=30 --gres=gpu:5"
    result = submit(tmp_path, "--nodes=4", "--gres=gpu:8", "--cpus-per-task=64", *run, PHASES=phases)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: train_ar ar.train.global_batch=30: ar.train.global_batch=30 cannot be shared equally by 20"
    )
    result = submit(tmp_path, "--nodes=4", "--gres=gpu:8", *run, PHASES=phases.replace("gpu:5", "gpu:6").replace("30", "24"))
    assert result.returncode == 0 and result.stdout.count("job 17") == 3


@pytest.mark.parametrize("options", [("--nodes=2-4", "--gres=gpu:8"), ("--nodes=4", "--gpus-per-socket=4")])
def test_where_the_processes_are_not_known_it_is_said_that_batches_were_not_checked(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    run = [*options, "configs/math_8b.yaml", f"run.folder={tmp_path}", "run.name=a"]
    result = submit(tmp_path, *run, PHASES="train_vae; encode_latents; train_denoiser stage=rollout")
    assert result.returncode == 0 and result.stdout.count("job 17") == 3
    unknown, line = result.stderr.splitlines()
    assert unknown == f"warning: {MEMORY_UNKNOWN}"
    assert line.startswith("warning: batches were not checked (train_vae; train_denoiser stage=rollout): ")
    assert "--nodes=N and --gres=gpu:N" in line
    result = submit(tmp_path, *run, PHASES="train_denoiser --nodes=4-4 --gpus-per-node=8 stage=rollout")
    assert result.returncode == 2 and "rollout.train.global_batch=16 cannot be shared equally by 32" in result.stderr


def test_a_phase_that_does_not_fit_into_a_gpu_is_not_queued(tmp_path: Path) -> None:
    """The 8B file's VAE under ZeRO-2 on 32 GPUs of 24 GiB; stage 1 barely fits into 22."""
    run = ["--nodes=4", "--gres=gpu:8", "--cpus-per-task=64", "configs/math_8b.yaml", f"run.folder={tmp_path}", "run.name=a"]
    phases = "train_vae; encode_latents; train_denoiser"
    result = submit(tmp_path, *run, PHASES=phases, GPU_MEMORY="24")
    assert (result.returncode, result.stdout) == (2, "") and not (tmp_path / "a").exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("error", "warning"))]
    assert re.fullmatch(
        r"error: train_vae: takes 3\d\.\d GiB of a GPU with records as long as data\.max_\* lets in, and one has 24 "
        r"\(GPU_MEMORY\): try vae\.train\.deepspeed=ds_configs/zero3\.json",
        line,
    )
    remedy = line.rpartition(" try ")[2]
    result = submit(tmp_path, *run, remedy, PHASES=phases, GPU_MEMORY="22")
    assert result.returncode == 0 and result.stdout.count("job 17") == 3
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("error", "warning"))]
    assert line.startswith("warning: train_denoiser: takes 20.7 GiB") and "too little is left for CUDA" in line
    result = submit(tmp_path, *run, PHASES="train_vae", GPU_MEMORY="80GB")
    assert result.returncode == 2 and result.stderr.startswith("error: GPU_MEMORY=80GB is no number of GiB")


def count_processes(needs: str, **facts: str) -> subprocess.CompletedProcess[str]:
    """What the batch scripts make of a job's GPUs and CPUs."""
    command = 'source slurm/common.sh; count_processes train_vae "$NEEDS"; echo "$NODES $PROCESSES"'
    names = ("PROCESSES_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_ON_NODE", "LAUNCHER")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**rest, "NEEDS": needs, "SLURM_JOB_NUM_NODES": "2", **facts}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("needs", "gpus", "own", "cpus", "counted"),
    [
        ("gpus", "8", None, "16", "2 8"),
        ("gpus", "8", "4", "8", "2 4"),
        ("gpus", None, "8", "1", "2 8"),
        ("cpu", "1", None, "1", "1 1"),
        ("gpus", "8", None, "8", "8 CPU(s) on a node for 8 process(es)"),
        ("gpus", "8", "8", "15", "15 CPU(s) on a node for 8 process(es)"),
        ("gpus", "1", None, "1", "1 CPU(s) on a node for 1 process(es)"),
    ],
)
def test_a_job_with_fewer_than_two_cpus_for_a_gpus_process_ends_at_once(
    needs: str, gpus: str | None, own: str | None, cpus: str, counted: str
) -> None:
    """Processes without GPUs may share a CPU."""
    facts = {"SLURM_GPUS_ON_NODE": gpus, "PROCESSES_PER_NODE": own, "SLURM_CPUS_ON_NODE": cpus}
    result = count_processes(needs, **{name: value for name, value in facts.items() if value is not None})
    if result.returncode == 0:
        assert result.stdout.strip() == counted
    else:
        assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"error: train_vae: {counted}") and "add --cpus-per-task=N" in result.stderr


def test_scripts_and_submission_ask_for_the_same_cpus() -> None:
    (least,) = re.findall(r"\bCPUS_PER_PROCESS=(\d+)", (ROOT / "slurm" / "common.sh").read_text())
    assert int(least) == CPUS_PER_PROCESS


def test_with_a_container_the_machine_that_submits_needs_no_python(tmp_path: Path) -> None:
    """Its own is found first, and fails; the image's stands behind the command."""
    image = tmp_path / "image"
    image.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/ran\nexport PATH={Path(sys.executable).parent}:$PATH\nexec "$@"\n')
    image.chmod(0o755)
    for name in ("python", "python3"):
        bare = tmp_path / "bin" / name
        bare.parent.mkdir(exist_ok=True)
        bare.write_text("#!/bin/sh\necho no packages here >&2\nexit 1\n")
        bare.chmod(0o755)
    run = ["--gres=gpu:8", "--cpus-per-task=64", "configs/gsm8k.yaml", f"run.folder={tmp_path}", "run.name=a"]
    missing = f"{tmp_path}/none"
    assert "no packages here" in submit(tmp_path, *run, VENV=missing).stderr
    result = submit(tmp_path, *run, VENV=missing, CONTAINER=str(image), PHASES="train_vae")
    assert result.returncode == 0 and f"status       {image} python -m ladir status" in result.stdout
    assert (tmp_path / "ran").read_text().startswith("python slurm/settings.py --phases")


def test_with_slurms_own_containers_the_other_one_is_for_the_submission_alone() -> None:
    command = 'source slurm/common.sh; use_environment; has_image && echo "${#container[@]} ${srun_extra[*]}"'
    for extra, expected in (("--container-image=a.sqsh --container-mounts=/b", 0), ("--mpi=none", 2)):
        environment = {**os.environ, "ROOT": str(ROOT), "SRUN_EXTRA": extra, "CONTAINER": "enroot start"}
        result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (result.stdout, result.stderr) == (f"{expected} {extra}\n", "")


CRASH = """
source slurm/common.sh
prepare() { mkdir -p "$RUN_FOLDER/slurm" "$RUN_FOLDER/checkpoints/vae"; mark=$(saved_so_far); }
max_restarts=20 max_crashes=2 restarts=$IDLE idle_restarts=$IDLE LOG=log RANK_LOGS=ranks
INTERRUPTED_MARK=$RUN_FOLDER/interrupted FAILURE_MARK=$RUN_FOLDER/failure FAILED_NODES=$RUN_FOLDER/slurm/failed-nodes
STARTED=$RUN_FOLDER/slurm/started-7
prepare
[ -z "$SAVED" ] || echo "$SAVED" >"$RUN_FOLDER/checkpoints/vae/latest"
[ -z "$FAILURE" ] || echo "$FAILURE" >"$FAILURE_MARK"
finish train_vae 1
"""
SCONTROL = """#!/bin/sh
left=$(cat "$RUN_FOLDER/silent" 2>/dev/null || echo 0)
[ "$left" -eq 0 ] || { echo $((left - 1)) >"$RUN_FOLDER/silent"; kill -PIPE $$; }
[ "$1" != show ] || echo "JobId=$4 JobState=$(cat "$RUN_FOLDER/state") ExcNodeList=nodeX MinCPUsNode=1"
[ "$1" != requeue ] || echo PENDING >"$RUN_FOLDER/state"
[ "$1" != update ] || echo "updated $2 $3"
"""


def with_scontrol(folder: Path, state: str) -> None:
    """A scontrol that only tells, of jobs in this state."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    (folder / "state").write_text(f"{state}\n")


def test_a_job_goes_back_to_the_queue_though_slurm_does_not_answer_at_once(tmp_path: Path) -> None:
    sleep = tmp_path / "bin" / "sleep"
    sleep.parent.mkdir()
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    for silent, expected in ((2, 0), (5, 0), (99, 2)):
        (tmp_path / "silent").write_text(str(silent))
        status, told = crash(tmp_path, "absent -")
        assert status == expected and ("scontrol requeue was refused" in told) == bool(expected)


def crash(folder: Path, failure: str, saved: str = "", idle: int = 0) -> tuple[int, str]:
    """Status and output of a batch script whose step has failed, with a scontrol that only tells."""
    with_scontrol(folder, "RUNNING")
    facts = {"RUN_FOLDER": str(folder), "SLURM_JOB_ID": "7", "STOP_SIGNAL": "USR2"}
    facts |= {"IDLE": str(idle), "FAILURE": failure, "SAVED": saved}
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **facts}
    done = subprocess.run(["bash", "-c", CRASH], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_may_end_otherwise_goes_back_to_the_queue_and_what_must_be_mended_does_not(tmp_path: Path) -> None:
    assert crash(tmp_path, "refused -", "step-1")[0] == 1
    assert crash(tmp_path, "fault -")[0] == 1
    status, told = crash(tmp_path, "fault -", "step-2")
    assert status == 0 and "train_vae: crashed (an error in the program); back to the queue (restart 1; at most 2" in told
    assert "lost" in crash(tmp_path, "lost -", idle=1)[1]
    status, told = crash(tmp_path, "absent -", idle=1)
    assert status == 0 and "train_vae: crashed (its processes did not find one another); back to the queue (restart 2" in told
    assert crash(tmp_path, "absent -", idle=2)[0] == 2
    status, told = crash(tmp_path, "", idle=2)  # nobody said why
    assert status == 2 and "before anything more was saved, and MAX_CRASHES=2 is used up" in told
    assert crash(tmp_path, "", saved="step-3", idle=2)[0] == 0
    assert not (tmp_path / "slurm" / "failed-nodes").exists()


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/vae/latest",
        "tokens/records-1/index.json",
        "tokens/questions-1/index.json",
        "latents/train.parts-1/000000001.json",
        "judged/1/000000002.safetensors",
        "evaluation/answers/1/ladir.00000.jsonl",
        "gold.json",
        "outcome-vae.json",
        "results-denoiser-20.json",
    ],
)
def test_whatever_a_phase_keeps_for_the_next_start_is_progress_and_what_is_half_written_is_not(file: str, tmp_path: Path) -> None:
    def mark() -> str:
        entries = {"evaluation": "evaluate", "results-denoiser-20.json": "evaluate_snapshots"}
        entry = entries.get(file.partition("/")[0], "train_vae")
        command, environment = f"source slurm/common.sh; entry={entry}; saved_so_far", {**os.environ, "RUN_FOLDER": str(tmp_path)}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout

    before = mark()
    for other in ("judged/1/000000002.writing", "tokens/.questions-1.x/index.json", "status.json"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("1")
    assert mark() == before
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1")
    assert mark() != before and mark() == mark()


LOOK = """
source slurm/common.sh
flock() { command flock "${@/60/0}"; }
entry=evaluate_snapshots STARTED=$RUN_FOLDER/slurm/started-7
mkdir -p "$RUN_FOLDER/slurm"
keep_others_out
echo looks
wait_for_snapshots
"""


def look(folder: Path, state: str = "RUNNING", training: str = "5", phase: str = "denoiser") -> tuple[int, bool, bool]:
    """Status of a job that finds no snapshot, whether it could look at all, and whether it went back to the queue."""
    with_scontrol(folder, state)
    facts = {"RUN_FOLDER": str(folder), "SLURM_JOB_ID": "7", "STOP_SIGNAL": "USR2"}
    facts |= {"TRAINING_JOB": training, "SNAPSHOTS_OF": phase}
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **facts}
    done = subprocess.run(["bash", "-c", LOOK], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, "looks" in done.stdout, (folder / "state").read_text() == "PENDING\n"


def test_a_job_that_waits_for_snapshots_leaves_none_to_another_that_does_not_and_stays_cancelled(tmp_path: Path) -> None:
    assert look(tmp_path) == look(tmp_path, phase="") == (0, True, True)
    assert look(tmp_path, state="COMPLETING") == (1, True, False)
    with (tmp_path / "slurm" / ".snapshots.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a job for all phases
        assert look(tmp_path) == (0, False, True)
        assert look(tmp_path, training="") == (0, False, False)
        fcntl.flock(held, fcntl.LOCK_SH)  # as one for another phase
        assert look(tmp_path) == (0, True, True)
        assert look(tmp_path, training="", phase="") == (0, False, False)
    with (tmp_path / "slurm" / ".snapshots-denoiser.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert look(tmp_path) == (0, False, True)


ASK = """
source slurm/common.sh
start_step() { [ -z "$MARKED" ] || touch "$INTERRUPTED_MARK"; return "$STATUS"; }
finish() { echo "ends as stopped"; exit; }
entry=evaluate_snapshots restarts=0 NODES=1 PROCESSES=1 LAUNCHER=srun RANK_LOGS=ranks FAILED_SNAPSHOTS=$RUN_FOLDER/failed
INTERRUPTED_MARK=$RUN_FOLDER/interrupted FAILURE_MARK=$RUN_FOLDER/failure
echo "fault -" >"$FAILURE_MARK"
ask_snapshot "denoiser 20 evaluate.snapshot=20" config
echo "goes on"
"""


@pytest.mark.parametrize(
    ("status", "marked", "told", "failures"),
    [(0, "", "goes on", 0), (0, "1", "ends as stopped", 0), (75, "", "ends as stopped", 0), (1, "", "goes on", 1)],
)
def test_a_snapshot_whose_asking_was_stopped_is_not_taken_for_asked(
    tmp_path: Path, status: int, marked: str, told: str, failures: int
) -> None:
    """Some launchers garble the status, which is why there is a mark."""
    facts = {"RUN_FOLDER": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a", "STATUS": str(status), "MARKED": marked}
    done = subprocess.run(["bash", "-c", ASK], cwd=ROOT, env={**os.environ, **facts}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == told
    failed = tmp_path / "failed"
    assert (len(failed.read_text().splitlines()) if failed.is_file() else 0) == failures


def test_a_node_that_failed_twice_is_left_out_by_the_job_and_by_those_of_its_chain_that_wait(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs").write_text("7 train_vae\n8 encode_latents\n")
    assert "updated" not in crash(tmp_path, "lost nodeB")[1]
    status, told = crash(tmp_path, "sick nodeA,nodeB")
    assert status == 0 and "crashed (a device is wrong or slow: nodeA, nodeB)" in told
    assert {line for line in told.splitlines() if line.startswith("updated")} == {
        "updated JobId=7 ExcNodeList=nodeX,nodeB",
        "updated JobId=8 ExcNodeList=nodeX,nodeB",
    }


RESTART = """
source slurm/common.sh
restarts=$RESTARTS FAILED_NODES=$RUN_FOLDER/slurm/failed-nodes
mkdir -p "$RUN_FOLDER/slurm"
note_lost_node
"""
ACCOUNTS = '#!/bin/sh\n[ -f "$RUN_FOLDER/sacct" ] && cat "$RUN_FOLDER/sacct"\n'
NODES = """#!/bin/sh
case "$1 $2" in
    "show hostnames") printf 'nodeA\\nnodeB\\n' ;;
    "show node") cat "$RUN_FOLDER/nodes" ;;
    "show job") echo "JobId=$4 JobState=PENDING ExcNodeList=(null) MinCPUsNode=1" ;;
    update*) echo "updated $2 $3" ;;
esac
"""


def restart(folder: Path, number: int, nodes: dict[str, str], accounts: str = "") -> str:
    """What a batch script says at start ``number`` of its job, where Slurm tells that of its nodes and in its accounts."""
    for name, text in (("scontrol", NODES), ("sacct", ACCOUNTS)):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    facts = {"State": "IDLE", "BootTime": "2020-01-01T00:00:00"}
    lines = [
        f"NodeName={name} Arch=x86_64 BootTime={told if told[0].isdigit() else facts['BootTime']} "
        f"State={facts['State'] if told[0].isdigit() else told} Reason=a b"
        for name, told in nodes.items()
    ]
    (folder / "nodes").write_text("\n".join(lines) + "\n")
    (folder / "sacct").write_text(accounts)
    facts = {"RUN_FOLDER": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[A-B]", "RESTARTS": str(number)}
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **facts}
    done = subprocess.run(["bash", "-c", RESTART], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def failed(folder: Path) -> list[str]:
    file = folder / "slurm" / "failed-nodes"
    return [" ".join(line.split()[:2]) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.parametrize(
    ("nodes", "accounts", "lost"),
    [
        ({"nodeA": "IDLE", "nodeB": "DOWN+NOT_RESPONDING"}, "", "nodeB"),
        ({"nodeA": "IDLE*", "nodeB": "ALLOCATED"}, "", "nodeA"),
        ({"nodeA": "IDLE", "nodeB": "9999-01-01T00:00:00"}, "", "nodeB"),  # it has booted since
        ({"nodeA": "IDLE", "nodeB": "IDLE"}, "NODE_FAIL|nodeB\nRUNNING|None assigned\n", "nodeB"),
        ({"nodeA": "IDLE", "nodeB": "DOWN"}, "NODE_FAIL|nodeA\nRUNNING|\n", "nodeA"),
        ({"nodeA": "IDLE", "nodeB": "IDLE"}, "NODE_FAIL|nodeB\nPREEMPTED|\nRUNNING|\n", ""),  # noted by the start before
        ({"nodeA": "IDLE", "nodeB": "IDLE"}, "NODE_FAIL|elsewhere\nRUNNING|\n", ""),
        ({"nodeA": "DOWN", "nodeB": "DOWN"}, "", ""),  # a switch, or the whole site
        ({"nodeA": "IDLE", "nodeB": "IDLE"}, "", ""),  # put back for another job
    ],
)
def test_a_node_that_slurm_has_lost_is_noted_by_the_next_start(
    tmp_path: Path, nodes: dict[str, str], accounts: str, lost: str
) -> None:
    assert restart(tmp_path, 0, {"nodeA": "IDLE", "nodeB": "DOWN"}) == "" and not failed(tmp_path)
    told = restart(tmp_path, 1, nodes, accounts)
    assert (f"after it lost {lost} (noted" in told if lost else told == "") and failed(tmp_path) == [f"{lost} node-lost"] * bool(
        lost
    )


def test_a_node_that_slurm_has_lost_twice_is_left_out_and_what_a_start_has_noted_itself_is_not_noted_again(
    tmp_path: Path,
) -> None:
    lost = {"nodeA": "IDLE", "nodeB": "DOWN"}
    restart(tmp_path, 0, lost)
    (tmp_path / "slurm" / "jobs").write_text("7 train_vae\n8 encode_latents\n")
    assert "updated" not in restart(tmp_path, 1, lost)
    crash(tmp_path, "absent -")  # it has come to its own end, and blames none
    assert restart(tmp_path, 2, lost) == ""
    crash(tmp_path, "lost nodeC")
    assert failed(tmp_path) == ["nodeB node-lost", "nodeC lost"]
    restart(tmp_path, 3, lost)
    assert "updated JobId=8 ExcNodeList=nodeB" in restart(tmp_path, 4, lost)
    assert failed(tmp_path)[2:] == ["nodeB node-lost"]


def test_processes_that_die_without_a_word_are_told_of_by_their_node(tmp_path: Path) -> None:
    """And those that say why are not; the first to speak is believed."""
    mark = tmp_path / "failure"
    environment = {**os.environ, "FAILURE_MARK": str(mark), "SLURMD_NODENAME": "nodeB"}
    told = "from training.runtime.failures import tell_batch_script as tell; tell('refused'); tell('lost', ['nodeC']); exit(1)"
    for program, said in (("exit(0)", ""), ("import os; os.kill(os.getpid(), 9)", "ended nodeB\n"), (told, "refused -\n")):
        mark.unlink(missing_ok=True)
        command = [sys.executable, "slurm/pass_signals.py", sys.executable, "-c", program]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        assert (mark.read_text() if mark.exists() else "") == said


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_port_that_another_job_has_is_no_nodes_fault(tmp_path: Path, node: str) -> None:
    """torchrun finds it taken before a rank is started; behind a free port the same end is this node's."""
    mark = tmp_path / "failure"
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {
            **os.environ,
            "FAILURE_MARK": str(mark),
            "SLURMD_NODENAME": "nodeB",
            "SLURM_NODEID": node,
            "MASTER_PORT": port,
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--master_addr", "127.0.0.1", "--master_port"]
        launcher = [*torchrun, port, "--no_python", "true"] if node == "0" else [sys.executable, "-c", "exit(1)"]
        subprocess.run([sys.executable, "slurm/pass_signals.py", *launcher], cwd=ROOT, env=environment, check=False)
    assert mark.read_text() == ("absent -\n" if node == "0" else "ended nodeB\n")


def test_what_submit_prints_can_be_pasted(tmp_path: Path) -> None:
    """With a folder whose name has spaces and brackets."""
    folder = tmp_path / "my runs [1]"
    command = ["--gres=gpu:1", "configs/demo.yaml", f"run.folder={folder}", "run.name=d"]
    result = submit(tmp_path, *command, PHASES="train_vae")
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert shlex.split(lines["tensorboard"])[-1] == str(folder / "d" / "tensorboard")
    assert shlex.split(lines["logs"])[-1] == str(folder / "d" / "logs" / "*.log")


def test_settings_report_every_error_in_a_line_of_its_own() -> None:
    result = settings("configs/demo.yaml", "vae.latent_dimm=3", "vae.beta=-1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert [line.startswith("error: ") for line in result.stderr.splitlines()] == [True, True]
