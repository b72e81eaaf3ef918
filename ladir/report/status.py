"""What the job of a run is doing, read from the file that it keeps, and from whether anybody still holds the run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
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
#: Slurm's controller is asked once in so many seconds, however often one looks
_QUEUE_EVERY_SECONDS = 60.0
_JOBS = Path("slurm") / "jobs"


@dataclass(frozen=True)
class JobStatus:
    """One job of a run folder: what it wrote last, and how it stands by now (``RUNNING``, ..., ``CRASHED``, ``SILENT``)."""

    facts: Mapping[str, Any]
    state: str
    now: float
    lane: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether somebody should look."""
        return self.state in (FAILED, CRASHED, SILENT)

    @property
    def is_over(self) -> bool:
        """Whether it will not go on by itself, or by the same command as it is."""
        return self.state in (FINISHED, FAILED)


@dataclass(frozen=True)
class RunStatus:
    """A run folder's jobs, its finished phases in words, and its jobs that Slurm keeps waiting or has just started, in words."""

    folder: Path
    jobs: Sequence[JobStatus]
    finished: Sequence[str]
    queued: Sequence[str]
    starting: Sequence[str] = ()

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, waits or can go on."""
        return all(job.is_over for job in self.jobs) and not self.queued and not self.starting


def read_status(folder: str | Path, queue: Queue | None = None) -> RunStatus:
    """How a run stands.  UnusableError where nothing was started in ``folder`` and nothing was ever queued for it.

    ``queue``: what is known of Slurm's, by one who looks often.
    """
    path = Path(folder)
    files = sorted(path.glob("status*.json"), key=lambda file: file.stat().st_mtime)
    jobs = [job for job in map(_job, files) if job is not None]
    finished = [_finished(file) for file in sorted(path.glob("outcome-*.json"), key=lambda file: file.stat().st_mtime)]
    queue = queue or Queue()
    queued, starting = queue.look(path, jobs)
    if not jobs and not (path / _JOBS).is_file():
        raise UnusableError(f"{path}: no job has left a status.json there; name a run's folder (runs/<name>)")
    if queue.is_silent and not (jobs or queued or starting):  # what it said before stands
        raise UnusableError(f"{path}: no job has begun, and squeue does not answer: ask again")
    return RunStatus(path, jobs, finished, queued, starting)


def _job(file: Path) -> JobStatus | None:
    """What a file says; None where it is torn (a disk that was full), which the next writing mends."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "phase" not in facts:
        return None
    lane, now = file.stem.removeprefix("status"), time.time()
    return JobStatus(facts, _state(facts, is_locked(file.with_name(f".lock{lane}")), now), now, lane)


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


class Queue:
    """What Slurm's queue has of a run, asked at most once a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._asked = clock, -math.inf
        self._rows: dict[str, tuple[str, str]] = {}
        self.is_silent = False
        """Whether Slurm did not answer when it was asked last."""

    def look(self, folder: Path, jobs: Sequence[JobStatus]) -> tuple[list[str], list[str]]:
        """The run's jobs that Slurm has not started, or has put back; those that it has started and that say nothing yet."""
        names = _slurm_jobs(folder, jobs)
        if names and self._clock() - self._asked >= _QUEUE_EVERY_SECONDS:
            found, self._asked = _squeue(names), self._clock()
            self.is_silent, self._rows = found is None, self._rows if found is None else found
        for job in jobs:
            if job.state == RUNNING:  # whatever the queue said of it before
                self._rows.pop(str(job.facts.get("job")), None)
        heard = {str(job.facts.get("job")) for job in jobs}
        words = {number: f"job {number} {names.get(number, '')}" for number in self._rows}
        queued = [f"{words[number]} ({reason})" for number, (state, reason) in self._rows.items() if state == _PENDING]
        return queued, [words[number] for number, (state, _) in self._rows.items() if state != _PENDING and number not in heard]


#: Slurm's short names of states
_PENDING, _STARTED = "PD", ("CF", "R")
#: what squeue says, and fails, of a job that ended long ago
_FORGOTTEN = "Invalid job id"


