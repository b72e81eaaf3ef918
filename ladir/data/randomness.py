"""Counter-based randomness: whatever is drawn for a sample depends on (seed, its number in the run) and nothing else.

Results are therefore the same on any number of ranks, micro batches and accumulation steps, and a resumed run has no
generator state to restore.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, number: int) -> np.random.Generator:
    """An independent generator for the ``number``-th draw under ``seed`` (Philox keyed by both)."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), number & (2**64 - 1)]))


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed of its own for a named purpose, e.g. ``derive(seed, "vae")``."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
