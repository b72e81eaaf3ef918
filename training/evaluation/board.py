"""What loggers are told of an evaluation: TensorBoard's HPARAMS get a row, settings that are not the defaults and what came out;
those of a training's snapshots are one curve over its steps.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ladir.config import Config
from ladir.evaluation.results import read_results
from training.evaluation.rows import PHASES, model_of, sampling_of
from training.evaluation.table import result_files
from training.runtime.dashboard import hyperparameters
from training.runtime.loggers import Loggers
from training.runtime.run import IRRELEVANT_IN_TRAIN, SECTIONS, Run, evaluation_label, flatten

logger = logging.getLogger(__name__)

#: settings that say where a run lies and how it is watched, not what it does
_NOT_SHOWN = ("run.name", "run.folder", "run.exclusive", "telemetry.", "deepspeed.", "plan.", "countdown.")


def changed_settings(run: Run) -> dict[str, Any]:
    """The settings that differ from their defaults, by name; those of a training are the ones it was started with."""
    settings = dict(flatten(dataclasses.asdict(run.config)))
    for phase in ("vae", "latents", "denoiser", "rollout", "rl", "verifier", "ar", "ar-rl"):
        section, file = SECTIONS.get(phase, ("ar",))[-1], run.folder.config(phase)
        if file.is_file():
            trained = yaml.safe_load(file.read_text(encoding="utf-8")).get(section)
            settings.update(flatten({section: trained}))
    defaults = dict(flatten(dataclasses.asdict(Config())))
    return {
        name: value
        for name, value in settings.items()
        if (name not in defaults or value != defaults[name])
        and not name.startswith(_NOT_SHOWN)
        and not (".train." in name and name.rsplit(".", 1)[1] in IRRELEVANT_IN_TRAIN)
    }


def passes(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's pass@k, by TensorBoard's names of them."""
    return {f"{name}/{row['method']}": rate for name, rate in row.items() if name.startswith("pass@") and rate is not None}


def draw_results(run: Run) -> None:
    """Tell the loggers of an evaluation; what they cannot take is still in its files."""
    snapshot, names = run.config.evaluate.snapshot, run.config.telemetry.loggers
    if not names:
        return
    whole = dataclasses.replace(run.config.evaluate, snapshot=None)
    label = f"evaluate{evaluation_label(whole)}{'' if snapshot is None else '-snapshots'}"
    rows = read_results(result_files(run)[0])["rows"]
    rates = [(name, rate, _step(run, row["method"])) for row in rows for name, rate in passes(row).items()]
    if "tensorboard" in names and snapshot is None:
        _draw_row(run, label, rates)
    elif "tensorboard" in names and snapshot is not None:
        _draw_point(run, label, snapshot, rates)
    others = Loggers(run, label, [name for name in names if name != "tensorboard"])
    for rate in rates:
        _tell(others, *rate)
    others.close()


def _tell(loggers: Loggers, name: str, rate: float, step: int) -> None:
    loggers.write(lambda one: one.scalars("evaluate", {name: rate}, step))


def _draw_row(run: Run, label: str, rates: Sequence[tuple[str, float, int]]) -> None:
    """A row of TensorBoard's HPARAMS, in place of one under the same label."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    folder = run.folder.tensorboard(label)
    # The columns are left to TensorBoard, which puts those of all rows together where none names them.
    _, started, ended = hparams(hyperparameters(changed_settings(run)), {})
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(str(folder)) as writer:
            for summary in (started, ended):
                writer.file_writer.add_summary(summary)
            for name, rate, step in rates:
                writer.add_scalar(name, rate, step)
    except OSError as error:
        logger.warning("TensorBoard's files cannot be written (%s): make room; this evaluation is not shown there", error)


def _draw_point(run: Run, label: str, snapshot: int, rates: Sequence[tuple[str, float, int]]) -> None:
    """The curve of a training's snapshots gets those of one more step, in place of what an earlier evaluation said of it."""
    from torch.utils.tensorboard import SummaryWriter

    folder, ending = run.folder.tensorboard(label), f".step-{snapshot}"
    try:
        for file in folder.glob(f"*{ending}"):
            file.unlink(missing_ok=True)
        with SummaryWriter(str(folder), filename_suffix=ending) as writer:
            for name, rate, _ in rates:
                writer.add_scalar(name, rate, snapshot)
    except OSError as error:
        logger.warning("TensorBoard's files cannot be written (%s): make room; this evaluation is not shown there", error)


def _step(run: Run, method: str) -> int:
    """The training step of the model behind a method."""
    *_, phase = PHASES[model_of(sampling_of(method)[0])]
    outcome = run.folder.outcome(run.folder.snapshot(phase, run.config.evaluate.snapshot))
    return 0 if outcome is None else outcome.steps
