"""What is due after a step, by steps or minutes, and whether there will be another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training.runtime.alarm import Alarm
from training.runtime.allowance import Allowance
from training.runtime.alone import GiveWay
from training.runtime.best import Best
from training.runtime.run import Run
from training.runtime.schedule import Progress


class Cadence:
    """The rhythm of a training: logging, snapshots, checkpoints, validations, the end.  It alone looks at the stop flag there.

    It goes by figures that all ranks have agreed on, so that all answer alike.
    """

    def __init__(self, run: Run, progress: Progress, num_samples: int) -> None:
        """``progress`` is that of the training, which moves.  Raises ValueError where no setting ends it."""
        self._run, self._settings, self._progress, self._num_samples = run, run.settings, progress, num_samples
        self.saved_step = self.validated_step = 0  # what step 0 would save follows from the seed
        self._saved_seconds = 0.0
        self.best = Best(run.settings)
        self.samples = Allowance(run.config.telemetry.samples_share)
        self.fraction()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"validated": self.validated_step, "best": self.best.state(), "shown": self.samples.state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """The training stands where a checkpoint with this ``state`` left it."""
        self.validated_step = state["validated"]
        self.best.load(state.get("best", {}))
        self.samples.load(state.get("shown", {}))
        self.saved()

    def fraction(self) -> float:
        """Part of the training done."""
        return self._progress.fraction(self._settings, self._num_samples)

    def ahead(self) -> float:
        """Part of the training done behind the step under way."""
        return self._progress.after(self._settings.global_batch).fraction(self._settings, self._num_samples)

    def over(self) -> bool:
        """Whether the training is at its end, or has not become better for so long that it ends here."""
        return self.fraction() >= 1 or self.best.exhausted

    def limit(self) -> str:
        """The setting that has ended the training, with its value."""
        ended = self.best.exhausted and self.fraction() < 1
        return self.best.limit() if ended else self._progress.limit(self._settings, self._num_samples)

    def asked_to_stop(self) -> bool:
        """Whether this rank was asked to stop; said once in its log."""
        self._run.stop.announce()
        return self._run.stop.requested

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop (collective)."""
        return self._run.stop_agreed()

    def alarm(self) -> Alarm:
        """Whether any rank was asked to stop, for ranks that go their own ways (collective)."""
        return self._run.alarm()

    def give_way(self) -> None:
        """Raise BrokenOff, on all ranks, where any was asked to stop (collective)."""
        self._run.give_way()

    def alone(self, work: Callable[[GiveWay], object]) -> None:
        """Have rank 0 do ``work``, unless a stop breaks it off (collective)."""
        self._run.alone(work)

    def ending(self) -> bool:
        """Whether the next step will not be made: a stop was asked for, or this is the end (collective)."""
        return self.stop_agreed() or self.over()

    def log_due(self) -> bool:
        """Whether this step is logged."""
        return self._progress.step % self._settings.log_every == 0

    def snapshot_due(self) -> bool:
        """Whether the model of this step is kept; that of the last one is the finished model."""
        return self._by_step(self._settings.snapshot_every) and not self.over()

    def checkpoint_due(self) -> bool:
        """By steps, or by rank 0's clock; not at the end, which has a checkpoint of its own."""
        minutes = self._settings.checkpoint_minutes
        by_clock = minutes is not None and self._progress.seconds - self._saved_seconds >= 60 * minutes
        return (self._by_step(self._settings.checkpoint_every) or by_clock) and not self.over()

    def validation_due(self) -> bool:
        """Whether this step is validated; the last one is in any case."""
        return self._by_step(self._settings.validate_every) and not self.over()

    def samples_due(self) -> bool:
        """Whether the validation of this step shows samples: the first one and the last, and the others while that takes no more
        than its share of the training."""
        return self.over() or self.samples.covers(self._progress.seconds)

    def to_catch_up(self) -> bool:
        """Whether a validation is due before the first step of this start: one that a stop left out, or, where a figure of it
        is to choose the model, the first, which shows at once whether there is such a figure."""
        return self.validation_due() and (not self.is_validated or (bool(self.best) and self._progress.step == 0))

    def _by_step(self, every: int | None) -> bool:
        return every is not None and self._progress.step % every == 0

    @property
    def is_saved(self) -> bool:
        """Whether this step's checkpoint is written."""
        return self.saved_step == self._progress.step

    @property
    def is_validated(self) -> bool:
        """Whether this step was validated."""
        return self.validated_step == self._progress.step

    def saved(self) -> None:
        """This step's checkpoint is written."""
        self.saved_step, self._saved_seconds = self._progress.step, self._progress.seconds

    def validated(self) -> None:
        """This step was validated."""
        self.validated_step = self._progress.step
