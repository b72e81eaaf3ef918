"""What the job of a run is doing, read from the file that it keeps, and from whether anybody still holds the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ladir.errors import UnusableError
from ladir.files import is_locked
from ladir.report.text import printable

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
CRASHED, SILENT = "crashed", "silent"

#: a job that has not written for so many of its own intervals, and at least so many seconds, is said to be silent
_SILENT_INTERVALS, _SILENT_SECONDS = 4, 60.0
_SQUEUE_SECONDS = 20
_JOBS = Path("slurm") / "jobs"


@dataclass(frozen=True)
class JobStatus:
    """One job of a run folder: what it wrote last, and how it stands by now (``RUNNING``, ..., ``CRASHED``, ``SILENT``)."""

    facts: Mapping[str, Any]
    state: str
    now: float

    @property
    def is_bad(self) -> bool:
        """Whether somebody should look."""
        return self.state in (FAILED, CRASHED, SILENT)


@dataclass(frozen=True)
class RunStatus:
    """A run folder's jobs, its finished phases in words, and its jobs that wait in Slurm's queue, in words."""

    folder: Path
    jobs: Sequence[JobStatus]
    finished: Sequence[str]
    queued: Sequence[str]


def read_status(folder: str | Path) -> RunStatus:
    """How a run stands.  UnusableError where nothing was started in ``folder`` and nothing is queued for it."""
    path = Path(folder)
    files = sorted(path.glob("status*.json"), key=lambda file: file.stat().st_mtime)
    jobs = [job for job in map(_job, files) if job is not None]
    finished = [_finished(file) for file in sorted(path.glob("outcome-*.json"), key=lambda file: file.stat().st_mtime)]
    queued = _queued(path, jobs)
    if not jobs and not queued:
        raise UnusableError(f"{path}: no job has left a status.json there; name a run's folder (runs/<name>)")
    return RunStatus(path, jobs, finished, queued)


def _job(file: Path) -> JobStatus | None:
    """What a file says; None where it is torn (a disk that was full), which the next writing mends."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    lane = file.stem.removeprefix("status")
    now = time.time()
    return JobStatus(facts, _state(facts, is_locked(file.with_name(f".lock{lane}")), now), now) if "phase" in facts else None


def _state(facts: Mapping[str, Any], held: bool | None, now: float) -> str:
    """``held``: whether a process has the run (None: the file system cannot say, and the file's age must do)."""
    state = str(facts["state"])
    if state != RUNNING:
        return state
    if held is False:
        return CRASHED
    return SILENT if now - facts["written"] > max(_SILENT_INTERVALS * facts["every_seconds"], _SILENT_SECONDS) else RUNNING


def _finished(file: Path) -> str:
    phase, outcome = file.stem.removeprefix("outcome-"), json.loads(file.read_text(encoding="utf-8"))
    return f"{phase} ({outcome['steps']:,} steps)" if outcome["steps"] else phase


