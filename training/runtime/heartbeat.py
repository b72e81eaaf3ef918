"""Signs of life: every rank says in the job's key-value store how far it is, so that the others can name the one they lost."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed.distributed_c10d as c10d

from training.runtime.distributed import RankLostError, World
from training.runtime.failures import node_name, tell_batch_script

logger = logging.getLogger(__name__)

SAMPLES_READ, GRADIENTS_COMPUTED = "samples read", "gradients computed"
PARTS = (SAMPLES_READ, GRADIENTS_COMPUTED)
LOOK_SECONDS = 5.0
"""How long a rank has to answer."""


class Heartbeat:
    """How far this rank is in one phase, and how far the others said they were."""

    def __init__(self, world: World, phase: str) -> None:
        self.world, self.phase = world, phase
        self._store = c10d._get_default_store() if world.size > 1 else None
        self._place: tuple[int, int] = (0, 0)
        self._samples: Sequence[Any] = ()
        self._deadline, self._patience = math.inf, math.inf
        self._ended = threading.Event()
        self.lost_nodes: list[str] = []
        """The node of the ranks that did not answer when :meth:`behind` asked; none where they are of several."""
        if self._store is not None:
            self._store.set(f"{self._key(world.rank)}/node", node_name())

    def beat(self, step: int, part: str, samples: Sequence[Any]) -> None:
        """This rank has come so far: in step ``step`` (the first is 1), ``part`` (one of ``PARTS``) of ``samples``."""
        self._place, self._samples = (step, PARTS.index(part)), samples
        self._deadline = time.monotonic() + self._patience
        if self._store is not None:
            self._store.set(self._key(self.world.rank), json.dumps([*self._place, samples]))

    def where(self) -> str:
        """This rank's own place, for messages."""
        return f"phase {self.phase}, rank {self.world.rank}, {_told(*self._place, self._samples)}"

    def behind(self) -> str:
        """Which ranks do not answer or are behind the others, and where they were last seen.  Takes up to ``LOOK_SECONDS``."""
        if self._store is None:
            return "no other rank"
        late: list[str] = []
        # A thread, because the store answers late or never when the machine that holds it is gone.
        look = threading.Thread(target=self._look, args=(self._store, late), daemon=True)
        look.start()
        look.join(2 * LOOK_SECONDS)
        return "; ".join(late) or "all ranks answer, from the same place"

    def _look(self, store: Any, late: list[str]) -> None:
        """Fill ``late``: every rank that comes here says so, and those that do not within ``LOOK_SECONDS`` are lost."""
        try:
            store.set(f"{self._key(self.world.rank)}/lost", "1")
            end = time.monotonic() + LOOK_SECONDS
            silent = set(range(self.world.size))
            while silent and time.monotonic() < end:
                silent = {rank for rank in silent if not store.check([f"{self._key(rank)}/lost"])}
                time.sleep(0.1)
            places = {rank: self._last_place(store, rank) for rank in range(self.world.size)}
            nodes = {store.get(f"{self._key(rank)}/node").decode() for rank in silent}
            self.lost_nodes = sorted(nodes) if len(nodes) == 1 else []
        except RuntimeError as error:
            late.append(f"the job's key-value store, on the first node, does not answer either ({error})")
            return
        furthest = max(place[:2] for place in places.values())
        for rank, (step, part, samples) in places.items():
            if rank in silent:
                late.append(f"rank {rank} does not answer, last seen in {_told(step, part, samples)}")
            elif (step, part) < furthest:
                late.append(f"rank {rank} is behind, last seen in {_told(step, part, samples)}")

    def _last_place(self, store: Any, rank: int) -> tuple[int, int, Any]:
        key = self._key(rank)
        step, part, samples = json.loads(store.get(key)) if store.check([key]) else (0, 0, [])
        return step, part, samples

    def _key(self, rank: int) -> str:
        return f"heartbeat/{self.phase}/{rank}"

    def expect_within(self, minutes: float) -> None:
        """From now on two beats should be at most ``minutes`` apart."""
        self._patience = 60 * minutes
        self._deadline = time.monotonic() + self._patience

    def watch(self, every_seconds: float = 1.0) -> None:
        """Log where everybody is when a beat is overdue.

        For backends that end a process by themselves when a collective takes too long (NCCL): no error reaches our code then.
        """
        threading.Thread(target=self._watch, args=(every_seconds,), daemon=True).start()

    def _watch(self, every_seconds: float) -> None:
        while not self._ended.wait(every_seconds):
            if time.monotonic() > self._deadline:
                self._deadline = math.inf  # once, until the next beat
                logger.error("%s: nothing has happened for %.3g minutes. %s", self.where(), self._patience / 60, self.advice())
                tell_batch_script("lost", self.lost_nodes)

    def advice(self) -> str:
        """Who is missing and what to look at."""
        return (
            f"Now {self.behind()}. Look for an error of that rank above or in its log; if it was only slow, raise "
            "deepspeed.step_timeout_minutes. The same command continues after the last checkpoint"
        )

    def rank_lost(self, error: RuntimeError) -> RankLostError:
        """What to raise in place of a collective's ``error``: who was lost, where, and what to look at."""
        told = f"{self.where()}: another rank died or did not answer in time ({error}). {self.advice()}"
        return RankLostError(told, self.lost_nodes)

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()


def _told(step: int, part: int, samples: Sequence[Any]) -> str:
    """A place in words."""
    return f"step {step} ({PARTS[part]}), samples {samples}" if step else "its start"
