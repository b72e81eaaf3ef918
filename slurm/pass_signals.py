"""Run a launcher and pass the signals that are held back (``hold_signals.py``) on to the training processes that it starts.

Slurm signals the process that it started itself, this one, and no descendant of it (``proctrack/cgroup``, its default); launchers
would die of a signal or kill their processes.  ``rank.sh`` leaves its process id in the folder ``RANK_PIDS``; a signal that
comes before it has is passed on when it does.  Where a node's processes die and none of them has said why, the node is noted
for the batch script.  Usage: ``pass_signals.py launcher arguments``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from training.runtime.failures import node_name, tell_batch_script
from training.runtime.ports import is_taken

#: seconds between two looks at the launcher and at processes that have started since
_PERIOD = 0.5


def main(command: list[str]) -> int:
    """Run the launcher, which holds the same signals back; returns its exit status."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with tempfile.TemporaryDirectory(prefix="ladir-ranks-") as folder:
        launcher = subprocess.Popen(command, env={**os.environ, "RANK_PIDS": folder})
        status = _passing_on(launcher, held, Path(folder))
        if status and not (Path(folder) / "told").exists():
            _tell_for_the_launcher()
    return status if status >= 0 else 128 - status


def _tell_for_the_launcher() -> None:
    """torchrun itself listens at the job's port on the first node; where another job has it, no node is to blame."""
    port = os.environ.get("MASTER_PORT", "")
    if os.environ.get("SLURM_NODEID") == "0" and port.isdecimal() and is_taken(int(port)):
        tell_batch_script("absent")
    else:
        tell_batch_script("ended", [node_name()])


def _passing_on(launcher: subprocess.Popen[bytes], held: set[int], folder: Path) -> int:
    """The launcher's status, once it has ended."""
    told: dict[int, set[str]] = {}  # by signal that has come, the processes that know
    while launcher.poll() is None:
        found = signal.sigtimedwait(held, _PERIOD)
        if found is not None:
            told[found.si_signo] = set()
        for number, known in told.items():
            _tell(number, folder, known)
    return launcher.returncode


def _tell(number: int, folder: Path, known: set[str]) -> None:
    """Send a signal to the processes that do not know of it."""
    for file in folder.glob("[0-9]*"):
        text = file.read_text()
        if file.name not in known and text.endswith("\n"):  # written whole
            known.add(file.name)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(int(text), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
