"""Running programs that nobody trusts: each in a process of its own that can reach nothing, is limited, and is killed.

``namespaces`` (Linux 5.12 and newer): no network, no other process, and no file but the interpreter's, read-only, and an
empty folder in memory.  ``limits`` is for machines that forbid namespaces and can be thrown away themselves (a
container): the limits, the empty folder and the cleared environment remain, files and network stay within reach, and
a process that has left its program's group may go on after it.
Programs are never run as root.

No resource limit bounds the memory of several processes together, so the evaluation sums it up while a program runs.  System
V's shared segments are memory of no process: where they cannot be forbidden (only root may) they are not counted.

What a program says of itself is not trusted either: it has passed when its runner writes a secret word after the last
test.  A program that searches its own interpreter for that word, or makes everything equal to everything, can still
cheat itself to a pass; it harms nobody else.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ladir.errors import UnusableError
from ladir.tasks.signals import held_signals

_LAUNCHER = Path(__file__).with_name("isolated") / "launcher.py"
_MAX_PROGRAM = 200_000  # characters; far above any honest program
_MAX_VERDICT = 4096  # bytes
_PATIENCE = 3.0
_START_SECONDS = 120.0  # for the launcher, which runs nothing of the program
_PULSE = 0.05  # seconds between two looks at the memory of a program's processes


@dataclass(frozen=True)
class Limits:
    """What a program may use, the start of its interpreter (about 0.05 s) included."""

    seconds: float = 5.0
    """Processor time of each process; its wall time is _PATIENCE times that, for machines with other work."""
    memory: int = 512 << 20
    """Bytes of address space of each process, and of resident memory of all together (what they share counts for each)."""
    file_size: int = 1 << 20
    """Bytes in one file, and of output."""
    disk: int = 16 << 20
    """Bytes in all files together (``namespaces`` only)."""
    processes: int = 16
    """Processes and threads at a time."""
    open_files: int = 64

    def resources(self) -> dict[str, int]:
        """Resource limits by the names of :mod:`resource` without ``RLIMIT_``."""
        return {
            "CPU": max(1, round(self.seconds)),
            "AS": self.memory,
            "FSIZE": self.file_size,
            "NPROC": self.processes,
            "NOFILE": self.open_files,
            "CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``passed`` only where it ran to its end without an exception and within its limits."""

    passed: bool
    reason: str
    """``passed``, ``timeout``, ``too much memory``, the exception's type, or what else kept it from its end."""


def run_program(source: str, limits: Limits, isolation: str = "namespaces") -> Outcome:
    """Run a Python program to its end (standard library only; a file-less module, no arguments, no input).

    Whatever it does ends with it (``namespaces``).  ``isolation`` is ``namespaces`` or ``limits``, see the module.  Raises
    UnusableError where this machine does not permit that isolation.
    """
    if not Path("/proc/thread-self/children").exists():
        raise UnusableError("the memory of programs cannot be limited here: /proc does not list a process' children")
    if len(source) > _MAX_PROGRAM:
        return Outcome(False, "too long")
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb", buffering=0) as verdict,
        tempfile.TemporaryDirectory(prefix="ladir-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as program,
        tempfile.TemporaryFile() as output,
    ):
        program.write(json.dumps({"source": source, "token": token}).encode())
        program.seek(0)
        try:
            process = _start(folder, program, output, writer, limits, isolation)
        finally:
            os.close(writer)
        try:
            said, stopped = _read_verdict(verdict, process.pid, limits, isolation, b"ready\n" + token.encode())
        finally:
            _end(process)
        return _outcome(said, token, stopped, isolation, output)


def _start(
    folder: str, program: IO[bytes], output: IO[bytes], writer: int, limits: Limits, isolation: str
) -> subprocess.Popen[bytes]:
    """The launcher, leader of a process group of its own."""
    settings = {
        "isolation": isolation,
        "interpreter": interpreter(),
        "prefix": os.path.realpath(sys.base_prefix),
        "root": folder,
        "verdict": writer,
        "disk": limits.disk,
        "limits": limits.resources(),
    }
    with held_signals():
        return subprocess.Popen(
            [interpreter(), "-I", "-S", str(_LAUNCHER), json.dumps(settings)],
            stdin=program,
            stdout=output,
            stderr=output,
            env={},
            cwd=folder,
            pass_fds=(writer,),
            start_new_session=True,
        )


def interpreter() -> str:
    """The Python that programs are run with: this one without its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _read_verdict(verdict: IO[bytes], launcher: int, limits: Limits, isolation: str, passed: bytes) -> tuple[bytes, str]:
    """What was said on the pipe until all writers or the launcher ended or it says ``passed``; why that was not waited for."""
    said = b""
    deadline = time.monotonic() + _START_SECONDS
    trusted = 2 if isolation == "namespaces" else 0  # the launcher and process 1 of the namespace
    poll = select.poll()
    poll.register(verdict, select.POLLIN)
    while said != passed and len(said) < _MAX_VERDICT:
        if _memory(_family(launcher)[trusted:]) > limits.memory:
            return said, "too much memory"
        ended = os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        left = deadline - time.monotonic()
        if not poll.poll(max(0.0, min(left, _PULSE)) * 1000):
            if ended:
                break
            if left <= 0:
                return said, "timeout"
            continue
        part = verdict.read(_MAX_VERDICT)
        if not part:
            break
        if not said:
            deadline = time.monotonic() + _PATIENCE * limits.seconds
        said += part
    return said, ""


def _of_threads(pid: int, name: str) -> Iterator[str]:
    """What /proc says of every thread of a process: of its first one alone it says nothing once that has ended."""
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                yield (thread / name).read_text(encoding="ascii")


def _family(pid: int) -> list[int]:
    """A process and all below it, parents first.  Reads these only: a node may have thousands of others."""
    found = [pid]
    for member in found:  # which grows
        found += [int(child) for children in _of_threads(member, "children") for child in children.split()]
    return found


def _memory(pids: list[int]) -> int:
    """Bytes of resident memory; none of processes that have ended."""
    pages = sum(max((int(sizes.split()[1]) for sizes in _of_threads(pid, "statm")), default=0) for pid in pids)
    return pages * resource.getpagesize()


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Kill the launcher's group and what has left it (namespaces end with their launcher)."""
    for pid in _family(launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _outcome(said: bytes, token: str, stopped: str, isolation: str, output: IO[bytes]) -> Outcome:
    ready, _, rest = said.partition(b"\n")
    if ready == b"ready":
        if rest == token.encode():
            return Outcome(True, "passed")
        if stopped:
            return Outcome(False, stopped)
        kind, _, name = rest.partition(b"\n")[0].decode(errors="replace").partition(" ")
        return Outcome(False, name if kind == "error" and name else "ended before its tests did")
    if ready.startswith(b"unavailable "):
        raise UnusableError(
            f"programs cannot be isolated here: {said.removeprefix(b'unavailable ').decode(errors='replace')}; judge them on a "
            "machine that permits user namespaces (Linux 5.12 or newer, no container without them)"
            + (", or, where nothing can be harmed, set evaluate.isolation=limits" if isolation == "namespaces" else "")
        )
    output.seek(0)
    what = f"did not answer within {_START_SECONDS:g} s" if stopped else "failed"
    raise RuntimeError(f"the sandbox's launcher {what}: {output.read(2000).decode(errors='replace')}")
