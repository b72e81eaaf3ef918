"""Numbers that go to the ranks as they ask for them: whoever is done takes the next piece of work, none waits for another."""

from __future__ import annotations

from training.runtime.distributed import World
from training.runtime.words import Words


class Tickets:
    """0, 1, 2, ..., each for one rank, from the job's key-value store.  Made by all ranks together, then used by each alone."""

    def __init__(self, world: World) -> None:
        self._words = Words(world, "tickets")

    def take(self) -> int:
        """The next one.  RankLostError where the job's first rank, which has the store, is gone."""
        return self._words.count("next", 1) - 1
