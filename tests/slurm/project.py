"""Runs of the tiny configuration on the test cluster: submitted with the project's own scripts, read from their folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.slurm.cluster import REPOSITORY, Cluster

CONFIG = "tests/slurm/tiny.yaml"
SIZE = ("--nodes=2", "--gres=gpu:1", "--cpus-per-task=2")
COPIES = 10
"""Of the training's records in a long validation, which then takes many times what a signal needs to arrive."""


class Project:
    """A folder of runs, and what happens in them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        command = [sys.executable, "-m", "ladir", "countdown", "--out", str(folder / "data"), "--config", CONFIG]
        subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)

    def settings(self, name: str) -> list[str]:
        """Overrides of a run that starts from the base LM of the run ``first``."""
        own = [] if name == "first" else [f"backbone.name_or_path={self.folder}/first/models/base"]
        return [f"run.folder={self.folder}", f"run.name={name}", *own]

    def submit(self, entry: str, name: str, *settings: str, **variables: str) -> str:
        """One phase through its batch script; returns the job id."""
        return self.cluster.submit(*SIZE, f"slurm/{entry}.sbatch", CONFIG, *self.settings(name), *settings, **variables)

    def submit_chain(self, name: str, *settings: str, **variables: str) -> dict[str, str]:
        """A chain through submit.sh: job ids by phase."""
        result = self.cluster.run("slurm/submit.sh", *SIZE, CONFIG, *self.settings(name), *settings, **variables)
        jobs = re.findall(r"^job (\d+)  (\S+)(.*)", result.stdout, re.MULTILINE)
        named = {"from_scratch": "base", "stage=rollout": "rollout", "lane=ar": "evaluate ar", "lane=ladir": "evaluate ladir"}
        return {next((name for word, name in named.items() if word in rest), entry): job for job, entry, rest in jobs}

    def finish(self, job: str) -> None:
        """Wait for the job and expect it to have succeeded."""
        state = self.cluster.wait(job)
        assert state == "COMPLETED", f"{state}\n{self.cluster.report(job)}\n{self.log(job)}"

    def log(self, job: str) -> str:
        """The job's log in its run folder."""
        return "\n".join(file.read_text(errors="replace") for file in self.folder.glob(f"*/logs/*-{job}.log"))

    def losses(self, name: str, phase: str) -> dict[int, list[tuple[float, float, float]]]:
        """Loss, learning rate and gradient norm as recorded, by step; a step recorded twice has two entries."""
        found: dict[int, list[tuple[float, float, float]]] = {}
        for row in self._rows(name, phase, "train"):
            found.setdefault(row["step"], []).append((row["loss"], row["lr"], row["grad_norm"]))
        return found

    def validated(self, name: str, phase: str = "vae") -> list[int]:
        """The steps whose validations have come to their end."""
        return [row["step"] for row in self._rows(name, phase, "validation")]

    def _rows(self, name: str, phase: str, kind: str) -> Iterator[dict[str, Any]]:
        """What a phase has recorded of a kind."""
        file = self.folder / name / "metrics.jsonl"
        for line in file.read_text().splitlines() if file.is_file() else []:
            row = json.loads(line) if line.endswith("}") else {}  # the last line may be under way
            if row.get("phase") == phase and row["kind"] == kind:
                yield row

    def step(self, name: str, phase: str = "vae") -> int:
        """The last recorded step of a phase."""
        return max(self.losses(name, phase), default=0)

    def reach(self, job: str, name: str, step: int) -> None:
        """Wait until the VAE's training has recorded ``step``."""
        self.cluster.until(lambda: self.step(name) >= step, f"step {step}", job)

    def long_validation(self, step: int) -> list[str]:
        """Overrides with which the VAE is validated behind ``step`` and at its end, on so many records that it takes a while."""
        file = self.folder / "data" / "long.jsonl"
        file.write_text((self.folder / "data" / "train.jsonl").read_text() * COPIES)
        return [f"data.validation={file}", f"vae.train.validate_every={step}", "vae.train.validation_batches=1000000"]

    def restarted(self, job: str, times: int) -> None:
        """Wait until the job was put back into the queue for the ``times``-th time."""
        self.cluster.until(lambda: int(self.cluster.job(job)["Restarts"]) >= times, f"restart {times}", job)

    def started(self, job: str) -> None:
        """Wait until a process of the job exists; it is still loading its libraries then."""
        self.cluster.until(lambda: bool(list(self.folder.glob(f"*/logs/ranks/*-{job}-rank-*.log"))), "a rank to start", job)

    def rank(self, name: str, rank: int, job: str | None = None) -> psutil.Process:
        """The process of a rank of a run, of this ``job`` where several are at work in it."""
        for process in psutil.process_iter():
            try:
                environment, command = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            mine = environment.get("RUN_FOLDER") == str(self.folder / name) and environment.get("RANK") == str(rank)
            mine = mine and job in (None, environment.get("SLURM_JOB_ID"))
            if mine and command and "python" in command[0]:
                return process
        raise AssertionError(f"no process of rank {rank} of run {name}")

    def table(self, name: str, label: str = "") -> tuple[list[dict[str, Any]], str]:
        """The rows of an evaluation without what they took, and its judged answers."""
        run = self.folder / name
        rows = json.loads((run / f"results{label}.json").read_text())["rows"]
        times = [time for time in rows[0] if "seconds" in time]
        kept = [{key: value for key, value in row.items() if key not in times} for row in rows]
        return kept, (run / f"generations{label}.jsonl").read_text()

    def weights(self, name: str, phase: str) -> dict[str, bytes]:
        """The files of a finished model's weights."""
        return {file.name: file.read_bytes() for file in (self.folder / name / "models" / phase).glob("*.safetensors")}
