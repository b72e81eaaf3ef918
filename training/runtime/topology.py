"""Whether a training can start on so many processes: asked before a job is queued, and again before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ladir.config import Config, TrainSettings
from ladir.errors import UnusableError
from training.runtime.chain import Step
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config, read_ds_config, zero_stage
from training.runtime.sampler import BatchSizeError, micro_batch_size

#: CPUs that a process beside a GPU needs at least, as in slurm/common.sh: one that keeps the GPU busy, one that makes batches
CPUS_PER_PROCESS = 2

GIB = 2**30
#: the variable of a submission that says how many GiB a GPU has, which no option of sbatch does
GPU_MEMORY = "GPU_MEMORY"
#: what to tell where that is not set
MEMORY_UNKNOWN = (
    f"whether the phases fit into a GPU was not checked: no option says what memory one has; say {GPU_MEMORY}=N, its GiB, "
    "as a variable of this command"
)

_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")
_SECTIONS = ("vae", "denoiser", "rollout", "rl", "verifier")


def section_of(phase: str) -> str:
    """The section of settings of a training phase: its own, or the autoregressive LM's."""
    return {"ar-rl": "rl"}.get(phase, phase if phase in _SECTIONS else "ar")


def train_settings(config: Config, phase: str) -> TrainSettings:
    """How a phase is trained."""
    train: TrainSettings = getattr(config, section_of(phase)).train
    return train


def deepspeed_file(config: Config, phase: str) -> str:
    """The DeepSpeed configuration of a phase."""
    return train_settings(config, phase).deepspeed or config.deepspeed.config


def check_topology(config: Config, phase: str, ranks: int, on_nodes: Iterable[int | None] = ()) -> None:
    """Raise BatchSizeError or DeepSpeedConfigError where ``phase`` cannot be trained by so many processes.

    ``on_nodes``: how many of them nodes have, which need not be as many each; None where that is not known.
    """
    check_batch(config, phase, ranks)
    check_groups(config, phase, ranks, "")
    for processes in sorted({count for count in on_nodes if count is not None}):
        check_groups(config, phase, processes, "a node's ")


def check_batch(config: Config, phase: str, ranks: int) -> None:
    """Raise BatchSizeError where so many processes cannot share the phase's global batch."""
    train = train_settings(config, phase)
    try:
        micro_batch_size(train.global_batch, ranks, train.micro_batch)
    except BatchSizeError as error:
        raise BatchSizeError(f"{section_of(phase)}.train.{error}") from error


def check_groups(config: Config, phase: str, processes: int, whose: str) -> None:
    """Raise DeepSpeedConfigError where processes (``whose``: of a node, or empty) are no whole number of ZeRO's hpZ groups.

    A group that spans two nodes gathers weights over the network, which is what it is there to avoid.
    """
    file = deepspeed_file(config, phase)
    zero = read_ds_config(file)
    group = zero.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if zero_stage(zero) == 3 and processes % group:
        raise DeepSpeedConfigError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {group}, and {whose}{processes} processes are no "
            "whole number of such groups: set it to the processes of one node, or take ds_configs/zero3.json"
        )


