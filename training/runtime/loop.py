"""The train loop, the same for every phase."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from ladir.config import TrainSettings
from training.runtime import checkpoint
from training.runtime.distributed import is_lost_rank
from training.runtime.ending import finished_before, tell_trained
from training.runtime.engine import Engine
from training.runtime.heartbeat import GRADIENTS_COMPUTED, SAMPLES_READ, Heartbeat
from training.runtime.meters import LossSums, Meters
from training.runtime.phase import Batch, Measured, OnPolicy, Phase
from training.runtime.profiling import MemorySnapshot, Ranges, StepProfiler
from training.runtime.ranks import RankWatch
from training.runtime.run import Outcome, Run
from training.runtime.sampler import DataOrder, micro_batch_size
from training.runtime.schedule import Progress, learning_rate
from training.runtime.status import Pace
from training.runtime.step_batches import StepBatch, StepBatchLoader
from training.runtime.telemetry import Telemetry
from training.runtime.topology import section_of
from training.runtime.utilisation import as_written, counted_flops, measured_peak
from training.runtime.validation import validate

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or the gradient is NaN or infinite; nothing was stepped or saved."""


def train(run: Run, phase: Phase) -> Outcome:
    """Train ``phase`` to its end, or to a stop signal, continuing from the newest whole checkpoint.

    When finished, the model lies in the run folder's ``models/<phase>``, and another call returns at once.  Raises
    :class:`NonFiniteError`, :class:`~training.runtime.checkpoint.CheckpointError`,
    :class:`~training.runtime.distributed.RankLostError` and ValueError (settings).
    """
    done = finished_before(run)
    if done is not None:
        return done
    trainer = Trainer(run, phase)
    trainer.resume()
    with trainer.errors_explained():
        return _loop(trainer, run.settings, phase.num_samples)


def _loop(trainer: Trainer, settings: TrainSettings, num_samples: int) -> Outcome:
    """One turn is one optimizer step."""
    progress = trainer.progress
    with trainer.telemetry(), trainer.step_batches() as step_batches:
        trainer.catch_up()
        for step_batch in step_batches:
            stop = trainer.all_reduce_counts(step_batch)
            if stop or progress.fraction(settings, num_samples) >= 1:
                break
            ahead = progress.after(settings.global_batch).fraction(settings, num_samples)
            gradient_norm = trainer.accumulate(step_batch)
            lr = learning_rate(settings, ahead)
            with trainer.ranges("optimizer step"):
                trainer.engine.step(lr)
            trainer.advance(lr, gradient_norm, ahead)
        if progress.fraction(settings, num_samples) < 1:
            return trainer.interrupt()
        return trainer.finish()


