"""Running programs that nobody trusts: each in a process of its own that can reach nothing, is limited, and is killed.

``namespaces`` (Linux 5.12 and newer): no network, no other process, and no file but the interpreter's, read-only, and an
empty folder in memory.  ``limits`` is for machines that forbid namespaces and can be thrown away themselves (a
container): the limits, the empty folder and the cleared environment remain, files and network stay within reach, and
a process that has left its program's group goes on.
Programs are never run as root.

What a program says of itself is not trusted either: it has passed when its runner writes a secret word after the last
test.  A program that searches its own interpreter for that word, or makes everything equal to everything, can still
cheat itself to a pass; it harms nobody else.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
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


@dataclass(frozen=True)
class Limits:
    """What a program may use, the start of its interpreter (about 0.05 s) included."""

    seconds: float = 5.0
    """Processor time of each process; its wall time is _PATIENCE times that, for machines with other work."""
    memory: int = 512 << 20
    """Bytes of address space of each process."""
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
    """``passed``, ``timeout``, the exception's type, or what else kept it from its end."""


def run_program(source: str, limits: Limits, isolation: str = "namespaces") -> Outcome:
    """Run a Python program to its end (standard library only; a file-less module, no arguments, no input).

    Whatever it does ends with it (``namespaces``).  ``isolation`` is ``namespaces`` or ``limits``, see the module.  Raises
    UnusableError where this machine does not permit that isolation.
    """
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
            said, timeout = _read_verdict(verdict, _PATIENCE * limits.seconds, b"ready\n" + token.encode())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return _outcome(said, token, timeout, isolation, output)


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


def _read_verdict(verdict: IO[bytes], seconds: float, passed: bytes) -> tuple[bytes, bool]:
    """What was said on the pipe until all writers ended or it says ``passed``; whether ``seconds`` after the first word ran
    out before."""
    said = b""
    deadline = time.monotonic() + _START_SECONDS
    poll = select.poll()
    poll.register(verdict, select.POLLIN)
    while said != passed and len(said) < _MAX_VERDICT:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return said, True
        part = verdict.read(_MAX_VERDICT)
        if not part:
            break
        if not said:
            deadline = time.monotonic() + seconds
        said += part
    return said, False


def _outcome(said: bytes, token: str, timeout: bool, isolation: str, output: IO[bytes]) -> Outcome:
    ready, _, rest = said.partition(b"\n")
    if ready == b"ready":
        if rest == token.encode():
            return Outcome(True, "passed")
        if timeout:
            return Outcome(False, "timeout")
        kind, _, name = rest.partition(b"\n")[0].decode(errors="replace").partition(" ")
        return Outcome(False, name if kind == "error" and name else "ended before its tests did")
    if ready.startswith(b"unavailable "):
        raise UnusableError(
            f"programs cannot be isolated here: {said.removeprefix(b'unavailable ').decode(errors='replace')}; judge them on a "
            "machine that permits user namespaces (Linux 5.12 or newer, no container without them)"
            + (", or, where nothing can be harmed, set evaluate.isolation=limits" if isolation == "namespaces" else "")
        )
    output.seek(0)
    what = f"did not answer within {_START_SECONDS:g} s" if timeout else "failed"
    raise RuntimeError(f"the sandbox's launcher {what}: {output.read(2000).decode(errors='replace')}")
