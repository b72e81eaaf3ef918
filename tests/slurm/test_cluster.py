"""The batch scripts on a real two-node cluster: chains, launchers, signals, preemption, lost nodes, dead ranks, bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import PATIENCE, REPOSITORY, Cluster
from tests.slurm.project import CONFIG, SIZE, Project
from training.runtime.distributed import FIRST_PORT, NUM_PORTS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
PAGE = (REPOSITORY / "docs" / "slurm.md").read_text()
PHASES = "train_vae; encode_latents; train_denoiser; export --time=00:30:00; evaluate evaluate.methods=[ladir]"
#: a base LM's training, which needs nothing of other runs
ENDLESS = ["ar.phase=base", "ar.from_scratch=true", "ar.train.max_steps=1000000"]


def shown_submission() -> tuple[list[str], list[str]]:
    """What docs/slurm.md gives submit.sh for four nodes of eight GPUs: sbatch's options; configuration and settings."""
    shown = re.search(r"^    slurm/submit\.sh (.*--nodes=4 .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    assert shown is not None
    words = shlex.split(shown[1])
    return [word for word in words if word.startswith("--")], [word for word in words if not word.startswith("--")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_accepts_every_script_and_finds_no_site_in_it(script: Path, cluster: Cluster) -> None:
    accepted = cluster.run("sbatch", "--test-only", *SIZE, f"slurm/{script.name}", CONFIG)
    assert "to start at" in accepted.stderr
    lines = script.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(directives) > 3
    assert max(directives) < min(commands)
    for word in ("account", "partition", "qos", "gres", "gpus", "constraint", "nodes", "time"):
        assert not any(f"--{word}=" in lines[number] for number in directives)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*SIZE], "no configuration"),
        ([*SIZE, "configs/none.yaml"], "no configuration file 'configs/none.yaml'"),
        ([*SIZE, CONFIG, "vae.latent_dimm=3"], "unknown setting vae.latent_dimm; did you mean vae.latent_dim?"),
        (["--nodes=2", CONFIG], "no GPU asked for"),
    ],
    ids=["no config", "no such config", "unknown key", "no GPU"],
)
def test_a_chain_that_cannot_work_is_refused_in_one_line(arguments: list[str], reason: str, cluster: Cluster) -> None:
    result = cluster.run("slurm/submit.sh", *arguments, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_a_batch_that_32_gpus_cannot_share_is_refused_and_with_the_remedy_the_chain_waits_in_the_queue(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The submission that docs/slurm.md shows, without its batch of stage 2 and with the one that the refusal names."""
    options, settings = shown_submission()
    settings.remove("rollout.train.global_batch=32")
    command = ["slurm/submit.sh", *options, "--partition=large", *settings, f"run.folder={tmp_path}"]
    before = cluster.known()
    refused = cluster.run(*command, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.strip() in PAGE
    assert cluster.known() == before
    assert list(tmp_path.iterdir()) == []
    remedy = re.search(r"(rollout\.train\.global_batch)=16 cannot be shared equally by 32 ranks: use (\d+)", refused.stderr)
    assert remedy is not None
    accepted = cluster.run(*command, f"{remedy[1]}={remedy[2]}")
    entries = dict(re.findall(r"^job (\d+)  (\S+)", accepted.stdout, re.MULTILINE))
    assert cluster.known() == before | entries.keys()
    on_gpus = ",".join(job for job, entry in entries.items() if entry not in ("export", "table"))
    waiting = cluster.run("squeue", "--noheader", f"--jobs={on_gpus}", "--format=%T %D %b").stdout.splitlines()
    assert waiting == ["PENDING 4 gres:gpu:8"] * 7
    (run,) = tmp_path.iterdir()
    status = [sys.executable, "-m", "ladir", "status", str(run)]

    def told() -> str:
        return cluster.run(*status).stdout

    # Slurm's own word of why, which it finds when it goes through its queue
    cluster.until(lambda: "(Dependency)" in told(), "the queue's reason in the status", next(iter(entries)))
    assert re.findall(r"^waits in the queue: job (\d+) ", told(), re.MULTILINE) == sorted(entries, key=int)
    with (tmp_path / "watched").open("w+") as watched, cluster.start(*status, "--watch", "1", stdout=watched) as watch:
        cluster.until(lambda: "waits in the queue" in Path(watched.name).read_text(), "a watch to tell", next(iter(entries)))
        cluster.run("scancel", *entries)
        assert watch.wait(timeout=PATIENCE) == 0  # nothing waits any more: it ends by itself


def test_a_chain_is_queued_as_a_whole_or_not_at_all(cluster: Cluster, tmp_path: Path) -> None:
    chain = "train_vae --begin=now+1hour; export; evaluate --partition=nowhere"
    result = cluster.run("slurm/submit.sh", *SIZE, CONFIG, f"run.folder={tmp_path}", check=False, PHASES=chain)
    assert result.returncode != 0
    assert result.stdout.count("job ") == 2
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout == ""


@pytest.mark.parametrize(
    ("options", "arguments", "reason"),
    [
        (SIZE, [], "no configuration"),
        (SIZE, [CONFIG, "vae.latent_dimm=3"], "unknown setting vae.latent_dimm"),
        (["--nodes=2"], [CONFIG], "this job has no GPU"),
    ],
    ids=["no config", "unknown key", "no GPU"],
)
def test_a_job_that_cannot_work_ends_at_once_in_one_line(
    options: list[str], arguments: list[str], reason: str, cluster: Cluster, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = cluster.submit(f"--output={log}", *options, "slurm/train_vae.sbatch", *arguments)
    assert cluster.wait(job, seconds=30) == "FAILED"
    assert len(log.read_text().splitlines()) == 1
    assert reason in log.read_text()


def test_the_chain_leaves_everything_in_the_run_folder(chain: dict[str, str], project: Project) -> None:
    ladir = ["train_vae", "encode_latents", "train_denoiser", "rollout"]
    assert list(chain) == ["base", *ladir, "train_ar", "export", "evaluate ladir", "evaluate ar", "table"]
    run = project.folder / "first"
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["ar-greedy", "ladir", "ladir-rollout"]
    assert json.loads((run / "export" / "ladir.json").read_text())["origin"]  # stage 2's denoiser was exported
    assert (run / "export" / "config.json").is_file()
    assert json.loads((run / "environment.json").read_text())["packages"]
    assert (run / "config.yaml").is_file()
    assert len(list((run / "slurm").glob("submitted-*.yaml"))) == 1
    job = chain["train_vae"]
    assert (run / "slurm" / f"hostfile-{job}").read_text().splitlines() == ["nodeA slots=1", "nodeB slots=1"]
    assert (run / "slurm" / f"train_vae-{job}.sbatch").read_text() == (REPOSITORY / "slurm/train_vae.sbatch").read_text()
    for rank in range(2):
        assert (run / "logs" / "ranks" / f"train_vae-{job}-rank-{rank}.log").is_file()
    assert "vae 100%" in project.log(job)
    assert "2 node(s) x 1 process(es), torchrun" in project.log(job)
    steps = project.losses("first", "vae")
    assert list(steps) == list(range(1, max(steps) + 1))


def test_both_lanes_go_on_at_once_and_their_table_is_that_of_one_job(chain: dict[str, str], project: Project) -> None:
    """The baseline waits for none of LaDiR's phases.  Of the two that ask, one is stopped and the other's rank is killed."""
    begun = {phase: project.cluster.job(job)["StartTime"] for phase, job in chain.items()}
    assert begun["train_ar"] < begun["encode_latents"]
    project.finish(project.submit("evaluate", "first", "evaluate.name=one"))
    expected = project.table("first", "-one")
    assert project.table("first") == expected
    asking = [f"evaluate evaluate.lane={lane} run.exclusive=false" for lane in ("ladir", "ar")]
    phases = "; ".join([*asking, "table"])
    jobs = project.submit_chain("first", "evaluate.name=two", PHASES=phases, STOP_SECONDS="60")
    ladir, ar = jobs["evaluate ladir"], jobs["evaluate ar"]
    for job in (ladir, ar):
        project.started(job)
    project.cluster.run("scancel", "--signal=USR2", ladir)
    project.rank("first", 1, ar).kill()
    for job in (ladir, ar):
        project.restarted(job, 1)
    assert project.cluster.state(jobs["table"]) == "PENDING"
    for job in jobs.values():
        project.finish(job)
    assert project.table("first", "-two") == expected
    assert not (project.folder / "first" / "evaluation").exists()


def test_snapshots_are_asked_while_their_training_goes_on_each_once_and_without_harm(
    chain: dict[str, str], project: Project
) -> None:
    """The training is frozen behind its first snapshot: what asks it is stopped, comes back, and waits without GPUs.

    Another snapshot cannot be asked: it is given up, the rest is not.
    """
    cluster, name, run = project.cluster, "beside", project.folder / "beside"
    settings = ("denoiser.train.max_steps=12", "denoiser.train.snapshot_every=4", "evaluate.questions_per_batch=1")
    phases, own = "train_denoiser --nodes=1; export", "--nodes=1 evaluate.num_questions=4"
    for part in ("models/vae", "latents"):
        shutil.copytree(project.folder / "first" / part, run / part)
    jobs = project.submit_chain(name, *settings, PHASES=phases, SNAPSHOTS=own, SNAPSHOT_SECONDS="1")
    assert list(jobs) == ["train_denoiser", "evaluate_snapshots", "export"]
    training, asking = jobs["train_denoiser"], jobs["evaluate_snapshots"]
    cluster.until(lambda: (run / "outcome-denoiser-4.json").is_file(), "the first snapshot", training)
    process = project.rank(name, 0, training)
    process.suspend()
    broken = run / "models" / "denoiser-2"
    broken.mkdir()
    (run / "outcome-denoiser-2.json").write_text((run / "outcome-denoiser-4.json").read_text())
    project.started(asking)
    cluster.run("scancel", "--signal=USR2", asking)
    cluster.until(lambda: (run / "results-denoiser-4.json").is_file(), "its results", asking)
    assert not (run / "outcome-denoiser-8.json").exists()
    cluster.until(lambda: "the next look is in 1 seconds" in project.log(asking), "it to wait", asking)
    restarts = int(cluster.job(asking)["Restarts"])
    project.restarted(asking, restarts + 2)
    process.resume()
    project.finish(training)
    assert cluster.wait(asking) == "FAILED"
    project.finish(jobs["export"])
    log = project.log(asking)
    assert "given up after two failures each: denoiser 2; " in log
    assert {path.name for path in run.glob("results*")} == {"results-denoiser-4.json", "results-denoiser-8.json"}
    assert log.count("evaluate finished: 4 questions") == 2
    assert log.count("step 2 of denoiser was not asked") == 2
    assert {path.name for path in (run / "tensorboard").glob("evaluate*")} == {"evaluate-denoiser-snapshots"}


@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_a_chain_is_stopped_and_continues_under_each_launcher(launcher: str, chain: dict[str, str], project: Project) -> None:
    """The VAE is stopped in training; encoding and evaluation while their processes are still starting (of one launcher).

    One launcher finds Python behind a command, as in a container, and no environment is activated.
    """
    phases = PHASES.split("; ") if launcher == "srun" else ["train_vae", "encode_latents"]
    image = {"CONTAINER": f"env PATH={Path(sys.executable).parent}:{os.environ['PATH']}"} if launcher == "srun" else {}
    jobs = project.submit_chain(launcher, LAUNCHER=launcher, PHASES="; ".join(phases), **image)
    assert list(jobs) == [phase.split()[0] for phase in phases]
    for phase, job in jobs.items():
        if phase == "train_vae":
            project.reach(job, launcher, 3)
        elif phase in ("encode_latents", "evaluate") and launcher == "srun":
            project.started(job)
        else:
            project.finish(job)
            continue
        project.cluster.run("scancel", "--signal=USR2", job)
        project.restarted(job, 1)
        project.finish(job)
        assert "interrupted and saved; back to the queue (restart 1; at most 20 without progress)" in project.log(job)
        assert f"start 2: 2 node(s) x 1 process(es), {launcher}" in project.log(job)
    assert (project.folder / launcher / "results.json").is_file() == ("evaluate" in jobs)
    assert project.losses(launcher, "vae") == project.losses("first", "vae")
    assert project.weights(launcher, "vae") == project.weights("first", "vae")


def test_signal_a_lost_node_and_preemption_in_a_validation_change_no_loss(chain: dict[str, str], project: Project) -> None:
    """Behind the step that is validated no checkpoint is due: the stop has written it, and the validation is made up for."""
    cluster, name, validated = project.cluster, "survivor", 45
    job = project.submit("train_vae", name, *project.long_validation(validated))

    project.reach(job, name, 3)
    cluster.run("scancel", "--signal=USR2", job)
    project.restarted(job, 1)
    saved = project.step(name)

    project.reach(job, name, saved + 3)
    cluster.run("scontrol", "update", "nodename=nodeB", "state=down", "reason=test")
    project.restarted(job, 2)
    cluster.run("scontrol", "update", "nodename=nodeB", "state=resume", check=False)  # refused where it is back by itself

    project.reach(job, name, validated)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    project.restarted(job, 3)
    assert (project.step(name), project.validated(name)) == (validated, [])
    assert f"vae interrupted after step {validated}, saved" in project.log(job)
    assert cluster.wait(urgent) == "COMPLETED"
    project.finish(job)

    log = project.log(job)
    assert "USR2 received" in log
    assert "TERM received" in log
    assert "start 4: " in log
    assert f"phase vae continues after step {validated}" in log
    assert project.validated(name) == [validated, 60]
    assert project.losses(name, "vae") == project.losses("first", "vae")
    assert project.weights(name, "vae") == project.weights("first", "vae")


def test_a_cancelled_job_stays_cancelled(chain: dict[str, str], project: Project) -> None:
    cluster, name = project.cluster, "killed"
    job = project.submit("train_vae", name)
    project.reach(job, name, 3)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(3)  # a job that went back to the queue would do so now
    assert cluster.state(job) == "CANCELLED"


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_killed_rank_brings_the_job_back_and_a_node_that_failed_twice_is_left_out(
    launcher: str, chain: dict[str, str], project: Project
) -> None:
    """Killed before there is a checkpoint, and behind one; the second time nodeB goes, and with it the place for two nodes."""
    cluster, name = project.cluster, f"killed-{launcher}"
    job = project.submit("train_vae", name, LAUNCHER=launcher)
    project.reach(job, name, 3)
    project.rank(name, 1).kill()
    project.restarted(job, 1)
    project.reach(job, name, 13)
    project.rank(name, 1).kill()
    project.restarted(job, 2)
    cluster.until(lambda: cluster.job(job)["ExcNodeList"] == "nodeB", "nodeB to be left out", job)
    failed = (project.folder / name / "slurm" / "failed-nodes").read_text().splitlines()
    assert [line.split()[0] for line in failed] == ["nodeB", "nodeB"]
    assert f"job {job} leaves out nodeB, which failed twice" in project.log(job)
    cluster.run("scontrol", "update", f"JobId={job}", "ExcNodeList=")  # the only other node, so that the job can end
    project.finish(job)
    assert "error: train_vae failed with status" in project.log(job)
    assert "phase vae continues after step 10" in project.log(job)
    steps = project.losses(name, "vae")
    assert {step: set(found) for step, found in steps.items()} == {
        step: set(found) for step, found in project.losses("first", "vae").items()
    }
    assert project.weights(name, "vae") == project.weights("first", "vae")


def test_a_node_that_slurm_declares_lost_is_noted_by_the_next_start(project: Project) -> None:
    """Its script is gone with it.  It stays down, so that the job begins again on the other node."""
    cluster, name = project.cluster, "node-lost"
    own = [*project.settings(name), f"backbone.name_or_path={project.folder}/{name}/models/base", *ENDLESS]
    job = cluster.submit("--nodes=1", *SIZE[1:], "slurm/train_ar.sbatch", CONFIG, *own)
    project.started(job)
    lost = cluster.job(job)["NodeList"]
    noted = project.folder / name / "slurm" / "failed-nodes"
    cluster.lose_node(lost)  # where nothing else runs
    try:
        cluster.until(noted.is_file, "the next start to note the node", job)
        assert noted.read_text().startswith(f"{lost} node-lost job {job} ")
        assert cluster.job(job)["NodeList"] in {"nodeA", "nodeB"} - {lost}
        assert f"Slurm put this job back after it lost {lost}" in project.log(job)
    finally:
        cluster.run("scancel", job)
        cluster.start_node(lost)
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)
        cluster.wait(job)


def test_a_job_that_finds_its_port_taken_comes_back_and_meets_at_another(chain: dict[str, str], project: Project) -> None:
    cluster, name = project.cluster, "taken"
    held = ("--hold", *SIZE, "slurm/train_vae.sbatch", CONFIG, *project.settings(name))
    job = cluster.submit(*held, LAUNCHER="srun")
    with socket.socket() as other:
        other.bind(("", FIRST_PORT + int(job) % NUM_PORTS))
        other.listen()
        cluster.run("scontrol", "release", job)
        project.restarted(job, 1)
    project.finish(job)
    assert "crashed (its processes did not find one another); back to the queue (restart 1" in project.log(job)
    assert not (project.folder / name / "slurm" / "failed-nodes").exists()
    assert project.losses(name, "vae") == project.losses("first", "vae")


def test_a_failing_phase_cancels_what_depends_on_it(chain: dict[str, str], project: Project) -> None:
    phases = "train_vae; encode_latents; evaluate"
    jobs = project.submit_chain("failing", "data.train=nowhere.jsonl", PHASES=phases, LAUNCHER="srun")
    assert [project.cluster.wait(job) for job in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "nowhere.jsonl" in project.log(jobs["train_vae"])


def test_a_job_goes_back_to_the_queue_only_so_often_without_progress(chain: dict[str, str], project: Project) -> None:
    job = project.submit("train_vae", "tired", MAX_RESTARTS="0")
    project.started(job)
    project.cluster.run("scancel", "--signal=USR2", job)
    assert project.cluster.wait(job) == "FAILED"
    assert "interrupted before anything more was saved, and MAX_RESTARTS=0 is used up" in project.log(job)