@dataclass(frozen=True)
class Topology:
    """What a job is to run on: nodes, processes and CPUs on each, GiB of a GPU (of the smallest); None where nobody says."""

    nodes: int | None
    processes: int | None
    cpus: int | None = None
    has_gpus: bool = True
    gpu_gib: float | None = None

    @classmethod
    def of(cls, gpus: int, per_node: int, gpu_gib: float) -> Topology:
        """So many GPUs on the fewest nodes of at most ``per_node`` that have as many each."""
        nodes = next(nodes for nodes in range(-(-gpus // per_node), gpus + 1) if gpus % nodes == 0)
        return cls(nodes, gpus // nodes, gpu_gib=gpu_gib)

    @property
    def ranks(self) -> int | None:
        """Processes in all."""
        return None if self.nodes is None or self.processes is None else self.nodes * self.processes


def asked_for(options: Sequence[str], environment: Mapping[str, str]) -> Topology:
    """What options of sbatch (``--name=value``; the last of a name counts) and its variables ask for.

    Raises UnusableError where GPU_MEMORY is no number of GiB.
    """
    given = _variables(environment) | dict(option.removeprefix("--").partition("=")[::2] for option in options)
    nodes = _nodes(given.get("nodes", "1"))
    gpus = _per_node(given, nodes)
    own = environment.get("PROCESSES_PER_NODE")
    cpus = _number(given.get("cpus-per-task", ""))
    if cpus is None and gpus is not None and (each := _number(given.get("cpus-per-gpu", ""))) is not None:
        cpus = gpus * each
    has_gpus = own is None or _asks_for_gpus(given)
    return Topology(nodes, gpus if own is None else _number(own), cpus, has_gpus, gpu_memory(environment))


def gpu_memory(environment: Mapping[str, str]) -> float | None:
    """A GPU's GiB, where the variable says so.  UnusableError where it says something else."""
    text = environment.get(GPU_MEMORY, "")
    if not text.strip():
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UnusableError(f"{GPU_MEMORY}={text} is no number of GiB: say what a GPU has, e.g. {GPU_MEMORY}=80, or unset it")
    return found


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """sbatch's own variables that say the same as options, by the options' names."""
    names = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "cpus-per-task", "cpus-per-gpu")
    variables = {name: f"SBATCH_{name.upper().replace('-', '_')}" for name in names}
    return {name: environment[variable] for name, variable in variables.items() if variable in environment}


def _nodes(text: str) -> int | None:
    """How many nodes: ``N`` or ``N-N``; None where Slurm may choose."""
    least, _, most = text.partition("-")
    return _number(least) if most in ("", least) else None


def _asks_for_gpus(given: Mapping[str, str]) -> bool:
    return any(name in given for name in _GPU_OPTIONS) or bool(_gpu_parts(given))


def _gpu_parts(given: Mapping[str, str]) -> list[str]:
    """The entries of --gres that are GPUs."""
    return [part for part in given.get("gres", "").split(",") if part.partition("(")[0].partition(":")[0] == "gpu"]


def _per_node(given: Mapping[str, str], nodes: int | None) -> int | None:
    """GPUs on a node; a batch script has one task on each."""
    for name in ("gpus-per-node", "gpus-per-task"):
        if name in given:
            return _count(given[name])
    if "gpus-per-socket" in given:
        each, sockets = _count(given["gpus-per-socket"]), _number(given.get("sockets-per-node", ""))
        return None if each is None or sockets is None else each * sockets
    if gres := _gpu_parts(given):
        count = gres[0].partition("(")[0].rpartition(":")[2]
        return 1 if count == "gpu" else _number(count)
    total = _count(given.get("gpus", ""))
    return None if total is None or nodes is None or total % nodes else total // nodes


def _count(text: str) -> int | None:
    """The number in ``[type:]number``."""
    return _number(text.rpartition(":")[2])


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) > 0 else None


def step_problems(config: Config, step: Step, topology: Topology) -> Iterator[str]:
    """Why ``step`` of a chain cannot start there."""
    if step.entry in ("export", "table"):  # one process
        return
    processes, cpus = topology.processes, topology.cpus
    if topology.has_gpus and cpus is not None and processes is not None and cpus < (least := CPUS_PER_PROCESS * processes):
        yield (
            f"{step.words}: {cpus} CPUs on a node for {processes} processes: each needs {CPUS_PER_PROCESS} beside a GPU; say "
            f"--cpus-per-task=N, the CPUs of a whole node, {least} at least"
        )
    if step.entry.startswith("train_"):
        yield from (f"{step.words}: {problem}" for problem in _training_problems(config, step.phase, topology))


def _training_problems(config: Config, phase: str, topology: Topology) -> Iterator[str]:
    """Why a training cannot start there, as far as its processes are known."""
    try:
        check_ds_config(config.backbone, deepspeed_file(config, phase))
    except DeepSpeedConfigError as error:
        yield from str(error).splitlines()
        return
    ranks, processes = topology.ranks, topology.processes
    try:
        if ranks is not None:
            check_batch(config, phase, ranks)
    except BatchSizeError as error:
        yield f"{error} ({topology.nodes} nodes x {processes})"
    try:
        if processes is not None:
            check_groups(config, phase, processes, "a node's ")
    except DeepSpeedConfigError as error:
        yield str(error)


def unchecked(step: Step, topology: Topology) -> bool:
    """Whether ``step`` is a training of which nobody knows how many processes share its batch."""
    return step.entry.startswith("train_") and topology.ranks is None


def not_checked(steps: Sequence[str]) -> str:
    """What to tell of trainings that are :func:`unchecked`, by their words."""
    return (
        f"batches were not checked ({'; '.join(steps)}): the options do not say on how many processes they are to be shared; "
        "they are checked with --nodes=N and --gres=gpu:N, or --gpus-per-node=N, or PROCESSES_PER_NODE=N"
    )
