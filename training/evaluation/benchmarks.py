"""The data sets of an evaluation: the one of the settings, or those of a suite, each with settings of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ladir.config import Config
from ladir.config.loader import ConfigError, with_settings
from ladir.config.suites import DataSetEntry, entries, file_key
from ladir.data.rows import EXTENSIONS
from ladir.errors import UnusableError
from ladir.tasks import Task, get_task
from training.evaluation.answers import AnswerLog
from training.evaluation.questions import Asked, choose_questions
from training.runtime.run import Run


@dataclass(frozen=True)
class DataSet:
    """A data set to ask: its name in a suite ("" where it is the only one), and the run under its own settings."""

    name: str
    run: Run


@dataclass(frozen=True)
class Benchmark:
    """A data set's questions, what judges them, and the answers so far."""

    name: str
    run: Run
    task: Task
    asked: Asked
    log: AnswerLog


def data_sets(run: Run) -> list[DataSet]:
    """What is asked.  UnusableError for settings of a set that cannot be, all at once."""
    return [DataSet(name, run.under(config) if name else run) for name, config in set_configs(run.config)]


def set_configs(config: Config) -> list[tuple[str, Config]]:
    """The name of every set ("" where it is the only one), and its settings.  UnusableError as :func:`data_sets`."""
    found = entries(config.evaluate.suite)
    if not found:
        return [("", config)]
    configs, errors = [], []
    for entry in found:
        try:
            configs.append((entry.name, _config(config, entry)))
        except ConfigError as error:
            errors += [f"evaluate.suite: {entry.name}: {text}" for text in error.errors]
    if errors:
        raise UnusableError("\n".join(errors))
    return configs


def _config(config: Config, entry: DataSetEntry) -> Config:
    """The settings under which a set of a suite is asked; its results are filed under its name."""
    name = "-".join(part for part in (config.evaluate.name, entry.name) if part)
    alone = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, suite=[], name=name))
    file = f"data.{config.evaluate.split}"  # its own in any case: that of the run is another set
    own = entry.settings if file in entry.settings else {file: str(_file(Path(config.evaluate.suite_folder), entry.name))}
    return with_settings(alone, {**own, **entry.settings})


def _file(folder: Path, name: str) -> Path:
    """The file of a set in the suites' folder: ``NAME.jsonl`` (or another kind), or ``NAME/test.jsonl``; its spelling is free."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        inside = sorted(path.glob("test.*")) if path.is_dir() else [path]
        stem = path.name if path.is_dir() else next((path.name.removesuffix(e) for e in EXTENSIONS if path.name.endswith(e)), "")
        if stem and file_key(stem) == file_key(name) and inside:
            return inside[0]
    return folder / f"{name}.jsonl"


def open_benchmarks(sets: Sequence[DataSet]) -> list[Benchmark] | None:
    """Read every set's questions, judge their own answers, and look up the answers that an earlier start has left (all ranks).

    None where a signal asked to stop in between.
    """
    opened = []
    for data_set in sets:
        run = data_set.run
        task = get_task(run.config.evaluate.task, run.config.evaluate)
        run.status.say(f"reading and judging the own answers of {data_set.name or 'the questions'}")
        if (asked := choose_questions(run, task)) is None:
            return None
        opened.append(Benchmark(data_set.name, run, task, asked, AnswerLog(run, asked.records)))
    return opened
