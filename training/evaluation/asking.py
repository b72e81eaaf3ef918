"""The queue of questions: batches of all data sets, taken by the ranks as they are done, each kept as soon as it is judged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ladir.config import EvaluateSettings
from ladir.data.records import Record
from ladir.evaluation.results import QuestionResult
from ladir.report.status import duration
from ladir.tasks import Task
from training.evaluation.answerers import Answerer, load_answerers
from training.evaluation.answers import Answered, cut
from training.evaluation.benchmarks import Benchmark
from training.evaluation.judging import judge_samples, judges_of
from training.evaluation.rows import GREEDY, model_of, questions_at_a_time
from training.runtime.alarm import APART_MINUTES
from training.runtime.alone import GiveWay, apart
from training.runtime.preemption import BrokenOff
from training.runtime.profiling import when_full
from training.runtime.run import Run
from training.runtime.status import Pace
from training.runtime.tickets import Tickets

logger = logging.getLogger(__name__)

_FULL = (
    "Lower evaluate.questions_per_batch (greedy rows: greedy_questions_per_batch; results do not change), then "
    "evaluate.num_trajectories."
)
#: as many portions of several batches every rank has at least, so that none waits long for another's last
_PORTIONS = 4


@dataclass(frozen=True, slots=True)
class Portion:
    """A batch of a data set's questions that is asked in one way: the place of its benchmark, and those of its questions."""

    benchmark: int
    sampling: str
    batch: range


def portions(run: Run, benchmarks: Sequence[Benchmark], samplings: Sequence[str]) -> list[Portion]:
    """What is not answered yet, alike on all ranks: model by model, so that each is loaded once; greedy rows, whose batches are
    short, are the last of each, for then nobody waits long at the end."""
    found = []
    for model in dict.fromkeys(map(model_of, samplings)):
        own = [sampling for sampling in samplings if model_of(sampling) == model]
        for sampling in sorted(own, key=lambda sampling: sampling in GREEDY):
            for place, benchmark in enumerate(benchmarks):
                done, questions = benchmark.log.done(sampling), len(benchmark.asked.records)
                size = portion_size(benchmark.run.config.evaluate, sampling, questions, run.world.size)
                batches = cut(questions, size, run.world.size)
                found += [Portion(place, sampling, batch) for batch in batches if not done.issuperset(batch)]
    return found


