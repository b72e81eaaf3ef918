"""Whether a training can start on so many processes: asked before a job is queued, and again before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ladir.config import Config, TrainSettings
from training.runtime.chain import Step
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config, read_ds_config, zero_stage
from training.runtime.sampler import BatchSizeError, micro_batch_size

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


def check_topology(config: Config, phase: str, ranks: int) -> None:
    """Raise BatchSizeError or DeepSpeedConfigError where ``phase`` cannot be trained by so many processes."""
    train = train_settings(config, phase)
    try:
        micro_batch_size(train.global_batch, ranks, train.micro_batch)
    except BatchSizeError as error:
        raise BatchSizeError(f"{section_of(phase)}.train.{error}") from error
    file = deepspeed_file(config, phase)
    zero = read_ds_config(file)
    group = zero.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if zero_stage(zero) == 3 and ranks % group:
        raise DeepSpeedConfigError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {group}, and {ranks} processes are no "
            "whole number of such groups: set it to the processes of one node, or take ds_configs/zero3.json"
        )


@dataclass(frozen=True)
class Topology:
    """What a job is to run on: nodes, processes and CPUs on each; None where the options do not say."""

    nodes: int | None
    processes: int | None
    cpus: int | None = None

    @property
    def ranks(self) -> int | None:
        """Processes in all."""
        return None if self.nodes is None or self.processes is None else self.nodes * self.processes


def asked_for(options: Sequence[str], environment: Mapping[str, str]) -> Topology:
    """What options of sbatch (``--name=value``; the last of a name counts) and its variables ask for."""
    given = _variables(environment) | dict(option.removeprefix("--").partition("=")[::2] for option in options)
    nodes = _number(given.get("nodes", "1"))
    gpus = _per_node(given, nodes)
    own = environment.get("PROCESSES_PER_NODE")
    cpus = _number(given.get("cpus-per-task", ""))
    if cpus is None and gpus is not None and (each := _number(given.get("cpus-per-gpu", ""))) is not None:
        cpus = gpus * each
    return Topology(nodes, gpus if own is None else _number(own), cpus)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """sbatch's own variables that say the same as options, by the options' names."""
    names = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "cpus-per-task", "cpus-per-gpu")
    variables = {name: f"SBATCH_{name.upper().replace('-', '_')}" for name in names}
    return {name: environment[variable] for name, variable in variables.items() if variable in environment}


def _per_node(given: Mapping[str, str], nodes: int | None) -> int | None:
    """GPUs on a node; a batch script has one task on each."""
    for name in ("gpus-per-node", "gpus-per-task"):
        if name in given:
            return _number(given[name].rpartition(":")[2])
    gres = [part for part in given.get("gres", "").split(",") if part.partition(":")[0] == "gpu"]
    if gres:
        count = gres[0].partition("(")[0].rpartition(":")[2]
        return 1 if count == "gpu" else _number(count)
    total = _number(given.get("gpus", "").rpartition(":")[2])
    return None if total is None or nodes is None or total % nodes else total // nodes


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) > 0 else None


def step_problems(config: Config, step: Step, topology: Topology) -> Iterator[str]:
    """Why ``step`` of a chain cannot start there."""
    if step.entry == "export":  # one process
        return
    ranks, processes, cpus = topology.ranks, topology.processes, topology.cpus
    if cpus is not None and processes is not None and cpus < processes:
        yield (
            f"{step.words}: {cpus} CPUs on a node for {processes} processes: every process needs one at least, and some for "
            "making batches; say --cpus-per-task=N, the CPUs of a whole node"
        )
    if not step.entry.startswith("train_"):
        return
    try:
        check_ds_config(config.backbone, deepspeed_file(config, step.phase))
    except DeepSpeedConfigError as error:
        yield from (f"{step.words}: {line}" for line in str(error).splitlines())
        return
    if ranks is None:
        return
    try:
        check_topology(config, step.phase, ranks)
    except BatchSizeError as error:
        yield f"{step.words}: {error} ({topology.nodes} nodes x {processes})"
    except DeepSpeedConfigError as error:
        yield f"{step.words}: {error}"
