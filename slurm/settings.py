"""What the scripts of this folder need to know of a configuration, without loading more than the settings.

``settings.py CONFIG [section.key=value ...]`` prints the run folder and the stop signal, one a line.  With ``--phases`` as the
first argument it prints the phases of the chain as well, one a line: those in the variable PHASES, else all that are needed.
What follows and begins with ``--`` are options of sbatch: whether every phase can start on what they ask for is checked.
Errors go to stderr, one a line, with status 2; so does a warning where the options leave something open, with status 0.
Where the variable GPU_MEMORY says how many GiB a GPU has, whether every phase fits into one is asked of the plan, which loads no
weight and takes up to a minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import preflight  # noqa: F401

from ladir.config import Config
from ladir.config.loader import ConfigError, load_config
from ladir.errors import UnusableError
from training.runtime.chain import Step, chain
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config
from training.runtime.topology import MEMORY_UNKNOWN, Topology, asked_for, not_checked, step_problems, unchecked


def missing(config: Config) -> list[str]:
    """What the whole chain reads and the configuration does not name."""
    names = {"train": "every phase reads it"}
    if not config.evaluate.suite:  # whose sets have files of their own
        names[config.evaluate.split] = "the last phase, evaluate, asks its questions"
    return [
        f"data.{name} is not set: {why}; name it, or say in PHASES which phases to run"
        for name, why in names.items()
        if getattr(config.data, name) is None
    ]


def refused_by_every_training(config: Config) -> list[str]:
    """What is wrong with the DeepSpeed file, which every training would say only when its job has started."""
    try:
        check_ds_config(config.backbone, config.deepspeed.config)
    except DeepSpeedConfigError as error:
        return str(error).splitlines()
    return []


def named_phases(text: str) -> list[str]:
    """The entries of PHASES."""
    return [" ".join(entry.split()) for entry in text.split(";") if entry.split()]


@dataclass(frozen=True)
class Asked:
    """A phase with its settings, and what options and variables of the submission ask for on its behalf."""

    config: Config
    step: Step
    topology: Topology


def asked(entry: str, options: Sequence[str], path: str, overrides: Sequence[str]) -> Asked | ConfigError:
    """An entry of the chain, or what is wrong with its settings."""
    name, *words = entry.split()
    own = [word for word in words if word.startswith("--")]
    settings = [word for word in words if not word.startswith("--")]
    try:
        config = load_config(path, [*overrides, *settings])
        topology = asked_for([*options, *own], os.environ)
    except ConfigError as error:
        return error
    except UnusableError as error:
        return ConfigError([str(error)])
    denoiser = "rollout" if config.stage == "rollout" else "denoiser"
    phase = {"train_ar": config.ar.phase, "train_denoiser": denoiser, "encode_latents": "latents"}
    step = Step(phase.get(name, name.removeprefix("train_")), name, tuple(settings))
    return Asked(config, step, topology)


def problems(one: Asked | ConfigError) -> Iterable[str]:
    """What keeps a phase from starting on the nodes, GPUs and CPUs that are asked for."""
    return one.errors if isinstance(one, ConfigError) else step_problems(one.config, one.step, one.topology)


def memory(phases: Sequence[Asked]) -> tuple[list[str], list[str]]:
    """(why phases are refused, what is to be warned of) where the memory of a GPU is told."""
    on_gpus = [one for one in phases if one.topology.has_gpus and one.step.entry != "export"]
    told = [one for one in on_gpus if one.topology.gpu_gib is not None]
    if not told:
        return [], [MEMORY_UNKNOWN] if on_gpus else []
    sys.stderr.write(f"asking the plan whether {len(told)} phase(s) fit into a GPU's {told[0].topology.gpu_gib:g} GiB\n")
    from training.planning.fitting import verdict  # slow to import

    verdicts = [verdict(one.config, one.step, one.topology) for one in told]
    unknown = [f"memory was not checked: {found.unknown}" for found in verdicts if found.unknown]
    near = [found.near for found in verdicts if found.near]
    return [found.refused for found in verdicts if found.refused], [*near, *unknown]


def main(arguments: list[str]) -> int:
    """Print the answer; returns the exit status."""
    whole = arguments[:1] == ["--phases"]
    options = [argument for argument in arguments[1:] if whole and argument.startswith("--")]
    path, *overrides = [argument for argument in arguments if not (whole and argument.startswith("--"))]
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return _refused(error.errors)
    named = named_phases(os.environ.get("PHASES", "")) if whole else []
    phases = named or [step.words for step in chain(config) if whole]
    wrong = [*refused_by_every_training(config), *(missing(config) if whole and not named else [])]
    phases_asked = [] if wrong else [asked(entry, options, path, overrides) for entry in phases]
    if wrong := wrong or [line for one in phases_asked for line in problems(one)]:
        return _refused(wrong)
    checked = [one for one in phases_asked if isinstance(one, Asked)]
    too_large, warnings = memory(checked)
    if too_large:
        return _refused(too_large)
    trainings = [one for one in checked if unchecked(one.step, one.topology)]
    if trainings:  # whose number of processes the options leave open
        warnings.append(not_checked([one.step.words for one in trainings]))
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    lines = [str((Path(config.run.folder) / config.run.name).absolute()), config.deepspeed.stop_signal]
    sys.stdout.write("\n".join([*lines, *phases]) + "\n")
    return 0


def _refused(errors: Iterable[str]) -> int:
    sys.stderr.writelines(f"error: {line}\n" for line in errors)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
