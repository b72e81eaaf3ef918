"""What a plan says of one phase on one machine."""

from __future__ import annotations

from dataclasses import dataclass

from training.planning.memory import Holdings
from training.runtime.topology import GIB, Topology

#: bytes of a GPU that are kept for CUDA, NCCL and the allocator's losses
RESERVE = 3 * GIB


@dataclass(frozen=True)
class Machine:
    """What a job runs on: a topology that leaves nothing open, and how fast it is; ``reserve``: bytes per GPU, as above."""

    topology: Topology
    reserve: int = RESERVE
    flops: float = 989e12
    """Dense bf16 peak of one GPU, per second (an H100 SXM's)."""
    mfu: float = 0.4
    """The share of that peak that is reached."""
    launch_seconds: float = 20e-6
    """What it takes the host to launch one operator (docs/benchmark.md: 20 to 28 us beside an H200)."""
    replays: bool = True
    """Whether denoising steps are replayed as CUDA graphs; on a CPU every one is launched."""

    def __post_init__(self) -> None:
        """Raises ValueError where the topology leaves something open."""
        if self.topology.ranks is None or self.topology.gpu_gib is None:
            raise ValueError(f"a plan is of so many GPUs of so many GiB: {self.topology}")

    @property
    def gpus(self) -> int:
        """GPUs (processes) of the job."""
        assert self.topology.ranks is not None
        return self.topology.ranks

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        assert self.topology.gpu_gib is not None
        return int(self.topology.gpu_gib * GIB)

    @property
    def capacity(self) -> int:
        """Bytes of one GPU, the reserve left out."""
        return self.gpu_bytes - self.reserve

    @property
    def ranks_per_node(self) -> int:
        """Processes on one node."""
        assert self.topology.processes is not None
        return self.topology.processes


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


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a phase takes of a GPU, in bytes; ``remedy`` says what makes it fit where it does not."""

    phase: str
    holdings: Holdings
    activations: int
    capacity: int
    remedy: str = ""

    @property
    def peak(self) -> int:
        """Most bytes on a GPU: resident, and the larger of a pass (activations, gathered weights) and a step."""
        held = self.holdings
        return held.resident + max(self.activations + held.gathered, held.step)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's memory, the reserve left out."""
        return self.peak <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Prediction(Need):
    """One phase: bytes per GPU unless said otherwise."""

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
    def host_peak(self) -> int:
        """Most bytes of a node's memory: while the models are loaded, or later, while a checkpoint is written."""
        return max(self.loading_per_node, self.host_per_node + self.saving_per_node)