class Trainer:
    """One training under way: the parts of a turn of the loop."""

    def __init__(self, run: Run, phase: Phase) -> None:
        self.run, self.phase, self.world, self.settings = run, phase, run.world, run.settings
        self.micro = micro_batch_size(self.settings.global_batch, self.world.size, self.settings.micro_batch)
        length = phase.length if isinstance(phase, Measured) else None
        self.order = DataOrder(phase.num_samples, self.settings.global_batch, run.config.run.seed, length)
        self.progress = Progress()
        self.progress.fraction(self.settings, phase.num_samples)  # refuses a training without end before it starts
        backbone, deepspeed = run.config.backbone, run.config.deepspeed
        lag = phase.lag if isinstance(phase, OnPolicy) else None
        self.engine = Engine(phase.model, self.settings, backbone.dtype, deepspeed, run.world, lag)
        self.meters = Meters(phase.weights)
        self.metrics: dict[str, float] = {}
        self._checkpoints = run.folder.checkpoints(run.phase)
        self._saved_step = self._validated_step = 0  # what step 0 would save follows from the seed
        self._saved_seconds = 0.0
        self._counts: dict[str, float] = {}
        self._step_counts = {"tokens": 0.0, "wait": 0.0}
        self._interval = {"tokens": 0.0, "flops": 0.0, "wait": 0.0, "seconds": 0.0}
        self._sample_ids: list[list[int]] = []
        self._first = True
        self._heartbeat = Heartbeat(run.world, run.phase)
        telemetry = run.config.telemetry
        self._ranks = RankWatch(run.world, telemetry.slow_rank_factor)
        self._profiler = StepProfiler(telemetry.profile_steps, run.folder.profile(run.phase), run.world)
        self.ranges = Ranges(telemetry.nvtx)
        snapshot = run.folder.memory_snapshot(run.phase, run.world.rank)
        self._memory = MemorySnapshot(telemetry.memory_events, snapshot, run.world.device)
        self._pace = Pace()
        self._flops_per_token: dict[str, float] = {}
        self._peak = 0.0
        self._unlogged: tuple[float, float] | None = None
        self._left: float | None = None
        self._started = 0.0

    def resume(self) -> None:
        """Go to the newest whole checkpoint, where there is one."""
        path = checkpoint.find(self._checkpoints, self.world)
        if path is not None:
            state = checkpoint.load(path, self.engine)
            self.progress.step, self.progress.samples = state["step"], state["samples"]
            self.progress.seconds = state["seconds"]
            self.meters.load(state["meters"])
            self.metrics.update(state["metrics"])
            self._saved_step, self._validated_step = self.progress.step, state["validated"]
            self._saved_seconds = self.progress.seconds
            self.run.status.say(step=self.progress.step, checkpoint_step=self.progress.step, checkpoint_time=path.stat().st_mtime)
            logger.info("phase %s continues after step %d (%s)", self.run.phase, self.progress.step, path)

    @contextmanager
    def telemetry(self) -> Iterator[None]:
        """Open the records and start the clock."""
        given = self.run.config.telemetry.peak_tflops
        self._peak = given * 1e12 if given else measured_peak(self.world.device, self.engine.dtype)
        validated = self._validated_step == self.progress.step
        with Telemetry(self.run, self.progress.step, validated) as self._telemetry:
            self._started = time.perf_counter() - self.progress.seconds
            self._interval["seconds"] = self.progress.seconds
            yield

    def step_batches(self) -> AbstractContextManager[Iterator[StepBatch]]:
        """The data from here on."""
        return closing(self.phase.step_batches(self)) if isinstance(self.phase, OnPolicy) else self.stored()

    def stored(self) -> StepBatchLoader:
        """The phase's stored samples from here on."""
        settings = self.settings
        consumed, skipped = self.progress.samples, settings.skip_samples
        return StepBatchLoader(self.phase, self.order, consumed, self.world, self.micro, settings.data_processes, skipped)

    @contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Say where an error struck and which rank was lost, where it was one; afterwards ranks may take their time again."""
        if self.world.device.type == "cuda":
            self._heartbeat.watch()
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and is_lost_rank(error):
                raise self._heartbeat.rank_lost(error) from error
            error.add_note(f"This happened in {self._heartbeat.where()}.")
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(f"Lower {self.run.phase}'s micro_batch (results do not change), or see ds_configs/README.md.")
                for note in self._memory.dumped():
                    error.add_note(note)
            raise
        finally:
            self._heartbeat.end()
            self._profiler.close()
        self.world.wait_at_most(self.run.config.deepspeed.timeout_minutes)

    def _wait_at_most(self, minutes: float) -> None:
        """From now on ranks wait this long for one another."""
        self.world.wait_at_most(minutes)
        self._heartbeat.expect_within(minutes)

    @contextmanager
    def _off_the_clock(self, doing: str) -> Iterator[None]:
        """What happens inside is not training time, and ranks may wait long for one another."""
        start = time.perf_counter()
        self.run.status.say(f"{doing}, behind step {self.progress.step}")
        self._wait_at_most(self.run.config.deepspeed.timeout_minutes)
        with self.ranges(doing):
            yield
        if not self._first:  # which waits for others that compile
            self._wait_at_most(self.run.config.deepspeed.step_timeout_minutes)
        self._started += time.perf_counter() - start

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, ranks may wait long for one another: it is training time, but no step."""
        self._wait_at_most(self.run.config.deepspeed.timeout_minutes)
        with self.ranges("own samples"):
            yield
        if not self._first:
            self._wait_at_most(self.run.config.deepspeed.step_timeout_minutes)

    def ending(self) -> bool:
        """Whether the next step will not be made: a stop was asked for, or this is the end (collective)."""
        return self.stop_agreed() or self.progress.fraction(self.settings, self.phase.num_samples) >= 1

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop (collective)."""
        return self.run.stop_agreed()

    def _seconds(self) -> float:
        """Training seconds so far, by this rank's clock."""
        return time.perf_counter() - self._started

    def all_reduce_counts(self, step_batch: StepBatch) -> bool:
        """The first of a step's two all-reduces: label counts, rank 0's clock, and whether anybody is asked to stop."""
        self._sample_ids = [list(batch.sample_ids) for batch in step_batch.batches]
        self._profiler.before(self.progress.step + 1)
        self._arrive(SAMPLES_READ)
        self.run.stop.announce()
        seconds = self._seconds() if self.world.is_main else 0.0
        counts = [step_batch.count(term) for term in self.phase.weights]
        values = [*counts, step_batch.num_tokens, step_batch.wait, float(self.run.stop.requested), seconds]
        *counts, tokens, wait, stops, seconds = self.world.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        self._counts = dict(zip(self.phase.weights, counts, strict=True))
        self._step_counts = {"tokens": tokens, "wait": wait / self.world.size}  # counted once it is trained on
        self.progress.seconds = seconds
        if step_batch.first > self.progress.samples:
            logger.info("samples %d to %d are left out (skip_samples)", self.progress.samples, step_batch.first - 1)
            self.progress.samples = step_batch.first
        self._ranks.waited(step_batch.wait)
        self.run.status.say(f"step {self.progress.step + 1}: forward and backward")
        return stops > 0

    def _arrive(self, part: str) -> None:
        """This rank has come so far in the step, and has to wait for the others."""
        self._heartbeat.beat(self.progress.step + 1, part, self._sample_ids)
        waits = ", waits for the other ranks" if self.world.size > 1 else ""
        self.run.status.say(f"step {self.progress.step + 1}: {part}{waits}")

    def accumulate(self, step_batch: StepBatch) -> float:
        """Forward and backward of all micro batches, then the second all-reduce: loss sums and gradient norm.

        Returns the gradient norm before clipping; raises :class:`NonFiniteError` on all ranks together.
        """
        sums, losses = LossSums(self.phase.weights, self.world.device), []
        self.meters.add_metrics(step_batch.metrics)
        for number, batch in enumerate(step_batch.batches):
            torch.manual_seed(_seed(self.run.config.run.seed, step_batch.numbers[number]))  # dropout inside the model
            # The first of a kind is counted, for which compiled layers run as they were written, forward and back.
            with nullcontext() if batch.kind in self._flops_per_token else as_written(self.engine.model):
                with self.ranges("forward"):
                    outputs = self._forward(batch)
                    loss = self._weighted(outputs)
                with self.ranges("backward"):
                    self.engine.backward(loss, last=number + 1 == len(step_batch.batches))
            losses.append(loss.detach())
            sums.add(outputs)
            self.meters.add_metrics(outputs)
        square = self.engine.gradient_square().double().reshape(1)
        self._arrive(GRADIENTS_COMPUTED)
        *values, square_sum = self.world.sum(torch.cat([sums.stacked(), square])).tolist()
        if not all(map(math.isfinite, (*values, square_sum))):
            self._report_non_finite(step_batch, losses)
        self.meters.add_losses(dict(zip(self.phase.weights, values, strict=True)), self._counts)
        return math.sqrt(square_sum)

    def _weighted(self, outputs: dict[str, Tensor]) -> Tensor:
        """This micro batch's part of the step's loss."""
        terms = [
            outputs[term] * (weight / max(self._counts[term], 1.0))
            for term, weight in self.phase.weights.items()
            if term in outputs
        ]
        return torch.stack([term.float() for term in terms]).sum()

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """The engine's forward pass; the FLOPs per token of the first batch of a kind stand for all of it (MFU)."""
        if batch.kind in self._flops_per_token:
            with self._ranks.timed(self.engine.model):
                outputs = self.engine.forward(batch)
        else:
            with counted_flops(self.engine.model) as count:
                outputs = self.engine.forward(batch)
            self._flops_per_token[batch.kind] = count.flops / max(batch.num_tokens, 1)
        self._interval["flops"] += self._flops_per_token[batch.kind] * batch.num_tokens
        return outputs

    def _report_non_finite(self, step_batch: StepBatch, losses: list[Tensor]) -> NoReturn:
        """Find out together which rank's samples it was."""
        finite = [bool(torch.isfinite(loss)) for loss in losses]
        bad = [list(batch.sample_ids) for batch, fine in zip(step_batch.batches, finite, strict=True) if not fine]
        first = min((number for number, fine in zip(step_batch.numbers, finite, strict=True) if not fine), default=math.inf)
        found = self.world.gather((bad, self._sample_ids, first))
        where = [f"loss on rank {rank}, samples {ids}" for rank, (ids, _, _) in enumerate(found) if ids]
        if not where:
            where = [f"gradient, from rank {rank}'s samples {ids}" for rank, (_, ids, _) in enumerate(found)]
        named = min(first for *_, first in found)
        raise NonFiniteError(
            f"phase {self.run.phase}, step {self.progress.step + 1}: not finite: {'; '.join(where)}. "
            f"Neither weights nor checkpoints were touched. {self._remedy(step_batch.first if named == math.inf else int(named))}"
        )

    def _remedy(self, number: int) -> str:
        """How to go on behind a step that was not finite, sample ``number`` being in it."""
        train = f"{section_of(self.run.phase)}.train"
        skipped = ",".join(map(str, [*self.settings.skip_samples, number]))
        return (
            f"To go on after the last checkpoint, start the same command with this batch left out ({train}.skip_samples="
            f"[{skipped}]), or with a lower learning rate ({train}.lr=... run.allow_changes=[{train}.lr]) or clipping norm "
            f"({train}.max_grad_norm=... run.allow_changes=[{train}.max_grad_norm])"
        )

    def advance(self, lr: float, gradient_norm: float, ahead: float) -> None:
        """Count the step; log, validate and checkpoint where due."""
        if self._first:
            self._first = False
            self._wait_at_most(self.run.config.deepspeed.step_timeout_minutes)
        step = self.progress.step = self.progress.step + 1
        self.progress.samples += self.settings.global_batch
        self._profiler.after(step)
        self._tell(ahead)
        for name, amount in self._step_counts.items():
            self._interval[name] += amount
        self._unlogged = (lr, gradient_norm)
        if step % self.settings.log_every == 0:
            self._log(ahead)
        # Before the checkpoint: a run killed in between makes this step again, and the snapshot with it.
        if self.settings.snapshot_every and step % self.settings.snapshot_every == 0 and ahead < 1:
            self._record_model("unfinished", step)
        if self._checkpoint_due() and ahead < 1:
            self.save()
        if self._validation_due(ahead):  # behind the checkpoint: whatever fails here costs no step
            self.validate()
        self.run.status.say(f"step {step + 1}: waits for its batch")

    def _tell(self, fraction: float) -> None:
        """How far the training is, and when it will be done."""
        self._left = self._pace.seconds_left(fraction)
        total = round(self.progress.step / fraction) if fraction > 0 else None
        self.run.status.say(step=self.progress.step, fraction=fraction, total_steps=total, seconds_left=self._left)

    def _checkpoint_due(self) -> bool:
        """By steps, or by rank 0's clock, which all ranks have agreed on."""
        every, minutes = self.settings.checkpoint_every, self.settings.checkpoint_minutes
        by_step = every is not None and self.progress.step % every == 0
        return by_step or (minutes is not None and self.progress.seconds - self._saved_seconds >= 60 * minutes)

    def _validation_due(self, fraction: float) -> bool:
        every = self.settings.validate_every
        return every is not None and self.progress.step % every == 0 and fraction < 1

    def catch_up(self) -> None:
        """Validate where a run ended between a checkpoint and the validation of its step."""
        fraction = self.progress.fraction(self.settings, self.phase.num_samples)
        if self.progress.step != self._validated_step and self._validation_due(fraction):
            self.validate()

    def _log(self, fraction: float) -> None:
        """Write what was measured since the last time, if anything."""
        if self._unlogged is None:
            return
        (lr, gradient_norm), self._unlogged = self._unlogged, None
        self.meters.collect(self.world)
        averages = self.meters.averages()
        self.meters.clear()
        now = self._seconds()
        seconds = max(now - self._interval["seconds"], 1e-9)
        per_device = self._interval["tokens"] / seconds / self.world.size
        of_ranks, ranks = self._ranks.figures(self._telemetry.memory_gib(), seconds)
        speed = {
            "lr": lr,
            **({"heads_lr": lr * self.settings.heads_lr_factor} if self.settings.heads_lr_factor != 1 else {}),
            "grad_norm": gradient_norm,
            "skipped_steps": float(self.engine.skipped_steps),
            "tokens_per_second": self._interval["tokens"] / seconds,
            "tokens_per_second_per_device": per_device,
            "mfu": self._interval["flops"] / seconds / self._peak,
            "data_wait": self._interval["wait"] / seconds,
            **of_ranks,
            "epoch": self.progress.samples / self.phase.num_samples,
            "seconds": now,
        }
        self._interval = {"tokens": 0.0, "flops": 0.0, "wait": 0.0, "seconds": now}
        self.metrics.update(averages)
        self._telemetry.record("train", self.progress.step, {**averages, **speed})
        shown = {name: speed[name] for name in ("lr", "grad_norm", "tokens_per_second", "data_wait", "memory_gib")}
        self._telemetry.progress(fraction, self.progress.step, {**averages, **shown}, self._left)
        told = {name: speed[name] for name in ("tokens_per_second", "mfu", "data_wait", "memory_gib")}
        self.run.status.say(loss=averages.get("loss"), **told, **ranks)

    def validate(self) -> bool:
        """Validate now, off the clock; False where a signal asked to stop in between: it is then made up for."""
        most, stopped = self.settings.validation_batches * self.settings.global_batch, self.run.stop_agreed
        with self._off_the_clock("validation"):
            values = validate(self.engine, self.phase, most, self.micro, self._telemetry, self.progress.step, stopped)
        if values is None:
            return False
        self._validated_step = self.progress.step
        if values:
            self._telemetry.record("validation", self.progress.step, values)
            self.metrics.update({f"validation/{name}": value for name, value in values.items()})
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step, off the clock, unless there is one."""
        if self._saved_step == self.progress.step:
            return
        with self._off_the_clock("writing a checkpoint"):
            self.meters.collect(self.world)
            state = {
                **dataclasses.asdict(self.progress),
                "meters": self.meters.state(),
                "metrics": self.metrics,
                "validated": self._validated_step,
            }
            checkpoint.save(self._checkpoints, self.engine, state, self.settings.keep_checkpoints)
        self._saved_step, self._saved_seconds = self.progress.step, self.progress.seconds
        self.run.status.say(checkpoint_step=self._saved_step, checkpoint_time=time.time())

    def interrupt(self) -> Outcome:
        """Stopped by a signal: checkpoint, and leave the mark to be started again."""
        self.save()
        self.run.interrupt()
        logger.info("%s interrupted after step %d, saved: the same command continues", self.run.phase, self.progress.step)
        return self._outcome("interrupted")

    def finish(self) -> Outcome:
        """At the end: log, validate, checkpoint, write the model, record the outcome; a signal may interrupt the validation."""
        self._log(1.0)
        self.save()
        if self._validated_step != self.progress.step and not self.validate():  # else it was done before a restart
            return self.interrupt()
        outcome = self._record_model("finished")
        if self.world.is_main and not self.settings.keep_finished:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        tell_trained(self.run, outcome, self.progress.limit(self.settings, self.phase.num_samples))
        return outcome

    def _record_model(self, status: str, snapshot: int | None = None) -> Outcome:
        """Write the model, as the finished one or that of a step, off the clock."""
        outcome = self._outcome(status)
        with self._off_the_clock("writing the model"):  # the others wait while rank 0 brings the last files to disk
            self._write_model(self.run.folder.snapshot(self.run.phase, snapshot))
            self.run.finish(outcome, snapshot)
        return outcome

    def _write_model(self, name: str) -> None:
        state = self.engine.full_state(ema=True)
        if self.world.is_main:
            with self.run.new_folder(self.run.folder.model(name)) as folder:
                self.phase.save(folder, state)
        for _ in state:  # collective: every rank goes through all of it
            pass

    def _outcome(self, status: str) -> Outcome:
        progress = self.progress
        return Outcome(status, progress.step, progress.samples, progress.seconds, dict(self.metrics))


def _seed(seed: int, number: int) -> int:
    """Seed of the operations inside the model, a function of the run's seed and the micro batch's first sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=7).digest(), "little")
