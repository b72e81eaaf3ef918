"""Running other programs of this project as jobs: launched, logged, watched, and stopped so that they can save."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

LAUNCHER = "deepspeed.launcher"
LAUNCHER_LINE = re.compile(r"\[\d{4}-\d\d-\d\d ")
TAIL_BYTES = 16384
POLL_SECONDS = 0.2
MEMORY_EVERY_SECONDS = 2.0
GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class JobResult:
    """How a job ended: its exit status, its wall-clock seconds, and the most memory its processes held together."""

    status: int
    seconds: float
    peak_gib: float


def launcher_command(script: str | Path, ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command that runs ``script`` on ``ranks`` processes of this machine through the ``deepspeed`` launcher.

    The launcher is called as a module of this interpreter, so that it works in an environment that is not activated;
    the port is a free one, so that several jobs can run beside one another.
    """
    launcher = [sys.executable, "-m", f"{LAUNCHER}.runner"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [*launcher, "--num_accelerators", str(ranks), "--master_port", str(port), str(script), *arguments]


class Job:
    """A command under way, its output in a log; made by starting it, ended by :meth:`poll` or :meth:`stop`."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        """Start ``command``; each of its processes computes on ``threads`` cores."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start, self._peak, self._measured = time.monotonic(), 0.0, float("-inf")
        with log.open("wb") as output:  # the job has the file open for itself
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads), start_new_session=True
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def poll(self) -> JobResult | None:
        """How the job ended; None while it runs.  To be called a few times a second."""
        if self._process.poll() is not None:
            return JobResult(self._process.returncode, self.seconds, self._peak)
        if self.seconds - self._measured >= MEMORY_EVERY_SECONDS:
            self._measured, self._peak = self.seconds, max(self._peak, _memory_gib(self._process.pid))
        return None

    def stop(self) -> None:
        """Ask the job's ranks to save and stop, and wait for it; end everything by force if that takes too long.

        The ranks get the signal themselves: the launcher would kill them at once.
        """
        try:
            for process in _working(self._process.pid):
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            self._process.wait(timeout=GRACE_SECONDS)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            pass  # gone already, or ended below
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def run_job(command: Sequence[str], log: Path, ranks: int) -> JobResult:
    """Run ``command``, of ``ranks`` processes that share the cores, to its end with its output in ``log``.

    An exception (KeyboardInterrupt, too) first stops the job and is then raised again.
    """
    job = Job(command, log, threads_of(ranks))
    try:
        while (result := job.poll()) is None:
            time.sleep(POLL_SECONDS)
    except BaseException:
        job.stop()
        raise
    return result


def threads_of(processes: int) -> int:
    """Cores for each of ``processes`` that run at the same time, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, cores // processes)


def tail(log: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log that say something, without the launcher's own; only the log's end is read."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip() and not LAUNCHER_LINE.match(line)][-count:]


def _environment(threads: int) -> dict[str, str]:
    """This process' environment, this interpreter's tools first on the path, ``threads`` for every process."""
    tools = str(Path(sys.executable).parent)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }


def _working(pid: int) -> list[psutil.Process]:
    """The ranks below the launcher processes of a job, or the job itself where it has no launcher."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    launchers = {process.pid for process in family if _is_launcher(process)}
    ranks = [process for process in family if process.pid == pid or _parent(process) in launchers]
    return [process for process in ranks if process.pid not in launchers]


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(LAUNCHER in part for part in process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _memory_gib(pid: int) -> float:
    """Memory of a process and all below it, pages shared among them counted once (where the system can tell)."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    except psutil.Error:
        pass  # a process ended while it was being looked at: this sample is too low, the next one will not be
    return total / 2**30
