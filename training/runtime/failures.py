"""What a program that fails leaves for those who started it: its launcher, and the batch script that may queue its job again.

torchrun ends with a traceback of its own and, below it, a summary of the processes that failed.  What a process has written to
the file TORCHELASTIC_ERROR_FILE is quoted there, so that the last thing to be read is what went wrong and not where torchrun
noticed (its format: https://pytorch.org/docs/stable/elastic/errors.html).

Launchers garble statuses.  So the first process that knows why a job fails writes it to the file FAILURE_MARK.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

#: refused: the user's to mend; fault: an exception like any other; device: of this node's device or network; lost: another
#: process died or hangs; absent: the processes have not found one another; sick: the pre-flight has found a device wrong or
#: slow; ended: a node's processes died without a word
Kind = Literal["refused", "fault", "device", "lost", "absent", "sick", "ended"]


def tell_launcher(message: str, follows: bool = False) -> None:
    """Have ``message`` quoted; the other launchers show what was logged.

    The earliest failure is taken for the cause, in whole seconds: one that only ``follows`` from another process' is dated later.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()) + follows}), encoding="utf-8")


def tell_batch_script(kind: Kind, nodes: Sequence[str] = ()) -> None:
    """Note why the job fails and whose ``nodes`` are to blame, unless another process has already: what follows is no cause.

    Without a batch script nobody asks.
    """
    pids, file = os.environ.get("RANK_PIDS"), os.environ.get("FAILURE_MARK")
    if pids and kind != "ended":  # this node's processes did not die without a word
        with suppress(OSError):
            (Path(pids) / "told").touch()
    if file and not (kind == "lost" and not nodes):  # who knows the node will say more
        with suppress(OSError), Path(file).open("x", encoding="utf-8") as mark:
            mark.write(f"{kind} {','.join(nodes) or '-'}\n")


def node_name() -> str:
    """This node's name, as the batch system knows it where there is one."""
    return os.environ.get("SLURMD_NODENAME", platform.node())
