"""The questions of an iteration, answered by a copy of the old model on every rank and judged beside that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from ladir.config import RlSettings
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.evaluation.results import Trajectory as Verdict
from ladir.rl.lines import Answered, Group, Line
from ladir.rl.rewards import RewardFunction
from ladir.tasks import Task
from training.evaluation.answers import cut
from training.evaluation.judging import judge_samples
from training.reinforcement.samplers import Sampler, Tries
from training.runtime.alarm import Alarm
from training.runtime.alone import GiveWay
from training.runtime.distributed import World, until
from training.runtime.preemption import BrokenOff
from training.runtime.profiling import when_full


@dataclass(frozen=True)
class Asked:
    """An iteration's groups, in the order of its questions, on all ranks alike; ``seconds`` this rank sampled and judged."""

    groups: list[Group]
    sampling_seconds: float
    judging_seconds: float


class Asker:
    """Asks a whole copy of the old model, which every rank has: ranks go their own ways until all have answered."""

    def __init__(self, sampler: Sampler, task: Task, reward: RewardFunction, settings: RlSettings, judges: int) -> None:
        """``judges``: answers that this rank judges at a time."""
        self.sampler, self.task, self.reward, self.settings, self.judges = sampler, task, reward, settings, judges

    def ask(self, records: Sequence[Record], seed: int, world: World, alarm: Alarm, steps: Sequence[int] = ()) -> Asked | None:
        """All ranks' answers to ``records``; None where any rank was asked to stop meanwhile (collective).

        A stop is obeyed at the next step, token or verdict: what was answered is lost.
        ``steps``: numbers of the denoising steps that are random.  An attempt's random numbers are a function of ``seed``, its
        question and its number.  Raises UnusableError, on all ranks, where thoughts did not stay finite, or a reward was none.
        """
        own = cut(len(records), self.settings.questions_per_batch, world.size)[world.rank :: world.size]
        self._sampling = self._judging = 0.0
        answered: tuple[dict[int, Group], str] = {}, ""
        with suppress(BrokenOff):  # all ranks meet behind it
            answered = self._answered(records, own, seed, steps, alarm.give_way)
        if alarm.meet():
            return None
        gathered = world.gather(answered)
        if errors := [error for _, error in gathered if error]:
            raise UnusableError(errors[0])
        everyone = {place: group for found, _ in gathered for place, group in found.items()}
        return Asked([everyone[place] for place in range(len(records))], self._sampling, self._judging)

    def _answered(
        self, records: Sequence[Record], batches: Sequence[range], seed: int, steps: Sequence[int], give_way: GiveWay
    ) -> tuple[dict[int, Group], str]:
        """This rank's ``batches``, judged, by the place of the question; and what was wrong, which the others are told."""
        coming: list[tuple[range, Future[list[Group]]]] = []
        error = ""
        with ThreadPoolExecutor(1, thread_name_prefix="judge") as judge:  # is left when judging has ended, or given way as well
            for batch in batches:
                try:
                    start = time.perf_counter()  # all that the tokenizer does is done here: it is not for two threads
                    with when_full("Lower rl.questions_per_batch (results do not change), then rl.group."):
                        tries = self.sampler([records[i] for i in batch], seed, steps, give_way)
                    self._sampling += time.perf_counter() - start
                    coming.append((batch, judge.submit(self._judge, tries, give_way)))
                except UnusableError as caught:
                    error = str(caught)
                    break
            found, wrong = _collected(coming, give_way)
        return found, error or wrong

    def _judge(self, asked: Sequence[Tries], give_way: GiveWay) -> list[Group]:
        """Verdicts and rewards of every answer (in a thread of its own: the device is not touched)."""
        start = time.perf_counter()
        records, samples = [entry.record for entry in asked], [entry.texts for entry in asked]
        verdicts, groups = judge_samples(self.task, self.judges, records, samples, give_way), []
        for entry, judged in zip(asked, verdicts, strict=True):
            give_way()  # a function of the user's may take its time at every question
            groups.append(self._group(entry, judged))
        self._judging += time.perf_counter() - start
        return groups

    def _group(self, asked: Tries, verdicts: Sequence[Verdict]) -> Group:
        limit, count = self.sampler.limit, len(asked.answers) // len(asked.latents)
        rewards = self.reward([asked.record] * len(verdicts), verdicts, [len(ids) / limit for ids in asked.answers])
        answers = [
            Answered(ids, verdict, reward, len(ids) < limit)
            for ids, verdict, reward in zip(asked.answers, verdicts, rewards, strict=True)
        ]
        own = [tuple(answers[place : place + count]) for place in range(0, len(answers), count)]
        lines = tuple(map(Line, asked.latents, own, asked.steps, asked.sentences))
        return Group(asked.record.question, asked.question, lines, asked.times)


def _collected(coming: Sequence[tuple[range, Future[list[Group]]]], give_way: GiveWay) -> tuple[dict[int, Group], str]:
    """Judged groups by the place of their question; or what was wrong with a reward."""
    found: dict[int, Group] = {}
    for batch, future in coming:
        until(future.done, give_way, most_seconds=0.05)  # a signal that comes just before a wait without end is not handled in it
        try:
            found.update(zip(batch, future.result(), strict=True))
        except UnusableError as error:
            return {}, str(error)
    return found, ""
