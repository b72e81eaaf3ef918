"""The finished model is that of the best validation, and waiting for a better one ends: also of a training that was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ladir.config import TrainSettings
from ladir.config.loader import ConfigError, load_config
from ladir.errors import UnusableError
from tests.distributed import ProcessGroup
from tests.test_loop import assert_identical, model, records, run_with, toy_settings
from tests.toy_phase import ToyPhase, toy_config
from training.runtime.best import Best
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import open_run

#: so large a rate that the losses go up and down
SETTINGS = toy_settings(
    max_steps=40,
    lr=0.3,
    schedule="constant",
    warmup_fraction=0.0,
    validate_every=2,
    micro_batch=4,
    ema=0.5,
    best="loss",
    patience=3,
)


def test_the_best_model_is_the_finished_one_also_of_a_training_that_goes_on(two_processes: ProcessGroup, tmp_path: Path) -> None:
    """Stopped between two validations and amid the patience; the model is that of a snapshot at the best step."""
    whole, parts, kept = tmp_path / "whole", tmp_path / "parts", tmp_path / "kept"
    (outcome, _) = two_processes.run(run_with, whole, 3, "float32", SETTINGS)
    validations = {row["step"]: row["loss"] for row in records(whole, "validation") if row["step"]}
    best = min(validations, key=lambda step: validations[step])
    assert outcome.finished and outcome.steps == max(validations) == best + 2 * 3 < 40  # three validations later
    assert (outcome.metrics["best_step"], outcome.metrics["validation/loss"]) == (best, validations[best])
    two_processes.run(
        run_with, kept, 3, "float32", {**SETTINGS, "best": None, "patience": None, "snapshot_every": 1, "max_steps": best + 1}
    )
    there, here = load_file(kept / "toy" / "models" / f"ar-{best}" / "model.safetensors"), model(whole)
    assert all(torch.equal(here[name], there[name]) for name in there)
    for sample in (8 * best + 15, 8 * best + 31):  # of the last rank
        stopped = two_processes.run(run_with, parts, 3, "float32", SETTINGS, sample)
        assert {one.status for one in stopped} == {"interrupted"}
    two_processes.run(run_with, parts, 3, "float32", SETTINGS)
    assert_identical(parts, whole)
    assert sorted(path.name for path in (parts / "toy" / "models").iterdir()) == ["ar"]
    told = [json.loads((run / "toy" / "outcome-ar.json").read_text())["metrics"] for run in (parts, whole)]
    assert told[0]["best_step"] == told[1]["best_step"] == best


def refused(world: World, folder: Path, best: str, validation: bool) -> str:
    try:
        with open_run(toy_config(folder, **{**SETTINGS, "best": best}), "ar", world) as run:
            train(run, ToyPhase(validation=validation))
    except UnusableError as error:
        return str(error)
    return ""


def test_what_cannot_choose_is_refused_before_the_first_step(one_process: ProcessGroup, tmp_path: Path) -> None:
    (message,) = one_process.run(refused, tmp_path, "accuracy", True)
    assert "train.best=accuracy: validations have no such figure; name one of all, loss, odd, size" in message
    assert records(tmp_path) == []
    assert "set data.validation" in one_process.run(refused, tmp_path / "b", "loss", False)[0]
    with pytest.raises(ConfigError, match=r"vae.train.best=loss: .* set vae.train.validate_every") as raised:
        load_config(None, ["vae.train.best=loss", "ar.train.patience=2"])
    assert "ar.train.patience=2: nothing says which validation is better" in str(raised.value)


def test_more_may_be_better_and_what_is_no_number_never_is() -> None:
    best = Best(TrainSettings(best="+exact", patience=2))
    seen: list[Any] = [best.better(step, {"exact": value}) for step, value in enumerate((math.nan, 0.1, 0.1, 0.2, math.nan))]
    assert seen == [False, True, False, True, False] and best.step == 3 and not best.exhausted
    again = Best(TrainSettings(best="+exact", patience=2))
    again.load(json.loads(json.dumps(best.state())))
    assert not again.better(5, {"exact": 0.2}) and again.exhausted and again.figures == {"exact": 0.2}
