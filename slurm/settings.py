"""What the scripts of this folder need to know of a configuration, without loading more than the settings.

``settings.py CONFIG [section.key=value ...]`` prints the run folder and the stop signal, one a line; with ``--phases`` as the
first argument also the phases of the whole chain, one a line.  Errors go to stderr, one a line, with status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import preflight  # noqa: F401

from ladir.config import Config
from ladir.config.loader import ConfigError, load_config
from training.runtime.chain import chain
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config


def missing(config: Config) -> list[str]:
    """What the whole chain reads and the configuration does not name."""
    names = {"train": "every phase reads it", config.evaluate.split: "the last phase, evaluate, asks its questions"}
    return [
        f"data.{name} is not set: {why}; name it, or say in PHASES which phases to run"
        for name, why in names.items()
        if getattr(config.data, name) is None
    ]


def refused_by_every_training(config: Config) -> list[str]:
    """What is wrong with the DeepSpeed file, which every training would say only when its job has started."""
    try:
        check_ds_config(config.backbone, config.deepspeed)
    except DeepSpeedConfigError as error:
        return str(error).splitlines()
    return []


def main(arguments: list[str]) -> int:
    """Print the answer; returns the exit status."""
    whole = arguments[:1] == ["--phases"]
    path, *overrides = arguments[1:] if whole else arguments
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return _refused(error.errors)
    if wrong := [*refused_by_every_training(config), *(missing(config) if whole else [])]:
        return _refused(wrong)
    lines = [str((Path(config.run.folder) / config.run.name).absolute()), config.deepspeed.stop_signal]
    sys.stdout.write("\n".join([*lines, *(step.words for step in chain(config) if whole)]) + "\n")
    return 0


def _refused(errors: Iterable[str]) -> int:
    sys.stderr.writelines(f"error: {line}\n" for line in errors)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