def portion_size(settings: EvaluateSettings, sampling: str, questions: int, ranks: int) -> int:
    """Most of a data set's ``questions`` that are asked at a time in one way."""
    size = questions_at_a_time(settings, sampling in GREEDY)
    if not model_of(sampling).startswith("ar"):
        return size
    # They join as others end; still with several portions for every rank.
    return max(size, min(size * settings.ar_batches, questions // (_PORTIONS * ranks)))


def rows_of(settings: EvaluateSettings, sampling: str) -> int:
    """Samples of a question in one way of asking."""
    return 1 if sampling in GREEDY else settings.num_trajectories


class Models:
    """One model in memory at a time, and how it answers the questions of every data set; seconds of ``loading`` so far."""

    def __init__(self, run: Run, benchmarks: Sequence[Benchmark], samplings: Sequence[str], give_way: GiveWay) -> None:
        """``give_way`` is called while they are loaded and while they answer, after every step and token, and may raise."""
        self._run, self._samplings, self._give_way = run, samplings, give_way
        self._configs = [benchmark.run.config for benchmark in benchmarks]
        self._model, self.loading = "", 0.0
        self._answerers: Sequence[Mapping[str, Answerer]] = ()

    def answerer(self, portion: Portion) -> Answerer:
        """Who answers a portion; the model is loaded where it is not the present one."""
        model = model_of(portion.sampling)
        if model != self._model:
            self._run.status.say(f"loading the model behind {portion.sampling}")
            self._answerers = ()  # lets the other one go before this one comes
            own = [sampling for sampling in self._samplings if model_of(sampling) == model]
            start, device = time.perf_counter(), self._run.world.device
            self._answerers = apart(lambda: load_answerers(self._configs, model, own, device, self._give_way), self._give_way)
            self._model, self.loading = model, self.loading + time.perf_counter() - start
        return self._answerers[portion.benchmark][portion.sampling]


@dataclass(frozen=True)
class Busy:
    """How long the queue took since this start, and which share of that, but for loading models, every rank worked."""

    seconds: float
    ranks: list[float]


def together(busy: Sequence[Busy]) -> Busy:
    """Of jobs that asked side by side: the longest one's seconds, and the ranks of all, each with its share of its own job's."""
    return Busy(max((one.seconds for one in busy), default=0.0), [share for one in busy for share in one.ranks])


def ask(run: Run, benchmarks: Sequence[Benchmark], samplings: Sequence[str]) -> Busy | None:
    """Add all answers to the logs; None when a signal asked to stop: portions that are done are kept, those under way are not."""
    left, tickets, alarm = portions(run, benchmarks, samplings), Tickets(run.world), run.alarm()
    models = Models(run, benchmarks, samplings, alarm.give_way)
    judges = judges_of(run.config, run.world.largest([run.world.local_rank])[0] + 1)
    told, start, busy = _Progress(run, benchmarks, left), time.perf_counter(), 0.0
    while not alarm.rung() and (number := tickets.take()) < len(left):
        portion = left[number]
        benchmark = benchmarks[portion.benchmark]
        records = [benchmark.asked.records[i] for i in portion.batch]
        try:
            answerer = models.answerer(portion)
            told.taken(number)
            begun = time.perf_counter()
            with when_full(_FULL):
                answered = _answer(benchmark.task, judges, records, answerer, run.world.rank, alarm.give_way)
        except BrokenOff:
            break  # what is answered again is answered in the same company
        benchmark.log.add(portion.sampling, dict(zip(portion.batch, answered, strict=True)))
        busy += time.perf_counter() - begun
    run.status.say("waits for the last batches of the other ranks" if run.world.size > 1 else None)
    run.world.wait_at_most(APART_MINUTES)
    if alarm.meet():
        return None
    return _busy(run, busy, models.loading, time.perf_counter() - start)


def _busy(run: Run, busy: float, loading: float, seconds: float) -> Busy:
    """This rank asked for ``busy`` of so many seconds, besides ``loading``; what all did, and said (all ranks together)."""
    shares = run.world.gather(round(busy / max(seconds - loading, 1e-9), 4))
    if run.world.size > 1:
        least = min(range(len(shares)), key=shares.__getitem__)
        mean = sum(shares) / len(shares)
        logger.info("asked for %s; ranks were busy %.0f %% of it (rank %d, the least: %.0f %%)",
                    duration(seconds), 100 * mean, least, 100 * shares[least])  # fmt: skip
    return Busy(round(seconds, 3), shares)


class _Progress:
    """Says how far the queue is, in the status and now and then in a line."""

    def __init__(self, run: Run, benchmarks: Sequence[Benchmark], left: Sequence[Portion]) -> None:
        self._run, self._benchmarks, self._left = run, benchmarks, left
        self._before = [0]
        for portion in left:
            settings = benchmarks[portion.benchmark].run.config.evaluate
            self._before.append(self._before[-1] + len(portion.batch) * rows_of(settings, portion.sampling))
        self._pace, self._line = Pace(), -math.inf

    def taken(self, number: int) -> None:
        """This rank is about to ask portion ``number``; all before it are taken."""
        portion, done = self._left[number], self._before[number] / self._before[-1]
        benchmark, seconds = self._benchmarks[portion.benchmark], self._pace.seconds_left(done)
        name = f"{portion.sampling} on {benchmark.name}" if benchmark.name else portion.sampling
        first, end, count = portion.batch.start + 1, portion.batch.stop, len(benchmark.asked.records)
        self._run.status.say(f"asking {name}, questions {first} to {end} of {count}", fraction=done, seconds_left=seconds)
        now = time.monotonic()
        if self._run.world.is_main and now - self._line >= self._run.config.telemetry.line_every_seconds:
            self._line = now
            eta = "" if seconds is None else f" ETA {duration(seconds)}"
            logger.info("evaluate %3.0f%%%s %s: question %d of %d", 100 * done, eta, name, first, count)


def _answer(
    task: Task, judges: int, records: Sequence[Record], answerer: Answerer, rank: int, give_way: GiveWay
) -> list[Answered]:
    """A batch of questions, answered and judged."""
    start, count = time.perf_counter(), len(records)
    answers = answerer(records)
    judged = judge_samples(task, judges, records, answers.samples, give_way)
    costs = {name: getattr(answers, name).share(count) for name in ("cost", "reading", "scoring", "drifting")}
    elapsed = (time.perf_counter() - start) / count
    return [
        Answered(QuestionResult(record.question, trajectories, record.answer), elapsed=elapsed, rank=rank, **costs)
        for record, trajectories in zip(records, judged, strict=True)
    ]
