"""Requests as they wait for the model, and what comes back to them piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ladir.config import SampleSettings
from ladir.inference.asking import Ask
from ladir.inference.trajectory import Trajectory


@dataclass(frozen=True)
class Step:
    """What a trajectory's block reads as after a denoising step (all counted from 0)."""

    trajectory: int
    block: int
    step: int
    text: str


@dataclass(frozen=True)
class Block:
    """A finished block of a trajectory."""

    trajectory: int
    block: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The trajectories of every question of the job, chosen ones alone where one was to be chosen; and tokens of its questions
    and of its answers."""

    groups: Sequence[Sequence[Trajectory]]
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Failed:
    """Why there is no answer; ``status``: as HTTP says it."""

    message: str
    status: int = 500


Event = Step | Block | Finished | Failed


@dataclass(eq=False)
class Job:
    """Questions of one request, and the way back to it.

    Made in the event loop of its request; :meth:`emit` is called by the model's thread.
    """

    asks: Sequence[Ask]
    settings: SampleSettings
    choose: str | None = None
    steps: bool = False
    """Whether it wants to see every denoising step as text."""
    cancelled: bool = False
    """Set where nobody waits for it any more."""
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def rows(self) -> int:
        """Its trajectories, of all questions together."""
        return sum(ask.num_trajectories for ask in self.asks)

    def joins(self, other: Job) -> bool:
        """Whether both can think in one batch."""
        return self.settings == other.settings and self.steps == other.steps

    def emit(self, event: Event) -> None:
        """Hand an event to the request, from any thread; a loop that has ended waits for none."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """What happens, up to the end: :class:`Finished` or :class:`Failed`."""
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return
