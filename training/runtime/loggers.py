"""Where a phase's records go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, behind one hook.

Each is its own package's business: what is set through environment variables there (``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ...) holds here, too.
"""

from __future__ import annotations

import dataclasses
import html
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from training.runtime import dashboard
from training.runtime.files import read_json, write_json
from training.runtime.run import Run, flatten

logger = logging.getLogger(__name__)


class Logger(Protocol):
    """Records of one phase."""

    name: str
    failures: tuple[type[Exception], ...]
    """What its package raises where nothing can be written."""
    remedy: str

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Figures of training or of a validation (``kind``: ``train``, ``validation``)."""

    def text(self, name: str, text: str, step: int) -> None:
        """Samples in Markdown."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """The distribution of latents: finite values, fp32 [N], on the CPU."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [height, width, channels]."""

    def close(self) -> None:
        """All is written."""


class TensorBoardLogger:
    """Event files in the run's folder; training and validation are two runs, whose tags of one name are one chart."""

    name = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)
    remedy = "make room"

    def __init__(self, run: Run, label: str, purge_steps: Mapping[str, int]) -> None:
        """What earlier files hold of ``purge_steps`` (by kind) and later is withdrawn."""
        from torch.utils.tensorboard import SummaryWriter

        self._label, folder = label, run.folder.tensorboard(label)
        folders = {"train": folder, "validation": folder / "validation"}
        self._writers: dict[str, Any] = {
            kind: SummaryWriter(str(folders[kind]), purge_step=purge_steps.get(kind)) for kind in folders
        }
        self._writers["train"].add_custom_scalars(dashboard.layout(label))

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        for name, value in values.items():
            self._writers[kind].add_scalar(dashboard.tag(self._label, name), value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """See :class:`Logger`."""
        self._writers["validation"].add_text(name, text, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """See :class:`Logger`."""
        self._writers["validation"].add_histogram(dashboard.latents_tag(self._label, name), values, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See :class:`Logger`."""
        self._writers["validation"].add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """What was recorded is in the files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """See :class:`Logger`."""
        for writer in self._writers.values():
            writer.close()


class WandbLogger:
    """A run of Weights & Biases per phase, in a group of the run's name; steps that are made again stand there twice."""

    name = "wandb"
    failures: tuple[type[Exception], ...]
    remedy = "see its message; wandb login and WANDB_MODE=offline may help"

    def __init__(self, run: Run, label: str, purge_steps: Mapping[str, int]) -> None:
        """``purge_steps`` cannot be withdrawn there."""
        import wandb

        self._wandb, self.failures = wandb, _failures("wandb")
        known = _identity(run, label, self.name)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ladir"),
            group=run.config.run.name,
            name=f"{run.config.run.name}/{label}",
            id=known,
            resume="allow" if known else None,
            dir=str(run.folder.path),
            config=_settings(run),
        )
        _remember(run, label, self.name, self._run.id)
        self._run.define_metric("*", step_metric="step")

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({**values, "step": step})

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        self._log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """See :class:`Logger`."""
        self._log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """See :class:`Logger`."""
        self._log({f"latents/{name}": self._wandb.Histogram(values.numpy())}, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See :class:`Logger`."""
        self._log({name: self._wandb.Image(pixels)}, step)

    def close(self) -> None:
        """See :class:`Logger`."""
        self._run.finish()


class MlflowLogger:
    """A run of MLflow per phase, in an experiment of the run's name; without ``MLFLOW_TRACKING_URI`` in the run's folder.

    It knows no histograms.  Steps that are made again stand there twice.
    """

    name = "MLflow"
    failures: tuple[type[Exception], ...]
    remedy = "see its message, and MLFLOW_TRACKING_URI"

    def __init__(self, run: Run, label: str, purge_steps: Mapping[str, int]) -> None:
        """``purge_steps`` cannot be withdrawn there."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self.failures = Metric, _failures("mlflow")
        folder = run.folder.path.resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db")
        known = _identity(run, label, self.name)
        self._id = known or self._create(run, label, folder.as_uri())
        if known is None:
            _remember(run, label, self.name, self._id)
            params = [Param(name, str(value)) for name, value in _settings(run).items()]
            self._client.log_batch(self._id, params=params)
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, run: Run, label: str, artifacts: str) -> str:
        name = run.config.run.name
        experiment = self._client.get_experiment_by_name(name)
        where = None if os.environ.get("MLFLOW_TRACKING_URI") else artifacts
        number = self._client.create_experiment(name, where) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(number, run_name=f"{name}/{label}").info.run_id)

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """See :class:`Logger`."""
        now = int(1000 * time.time())
        metrics = [self._metric(_plain(f"{kind}/{name}"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, name: str, text: str, step: int) -> None:
        """See :class:`Logger`."""
        self._client.log_text(self._id, text, f"{_plain(name)}/step-{step:08}.md")

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """See :class:`MlflowLogger`."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See :class:`Logger`."""
        self._client.log_image(self._id, pixels, artifact_file=f"{_plain(name)}/step-{step:08}.png")

    def close(self) -> None:
        """See :class:`Logger`."""
        self._client.set_terminated(self._id)


#: by the names of ``telemetry.loggers``
LOGGERS: dict[str, Callable[[Run, str, Mapping[str, int]], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


class Loggers:
    """All that are asked for.  One that cannot write is told once and left out from there on: a training is worth more."""

    def __init__(self, run: Run, label: str, names: Sequence[str], purge_steps: Mapping[str, int] | None = None) -> None:
        """``names``: of :data:`LOGGERS`; ``purge_steps``: by kind, the first step that will be made again."""
        self._open: list[Logger] = []
        for name in dict.fromkeys(names):
            try:
                self._open.append(LOGGERS[name](run, label, purge_steps or {}))
            except _failures(name) as error:
                logger.warning("telemetry.loggers: %s cannot be written (%s); this phase goes on without it", name, error)

    def __bool__(self) -> bool:
        return bool(self._open)

    def write(self, what: Callable[[Logger], None]) -> None:
        """Let each of them write."""
        for one in tuple(self._open):
            try:
                what(one)
            except one.failures as error:
                self._open.remove(one)
                logger.warning("%s cannot be written (%s): %s; charts end here until the next start", one.name, error, one.remedy)

    def close(self) -> None:
        """All is written."""
        self.write(lambda one: one.close())
        self._open.clear()


def _failures(name: str) -> tuple[type[Exception], ...]:
    """What a logger's package raises where it cannot begin to write."""
    if name == "wandb":
        import wandb

        return wandb.Error, OSError
    if name == "mlflow":
        from mlflow.exceptions import MlflowException

        return MlflowException, OSError
    return (OSError,)


def _settings(run: Run) -> dict[str, Any]:
    return dict(flatten(dataclasses.asdict(run.config)))


def _identity(run: Run, label: str, name: str) -> str | None:
    """Under which id a logger knows this phase from an earlier start; None where there was none."""
    known = read_json(_identities(run, label)).get(name)
    return None if known is None else str(known)


def _remember(run: Run, label: str, name: str, identity: str) -> None:
    file = _identities(run, label)
    write_json(file, {**read_json(file), name: identity})


def _identities(run: Run, label: str) -> Path:
    return run.folder.path / f"loggers-{label}.json"


def _plain(name: str) -> str:
    """A name without signs that MLflow refuses."""
    return re.sub(r"[^\w./ :-]", "_", name)
