"""Running programs that nobody trusts: each in a process of its own that can reach nothing, is limited, and is killed.

``namespaces`` (Linux 5.12 and newer): no network, no other process, and no file but the interpreter's, read-only, and an
empty folder in memory.  ``limits`` is for machines that forbid namespaces and can be thrown away themselves (a
container): the limits, the empty folder and the cleared environment remain, files and network stay within reach, and
a process that has left its program's group may go on after it.
Programs are never run as root.

No resource limit bounds the memory of several processes together, so the evaluation sums it up while a program runs.  System
V's shared segments are memory of no process: where they cannot be forbidden (only root may) they are not counted.

What a program says of itself is not trusted either: it has passed when its runner writes a secret word after the last
test, in the process that began them, and finds Python's own names, the functions of the modules that the tests import and
the tests' own functions as they were.  Program and tests share an interpreter all the same: docs/evaluation.md names the cheats
that this leaves.  They harm nobody else.
"""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import re
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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

from ladir.errors import UnusableError
from ladir.tasks.signals import held_signals

_LAUNCHER = Path(__file__).with_name("isolated") / "launcher.py"
_MAX_PROGRAM = 200_000  # characters; far above any honest program
_LONG_TESTS = 50_000  # characters from which they are compiled once and not in every sandbox
_PACKAGES = ("numpy",)  # that programs and their tests may import
_SHOWN = "/packages"  # where they are in a namespace
_DEFINED = re.compile(r"^(@[^\n]*\n)?def[ \t]+(\w+)", re.MULTILINE)
_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import\b|import[ \t]+([\w., \t]+))", re.MULTILINE)
_MAX_VERDICT = 4096  # bytes
_PATIENCE = 3.0
_START_SECONDS = 120.0  # for the launcher, which runs nothing of the program
_LAST_SECONDS = 1.0  # from a program's last word to its launcher's end
_MAX_WORDS = 200  # characters of what a program says of its failure, each of its line and its message
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
    processes: int = 40
    """Processes and threads at a time: no fewer than a thread pool of Python's default size."""
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
    detail: str = field(default="", compare=False)
    """Where and how, in the program's own words or in ours; may be empty."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Reading:
    """A program as it may be meant: ``setup`` runs before ``text``, unless ``text`` begins with it (a function's head)."""

    text: str
    setup: str = ""
    joined: bool = False

    @property
    def parts(self) -> tuple[str, str, int]:
        """What runs first, what runs then, and how many lines of the whole are the set-up's."""
        return "" if self.joined else self.setup, self.text, self.setup.count("\n") + 1 if self.setup else 0


@dataclass(frozen=True)
class Program:
    """What is run: the first reading that compiles, then the tests in the same module."""

    readings: tuple[Reading, ...]
    tests: str = ""


def run_program(program: Program | str, limits: Limits, isolation: str = "namespaces") -> Outcome:
    """Run a Python program to its end (standard library and numpy; no file of its own, no arguments, no input, no output).

    Whatever it does ends with it (``namespaces``).  ``isolation`` is ``namespaces`` or ``limits``, see the module.  Raises
    UnusableError where this machine does not permit that isolation.
    """
    if not Path("/proc/thread-self/children").exists():
        raise UnusableError("the memory of programs cannot be limited here: /proc does not list a process' children")
    if isinstance(program, str):
        program = Program((Reading(program),))
    if any(len(reading.text) > _MAX_PROGRAM for reading in program.readings):
        return Outcome(False, "too long", f"more than {_MAX_PROGRAM:,} characters")
    token = secrets.token_bytes(16)
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb", buffering=0) as verdict,
        tempfile.TemporaryDirectory(prefix="ladir-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as request,
        tempfile.TemporaryFile() as output,
    ):
        request.write(marshal.dumps(_request(program, token, isolation), 4))
        request.seek(0)
        try:
            process = _start(folder, request, output, writer, limits, isolation)
        finally:
            os.close(writer)
        try:
            said, stopped = _read_verdict(verdict, process.pid, limits, isolation, b"ready\n" + token)
            code = _exit_code(process.pid) if said == b"ready\n" and not stopped else None
        finally:
            _end(process)
        ready, _, rest = said.partition(b"\n")
        if ready != b"ready":
            raise _failed(said, stopped, isolation, output)
        return Outcome(True, "passed") if rest == token else _failure(rest, stopped, code, limits)


def _request(program: Program, token: bytes, isolation: str) -> dict[str, object]:
    """What the runner reads."""
    tests = _facts_of(program.tests)
    setup = program.readings[0].setup if program.readings else ""
    return {
        "token": token,
        "readings": [reading.parts for reading in program.readings],
        "tests": program.tests,
        "compiled": b"" if "__future__" in setup else tests.compiled,
        "version": sys.version,
        "modules": tests.modules,
        "functions": tests.functions,
        "patches": tests.patches,
        "folder": _SHOWN if isolation == "namespaces" else str(next(iter(_packages()), Path()).parent),
        "packages": _PACKAGES,
    }


@lru_cache(maxsize=1)
def _packages() -> tuple[Path, ...]:
    """Folders of the packages that programs may import, where they are installed, and of the libraries that they bring."""
    found = [importlib.util.find_spec(name) for name in _PACKAGES]
    folders = [Path(place).resolve() for spec in found if spec for place in spec.submodule_search_locations or []]
    return tuple(
        folder for package in folders for folder in (package, package.with_name(f"{package.name}.libs")) if folder.is_dir()
    )


@dataclass(frozen=True)
class _TestFacts:
    """What the runner needs to know of a tests' text."""

    modules: list[str]
    """That it imports."""
    functions: list[str]
    """That it defines once, without decorators, and gives to no other name."""
    patches: bool
    """Whether it may change a module itself."""
    compiled: bytes
    """Its code, where it is long: parsing megabytes of data takes seconds and hundreds of MiB."""


@lru_cache(maxsize=64)
def _facts_of(tests: str) -> _TestFacts:
    defined = [match[2] for match in _DEFINED.finditer(tests) if not match[1]]
    assigned = set(re.findall(r"^(\w+)[ \t]*(?::[^=\n]*)?=", tests, re.MULTILINE))
    return _TestFacts(
        modules=sorted({name for match in _IMPORT.finditer(tests) for name in re.findall(r"[\w.]+", match[1] or match[2])[:1]}),
        functions=[name for name in defined if defined.count(name) == 1 and name not in assigned],
        patches=bool(re.search(r"\.\w+[ \t]*=[^=]|setattr|patch", tests)),
        compiled=_compiled(tests) if len(tests) >= _LONG_TESTS else b"",
    )


def _compiled(tests: str) -> bytes:
    """Empty where they are no program: the runner says why."""
    try:
        return marshal.dumps(compile(tests, "tests.py", "exec", dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return b""


def _start(
    folder: str, request: IO[bytes], output: IO[bytes], writer: int, limits: Limits, isolation: str
) -> subprocess.Popen[bytes]:
    """The launcher, leader of a process group of its own."""
    settings = {
        "isolation": isolation,
        "interpreter": interpreter(),
        "prefix": os.path.realpath(sys.base_prefix),
        "packages": {str(folder): f"{_SHOWN}/{folder.name}" for folder in _packages()},
        "root": folder,
        "verdict": writer,
        "disk": limits.disk,
        "limits": limits.resources(),
    }
    with held_signals():
        return subprocess.Popen(
            [interpreter(), "-I", "-S", str(_LAUNCHER), json.dumps(settings)],
            stdin=request,
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


def _exit_code(launcher: int) -> int | None:
    """The code of a program that ended without a word, 128 and more for a signal; the launcher hands it on and stays unreaped."""
    deadline = time.monotonic() + _LAST_SECONDS
    while (state := os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(_PULSE / 10)
    return state.si_status if state.si_code == os.CLD_EXITED else 128 + state.si_status


def _failure(said: bytes, stopped: str, code: int | None, limits: Limits) -> Outcome:
    """Why a program has not passed."""
    if stopped == "timeout":
        return Outcome(False, stopped, f"more than {_PATIENCE * limits.seconds:g} s (evaluate.check_seconds={limits.seconds:g})")
    if stopped:
        return Outcome(False, stopped, f"all processes together above evaluate.check_memory_mb={limits.memory >> 20}")
    if code == 128 + signal.SIGXCPU:
        return Outcome(False, "timeout", f"more than {limits.seconds:g} s of processor time (evaluate.check_seconds)")
    first, _, rest = said.decode(errors="replace").partition("\n")
    kind, _, name = first.partition(" ")
    place, line, message = (*(_shown(part) for part in rest.split("\n")), "", "", "")[:3]
    if kind == "changed":
        return Outcome(False, "changed what its tests use", message)
    if kind != "error" or not name:
        return Outcome(False, "ended before its tests did", "" if code is None else _named(code))
    if name == "MemoryError":
        message = message or f"above evaluate.check_memory_mb={limits.memory >> 20}"
    text = f"{message}: {line}" if message and name == "AssertionError" else message or line
    return Outcome(False, _shown(name), f"{text} ({place})" if place else text)


def _shown(text: str) -> str:
    """A program's words on one line, not too long."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_MAX_WORDS]


def _named(code: int) -> str:
    if code <= 128:
        return f"exit status {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(code - 128).name}"
    return f"killed by signal {code - 128}"


def _failed(said: bytes, stopped: str, isolation: str, output: IO[bytes]) -> Exception:
    """Of a launcher that did not come to run the program."""
    if said.startswith(b"unavailable "):
        return UnusableError(
            f"programs cannot be isolated here: {said.removeprefix(b'unavailable ').decode(errors='replace')}; judge them on a "
            "machine that permits user namespaces (Linux 5.12 or newer, no container without them)"
            + (", or, where nothing can be harmed, set evaluate.isolation=limits" if isolation == "namespaces" else "")
        )
    output.seek(0)
    what = f"did not answer within {_START_SECONDS:g} s" if stopped else "failed"
    return RuntimeError(f"the sandbox's launcher {what}: {output.read(2000).decode(errors='replace')}")
