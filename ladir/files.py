"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


def sync_file(path: Path) -> None:
    """Force the content of a file, or the entries of a folder where its file system can do that, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def replace_folder(aside: Path, final: Path) -> None:
    """Give ``aside`` the name ``final``.

    What has it is renamed before it is deleted: a deletion that is cut short leaves no folder that looks foreign.
    """
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # another process still reads what is in it, and the file system keeps that
        old = Path(tempfile.mkdtemp(prefix=f"{old.name}.", dir=final.parent)) / final.name
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync_file(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_locked(path: Path) -> bool | None:
    """Whether a process keeps the lock file ``path`` locked; None where the file system knows no locks."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once: who wants to lock it tries again
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
