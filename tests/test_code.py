"""Programs as answers: right ones pass, and nothing that a program does gets out of its sandbox."""

from __future__ import annotations

import os
import re
import socket
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladir.config import EvaluateSettings
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.tasks import get_task, sandbox
from ladir.tasks.code import CodeTask, assembled, program_of
from ladir.tasks.sandbox import Limits, Outcome, Program, run_program

PATIENT = Limits(seconds=30.0)  # for programs that end by themselves, on a busy machine, too
QUICK = Limits(seconds=1.0)
SMALL = Limits(seconds=30.0, memory=200 << 20)


def why_not_isolated() -> str:
    """Why programs cannot be isolated on this machine; empty where they can."""
    try:
        run_program("", PATIENT)
    except UnusableError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def namespaces() -> None:
    """For tests that need a machine where programs can be isolated."""
    if reason := why_not_isolated():
        pytest.skip(f"NOT TESTED: {reason}")  # a kernel that forbids it cannot be installed


isolated = pytest.mark.usefixtures("namespaces")


@pytest.fixture
def treasure(tmp_path: Path) -> Iterator[Path]:
    """A folder that everybody may write to: only the sandbox protects it."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o555)
    (folder / "gold.txt").write_text("gold")
    (folder / "gold.txt").chmod(0o666)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["gold.txt"]
    assert (folder / "gold.txt").read_text() == "gold"


def run(program: str, limits: Limits = PATIENT, **names: object) -> Outcome:
    """The program with ``@name`` replaced."""
    program = textwrap.dedent(program)
    for name, value in names.items():
        program = program.replace(f"@{name}", repr(str(value)))
    return run_program(program, limits)


@isolated
def test_a_program_that_runs_to_its_end_passes() -> None:
    assert run("import math, json, collections\nassert math.gcd(6, 4) == 2\nprint('fine')") == Outcome(True, "passed")


@isolated
def test_what_asks_a_job_to_stop_does_not_fail_a_program() -> None:
    """As on clusters where a signal reaches all processes of a step."""
    outcome = run(
        "import os, signal\nfor number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2): os.kill(os.getpid(), number)"
    )
    assert outcome == Outcome(True, "passed")


@isolated
def test_a_program_starts_with_nothing() -> None:
    outcome = run(
        """
        import os, sys
        assert set(os.environ) <= {"LC_CTYPE"}, os.environ  # Python's own
        assert os.getuid() and os.geteuid() and os.getgid()
        assert os.listdir() == [] and sys.argv == ["-c"] + sys.argv[1:]
        assert sys.stdin.read() == "" and os.read(0, 10) == b""
        open("file.txt", "w").write("a program may have files")
        assert open("file.txt").read()
        """
    )
    assert outcome.passed, outcome


ENDS = {
    "exit": ("raise SystemExit(0)", "SystemExit"),
    "hard exit": ("import os; os._exit(0)", "ended before its tests did"),
    "kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended before its tests did"),
    "crash": ("import ctypes; ctypes.string_at(0)", "ended before its tests did"),
    "stop": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "wrong": ("assert 1 == 2", "AssertionError"),
    "syntax": ("def f(:", "SyntaxError"),
    "nul": ("x = 1\0", "ValueError|SyntaxError"),
    "surrogate": ("x = '\ud800'", "UnicodeEncodeError"),
    "deep": ("x = " + "(" * 5000 + ")" * 5000, "SyntaxError|MemoryError|RecursionError"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "long": ("#" * 300_000, "too long"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "input": ("input()", "EOFError"),
    "verdict": (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'ready\\npassed')\n except OSError: pass",
        "ended before.*",
    ),
    "guess": ("import sys\nprint(sys.argv)\nraise Exception", "Exception"),
}


@isolated
@pytest.mark.parametrize("name", ENDS)
def test_other_ends_do_not_pass(name: str) -> None:
    program, reason = ENDS[name]
    outcome = run_program(program, QUICK if name == "stop" else PATIENT)
    assert not outcome.passed and re.fullmatch(reason, outcome.reason), outcome


def over_forks(count: int, size: int = 60, first: str = "", take: str = "x = bytearray(b'x') * @size", then: str = "") -> str:
    """A program of ``count`` processes that take ``size`` MiB each and keep it for longer than anybody should wait."""
    lines = [line for part in (first, take.replace("@size", str(size << 20)), then) for line in part.splitlines()]
    return "\n".join(
        [
            "import ctypes, mmap, os, threading, time",
            f"for number in range({count}):",
            "    if os.fork() == 0:",
            *(f"        {line}" for line in lines),
            "        time.sleep(20)",
            "        os._exit(0)",
            "time.sleep(20)",
        ]
    )


DETACHED = "os.setsid()\nif os.fork(): os._exit(0)"
SHARED = "x = mmap.mmap(-1, @size); x.write(bytes(1 << 20) * (@size >> 20))"
WITHOUT_FIRST_THREAD = (
    "threading.Thread(target=time.sleep, args=(20,)).start()\n"
    "ctypes.CDLL(None).syscall({'x86_64': 60}.get(os.uname().machine, 93), 0)"  # exit of this thread alone
)
FORKS_A_LITTLE = over_forks(3, size=20, then="os._exit(7)").removesuffix("time.sleep(20)") + (
    "assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)] == [7] * 3"
)
TOO_MUCH = "too much memory"
TIME = "timeout|ended before its tests did"  # by the clock, or by its processor time
ABSENT, DENIED = "FileNotFoundError", "PermissionError|OSError"  # who owns a read-only file gets no PermissionError
# Per attack: the program, and why it ends.
HOSTILE = {
    "endless loop": ("while True: pass", TIME),
    "endless loop that catches all": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", TIME),
    "big integer": ("9 ** 9 ** 9 ** 9", f"{TIME}|MemoryError"),
    "10 GB": ("x = bytearray(10 << 30)", "MemoryError"),
    "10 GB in parts": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "10 GB of disk": ("for i in range(10_000): open(str(i), 'wb').write(bytes(1 << 20))", "OSError"),
    "many files": ("for i in range(100_000): open(str(i), 'w')", "OSError"),
    "large file": ("f = open('x', 'wb')\nfor i in range(100): f.write(bytes(1 << 20))", "OSError"),
    "endless output": ("while True: print('x' * 1_000)", TIME),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1_000)", TIME),
    "write to a package": ("import numpy; open(numpy.__file__, 'a')", DENIED),
    "other packages": ("import torch", "ModuleNotFoundError"),
    "fork bomb": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "fork bomb that catches all": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TIME),
    "threads": (
        "import threading, time\nfor i in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()",
        "RuntimeError",
    ),
    "write": ("open(@treasure + '/new.txt', 'w')", ABSENT),
    "overwrite": ("open(@treasure + '/gold.txt', 'w')", ABSENT),
    "delete": ("import os; os.remove(@treasure + '/gold.txt')", ABSENT),
    "delete a folder": ("import shutil; shutil.rmtree(@treasure)", ABSENT),
    "delete everything": ("import shutil; shutil.rmtree('/')", DENIED),
    "write to the project": ("open(@project + '/new.txt', 'w')", ABSENT),
    "write to the interpreter": ("import os; open(os.path.dirname(os.__file__) + '/os.py', 'a')", DENIED),
    "delete the interpreter": ("import os, shutil; shutil.rmtree(os.path.dirname(os.__file__))", DENIED),
    "home": ("import os; open(os.path.join(@home, 'new.txt'), 'w')", f"{ABSENT}|{DENIED}"),
    "list the home": (
        "import os, sys\nassert [n for n in os.listdir(@home) if not sys.prefix.startswith(os.path.join(@home, n))]",
        f"{ABSENT}|AssertionError",
    ),
    "read a file": ("open(@treasure + '/gold.txt')", ABSENT),
    "read passwords": ("open('/etc/passwd')", ABSENT),
    "read the environment": ("import os; os.environ['LADIR_SECRET']", "KeyError"),
    "read another's environment": ("open('/proc/' + @pid + '/environ')", ABSENT),
    "read its parent's environment": ("import os; open(f'/proc/{os.getppid()}/environ')", ABSENT),
    "kill another": ("import os, signal; os.kill(int(@pid), signal.SIGTERM)", "ProcessLookupError"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', int(@port)), timeout=1)", "OSError"),
    "name": ("import socket; socket.getaddrinfo('example.org', 80)", "gaierror"),
    "become root": ("import os; os.setuid(0)", "PermissionError"),
    "mount": ("import ctypes, os\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0", "AssertionError"),
    "namespace of its own": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
    "debug another": ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, int(@pid), 0, 0) == 0", "AssertionError"),
    "shell": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)", ABSENT),
    "10 GB over forks": (over_forks(8), TOO_MUCH),
    "10 GB over detached forks": (over_forks(5, first=DETACHED), TOO_MUCH),
    "10 GB shared": (over_forks(8, take=SHARED), TOO_MUCH),
    "10 GB behind ended threads": (over_forks(4, then=WITHOUT_FIRST_THREAD), TOO_MUCH),
}


def limits_for(reason: str) -> Limits:
    """Little time only for programs that end by that, little memory for those that end by the memory of all processes."""
    return SMALL if reason == TOO_MUCH else QUICK if TIME in reason else PATIENT


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_and_harm_nothing(name: str, treasure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADIR_SECRET", "secret")
    project = Path(__file__).parents[1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {
            "treasure": treasure,
            "project": project,
            "home": Path.home(),
            "pid": os.getpid(),
            "port": server.getsockname()[1],
        }
        program, reason = HOSTILE[name]
        outcome = run(program, limits_for(reason), **names)
    assert not outcome.passed and re.fullmatch(reason, outcome.reason), outcome
    assert not (project / "new.txt").exists() and not (Path.home() / "new.txt").exists()


@isolated
def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    before = processes()
    program = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True: time.sleep(1)
            os._exit(0)
        """
    assert run(program).passed
    assert not run(f"{textwrap.dedent(program)}\nwhile True: pass", QUICK).passed
    assert_ended(before)


