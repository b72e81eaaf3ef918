"""What the scripts of this folder need to know of a configuration, without loading more than the settings.

``settings.py CONFIG [section.key=value ...]`` prints the run folder and the stop signal, one a line.  With ``--phases`` as the
first argument it prints the jobs of the chain as well, one a line: those in the variable PHASES, else all that are needed; with
those that ask snapshots, where the variable SNAPSHOTS has options and settings of theirs.  A job's line begins with the jobs,
counted from 0, that must have succeeded before (``0:3``; ``-``: none); ``+3:denoiser`` is beside job 3, which trains that phase.

What follows and begins with ``--`` are options of sbatch: whether every phase can start on what they ask for is checked.
Errors go to stderr, one a line, with status 2; so does a warning where the options leave something open, with status 0.
Where the variable GPU_MEMORY says how many GiB a GPU has, whether every phase fits into one is asked of the plan, which loads no
weight and takes up to a minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import preflight  # noqa: F401

from ladir.config import Config
from ladir.config.loader import ConfigError, load_config
from ladir.errors import UnusableError
from training.evaluation.rows import is_asked
from training.runtime.chain import LANES, SNAPSHOT_PHASES, Step, lanes_of, side_by_side
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config
from training.runtime.topology import (
    MEMORY_UNKNOWN,
    Topology,
    asked_for,
    not_checked,
    step_problems,
    train_settings,
    unchecked,
)

#: asks the snapshots of the training before it in the chain
SNAPSHOT_JOB = "evaluate_snapshots"


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
    """A job: its entry in PHASES, its phase with its settings, and what options and variables of the submission ask for on its
    behalf."""

    words: str
    config: Config
    step: Step
    topology: Topology

    @property
    def keeps_snapshots(self) -> bool:
        """Whether it trains models that may be asked while it does."""
        return self.step.phase in SNAPSHOT_PHASES and train_settings(self.config, self.step.phase).snapshot_every is not None


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
    phases = {
        "train_ar": config.ar.phase,
        "encode_latents": "latents",
        "train_denoiser": "rollout" if config.stage == "rollout" else "denoiser",
        "train_rl": "ar-rl" if config.rl.policy == "text" else "rl",
        SNAPSHOT_JOB: "evaluate",
    }
    step = Step(phases.get(name, name.removeprefix("train_")), name, tuple(settings))
    return Asked(entry, config, step, topology)


def with_snapshots(jobs: Sequence[Asked], make: Callable[[], Asked | ConfigError]) -> Iterator[Asked | ConfigError]:
    """``jobs``, and behind each training that keeps snapshots one that asks them."""
    for job in jobs:
        yield job
        if job.keeps_snapshots:
            yield make()


def problems(one: Asked | ConfigError) -> Iterable[str]:
    """What keeps a phase from starting on the nodes, GPUs and CPUs that are asked for."""
    return one.errors if isinstance(one, ConfigError) else step_problems(one.config, one.step, one.topology)


def memory(phases: Sequence[Asked]) -> tuple[list[str], list[str]]:
    """(why phases are refused, what is to be warned of) where the memory of a GPU is told."""
    on_gpus = [one for one in phases if one.topology.has_gpus and one.step.entry not in ("export", "table")]
    told = [one for one in on_gpus if one.topology.gpu_gib is not None]
    if not told:
        return [], [MEMORY_UNKNOWN] if on_gpus else []
    sys.stderr.write(f"asking the plan whether {len(told)} phase(s) fit into a GPU's {told[0].topology.gpu_gib:g} GiB\n")
    from training.planning.fitting import verdict  # slow to import

    verdicts = [verdict(_own_rows(one.config), one.step, one.topology) for one in told]
    unknown = [f"memory was not checked: {found.unknown}" for found in verdicts if found.unknown]
    near = [found.near for found in verdicts if found.near]
    return [found.refused for found in verdicts if found.refused], [*near, *unknown]


def _own_rows(config: Config) -> Config:
    """The settings with the rows of an evaluation's lane alone."""
    rows = [method for method in config.evaluate.methods if is_asked(config.evaluate, method)]
    return replace(config, evaluate=replace(config.evaluate, methods=rows))


def begins(jobs: Sequence[Asked]) -> Iterator[str]:
    """When each begins: behind the last ones of its lanes, or beside the training before it.

    One of the baseline's that keeps others out of the run's folder (run.exclusive) is beside none.
    """
    last: dict[str, int] = {}
    for number, job in enumerate(jobs):
        if job.step.entry == SNAPSHOT_JOB:
            trained = next(place for place in range(number - 1, -1, -1) if jobs[place].keeps_snapshots)
            yield f"+{trained}:{jobs[trained].step.phase}"
            continue
        lanes = lanes_of(job.config, job.step)
        if "ar" in lanes and job.config.run.exclusive:
            lanes = LANES
        yield ":".join(map(str, sorted({last[lane] for lane in lanes if lane in last}))) or "-"
        last |= dict.fromkeys(lanes, number)


def without_snapshots(jobs: Sequence[Asked]) -> Iterator[str]:
    """What is wrong where snapshots are to be asked and no training before keeps any."""
    for number, job in enumerate(jobs):
        if job.step.entry == SNAPSHOT_JOB and not any(before.keeps_snapshots for before in jobs[:number]):
            yield f"{SNAPSHOT_JOB}: no training before it keeps snapshots; set e.g. denoiser.train.snapshot_every=1000"


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
    entries = named or [step.words for step in side_by_side(config) if whole]
    wrong = [*refused_by_every_training(config), *(missing(config) if whole and not named else [])]
    found = [] if wrong else [asked(entry, options, path, overrides) for entry in entries]
    jobs = [one for one in found if isinstance(one, Asked)]
    if whole and (words := os.environ.get("SNAPSHOTS", "").strip()) and len(jobs) == len(found):
        if not any(job.keeps_snapshots for job in jobs):
            wrong.append("SNAPSHOTS: no training of the chain keeps any; set e.g. denoiser.train.snapshot_every=1000")
        found = list(with_snapshots(jobs, lambda: asked(f"{SNAPSHOT_JOB} {words}", options, path, overrides)))
        jobs = [one for one in found if isinstance(one, Asked)]
    if wrong := [*wrong, *without_snapshots(jobs), *(line for one in found for line in problems(one))]:
        return _refused(dict.fromkeys(wrong))
    too_large, warnings = memory(jobs)
    if too_large:
        return _refused(too_large)
    trainings = [one.step.words for one in jobs if unchecked(one.step, one.topology)]
    if trainings:  # whose number of processes the options leave open
        warnings.append(not_checked(trainings))
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    lines = [str((Path(config.run.folder) / config.run.name).absolute()), config.deepspeed.stop_signal]
    lines += [f"{begin} {job.words}" for begin, job in zip(begins(jobs), jobs, strict=True)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _refused(errors: Iterable[str]) -> int:
    sys.stderr.writelines(f"error: {line}\n" for line in errors)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
