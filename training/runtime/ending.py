"""The line with which a phase ends: what was done, what is written where, and the command that comes next."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from training.runtime.chain import OWN_SETTINGS, Step, following
from training.runtime.run import Outcome, Run
from training.runtime.topology import section_of

logger = logging.getLogger(__name__)

_ENTRIES = Path(__file__).parents[1]


def tell_end(run: Run, done: str, *written: Path) -> None:
    """Log that the phase is finished: ``done`` in words, the files or folders ``written``, the next command."""
    where = " and ".join(map(str, written))
    logger.info("%s finished: %s; wrote %s; next: %s", run.phase, done, where, next_command(run))


def finished_before(run: Run) -> Outcome | None:
    """How the phase ended, where it is finished already, on all ranks alike; a line says so, and what comes next."""
    done = run.outcome
    if done is not None:
        where, then = run.folder.model(run.phase), next_command(run)
        logger.info("%s is finished already (%d steps): %s; next: %s", run.phase, done.steps, where, then)
    return done


def tell_trained(run: Run, outcome: Outcome, limit: str) -> None:
    """The end of a training that ``limit`` (a setting) has ended."""
    prefix = "validation/"
    held_out = {name.removeprefix(prefix): value for name, value in outcome.metrics.items() if name.startswith(prefix)}
    figures = f"validation: {in_words(held_out)}" if held_out else "no validation"
    done = f"{outcome.steps} steps in {outcome.seconds:.0f} s, ended by {section_of(run.phase)}.train.{limit}; {figures}"
    tell_end(run, done, run.folder.model(run.phase))


def in_words(values: Mapping[str, float]) -> str:
    """Figures with their names."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def given_settings(arguments: argparse.Namespace) -> list[str]:
    """The settings of a command line, --config first."""
    return [*(["--config", arguments.config] if arguments.config else []), *arguments.overrides]


def next_command(run: Run) -> str:
    """What a shell takes to start the phase behind this one, in the way this one was started."""
    step = following(run.config, run.phase, lambda phase: run.folder.outcome_file(phase).is_file())
    if step is None:
        return shlex.join([_python(), "-m", "ladir", "report", str(run.folder.path)])
    if "LADIR_QUEUED" in os.environ:
        return f"{step.words}, which is queued"
    kept = [word for word in run.given if word.partition("=")[0] not in OWN_SETTINGS]
    if "INTERRUPTED_MARK" in os.environ:  # of the batch scripts, which take the file without --config
        return shlex.join([*_submitting(step), *(word for word in kept if word != "--config"), *step.settings])
    return shlex.join([*started_by(sys.argv[0]), _short(_ENTRIES / f"{step.entry}.py"), *kept, *step.settings])


def ask_command(export: Path, question: str = "a question") -> str:
    """What a shell takes to ask the exported model."""
    return shlex.join([_python(), "-m", "ladir", question, "--model", str(export)])


def _submitting(step: Step) -> list[str]:
    """What queues a step as this job was queued, as far as Slurm tells."""
    options = {"nodes": "SLURM_JOB_NUM_NODES", "partition": "SLURM_JOB_PARTITION"}
    given = [f"--{option}={os.environ[name]}" for option, name in options.items() if name in os.environ]
    gpus = [f"--gres=gpu:{count}"] if (count := os.environ.get("SLURM_GPUS_ON_NODE")) else []
    cpus = [f"--cpus-per-task={count}"] if (count := _cpus_asked_for()) else []
    return ["sbatch", *given, *gpus, *cpus, f"slurm/{step.entry}.sbatch"]


def _cpus_asked_for() -> str:
    """What sbatch was told of the CPUs of a node, else what the first one gave: elsewhere many sites give one, which is refused.

    The batch scripts pass the former on to srun.  The other variable is a rank's share where srun starts the ranks itself.
    """
    given = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "").partition(",")[0].partition("(")[0]  # 64(x2),32
    own = given if os.environ.get("LAUNCHER") == "srun" else os.environ.get("SLURM_CPUS_PER_TASK", given)
    return os.environ.get("SRUN_CPUS_PER_TASK", own)


def started_by(script: str) -> list[str]:
    """The launcher with its options, or the interpreter, that this process' ``script`` was started by.

    Launchers have the script's name on their own command lines.  srun's is not among this process' ancestors.
    """
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ:
        return ["srun", f"--ntasks={os.environ['SLURM_NTASKS']}", _python()]
    try:
        lines = [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        lines = []
    above = [line[: line.index(script)] for line in lines if script in line[1:]]
    if not above:
        return [_python()]
    interpreter, *rest = above[-1]  # the topmost: the deepspeed command starts another launcher
    if rest and Path(rest[0]).is_file():  # a console script
        return [_short(Path(rest[0])), *rest[1:]]
    return [_short(Path(interpreter)), *rest]


def _python() -> str:
    return _short(Path(sys.executable))


def _short(path: Path) -> str:
    """A path as one would type it: the name alone where the shell finds just that, else from here where it lies below."""
    found = shutil.which(path.name)
    if found is not None and Path(found) == path:
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