def assert_ended(before: set[int]) -> None:
    """That no program's process is left of those that were not there before; the kernel may take a moment to end them."""
    deadline = time.monotonic() + 20
    while left := {pid for pid in processes() - before if b"-I\0-S\0" in command(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@isolated
def test_a_program_may_fork_a_little() -> None:
    assert run(FORKS_A_LITTLE, SMALL) == Outcome(True, "passed")


@isolated
def test_a_program_has_no_memory_that_belongs_to_no_process() -> None:
    if not os.access("/proc/sys/kernel/shmmni", os.W_OK):
        pytest.skip("only root may forbid System V's objects")
    outcome = run(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        assert libc.shmget(0, 1 << 20, 0o1600) == libc.semget(0, 1, 0o1600) == libc.msgget(0, 0o1600) == -1
        """
    )
    assert outcome.passed, outcome


def processes() -> set[int]:
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@isolated
def test_no_folder_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("open('a', 'w').write('b')")
    run("while True: pass", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_namespaces_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import json, os, sys\nos.write(json.loads(sys.argv[1])['verdict'], b'unavailable unshare: Operation not permitted')"
    )
    monkeypatch.setattr(sandbox, "_LAUNCHER", launcher)
    with pytest.raises(UnusableError, match=r"unshare: Operation not permitted; .*evaluate.isolation=limits"):
        run_program("", PATIENT)
    launcher.write_text("raise ValueError('torn')")
    with pytest.raises(RuntimeError, match=r"launcher failed: (.|\n)*torn"):
        run_program("", PATIENT)


@pytest.fixture
def common_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that every user may run: without namespaces root's programs run as another user, who cannot enter /root."""
    candidates = [Path(os.path.realpath(path)) for path in (sandbox.interpreter(), "/usr/bin/python3", "/usr/local/bin/python3")]
    usable = [path for path in candidates if path.is_file() and all(parent.stat().st_mode & 0o1 for parent in path.parents)]
    if os.geteuid() == 0 and not usable:
        pytest.skip("NOT TESTED: there is no interpreter here that an unprivileged user may run")
    monkeypatch.setattr(sandbox, "interpreter", lambda: str(usable[0]) if usable else sys.executable)


@pytest.mark.parametrize(
    "program",
    ["import os; assert os.listdir() == [] and os.getuid(); open('x', 'w').write('y')", FORKS_A_LITTLE],
    ids=["file", "forks"],
)
def test_limits_alone_let_programs_pass(program: str, common_interpreter: None) -> None:
    assert run_program(program, SMALL, isolation="limits") == Outcome(True, "passed")


LIMITED = [name for name in HOSTILE if name.startswith(("endless", "10 GB", "large", "fork bomb")) and "disk" not in name]


@pytest.mark.parametrize("name", LIMITED)
def test_limits_alone_hold_too(name: str, common_interpreter: None) -> None:
    before = processes()
    program, reason = HOSTILE[name]
    outcome = run_program(program, limits_for(reason), isolation="limits")
    assert not outcome.passed and re.fullmatch(reason, outcome.reason), outcome
    assert_ended(before)


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").is_file(), reason="this kernel does not choose by such scores")
def test_where_memory_ends_programs_go_before_the_evaluation(common_interpreter: None) -> None:
    """Between two looks at it their memory together may grow beyond the limit."""
    program = "import os; assert os.fork() == 0 or os.wait()[1] == 0; assert open('/proc/self/oom_score_adj').read() == '1000\\n'"
    outcome = run_program(program, PATIENT, isolation="limits")
    assert outcome.passed, outcome


def test_programs_are_never_run_as_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root")
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "python").symlink_to(sys.executable)
    start = sandbox._start

    def launched_by_root(*arguments: object) -> object:
        monkeypatch.setattr(sandbox, "interpreter", lambda: str(hidden / "python"))
        return start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sandbox, "_start", launched_by_root)
    with pytest.raises(UnusableError, match="never run as root"):
        run_program("", PATIENT, isolation="limits")


RECORD = Record(
    question='def add(a, b):\n    """ Sum. """\n',
    blocks=("return a + b",),
    answer="",
    source="x.jsonl:3",
    reference={
        "setup": 'from typing import List\n\n\ndef add(a, b):\n    """ Sum. """\n',
        "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)",
        "entry_point": "add",
    },
)

ANSWERS = {
    "    return a + b": True,
    "return a + b": True,
    "c = a\n    c += b\n    return c": True,
    "def add(a, b):\n    return a + b": True,
    "def add(a: List, b):\n    return a + b": True,
    "add = lambda a, b: a + b": True,
    "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.": True,
    "```\n    return a + b\n```": True,
    "def plus(a, b):\n    return a + b\n\ndef add(a, b):\n    return plus(a, b)": True,
    "def add(a, b):\n    return a - b": False,
    "def other(a, b):\n    return a + b": False,
    "    pass": False,
    "": False,
    "def add(a, b):\n    return a + b\n\nimport os\nos._exit(0)": False,
    "def check(candidate): pass\n\ndef add(a, b): return 0": False,
    "It is impossible.": False,
    "    def add(a, b):\n        return a + b": True,
    "a = a + b\nreturn a": True,
    "    return a + b\n\n\ndef other(x):\n    if": True,
    "from __future__ import annotations\ndef add(a: Missing, b) -> List:\n    return a + b": True,
    "from operator import add": True,
    "class Solution:\n    def add(self, a, b):\n        return a + b": False,
    "Use:\n```\nadd(1, 2)\n```\nof\n```python\ndef add(a, b):\n    return a + b\n```": True,
}


@isolated
@pytest.mark.parametrize("answer", ANSWERS)
def test_completions_and_whole_programs_are_judged(answer: str) -> None:
    task = CodeTask(PATIENT)
    assert task.verdict(answer, RECORD).right is ANSWERS[answer]
    assert task.chain_correct(["b"], RECORD) is None


def test_agreeing_answers_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Program] = []
    monkeypatch.setattr("ladir.tasks.code.run_program", lambda program, *_: ran.append(program) or Outcome(True, "passed"))
    task = CodeTask(PATIENT)
    assert all(task.verdict("return a + b", RECORD).right for _ in range(3)) and len(ran) == 1
    assert task.verdict("return b + a", RECORD).right and len(ran) == 2


