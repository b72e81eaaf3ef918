"""The train loop, the same for every phase."""

from __future__ import annotations

import dataclasses
import gc
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
from ladir.errors import UnusableError
from training.runtime import checkpoint
from training.runtime.best import keep_as_finished, remove_others
from training.runtime.cadence import Cadence
from training.runtime.checkpoint import Writing
from training.runtime.clock import Clock
from training.runtime.collection import collected_when_asked
from training.runtime.distributed import is_lost_rank
from training.runtime.ending import finished_before, tell_trained
from training.runtime.engine import Engine
from training.runtime.heartbeat import GRADIENTS_COMPUTED, SAMPLES_READ, Heartbeat
from training.runtime.host_room import HostRoom
from training.runtime.meters import LossSums, Meters
from training.runtime.phase import Batch, Measured, OnPolicy, Phase
from training.runtime.profiling import Ranges, StepProfiler, when_full
from training.runtime.ranks import RankWatch
from training.runtime.run import Outcome, Run
from training.runtime.sampler import DataOrder, micro_batch_size
from training.runtime.schedule import Progress, learning_rate
from training.runtime.status import Pace
from training.runtime.step_batches import StepBatch, StepBatchLoader
from training.runtime.telemetry import Telemetry
from training.runtime.topology import section_of
from training.runtime.utilisation import as_written, counted_flops, measured_peak
from training.runtime.validation import show_samples, validate

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
        return _loop(trainer, run.settings)