def _queued(folder: Path, jobs: Sequence[JobStatus]) -> list[str]:
    """The run's jobs that Slurm has not started, or has put back: ids of ``slurm/submit.sh`` and of the jobs that ran."""
    names: dict[str, str] = {str(job.facts["job"]): job.facts["phase"] for job in jobs if job.facts.get("job")}
    if (folder / _JOBS).is_file():
        for line in (folder / _JOBS).read_text(encoding="utf-8").splitlines():
            number, _, words = line.partition(" ")
            names[number] = words
    if not names or shutil.which("squeue") is None:
        return []
    command = ["squeue", "--noheader", "--states=PENDING", f"--jobs={','.join(names)}", "--format=%i %r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = (line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.strip())
    return [f"job {number} {names.get(number, '')} ({reason})" for number, reason in rows]


def lines(status: RunStatus) -> list[str]:
    """Everything, in lines for people."""
    found = [line for job in status.jobs for line in _job_lines(job)]
    done = {job.facts["phase"] for job in status.jobs}
    before = [words for words in status.finished if words.split(" (")[0] not in done]
    if before:
        found.append(f"finished: {', '.join(before)}")
    found += [f"waits in the queue: {words}" for words in status.queued]
    return [printable(line) for line in found]


def one_line(status: RunStatus) -> str:
    """The newest job, or what waits in the queue, in a line that changes only where something has happened."""
    if not status.jobs:
        return printable(f"waits in the queue: {'; '.join(status.queued)}")
    job = status.jobs[-1]
    waiting = [f"waits in the queue: {'; '.join(status.queued)}"] if status.queued else []
    doing = [str(job.facts["doing"])] if job.facts["doing"] else []
    return printable(", ".join([headline(job), *_figures(job), *doing, *waiting]))


def headline(job: JobStatus) -> str:
    """Phase, state, step, and when it will be done."""
    facts = job.facts
    words = [f"{facts['phase']} {_STATES[job.state]}"]
    if facts.get("step") is not None:
        total = f" of about {facts['total_steps']:,}" if facts.get("total_steps") else ""
        words.append(f"step {facts['step']:,}{total}")
    if facts.get("fraction") is not None:
        words.append(f"{100 * min(facts['fraction'], 1.0):.0f} %")
    if job.state == RUNNING and facts.get("seconds_left") is not None:
        words.append(f"ETA {duration(facts['seconds_left'])}")
    return ", ".join(words)


_STATES = {
    RUNNING: "is running",
    FINISHED: "has finished",
    STOPPED: "was stopped and has saved: the same command continues",
    FAILED: "has FAILED",
    CRASHED: "has CRASHED or was killed: its process is gone without a word; the same command continues",
    SILENT: "is SILENT: no sign of life",
}


def _job_lines(job: JobStatus) -> Iterator[str]:
    facts, now = job.facts, job.now
    yield headline(job)
    if job.state == FAILED:
        yield f"  {facts.get('message', '')}"
    if figures := list(_figures(job)):
        yield f"  {', '.join(figures)}"
    if facts["doing"]:
        if job.state == RUNNING:
            yield f"  now: {facts['doing']}, for {duration(now - facts['since'])}"
        else:
            yield f"  last seen, {duration(now - facts['written'])} ago: {facts['doing']}"
    if facts.get("checkpoint_step") is not None:
        ago = duration(now - facts["checkpoint_time"])
        yield f"  last checkpoint: step {facts['checkpoint_step']:,}, {ago} ago"
    if facts["starts"] > 1:
        yield f"  restarts: {facts['starts'] - 1}"
    if facts.get("slow_rank"):
        yield f"  slowest: {facts['slow_rank']}"
    number = f", job {facts['job']}" if facts.get("job") else ""
    many = f", {facts['ranks']} processes" if facts["ranks"] > 1 else ""
    yield f"  process {facts['process']} on {facts['host']}{number}{many}, {_period(job)}"


def _period(job: JobStatus) -> str:
    facts = job.facts
    if facts.get("ended") is not None:
        return f"ended {duration(job.now - facts['ended'])} ago after {duration(facts['ended'] - facts['started'])}"
    return f"started {duration(job.now - facts['started'])} ago"


#: figures of the last log line: name, format, words
_FIGURES = (
    ("loss", "loss {:.4g}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("mfu", "MFU {:.1%}"),
    ("data_wait", "data wait {:.1%}"),
    ("memory_gib", "memory {:.1f} GiB"),
)


def _figures(job: JobStatus) -> Iterator[str]:
    for name, form in _FIGURES:
        if (value := job.facts.get(name)) is not None:
            yield form.format(value)
    if worst := job.facts.get("memory_rank"):
        yield f"most memory on {worst}"


def duration(seconds: float) -> str:
    """A span of time in words of a clock: 0:12:30, or 2 days, 3:00:00."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))
