"""Requests as they wait for the model, and what comes back to them piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ladir.config import SampleSettings
from ladir.inference.asking import Ask
from ladir.inference.trajectory import Trajectory

#: how a decoder shows bytes that are no whole character (yet)
_TORN = "\N{REPLACEMENT CHARACTER}"


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
class Piece:
    """What a trajectory's answer goes on with."""

    trajectory: int
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


Event = Step | Block | Piece | Finished | Failed


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
    stream: bool = False
    """Whether it hears of blocks and answers while they come; of a chosen trajectory it does when it is chosen."""
    cancelled: bool = False
    """Set where nobody waits for it any more."""
    _thoughts: dict[tuple[int, int], str] = field(default_factory=dict)
    _answers: dict[int, str] = field(default_factory=dict)
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def rows(self) -> int:
        """Its trajectories, of all questions together."""
        return sum(ask.num_trajectories for ask in self.asks)

    def joins(self, other: Job) -> bool:
        """Whether both can think in one batch."""
        return self.settings == other.settings and self.steps == other.steps

    @property
    def told_pieces(self) -> bool:
        """Whether what comes is told as it comes."""
        return self.stream and self.choose is None

    def step(self, step: Step) -> None:
        """A denoising step; those of a block that was told before (a batch may be answered again) are not told."""
        if self.stream and (step.trajectory, step.block) not in self._thoughts:
            self.emit(step)

    def block(self, block: Block) -> None:
        """A finished block, told once."""
        if self.told_pieces and (place := (block.trajectory, block.block)) not in self._thoughts:
            self._thoughts[place] = block.text
            self.emit(block)

    def answer(self, trajectory: int, text: str, whole: bool = False) -> None:
        """What of a trajectory's answer, ``text`` so far, was not told before.

        Where the text ends within a character, its rest is waited for, unless this is the ``whole`` answer.
        """
        told = self._answers.get(trajectory, "")
        if text.startswith(told) and text != told and (whole or not text.endswith(_TORN)):
            self._answers[trajectory] = text
            self.emit(Piece(trajectory, text[len(told) :]))

    def told_truly(self, trajectories: Sequence[Trajectory]) -> bool:
        """Tell the rest of the answers; whether all that was told is what the job's trajectories hold."""
        for number, trajectory in enumerate(trajectories):
            self.answer(number, trajectory.answer, whole=True)
        answers = [trajectory.answer for trajectory in trajectories]
        thoughts = {(n, b): text for n, trajectory in enumerate(trajectories) for b, text in enumerate(trajectory.thoughts)}
        return self._thoughts == thoughts and [self._answers.get(n, "") for n in range(len(answers))] == answers

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