def _loop(trainer: Trainer, settings: TrainSettings) -> Outcome:
    """One turn is one optimizer step."""
    cadence = trainer.cadence
    with collected_when_asked(), trainer.telemetry(), trainer.step_batches() as step_batches:  # the clock starts behind the first
        trainer.catch_up()
        for step_batch in step_batches:
            stop = trainer.all_reduce_counts(step_batch)
            if stop or cadence.over():
                break
            gradient_norm = trainer.accumulate(step_batch)
            lr = learning_rate(settings, cadence.ahead())
            with trainer.ranges("optimizer step"):
                trainer.engine.step(lr)
            trainer.advance(lr, gradient_norm)
        if not cadence.over():
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
        self.cadence = Cadence(run, self.progress, phase.num_samples)  # refuses a training without end before it starts
        backbone, deepspeed = run.config.backbone, run.config.deepspeed
        lag = phase.lag if isinstance(phase, OnPolicy) else None
        run.status.say("making the engine, and going to the last checkpoint")
        if self.cadence.best and phase.validation is None:
            raise UnusableError(
                f"{section_of(run.phase)}.train.best={self.settings.best}: there is nothing to validate on; set data.validation"
            )
        self.engine = Engine(phase.model, self.settings, backbone.dtype, deepspeed, run.world, lag)
        self.meters = Meters(phase.weights)
        self.metrics: dict[str, float] = {}
        self._checkpoints = run.folder.checkpoints(run.phase)
        self._counts: dict[str, float] = {}
        self._step_counts = {"tokens": 0.0, "wait": 0.0}
        self._interval = {"tokens": 0.0, "flops": 0.0, "wait": 0.0, "seconds": 0.0}
        self._sample_ids: list[list[int]] = []
        self._heartbeat = Heartbeat(run.world, run.phase)
        self.clock = Clock(run.world, deepspeed, self._heartbeat)
        telemetry = run.config.telemetry
        self._ranks = RankWatch(run.world, telemetry.slow_rank_factor, sharded=self.engine.stage == 3)
        self._profiler = StepProfiler(telemetry.profile_steps, run.folder.profile(run.phase), run.world)
        self.ranges = Ranges(telemetry.nvtx)
        self._pace = Pace()
        self._flops_per_token: dict[str, float] = {}
        self._peak = 0.0
        self._unlogged: tuple[float, float] | None = None
        self._left: float | None = None
        self._writing: Writing | None = None
        self._room = HostRoom()

    def resume(self) -> None:
        """Go to the newest whole checkpoint, where there is one."""
        path = checkpoint.find(self._checkpoints, self.world)
        if path is not None:
            state = checkpoint.load(path, self.engine)
            self.progress.step, self.progress.samples = state["step"], state["samples"]
            self.progress.seconds = state["seconds"]
            self.meters.load(state["meters"])
            self.metrics.update(state["metrics"])
            self.cadence.resume(state)
            self.run.status.say(step=self.progress.step, checkpoint_step=self.progress.step, checkpoint_time=path.stat().st_mtime)
            logger.info("phase %s continues after step %d (%s)", self.run.phase, self.progress.step, path)

    @contextmanager
    def telemetry(self) -> Iterator[None]:
        """Open the records and start the clock."""
        given = self.run.config.telemetry.peak_tflops
        self._peak = given * 1e12 if given else measured_peak(self.world.device, self.engine.dtype)
        with Telemetry(self.run, self.progress.step, self.cadence.is_validated, self.cadence) as self._telemetry:
            self.clock.start(self.progress.seconds)
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
            with when_full(f"Lower {self.run.phase}'s micro_batch (results do not change), or see ds_configs/README.md."):
                yield
        except Exception as error:
            if isinstance(error, RuntimeError) and is_lost_rank(error):
                raise self._heartbeat.rank_lost(error) from error
            error.add_note(f"This happened in {self._heartbeat.where()}.")
            raise
        finally:
            self._heartbeat.end()
            self._profiler.close()
        self.clock.end()

    @contextmanager
    def _off_the_clock(self, doing: str) -> Iterator[None]:
        self.run.status.say(f"{doing}, behind step {self.progress.step}")
        with self.clock.off(), self.ranges(doing):
            yield

    def all_reduce_counts(self, step_batch: StepBatch) -> bool:
        """The first of a step's two all-reduces: label counts, rank 0's clock, and whether anybody is asked to stop."""
        self._sample_ids = [list(batch.sample_ids) for batch in step_batch.batches]
        self._profiler.before(self.progress.step + 1)
        self._arrive(SAMPLES_READ)
        seconds = self.clock.seconds() if self.world.is_main else 0.0
        counts = [step_batch.count(term) for term in self.phase.weights]
        values = [*counts, step_batch.num_tokens, step_batch.wait, float(self.cadence.asked_to_stop()), seconds]
        values += [float(self._writing is not None and not self._writing.is_written)]
        *counts, tokens, wait, stops, seconds, writing = self.world.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        if self._writing is not None and writing == 0:  # on all ranks
            self._finish_writing()
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
            with self._ranks.timed(self.engine.model, batch.kind, batch.num_tokens):
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
        stored = list(zip(step_batch.numbers, finite, strict=True))[step_batch.made :]
        first = min((number for number, fine in stored if not fine), default=math.inf)
        found = self.world.gather((bad, self._sample_ids, first))
        where = [f"loss on rank {rank}, samples {ids}" for rank, (ids, _, _) in enumerate(found) if ids]
        named = min(first for *_, first in found)
        if not where:
            where = [f"gradient, from rank {rank}'s samples {ids}" for rank, (_, ids, _) in enumerate(found)]
            named = step_batch.first if stored else math.inf
        raise NonFiniteError(
            f"phase {self.run.phase}, step {self.progress.step + 1}: not finite: {'; '.join(where)}. "
            f"Neither weights nor checkpoints were touched. {self._remedy(None if named == math.inf else int(named))}"
        )

    def _remedy(self, number: int | None) -> str:
        """How to go on behind a step that was not finite, sample ``number`` being in it; None: none that can be left out."""
        train = f"{section_of(self.run.phase)}.train"
        skipped = ",".join(map(str, [*self.settings.skip_samples, number]))
        left_out = "" if number is None else f"with this batch left out ({train}.skip_samples=[{skipped}]), or "
        return (
            f"To go on after the last checkpoint, start the same command {left_out}with a lower learning rate "
            f"({train}.lr=... run.allow_changes=[{train}.lr]) or clipping norm "
            f"({train}.max_grad_norm=... run.allow_changes=[{train}.max_grad_norm])"
        )

    def advance(self, lr: float, gradient_norm: float) -> None:
        """Count the step; log, validate and checkpoint where due."""
        self.clock.stepped()
        step = self.progress.step = self.progress.step + 1
        self.progress.samples += self.settings.global_batch
        self._profiler.after(step)
        self._tell()
        for name, amount in self._step_counts.items():
            self._interval[name] += amount
        self._unlogged = (lr, gradient_norm)
        if self.cadence.log_due():
            self._log()
            gc.collect()  # on all ranks at the same step
        # Before the checkpoint: a run killed in between makes this step again, and the snapshot with it.
        if self.cadence.snapshot_due():
            self._record_model("unfinished", step)
        if self.cadence.checkpoint_due():
            self.save(in_background=True)
        if self.cadence.validation_due():  # behind the checkpoint: whatever fails here costs no step
            self.validate()
        self.run.status.say(f"step {step + 1}: waits for its batch")

    def _tell(self) -> None:
        """How far the training is, and when it will be done."""
        fraction = self.cadence.fraction()
        self._left = self._pace.seconds_left(fraction)
        total = round(self.progress.step / fraction) if fraction > 0 else None
        self.run.status.say(step=self.progress.step, fraction=fraction, total_steps=total, seconds_left=self._left)

    def catch_up(self) -> None:
        """Validate where a run ended between a checkpoint and the validation of its step."""
        if self.cadence.to_catch_up():
            self.validate()

    def _log(self) -> None:
        """Write what was measured since the last time, if anything."""
        if self._unlogged is None:
            return
        (lr, gradient_norm), self._unlogged = self._unlogged, None
        self.meters.collect(self.world)
        averages = self.meters.averages()
        self.meters.clear()
        now = self.clock.seconds()
        seconds = max(now - self._interval["seconds"], 1e-9)
        per_device = self._interval["tokens"] / seconds / self.world.size
        of_ranks, ranks = self._ranks.figures(self._telemetry.memory_gib(), seconds, self._flops_per_token)
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
        self._telemetry.progress(self.cadence.fraction(), self.progress.step, {**averages, **shown}, self._left)
        told = {name: speed[name] for name in ("tokens_per_second", "mfu", "data_wait", "memory_gib")}
        self.run.status.say(loss=averages.get("loss"), **told, **ranks)

    def validate(self) -> bool:
        """Validate now, off the clock; False where a signal asked to stop in between: it is then made up for."""
        most, stopped = self.settings.validation_batches * self.settings.global_batch, self.cadence.stop_agreed
        with self._off_the_clock("validation"):
            values = validate(self.engine, self.phase, most, self.micro, self._show, stopped)
        if values is None:
            return False
        self.cadence.validated()
        if values:
            self._telemetry.record("validation", self.progress.step, values)
            self.metrics.update({f"validation/{name}": value for name, value in values.items()})
            self._choose(values)
        return True

    def _show(self) -> None:
        """Show samples, where they are due."""
        if self.cadence.samples_due():
            self.cadence.samples.took(show_samples(self.engine, self.phase, self._telemetry, self.progress.step))

    def _choose(self, values: dict[str, float]) -> None:
        """Keep the model where its validation is the best so far and that was asked for; an untrained one is none."""
        best, step = self.cadence.best, self.progress.step
        if best and step == 0:
            best.check(values)
        elif best and best.better(step, values):
            with self._off_the_clock("writing the best model so far"):
                self._write_model(self._best_model(step))

    def _best_model(self, step: int) -> str:
        return f"{self.run.phase}-best-{step}"

    def _forget_models(self, finished: bool = False) -> None:
        """Remove best models that no checkpoint chooses, nor this step; all behind the finished one."""
        if self.cadence.best and self.world.is_main:
            chosen = [*checkpoint.states(self._checkpoints), {"best": self.cadence.best.state()}]
            steps = set() if finished else {state["best"]["step"] for state in chosen if state.get("best")}
            remove_others(self.run.folder.model(self.run.phase).parent, self.run.phase, steps)

    def save(self, in_background: bool = False) -> None:
        """Write a checkpoint of the present step, off the clock, unless there is one; ``in_background``: it may end later."""
        self._finish_writing()
        if self.cadence.is_saved:
            return
        with self._off_the_clock("writing a checkpoint"):
            self.meters.collect(self.world)
            state = {
                **dataclasses.asdict(self.progress),
                "meters": self.meters.state(),
                "metrics": self.metrics,
                **self.cadence.state(),
            }
            background = in_background and self.settings.checkpoint_in_background
            room = self._room if background else None
            self._writing = Writing(self._checkpoints, self.engine, state, self.settings.keep_checkpoints, room)
        self.cadence.saved()
        if not background:
            self._finish_writing()

    def _finish_writing(self) -> None:
        """Give the checkpoint under way, if there is one, its name, off the clock."""
        if self._writing is None:
            return
        with self._off_the_clock("writing a checkpoint"):
            self._writing.finish()
            self._forget_models()
        self.run.status.say(checkpoint_step=self._writing.step, checkpoint_time=time.time())
        self._writing = None

    def interrupt(self) -> Outcome:
        """Stopped by a signal: checkpoint, and leave the mark to be started again."""
        self.save()
        self.run.interrupt()
        logger.info("%s interrupted after step %d, saved: the same command continues", self.run.phase, self.progress.step)
        return self._outcome("interrupted")

    def finish(self) -> Outcome:
        """At the end: log, validate, checkpoint, write the model, record the outcome; a signal may interrupt the validation."""
        self._log()
        self.save()
        if not self.cadence.is_validated and not self.validate():  # else it was done before a restart
            return self.interrupt()
        outcome = self._record_model("finished")
        self._forget_models(finished=True)
        if self.world.is_main and not self.settings.keep_finished:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        tell_trained(self.run, outcome, self.cadence.limit())
        return outcome

    def _record_model(self, status: str, snapshot: int | None = None) -> Outcome:
        """Write the model, as the finished one or that of a step, off the clock."""
        outcome = self._outcome(status)
        with self._off_the_clock("writing the model"):  # the others wait while rank 0 brings the last files to disk
            if snapshot is None and self.cadence.best.step is not None:
                self._take_best(self.cadence.best.step)
            else:
                self._write_model(self.run.folder.snapshot(self.run.phase, snapshot))
            self.run.finish(outcome, snapshot)
        return outcome

    def _take_best(self, step: int) -> None:
        """The finished model is the best one."""

        def take() -> None:
            with self.run.new_folder(self.run.folder.model(self.run.phase)) as folder:
                keep_as_finished(self.run.folder.model(self._best_model(step)), folder)

        self.world.on_main(take)

    def _write_model(self, name: str) -> None:
        state = self.engine.full_state(ema=True)
        if self.world.is_main:
            with self.run.new_folder(self.run.folder.model(name)) as folder:
                self.phase.save(folder, state)
        for _ in state:  # collective: every rank goes through all of it
            pass

    def _outcome(self, status: str) -> Outcome:
        progress, metrics = self.progress, dict(self.metrics)
        if status == "finished" and self.cadence.best.step is not None:
            metrics |= {f"validation/{name}": value for name, value in self.cadence.best.figures.items()}
            metrics["best_step"] = float(self.cadence.best.step)
        return Outcome(status, progress.step, progress.samples, progress.seconds, metrics)


def _seed(seed: int, number: int) -> int:
    """Seed of the operations inside the model, a function of the run's seed and the micro batch's first sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=7).digest(), "little")