def _slurm_jobs(folder: Path, jobs: Sequence[JobStatus]) -> dict[str, str]:
    """Ids of ``slurm/submit.sh``, and of the jobs that ran, with what they do."""
    names: dict[str, str] = {str(job.facts["job"]): job.facts["phase"] for job in jobs if job.facts.get("job")}
    if (folder / _JOBS).is_file():
        for line in (folder / _JOBS).read_text(encoding="utf-8").splitlines():
            number, _, words = line.partition(" ")
            names[number] = words
    return names


def _squeue(numbers: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """State and reason of the jobs that wait or have begun; None where Slurm does not answer."""
    if shutil.which("squeue") is None:
        return {}
    states = ",".join((_PENDING, *_STARTED))
    command = ["squeue", "--noheader", f"--states={states}", f"--jobs={','.join(numbers)}", "--format=%i %t %r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0 and _FORGOTTEN not in answer.stderr:
        return None
    rows = (line.split(maxsplit=2) for line in answer.stdout.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def lines(status: RunStatus) -> list[str]:
    """Everything, in lines for people."""
    told = [job for job in status.jobs if not _is_behind(job, status.jobs)]
    found = [line for job in told for line in _job_lines(job)]
    done = {job.facts["phase"] for job in status.jobs}
    before = [words for words in status.finished if words.split(" (")[0] not in done]
    before += [job.lane.removeprefix("-") for job in status.jobs if _is_behind(job, status.jobs)]
    if before:
        found.append(f"finished: {', '.join(before)}")
    return [printable(line) for line in [*found, *_in_slurm(status)]]


def _is_behind(job: JobStatus, jobs: Sequence[JobStatus]) -> bool:
    """Whether it is one of many that are finished, as an evaluation of a snapshot, behind which there were others."""
    return bool(job.lane) and job.state == FINISHED and job.facts["phase"] == "evaluate" and job is not jobs[-1]


_NOTHING = "none of the jobs that were submitted has begun, and squeue, if it is here, knows of none that waits"


def _in_slurm(status: RunStatus) -> list[str]:
    waiting = [f"waits in the queue: {words}" for words in status.queued]
    if not (status.jobs or waiting or status.starting):
        return [_NOTHING]
    return [*waiting, *(f"begins: {words}" for words in status.starting)]


def news(status: RunStatus) -> Iterator[tuple[str, Hashable, str]]:
    """What there is to tell, in one line each: of which job (or Slurm), what makes it worth telling again, and the line.

    A job is when its phase or state, its start, its last checkpoint or the percent that is done is another one.
    """
    for job in status.jobs:
        doing = [str(job.facts["doing"])] if job.facts["doing"] else []
        kept = job.facts.get("checkpoint_step")
        key = (job.facts["phase"], job.state, job.facts["starts"], kept, _percent(job))
        yield job.lane, key, printable(", ".join([headline(job), *_figures(job), *doing, *_kept(job)]))
    if words := _in_slurm(status):
        yield "slurm", tuple(words), printable("; ".join(words))


def _kept(job: JobStatus) -> list[str]:
    step = job.facts.get("checkpoint_step")
    return [] if step is None else [f"last checkpoint: step {step:,}"]


def _percent(job: JobStatus) -> str | None:
    done = job.facts.get("fraction")
    return None if done is None else f"{100 * min(done, 1.0):.0f} %"


def headline(job: JobStatus) -> str:
    """Phase, state, step, and when it will be done."""
    facts = job.facts
    words = [f"{facts['phase']} {_STATES[job.state]}"]
    if facts.get("step") is not None:
        total = f" of about {facts['total_steps']:,}" if facts.get("total_steps") else ""
        words.append(f"step {facts['step']:,}{total}")
    if (percent := _percent(job)) is not None:
        words.append(percent)
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
    if facts.get("data_wait_rank") and facts.get("data_wait"):
        yield f"  waits longest for data: {facts['data_wait_rank']}"
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
