"""What the train loop sees of a phase (VAE, denoiser, AR baseline): its model, its losses, its samples.

A phase knows nothing of ranks, accumulation or checkpoints; the runtime knows nothing of the maths.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ladir.config import TrainSettings
from training.runtime.schedule import Progress

if TYPE_CHECKING:
    from training.runtime.cadence import Cadence
    from training.runtime.clock import Clock
    from training.runtime.distributed import World
    from training.runtime.engine import Engine, Lag
    from training.runtime.profiling import Ranges
    from training.runtime.step_batches import StepBatch, StepBatchLoader


class Batch(Protocol):
    """One micro batch, made by the phase's collator on the CPU."""

    @property
    def counts(self) -> Mapping[str, float]:
        """Labels per loss term in this micro batch, e.g. ``{"flow": 512, "answer": 40}``."""

    @property
    def kind(self) -> str:
        """Batches of one kind take the same passes: their FLOPs per token are counted once."""

    @property
    def num_tokens(self) -> int:
        """Real (not padding) tokens, for the throughput."""

    @property
    def sample_ids(self) -> Sequence[int]:
        """Indices of the samples, for error messages."""

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""


class SampleSource(Protocol):
    """A set of samples that can be collated into micro batches."""

    @property
    def num_samples(self) -> int:
        """How many samples there are."""

    def collate(self, indices: list[int], numbers: list[int], training: bool = True) -> Batch:
        """Build a micro batch.

        Args:
            indices: which samples, in ``[0, num_samples)``.
            numbers: their positions in the whole run (0, 1, 2, ... over all epochs).  All randomness of a sample is a
                function of (run.seed, number), so results depend neither on the number of ranks nor on accumulation.
            training: False in validation (no augmentation).
        """


class Phase(SampleSource, Protocol):
    """One training: a model, its loss terms and its samples."""

    name: str
    model: nn.Module
    """``model(batch)`` returns the SUM over its labels of every loss term (fp32 scalars).  It may add metrics under
    ``"metric/<name>"``: detached tensors ``[2]`` of (sum, count), averaged over the interval between two log lines.

    In the same micro batch all ranks must run the same modules and give gradients to the same parameters, whatever
    their samples are (an empty selection or ``+ 0.0 * parameter.sum()`` does): ZeRO-3 communicates while they run."""

    weights: Mapping[str, float]
    """Weight per loss term: ``loss = sum_k weights[k] * sum_k / max(count_k, 1)``, both taken over the global batch."""

    @property
    def validation(self) -> SampleSource | None:
        """What the model is validated on; None where nothing is held out."""

    def save(self, folder: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        """Write the finished model into the new folder ``folder`` (called on rank 0 only).

        ``state`` yields every parameter and persistent buffer once, in full, on the CPU; it must be exhausted.
        """


@runtime_checkable
class Measured(Protocol):
    """A phase may have this method: ranks then get equal shares of the work."""

    def length(self, index: int) -> int:
        """About how much work the sample ``index`` is, e.g. its tokens."""


@runtime_checkable
class ValidationHook(Protocol):
    """A phase may have this method: more to look at (text samples, histograms) after every validation."""

    def on_validate(self, model: nn.Module, telemetry: Any, step: int) -> None:
        """Called on every rank, without gradient, in evaluation mode; ranks must run the same modules."""


class Underway(Protocol):
    """What a phase that makes its own samples sees of the training under way."""

    engine: Engine
    world: World
    progress: Progress
    settings: TrainSettings
    cadence: Cadence
    clock: Clock
    ranges: Ranges

    def stored(self) -> StepBatchLoader:
        """Batches of the phase's stored samples, from the present step on."""


@runtime_checkable
class OnPolicy(Protocol):
    """A phase whose samples the model itself makes, with the weights of an old model."""

    lag: Lag

    def step_batches(self, training: Underway) -> Generator[StepBatch]:
        """A batch for every step to come, from the present one on (on all ranks together).

        Where ``training.cadence.ending()`` says so, one without batches: it is not trained on.
        """
