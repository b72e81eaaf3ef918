"""How an entry point's process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

#: an object that aborts the process once the interpreter takes its module apart, as gloo's threads do now and then
SCRIPT = """
import atexit, os, sys
from training.runtime.distributed import run_as_program

class Threads:
    def __del__(self, abort=os.abort):
        abort()

groups = Threads()
atexit.register(sys.stdout.write, "at exit\\n")

def main():
    sys.stdout.write("work done\\n")
    {body}

{ending}
"""


def run(body: str, ending: str = "run_as_program(main)") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body, ending=ending)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "RANK": "0"})


def test_without_it_the_interpreters_end_fails_a_process_whose_work_is_done() -> None:
    assert run("pass", "main()").returncode == -signal.SIGABRT


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such run')", 1, "no such run"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_a_process_ends_with_the_status_of_its_work(body: str, status: int, said: str) -> None:
    done = run(body)
    assert (done.returncode, done.stdout) == (status, "work done\nat exit\n"), done.stderr
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == ("ValueError" in said)
