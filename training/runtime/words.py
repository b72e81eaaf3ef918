"""What ranks let each other know without a collective: each says and looks when it likes."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from training.runtime.distributed import RankLostError, World


class Words:
    """Words and counts in the job's key-value store.  Made by all ranks together, then used by each alone, from any thread.

    RankLostError where the job's first rank, which has the store, is gone.
    """

    def __init__(self, world: World, about: str) -> None:
        self._store = c10d._get_default_store() if world.size > 1 else None
        self._own: Counter[str] = Counter()  # of a process that is the only one
        self._key = f"{about}/{world.broadcast(uuid.uuid4().hex)}"

    def say(self, word: str) -> None:
        """Let the others know."""
        self.count(word, 1)

    def said(self, word: str) -> bool:
        """Whether any rank has said it."""
        if self._store is None:
            return word in self._own
        with _answering():
            return bool(self._store.check([f"{self._key}/{word}"]))

    def count(self, word: str, amount: int) -> int:
        """Add to what all ranks have counted under ``word``; the new count."""
        if self._store is None:
            self._own[word] += amount
            return self._own[word]
        with _answering():
            return int(self._store.add(f"{self._key}/{word}", amount))


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise RankLostError(
            f"the job's key-value store, on the first rank, does not answer ({error}). Look for an error of that rank above; "
            "the same command continues"
        ) from error
