"""Counter-based randomness: whatever is drawn for a sample depends on (seed, its number in the run) and nothing else.

Results are therefore the same on any number of ranks, micro batches and accumulation steps, and a resumed run has no
generator state to restore.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, number: int) -> np.random.Generator:
    """An independent generator for the ``number``-th draw under ``seed`` (Philox keyed by both)."""
    return np.random.Generator(np.random.Philox(key=_key(seed, number)))


def _key(seed: int, number: int) -> np.ndarray:
    """Both as 64 bits; a list of them numpy would take for floats where only one exceeds 63."""
    return np.array([seed & (2**64 - 1), number & (2**64 - 1)], dtype=np.uint64)


class Streams:
    """:func:`generator` for many numbers, one after another: winding one generator on takes a sixth of making one."""

    def __init__(self, seed: int) -> None:
        self._seed, self._bits = seed, np.random.Philox(key=_key(seed, 0))
        self._start = self._bits.state  # a copy, with nothing drawn
        self._generator = np.random.Generator(self._bits)

    def at(self, number: int) -> np.random.Generator:
        """What ``generator(seed, number)`` draws; only until the next call."""
        self._start["state"]["key"] = _key(self._seed, number)
        self._bits.state = self._start
        return self._generator


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed of its own for a named purpose, e.g. ``derive(seed, "vae")``."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
