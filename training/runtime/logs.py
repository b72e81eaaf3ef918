"""What a program's processes write: our own lines, and what other libraries have to say, each thing once."""

from __future__ import annotations

import logging
import os
import sys
import warnings

#: loggers of this project; a module that is run as a script logs under the last of these names
OURS = ("ladir", "training", "__main__")

#: so many different lines are remembered
_REMEMBERED = 4096


class Once(logging.Filter):
    """Lets a line pass the first time; from ranks other than 0 only our own and errors, since libraries say the same on all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank, self._said = rank, set[tuple[int, str]]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        ours = record.name.split(".")[0] in OURS
        line = (record.levelno, _text(record))
        if line in self._said or (self._rank and not ours and record.levelno < logging.ERROR):
            return False
        if len(self._said) < _REMEMBERED:
            self._said.add(line)
        return True


def _text(record: logging.LogRecord) -> str:
    """What a record says; one whose arguments do not fit its text (libraries have such lines) is given them behind it.

    An error here would not stay in logging, as it does where a line is written, but end whoever logs.
    """
    try:
        return record.getMessage()
    except Exception:  # foreign code: what formatting its arguments raises is not known
        record.msg, record.args = f"{record.msg} {record.args!r}", None
        return record.getMessage()


def configure_logging(rank: int, size: int) -> None:
    """Our INFO lines from rank 0, our warnings from everybody; other libraries from WARNING on, from rank 0."""
    where = f" [rank {rank}]" if size > 1 else ""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s{where} %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        for before in [kept for kept in handler.filters if isinstance(kept, Once)]:  # of another run in this process
            handler.removeFilter(before)
        handler.addFilter(Once(rank))
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _route_libraries(rank)


def _route_libraries(rank: int) -> None:
    """Warnings of Python and of transformers become lines like the others; bars of downloads are for who sits before rank 0."""
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()  # those of loading, and the Hub's
    if rank == 0 and sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()
    else:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported, which is slow
    # DeepSpeed calls collectives by names that torch is about to rename: nothing a user could act on.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    warnings.formatwarning = _in_one_line
    logging.captureWarnings(True)


def _in_one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning without the source line that raised it."""
    return f"{category.__name__}: {message} ({filename}:{lineno})"
