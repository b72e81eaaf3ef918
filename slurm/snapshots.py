"""Which snapshot of a training is to be asked next: ``snapshots.py CONFIG [section.key=value ...]``, for the batch scripts.

Prints its phase, its step and the settings that ``training/evaluate.py`` asks it with, on one line; nothing where all that are
there have been asked.  A snapshot counts as asked when its results are there, so that whoever looks, and whenever, none is asked
twice and none forgotten.  One whose evaluation has failed comes last, and after two failures no more: with ``--given-up`` as the
first argument those are printed, one a line.  The variable SNAPSHOTS_OF names a phase; not set: all.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import preflight  # noqa: F401

from ladir.config import Config
from ladir.config.loader import ConfigError, load_config
from training.evaluation.rows import SCORED, model_of, sampling_of, stage_of
from training.runtime.chain import SNAPSHOT_PHASES

#: an evaluation that fails so often is not tried again
_TRIES = 2
#: a line for each failure: the phase, the step, and what else is to be known
FAILED = Path("slurm") / "failed-snapshots"
#: the row of a phase's models where evaluate.methods has none
_ROWS = {"denoiser": "ladir", "rollout": "ladir-rollout", "rl": "ladir-rl", "ar": "ar", "ar-rl": "ar-rl"}


def name_of(config: Config, phase: str) -> str:
    """What the results of a phase's snapshots are named: steps of two trainings may be the same."""
    return "-".join(part for part in (config.evaluate.name, phase) if part)


def methods_of(config: Config, phase: str) -> list[str]:
    """The rows of a phase's models; without those of a verifier, which is trained behind them."""
    rows = [(method, *sampling_of(method)) for method in config.evaluate.methods]
    own = [method for method, sampling, rule in rows if stage_of(model_of(sampling)) == phase and rule not in SCORED]
    return own or [_ROWS[phase]]


def to_ask(config: Config, phase: str) -> tuple[list[int], list[int]]:
    """Steps of a phase's snapshots that are whole and not asked yet, and of those among them that are given up."""
    folder, name = Path(config.run.folder) / config.run.name, name_of(config, phase)
    table = "suite" if config.evaluate.suite else "results"
    failed = Counter(tuple(line.split()[:2]) for line in _lines(folder / FAILED))
    found = [path.name.removeprefix(f"{phase}-") for path in folder.glob(f"models/{phase}-*")]
    steps = [
        step
        for step in found
        if step.isdecimal()
        and (folder / f"outcome-{phase}-{step}.json").is_file()  # written behind the model
        and not (folder / f"{table}-{name}-{step}.json").is_file()
    ]
    found = sorted(map(int, steps), key=lambda step: (failed[phase, str(step)], step))
    first = next((place for place, step in enumerate(found) if failed[phase, str(step)] >= _TRIES), len(found))
    return found[:first], found[first:]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def settings_of(config: Config, phase: str, step: int) -> list[str]:
    """With which ``evaluate.py`` asks it, beside whatever else goes on in the run."""
    own = {"snapshot": step, "name": name_of(config, phase), "methods": f"[{','.join(methods_of(config, phase))}]", "lane": "all"}
    return [*(f"evaluate.{name}={value}" for name, value in own.items()), "run.exclusive=false"]


def main(arguments: list[str]) -> int:
    """Print the answer; returns the exit status."""
    given_up = arguments[:1] == ["--given-up"]
    path, *overrides = arguments[given_up:]
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return _refused(error.errors)
    wanted = os.environ.get("SNAPSHOTS_OF") or None
    if wanted not in (None, *SNAPSHOT_PHASES):
        return _refused([f"SNAPSHOTS_OF={wanted}: must be one of {', '.join(SNAPSHOT_PHASES)}"])
    phases = SNAPSHOT_PHASES if wanted is None else (wanted,)
    waiting = [(phase, step) for phase in phases for step in to_ask(config, phase)[given_up]]
    lines = [[phase, str(step), *([] if given_up else settings_of(config, phase, step))] for phase, step in waiting]
    sys.stdout.writelines(f"{' '.join(line)}\n" for line in (lines if given_up else lines[:1]))
    return 0


def _refused(errors: Iterable[str]) -> int:
    sys.stderr.writelines(f"error: {line}\n" for line in errors)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
