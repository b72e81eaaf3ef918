"""What rank 0 does alone: the others wait for it without a collective, so that no backend loses patience, and answer signals."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from training.runtime.distributed import RankLostError, World
from training.runtime.preemption import BrokenOff, StopRequest

T = TypeVar("T")

#: raises BrokenOff where a stop was asked for; called between the pieces of a work
GiveWay = Callable[[], None]

_FIRST_SECONDS, _LAST_SECONDS = 0.001, 0.5


def alone(world: World, stop: StopRequest, work: Callable[[GiveWay], T]) -> T | None:
    """What ``work`` returns on rank 0, on every rank; None where it was broken off (collective).

    ``work`` is called on rank 0 with a function that it calls between pieces of work that may be left undone: it raises
    :class:`~training.runtime.preemption.BrokenOff` where any rank was asked to stop.  An error that a user can mend is raised on
    every rank.
    """
    post = _Post(world, stop)

    def whole() -> T | None:
        try:
            return work(post.give_way)
        except BrokenOff:
            return None
        finally:
            post.say("done")

    if not world.is_main:
        post.wait()
    return world.on_main(whole)


def unbroken(world: World, stop: StopRequest | None, work: Callable[[GiveWay], T]) -> T:
    """:func:`alone`; BrokenOff on every rank where it was broken off.  ``stop`` None: nobody asks."""
    found = alone(world, stop or StopRequest("TERM"), work)
    if found is None:
        raise BrokenOff
    return found


class _Post:
    """Words between the ranks through the job's key-value store."""

    def __init__(self, world: World, stop: StopRequest) -> None:
        self._stop, self._told = stop, False
        self._store = c10d._get_default_store() if world.size > 1 else None
        self._key = f"alone/{world.broadcast(uuid.uuid4().hex)}"

    def say(self, word: str) -> None:
        """Let the others know."""
        if self._store is not None:
            self._store.set(f"{self._key}/{word}", "1")

    def give_way(self) -> None:
        """Raise BrokenOff where this rank or another was asked to stop."""
        self._stop.announce()
        if self._stop.requested or (self._store is not None and self._store.check([f"{self._key}/stop"])):
            raise BrokenOff

    def wait(self) -> None:
        """Return when rank 0 is done; tell it when this rank is asked to stop."""
        assert self._store is not None
        pause = _FIRST_SECONDS
        try:
            while not self._store.check([f"{self._key}/done"]):
                self._stop.announce()
                if self._stop.requested and not self._told:
                    self.say("stop")
                    self._told = True
                time.sleep(pause)
                pause = min(2 * pause, _LAST_SECONDS)
        except (dist.DistError, RuntimeError) as error:
            raise RankLostError(
                f"rank 0 worked alone and is lost ({error}). Look for its error above; the same command continues"
            ) from error
