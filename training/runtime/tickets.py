"""Numbers that go to the ranks as they ask for them: whoever is done takes the next piece of work, none waits for another."""

from __future__ import annotations

import itertools
import uuid

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from training.runtime.distributed import RankLostError, World


class Tickets:
    """0, 1, 2, ..., each for one rank, from the job's key-value store.  Made by all ranks together, then used by each alone."""

    def __init__(self, world: World) -> None:
        self._store = c10d._get_default_store() if world.size > 1 else None
        self._alone = itertools.count()
        self._key = f"tickets/{world.broadcast(uuid.uuid4().hex)}"
        self._is_closed = False

    def take(self) -> int:
        """The next one.  RankLostError where the job's first rank, which has the store, is gone."""
        return next(self._alone) if self._store is None else self._add("next", 1) - 1

    def close(self) -> None:
        """Nobody should take another one: a rank was asked to stop."""
        self._is_closed = True
        if self._store is not None:
            self._add("closed", 1)

    @property
    def closed(self) -> bool:
        """Whether any rank has closed them."""
        return self._is_closed or (self._store is not None and self._add("closed", 0) > 0)

    def _add(self, name: str, amount: int) -> int:
        assert self._store is not None
        try:
            return int(self._store.add(f"{self._key}/{name}", amount))
        except (dist.DistError, RuntimeError) as error:
            raise RankLostError(
                f"the job's key-value store, on the first rank, does not answer ({error}). Look for an error of that rank above; "
                "the same command continues"
            ) from error
