"""What a plan says of one phase on one machine."""

from __future__ import annotations

from dataclasses import dataclass

from training.planning.memory import Holdings

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What a job runs on; ``reserve``: bytes per GPU for CUDA, NCCL and the allocator's losses."""

    gpus: int
    gpus_per_node: int
    gpu_bytes: int
    reserve: int
    flops: float
    mfu: float
    launch_seconds: float = 20e-6
    """What it takes the host to launch one operator (docs/benchmark.md: 20 to 28 us beside an H200)."""
    replays: bool = True
    """Whether denoising steps are replayed as CUDA graphs; on a CPU every one is launched."""

    @property
    def ranks_per_node(self) -> int:
        """Processes on one node."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Iteration:
    """Stage 3's asking and updates, as seconds of (arithmetic, launching): each takes the larger of its two."""

    sampling: tuple[float, float]
    learning: tuple[float, float]

    @property
    def seconds(self) -> float:
        """Of both, judging left out: it goes on beside."""
        return max(self.sampling) + max(self.learning)

    @property
    def arithmetic(self) -> float:
        return self.sampling[0] + self.learning[0]

    @property
    def launching(self) -> float:
        return self.sampling[1] + self.learning[1]


@dataclass(frozen=True)
class Prediction:
    """One phase: bytes per GPU unless said otherwise; ``remedy`` says what makes it fit where it does not."""

    phase: str
    holdings: Holdings
    activations: int
    capacity: int
    host_per_node: int
    """Of the state that is there, without what checkpoints take."""
    checkpoint: int
    model_folder: int
    setup: str
    samples: int
    tokens: int
    steps: float | None
    seconds: float
    epochs: float | None
    saving_per_node: int = 0
    """Host memory for writing checkpoints, their copies included."""
    loading_per_node: int = 0
    """Host memory of the weights that are read, before the GPUs have them."""
    remedy: str = ""
    lighter: str = ""
    """The DeepSpeed file that splits less and fits as well."""
    bound: str = ""
    """What the time is that of, where not of arithmetic."""
    iteration: Iteration | None = None
    """Of stage 3."""
    read_bytes: int = 0
    """Of stored samples, in an epoch."""
    balance: float | None = None
    """The share of the time that ranks do not wait for the one with most to do, where the records' sizes are known."""

    @property
    def peak(self) -> int:
        """Most bytes on a GPU: resident, and the larger of a pass (activations, gathered weights) and a step."""
        held = self.holdings
        return held.resident + max(self.activations + held.gathered, held.step)

    @property
    def host_peak(self) -> int:
        """Most bytes of a node's memory: while the models are loaded, or later, while a checkpoint is written."""
        return max(self.loading_per_node, self.host_per_node + self.saving_per_node)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's memory, the reserve left out."""
        return self.peak <= self.capacity