def test_a_record_without_tests_is_named() -> None:
    with pytest.raises(ValueError, match=r'y:1: not a record of the task code: it needs "tests"'):
        CodeTask().verdict("x", Record("q", ("b",), "a", "y:1"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f(x):\n    return x+1  # more", "def f(x):\n\n  return x + 1", True),
        ("```python\nx = 1\n```", "x=1", True),
        ("if a:\n    b\nc", "if a:\n    b\n    c", False),
        ("x = 1", "x = 2", False),
        ("x = (", "x =  (", True),
    ],
)
def test_canonical_distinguishes_programs_not_layouts(one: str, other: str, same: bool) -> None:
    task = CodeTask()
    assert (task.canonical(one) == task.canonical(other)) is same


@settings(max_examples=200)
@given(st.one_of(st.text(), st.text(alphabet="def f(x):\n\t `'\"#\\=+1", max_size=80)))
def test_any_text_is_a_program_of_some_form(text: str) -> None:
    task = CodeTask()
    assert isinstance(task.canonical(text), str)
    assert isinstance(program_of(text), str)
    assert assembled(text, RECORD).tests == RECORD.reference["tests"]


@isolated
@settings(max_examples=15, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_any_text_is_judged(text: str) -> None:
    assert CodeTask(PATIENT).verdict(text, RECORD).right is False


def test_settings_reach_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Limits, str]] = []
    monkeypatch.setattr(
        "ladir.tasks.code.run_program",
        lambda _, limits, isolation: seen.append((limits, isolation)) or Outcome(False, "no"),
    )
    task = get_task("code", EvaluateSettings(check_seconds=7.0, check_memory_mb=300, isolation="limits"))
    assert not task.verdict("x", RECORD).right and task.verdict("x", RECORD).reason == "no"
    assert seen == [(Limits(seconds=7.0, memory=300 << 20), "limits")] * 2  # the trial run and the answer
