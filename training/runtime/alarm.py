"""A stop that one rank is asked for, heard by all while each goes its own way."""

from __future__ import annotations

import math
import time

import torch

from training.runtime.distributed import World
from training.runtime.preemption import BrokenOff, StopRequest
from training.runtime.words import Words

#: where ranks go their own ways, those that are done wait so long for the slowest: one program that is judged may take long
APART_MINUTES = 24 * 60
#: seconds between two looks at whether another rank was asked to stop
_LOOK_SECONDS = 1.0
_STOP = "stop"


def stop_agreed(world: World, stop: StopRequest) -> bool:
    """Whether any rank was asked to stop, answered alike on all of them (collective)."""
    stop.announce()
    return bool(world.sum(torch.tensor([float(stop.requested)])).item() > 0)


def give_way(world: World, stop: StopRequest | None) -> None:
    """Raise BrokenOff, on all ranks, where any was asked to stop (collective).  ``stop`` None: nobody asks."""
    if stop is not None and stop_agreed(world, stop):
        raise BrokenOff


class Alarm:
    """Whether any rank was asked to stop.  Made by all ranks together; each looks for itself until all meet."""

    def __init__(self, world: World, stop: StopRequest) -> None:
        self._world, self._stop, self._words = world, stop, Words(world, "alarm")
        self._rung, self._looked = False, -math.inf

    def rung(self) -> bool:
        """Whether any was; that this one was is told to the others.  May be called often: they are asked now and then only."""
        self._stop.announce()
        if self._rung:
            return True
        if self._stop.requested:
            self._words.say(_STOP)
            self._rung = True
        elif time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._rung, self._looked = self._words.said(_STOP), time.monotonic()
        return self._rung

    def give_way(self) -> None:
        """Raise BrokenOff where any was."""
        if self.rung():
            raise BrokenOff

    def meet(self) -> bool:
        """Wait for all ranks; whether any was asked to stop, also while it waited (collective)."""
        self._world.meet(self.rung)
        return stop_agreed(self._world, self._stop)
