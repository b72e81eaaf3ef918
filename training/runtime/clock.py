"""What counts as training time, and how long ranks wait for one another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ladir.config import DeepSpeedSettings
from training.runtime.distributed import World
from training.runtime.heartbeat import Heartbeat


class Clock:
    """Training seconds over all restarts, by this rank's clock; short waits within steps, long ones around them.

    Until :meth:`stepped` every wait is long: in the first step some ranks compile while others wait.
    """

    def __init__(self, world: World, settings: DeepSpeedSettings, heartbeat: Heartbeat) -> None:
        self._world, self._heartbeat = world, heartbeat
        self._long, self._short = settings.timeout_minutes, settings.step_timeout_minutes
        self._steps = False
        self._started = 0.0

    def start(self, seconds: float) -> None:
        """Go on from ``seconds``, those of the starts before."""
        self._started = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Training seconds so far."""
        return time.perf_counter() - self._started

    def stepped(self) -> None:
        """A step was made: from the first one on, waits are short."""
        if not self._steps:
            self._steps = True
            self._wait_at_most(self._short)

    @contextmanager
    def patience(self, minutes: float | None = None) -> Iterator[None]:
        """Inside, ranks may wait long for one another, ``minutes`` where they are given: it is training time, but no step."""
        self._wait_at_most(self._long if minutes is None else minutes)
        yield
        self._wait_at_most(self._short if self._steps else self._long)

    @contextmanager
    def off(self) -> Iterator[None]:
        """What happens inside is not training time, and ranks may wait long for one another."""
        start = time.perf_counter()
        with self.patience():
            yield
        self._started += time.perf_counter() - start

    def end(self) -> None:
        """Behind the training ranks may take their time again."""
        self._world.wait_at_most(self._long)

    def _wait_at_most(self, minutes: float) -> None:
        self._world.wait_at_most(minutes)
        self._heartbeat.expect_within(minutes)
