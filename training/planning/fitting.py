"""Whether phases fit into the memory of a GPU, asked before a job is queued, and by a training before it loads anything."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

from ladir.config import Config
from ladir.data.records import BadRecords
from ladir.errors import UnusableError
from training.planning.models import PHASES, PlanError, data_size
from training.planning.predict import Planner
from training.planning.prediction import Machine
from training.runtime.chain import Step
from training.runtime.ds_config import DeepSpeedConfigError
from training.runtime.sampler import BatchSizeError
from training.runtime.topology import GIB, GPU_MEMORY, Topology, section_of

#: rows of each file whose lengths are looked at: what the longest of these takes, the longest of all does at least
_LOOKED_AT = 2000
#: steps of a chain as the plan calls them
_PLANNED = {"latents": "encode", "base": "ar", "ar-rl": "rl"}
#: phases that answer questions: where memory runs out they ask fewer at a time, and what is planned is an upper bound
_ASKING = ("verifier", "evaluate")


@dataclass(frozen=True)
class Verdict:
    """What is to be told of a phase: nothing, or why it is refused, or what may go wrong, or why nobody knows."""

    refused: str = ""
    near: str = ""
    unknown: str = ""


def verdict(config: Config, step: Step, topology: Topology) -> Verdict:
    """Whether a step of a chain fits there.  Where nodes or processes are left open, nothing is said."""
    gib = topology.gpu_gib
    if gib is None or topology.ranks is None or not topology.has_gpus or step.phase == "export":
        return Verdict()
    config = deepcopy(config)
    config.plan.samples = config.plan.samples or 1  # how many there are does not matter
    try:
        planner = Planner(config, Machine(topology))
        planner.data = data_size(config, _LOOKED_AT)
        found = planner.need(_PLANNED.get(step.phase, step.phase))
    except (PlanError, UnusableError, BadRecords, DeepSpeedConfigError, BatchSizeError, OSError) as error:
        return Verdict(unknown=f"{step.words}: {str(error).partition(chr(10))[0]}")
    records = "" if planner.data.measured else " with records as long as data.max_* lets in"
    size = f"{step.words}: takes {found.peak / GIB:.1f} GiB of a GPU{records}, and one has {gib:g} ({GPU_MEMORY})"
    asks = found.phase in _ASKING
    if found.fits:
        return Verdict()
    if (replace(found, activations=0) if asks else found).peak > gib * GIB:
        return Verdict(refused=f"{size}: try {found.remedy}")
    why = "where memory runs out it asks fewer questions at a time" if asks else "too little is left for CUDA, NCCL and gaps"
    return Verdict(near=f"{size}; {why}: try {found.remedy}")


def check_state(config: Config, phase: str, topology: Topology) -> None:
    """Raise UnusableError where what a training holds all the time, whatever its records are, is more than a GPU there has."""
    section = section_of(phase)
    if topology.gpu_gib is None or section not in PHASES:
        return
    try:
        held = Planner(config, Machine(topology)).state(section).resident / GIB
    except PlanError:  # the LM is not at hand yet
        return
    gpus, gib = topology.ranks, topology.gpu_gib
    if held > gib:
        raise UnusableError(
            f"{phase}: weights, gradients and optimizer take {held:.1f} GiB of each of {gpus} GPUs, and the smallest has "
            f"{gib:.1f}: training/plan.py --gpus {gpus} --gpu-memory {gib:.0f} names what makes it fit"
        )
