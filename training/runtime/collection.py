"""Python's collector of reference cycles, under control: all ranks collect at the same steps.

By itself it stops one rank here and another there, and every time the others wait for it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_when_asked() -> Iterator[None]:
    """Inside, cycles are collected where ``gc.collect`` is called; what is there already is never looked at again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
