"""One thread asks the model: what waits is answered together, as far as it fits together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ladir.errors import UnusableError
from ladir.inference.asking import Watch
from ladir.inference.trajectory import Trajectory
from ladir.reasoner import Reasoner
from ladir.serve.jobs import Block, Failed, Finished, Job, Step
from ladir.tokens import decode_text, encode_texts

logger = logging.getLogger(__name__)

_UNLIKE = Failed("the answer came out otherwise than the parts of it that were told already; ask again", 500)
_STOPPING = Failed("the server is stopping; send the request again to another one, or later", 503)


class _NobodyWaits(Exception):
    """All requests of the batch under way have gone, or the server stops."""


@dataclass
class Counts:
    """What ``/metrics`` tells."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    trajectories: int = 0
    batches: int = 0
    seconds: float = 0.0
    """Spent by the model."""
    running: int = 0


class Scheduler:
    """The queue in front of a reasoner; only its thread touches the model."""

    def __init__(self, reasoner: Reasoner, max_trajectories: int, max_waiting: int, canonical: Callable[[str], str]) -> None:
        """``max_trajectories``: in a batch; ``max_waiting``: requests in the queue; ``canonical``: which answers are the same."""
        self.reasoner, self.max_trajectories, self.max_waiting = reasoner, max_trajectories, max_waiting
        self._canonical = canonical
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.counts = Counts()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    def put(self, job: Job) -> Failed | None:
        """Queue a job; why not, where the server is full or stops."""
        with self._changed:
            if not self.alive:
                return _STOPPING
            if len(self._waiting) >= self.max_waiting:
                return Failed(f"{len(self._waiting)} requests wait already; try again later", 429)
            self._waiting.append(job)
            self.counts.requests += 1
            self._changed.notify()
            return None

    def stop(self) -> None:
        """Answer nothing more: what waits is told at once, what is under way at its next step."""
        with self._changed:
            self._stopping = True
            while self._waiting:
                self._waiting.popleft().emit(_STOPPING)
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            start = time.perf_counter()
            try:
                self._answer(batch)
            finally:
                self.counts.batches += 1
                self.counts.seconds += time.perf_counter() - start
                self.counts.running = 0
            del batch  # and the latents that its events hold, before the next ones come

    def _next(self) -> list[Job] | None:
        """The jobs that are answered now, in the order in which they came, as soon as there are any; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return None
                self._drop_cancelled()
                if self._waiting:
                    return self._taken()

    def _drop_cancelled(self) -> None:
        waiting = [job for job in self._waiting if not job.cancelled]
        self.counts.cancelled += len(self._waiting) - len(waiting)
        self._waiting = deque(waiting)

    def _taken(self) -> list[Job]:
        """The first job and those behind it that fit into its batch."""
        first, rows = self._waiting[0], 0
        batch: list[Job] = []
        for job in list(self._waiting):
            if job.joins(first) and (not batch or rows + job.rows <= self.max_trajectories):
                batch.append(job)
                rows += job.rows
        self._waiting = deque(job for job in self._waiting if job not in batch)
        self.counts.running = len(batch)
        return batch

    def _answer(self, batch: list[Job]) -> None:
        """Answer a batch; where that fails, its jobs one by one, so that none fails for another's sake."""
        jobs = [job for job in batch if self._fits(job)]
        if not jobs:
            return
        try:
            self._think(jobs)
        except _NobodyWaits:
            for job in jobs:
                self._give_up(job)
        except (UnusableError, torch.OutOfMemoryError) as error:
            if len(jobs) == 1:
                self._fail(jobs[0], _failure(error))
            else:
                for job in jobs:
                    self._answer([job])
        except Exception:
            logger.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                self._fail(job, Failed("the model failed; the server's log says why", 500))

    def _fits(self, job: Job) -> bool:
        """Whether its questions can be asked; it is told where they cannot."""
        try:
            for ask in job.asks:
                self.reasoner.check_question(ask.question, job.settings)
        except ValueError as error:
            self._fail(job, Failed(str(error), 400))
            return False
        return True

    def _fail(self, job: Job, why: Failed) -> None:
        self.counts.failed += 1
        job.emit(why)

    def _give_up(self, job: Job) -> None:
        if self._stopping:
            self._fail(job, _STOPPING)
        else:
            self.counts.cancelled += 1

    def _think(self, jobs: Sequence[Job]) -> None:
        asks = [ask for job in jobs for ask in job.asks]
        owners = [(job, place) for job in jobs for place in range(job.rows)]

        def on_step(row: int, block: int, step: int, text: str) -> None:
            job, place = owners[row]
            job.step(Step(place, block, step, text))

        def on_block(row: int, block: int, text: str) -> None:
            job, place = owners[row]
            job.block(Block(place, block, text))

        def on_answer(row: int, ids: Sequence[int]) -> None:
            job, place = owners[row]
            if job.told_pieces:
                job.answer(place, decode_text(self.reasoner.tokenizer, ids))

        def between_steps() -> None:
            if self._stopping or all(job.cancelled for job in jobs):
                raise _NobodyWaits

        watch = Watch(on_step if jobs[0].steps else None, on_block, on_answer, between_steps)
        found = iter(self.reasoner.answer(asks, jobs[0].settings, watch))
        for job in jobs:
            self._finish(job, [next(found) for _ in job.asks])

    def _finish(self, job: Job, groups: Sequence[Sequence[Trajectory]]) -> None:
        self.counts.trajectories += job.rows
        if job.told_pieces and not job.told_truly([trajectory for group in groups for trajectory in group]):
            self._fail(job, _UNLIKE)
            return
        if job.choose is not None:
            groups = self.reasoner.choose(job.asks, groups, job.choose, job.settings, self._canonical)
        questions = [ask.question for ask in job.asks]
        answers = [trajectory.answer for group in groups for trajectory in group]
        counts = (sum(map(len, encode_texts(self.reasoner.tokenizer, texts))) for texts in (questions, answers))
        job.emit(Finished(groups, *counts))


def _failure(error: Exception) -> Failed:
    if isinstance(error, torch.OutOfMemoryError):
        return Failed("the model ran out of memory: ask for fewer trajectories (n)", 503)
    return Failed(str(error), 400)
