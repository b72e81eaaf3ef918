"""Programs as answers: what passes in one file with its tests passes here, what fails has its reason, cheats are stopped."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ladir.data.records import Record
from ladir.tasks import sandbox
from ladir.tasks.code import CodeTask
from ladir.tasks.sandbox import Limits, Outcome, run_program
from ladir.tasks.verdict import Verdict
from tests.test_code import PATIENT, QUICK, SMALL, isolated, namespaces, over_forks

assert namespaces  # a fixture


def judged(answer: str, tests: str, setup: str = "", entry_point: str | None = None) -> Verdict:
    reference = {"setup": setup, "tests": textwrap.dedent(tests), "entry_point": entry_point}
    return CodeTask(PATIENT).verdict(textwrap.dedent(answer), Record("q", ("b",), "", "x.jsonl:3", reference))


RIGHT = [
    "import os, sys\nprint('x' * 3_000_000); sys.stderr.write('y' * 3_000_000); sys.stdout.buffer.write(b'z' * 9_000_000)",
    "import os; os.write(1, b'a' * 3_000_000); os.close(1); os.close(2)",
    "import sys; sys.stdout.close(); sys.stderr = None",
    "import threading, time\nfor daemon in (True, False): threading.Thread(target=time.sleep, args=(60,), daemon=daemon).start()",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(32) as pool: list(pool.map(abs, range(500)))",
    "import multiprocessing\nwith multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]",
    "import sys\nsys.setrecursionlimit(10**6)\ndef depth(n): return n and 1 + depth(n - 1)\nassert depth(30_000) == 30_000",
    "if __name__ == '__main__': raise SystemExit(1)",
]


@isolated
@pytest.mark.parametrize("program", RIGHT, ids=range(len(RIGHT)))
def test_a_right_program_may_say_and_leave_behind_what_it_likes(program: str) -> None:
    assert run_program(program, PATIENT) == Outcome(True, "passed")


NUMPY = f"""
import os
import numpy as np
np.testing.assert_allclose((np.ones((100, 100)) @ np.ones((100, 100))).sum(), 1e6)
assert os.environ.keys() <= {{"LC_CTYPE"}} and np.__version__ == {np.__version__!r}
"""


@isolated
def test_numpy_is_there_as_it_is_installed_whatever_the_umask() -> None:
    before = os.umask(0o077)
    try:
        assert run_program(NUMPY, PATIENT) == Outcome(True, "passed")
    finally:
        os.umask(before)
    assert run_program(NUMPY, Limits(seconds=30.0, memory=256 << 20)) == Outcome(True, "passed")


@pytest.fixture
def common_folder() -> Iterator[Path]:
    """A folder that every user may enter (pytest's own are closed to others whenever a session begins)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_limits_alone_show_numpy_and_nothing_beside_it(monkeypatch: pytest.MonkeyPatch, common_folder: Path) -> None:
    """Root's programs run as another user, who reaches neither this numpy nor, maybe, this Python: here are ones for all."""
    common = Path("/usr/bin/python3").resolve()
    if os.geteuid() == 0:
        if not common.is_file():
            pytest.skip("NOT TESTED: there is no interpreter here that an unprivileged user may run")
        monkeypatch.setattr(sandbox, "interpreter", lambda: str(common))
    for name in ("numpy", "other"):
        (common_folder / name).mkdir(mode=0o755)
        (common_folder / name / "__init__.py").write_text("here = True")
    monkeypatch.setattr(sandbox, "_packages", lambda: (common_folder / "numpy",))
    assert run_program("import numpy\nassert numpy.here", PATIENT, isolation="limits") == Outcome(True, "passed")
    assert run_program("import other", PATIENT, isolation="limits").reason == "ModuleNotFoundError"


@isolated
def test_tests_are_the_main_program() -> None:
    """Else those behind the usual condition would not run, and everything would pass."""
    tests = "def check(g): assert g(1) == 2\nif __name__ == '__main__':\n    check(f)"
    assert judged("def f(x): return 2\nif __name__ == '__main__': raise SystemExit", tests) == Verdict(True)
    assert not judged("def f(x): return 3", tests).right


HINTS = "def g(a: int) -> str: ...\nassert hints(g) == {'a': int, 'return': str}"
FUTURE = "from __future__ import annotations\n"
LISTENS = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out: f()\nassert out.getvalue() == 'hello\\n'"
SOURCE = "assert inspect.getsource(f) == 'def f():\\n    return 1\\n' and inspect.getsource(A) == 'class A:\\n    x = 1\\n'"
# Set-up, answer, tests.
PASSES = {
    "annotations of the tests": ("", "def hints(f): return f.__annotations__", HINTS),
    "the tests' future is their own": ("", f"{FUTURE}def hints(f): return f.__annotations__", HINTS),
    "future behind a set-up": ("import math\n", f"'''Doc.'''\n{FUTURE}def f(x: Missing): return x", "assert f(1) == 1"),
    "future of the set-up": (FUTURE, "def f(x: Missing): return x", "def g(y: Missing): ...\nassert f(1) == 1"),
    "signature": ("", "import inspect\ndef hints(f): return inspect.get_annotations(f)", HINTS),
    "types": (
        "",
        "import typing\nclass P: ...\nhints = typing.get_type_hints",
        "def g(a: 'P'): ...\nassert hints(g) == {'a': P}",
    ),
    "pickle": (
        "",
        "import pickle\nclass P: ...\ndef copy(p): return pickle.loads(pickle.dumps(p))",
        "assert type(copy(P())) is P",
    ),
    "source": ("import math\n\n", "import inspect\ndef f():\n    return 1\n\nclass A:\n    x = 1\n", SOURCE),
    "doctest": (
        "",
        "import doctest\ndef f():\n    '''\n    >>> f()\n    1\n    '''\n    return 1",
        "assert doctest.testmod().attempted",
    ),
    "dispatch": (
        "",
        "from functools import singledispatch\n@singledispatch\ndef f(x): return x\n@f.register\ndef _(x: int): return 2 * x",
        "assert f(2) == 4 and f('a') == 'a'",
    ),
    "all of a module": ("", "from math import *\ndef f(): return floor(1.5)", "assert f() == 1"),
    "coroutine": ("", "async def f(x): return x", "import asyncio\nassert asyncio.run(f(3)) == 3"),
    "tests that change modules": (
        "",
        "import time\ndef f(): return time.time()",
        "import time\ntime.time = lambda: 5\nassert f() == 5",
    ),
    "tests that play the user": ("", "def f(): return input('?')", "input = lambda *_: 'yes'\nassert f() == 'yes'"),
    "tests that mock": (
        "",
        "def f(): return input('?')",
        "from unittest import mock\nwith mock.patch('builtins.input', lambda *_: 'yes'): assert f() == 'yes'",
    ),
    "tests that listen": ("", "def f(): print('hello')", LISTENS),
    "own names like Python's": ("", "def sum(a, b): return a + b\nall = 3", "assert sum(1, 2) == all"),
}


@isolated
@pytest.mark.parametrize("name", PASSES)
def test_programs_run_as_in_one_file_with_their_tests(name: str) -> None:
    setup, answer, tests = PASSES[name]
    assert judged(answer, tests, setup) == Verdict(True)


ADD = "assert add(1, 2) == 3"


@isolated
@pytest.mark.parametrize(
    "answer", ["return a + b", "def add(a, b):\n    return a + b", "def add(a, b):\n    return math.fsum([a, b])"]
)
def test_a_set_up_that_is_only_a_head_takes_bodies_and_whole_functions(answer: str) -> None:
    assert judged(answer, ADD, "import math\ndef add(a, b):\n", "add") == Verdict(True)


DOUBLE = "assert f(2) == 4"
# Answer, tests, reason.
REASONS = {
    "no answer": ("", DOUBLE, "no program in the answer"),
    "wrong": ("def f(x): return x", f"y = 1\n{DOUBLE}", "AssertionError: assert f(2) == 4 (tests, line 2)"),
    "message": ("def f(x): return x", f"{DOUBLE}, 'no'", "AssertionError: no: assert f(2) == 4, 'no' (tests, line 1)"),
    "name": ("\ndef f(x):\n    return y", DOUBLE, "NameError: name 'y' is not defined (answer, line 3)"),
    "no import": ("def f(x: List[int]): return 4", DOUBLE, "NameError: name 'List' is not defined (answer, line 1)"),
    "syntax": ("def f(x:\n    return 0", DOUBLE, "SyntaxError: '(' was never closed (answer, line 1)"),
    "exit": ("import sys\nsys.exit(0)", DOUBLE, "SystemExit: 0 (answer, line 2)"),
    "hard exit": ("import os\nos._exit(0)", DOUBLE, "ended before its tests did: exit status 0"),
    "kill": ("import os\nos.kill(os.getpid(), 9)", DOUBLE, "ended before its tests did: killed by SIGKILL"),
    "tests": ("x = 1", "assert x ===", "SyntaxError: invalid syntax (tests, line 1)"),
    "memory": ("x = bytearray(90 << 30)", "pass", "MemoryError: above evaluate.check_memory_mb=512 (answer, line 1)"),
    "length": ("#" * 200_001, "pass", "too long: more than 200,000 characters"),
    "its own exception": ("class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E", "pass", "Exception"),
}


@isolated
@pytest.mark.parametrize("name", REASONS)
def test_a_failed_program_has_its_reason(name: str) -> None:
    answer, tests, reason = REASONS[name]
    assert judged(answer, tests) == Verdict(False, reason)


@isolated
def test_reasons_are_short_and_on_one_line() -> None:
    reason = judged("class E(Exception): ...\nE.__name__ = 'N\\n' * 9_999\nraise E('x\\n\\x1b[2J' * 9_999)", "pass").reason
    assert 20 < len(reason) < 700 and reason.isprintable()


@isolated
def test_lines_of_a_completion_are_counted_without_its_set_up() -> None:
    reason = judged("    c = a\n    return c + d", ADD, "import math\n\n\ndef add(a, b):\n", "add").reason
    assert reason == "NameError: name 'd' is not defined (answer, line 2)"


@isolated
def test_time_and_memory_have_their_reasons() -> None:
    assert str(run_program("import time; time.sleep(60)", QUICK)) == "timeout: more than 3 s (evaluate.check_seconds=1)"
    assert str(run_program(over_forks(8), SMALL)) == "too much memory: all processes together above evaluate.check_memory_mb=200"
    busy = run_program("while True: pass", Limits(seconds=1.0), isolation="namespaces")
    assert busy.reason == "timeout" and "evaluate.check_seconds" in busy.detail


COMPARE = "import math\nassert all(a == b for a, b in zip(f([1]), [2]))\nassert math.isclose(f([1])[0], 2)"
HELPER = "def assertion(a, b): assert a == b\ndef check(g):\n    assertion(g(1), 1)\n    assertion(g(2), 4)\ncheck(f)"
CHANGED = "changed what its tests use: "
CHEATS = {
    "frame": ("import sys\ndef f(x):\n    sys._getframe(1).f_globals['assertion'] = print\n    return 1", HELPER, CHANGED),
    "globals": ("def f(x):\n    globals()['assertion'] = print\n    return 1", HELPER, CHANGED),
    "code": ("def f(x):\n    assertion.__code__ = (lambda a, b: 0).__code__\n    return 1", HELPER, CHANGED),
    "own helper": ("def check(g): pass\ndef f(x): return 1", HELPER, "AssertionError"),
    "builtins": ("import builtins\nbuiltins.all = lambda _: True\ndef f(x): return [0]", COMPARE, "AssertionError"),
    "builtins' dict": ("__builtins__['zip'] = lambda *_: []\ndef f(x): return [0]", COMPARE, "AssertionError"),
    "late builtins": ("def f(x):\n    globals()['__builtins__']['all'] = lambda _: True\n    return [2.0]", COMPARE, CHANGED),
    "module": ("import math\nmath.isclose = lambda *_: True\ndef f(x): return [2]", COMPARE, f"{CHANGED}math.isclose"),
    "late module": (
        "import math\ndef f(x):\n    math.isclose = lambda *_: True\n    return [2]",
        COMPARE,
        f"{CHANGED}math.isclose",
    ),
    "other module": ("import sys, types\nsys.modules['math'] = types.SimpleNamespace()\n", COMPARE, f"{CHANGED}module math"),
    "numpy": (
        "import numpy\nnumpy.allclose = print\n",
        "import numpy as np\nassert np.allclose(f(1), 1)",
        f"{CHANGED}numpy.allclose",
    ),
    "guesses in forks": (
        "import os\ndef f(x):\n    for guess in range(5):\n        if os.fork() == 0: return guess\n        os.wait()",
        "assert f(1) == 3",
        "AssertionError",
    ),
    "exit": ("def f(x): raise SystemExit(0)", COMPARE, "SystemExit"),
    "late exit": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0", COMPARE, "TypeError"),
    "no exit, no write": ("import os\nos.write = os._exit = lambda *_: 0\ndef f(x): return [0]", COMPARE, "AssertionError"),
    "main module": ("import __main__\n__main__._run = __main__._failure = lambda _: b''\nraise KeyError", "pass", "KeyError"),
    "word in a frame": (
        """
        import os, sys
        def words(value):
            return [value] if isinstance(value, bytes) else sum(map(words, value.values()), []) if isinstance(value, dict) else []
        frame = sys._getframe()
        while frame:
            for word in words(dict(frame.f_locals)):
                for fd in range(3, 20):
                    try: os.write(fd, word)
                    except OSError: pass
            frame = frame.f_back
        os._exit(0)
        """,
        "pass",
        "ended before its tests did",
    ),
}


@isolated
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_that_are_stopped(name: str) -> None:
    answer, tests, reason = CHEATS[name]
    verdict = judged(answer, tests)
    assert not verdict.right and verdict.reason.startswith(reason), verdict


@isolated
def test_long_tests_are_parsed_once_and_still_told_apart() -> None:
    tests = f"inputs = {list(range(20_000))}\nassert [f(x) for x in inputs] == inputs"
    assert sandbox._facts_of(tests).compiled and not sandbox._facts_of(f"{tests}\n===").compiled
    assert judged("def f(x): return x", tests) == Verdict(True)
    wrong = judged("def f(x): return 0", tests)
    assert wrong.reason == "AssertionError: assert [f(x) for x in inputs] == inputs (tests, line 2)"
