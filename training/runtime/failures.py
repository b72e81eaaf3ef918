"""What a program that fails leaves for its launcher.

torchrun ends with a traceback of its own and, below it, a summary of the processes that failed.  What a process has written to
the file TORCHELASTIC_ERROR_FILE is quoted there, so that the last thing to be read is what went wrong and not where torchrun
noticed (its format: https://pytorch.org/docs/stable/elastic/errors.html).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path


def tell_launcher(message: str, follows: bool = False) -> None:
    """Have ``message`` quoted; the other launchers show what was logged.

    The earliest failure is taken for the cause, in whole seconds: one that only ``follows`` from another process' is dated later.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()) + follows}), encoding="utf-8")
