"""What rank 0 does alone: the others wait for it without a collective, so that no backend loses patience, and answer signals."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

import torch

from ladir.threads import in_thread
from training.runtime.alarm import Alarm
from training.runtime.distributed import World, until
from training.runtime.preemption import BrokenOff, StopRequest
from training.runtime.words import Words

T = TypeVar("T")

#: raises BrokenOff where a stop was asked for; called between the pieces of a work
GiveWay = Callable[[], None]


def alone(world: World, stop: StopRequest, work: Callable[[GiveWay], T]) -> T | None:
    """What ``work`` returns on rank 0, on every rank; None where it was broken off (collective).

    ``work`` is called on rank 0 with a function that it calls between pieces of work that may be left undone: it raises
    :class:`~training.runtime.preemption.BrokenOff` where any rank was asked to stop.  An error that a user can mend is raised on
    every rank.
    """
    alarm, words = Alarm(world, stop), Words(world, "alone")

    def whole() -> T | None:
        try:
            return work(alarm.give_way)
        except BrokenOff:
            return None
        finally:
            words.say("done")

    if not world.is_main:
        until(lambda: words.said("done"), meanwhile=alarm.rung)
    return world.on_main(whole)


def unbroken(world: World, stop: StopRequest | None, work: Callable[[GiveWay], T]) -> T:
    """:func:`alone`; BrokenOff on every rank where it was broken off.  ``stop`` None: nobody asks."""
    found = alone(world, stop or StopRequest("TERM"), work)
    if found is None:
        raise BrokenOff
    return found


def apart(work: Callable[[], T], give_way: GiveWay) -> T:
    """What ``work`` returns that has no pieces, such as the loading of a model: a thread does it, while ``give_way`` is called.

    Where that raises, the thread is left behind: nothing but the end of the process may follow.
    """
    context, device = copy_context(), torch.cuda.current_device() if torch.cuda.is_available() else None

    def there() -> T:
        if device is not None:  # every thread has its own
            torch.cuda.set_device(device)
        return context.run(work)

    found = in_thread(there)
    until(found.done, give_way, most_seconds=0.1)
    return found.result()
