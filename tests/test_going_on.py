"""A training goes on: bad batches left out, settings changed on request, stops obeyed in validations."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ladir.config import TrainSettings
from ladir.config.loader import ConfigError, load_config
from tests.distributed import ProcessGroup
from tests.test_loop import assert_identical, records, run_with, toy_settings
from tests.toy_phase import ToyPhase, toy_config
from training.runtime.checkpoint import steps_in
from training.runtime.distributed import World
from training.runtime.loop import NonFiniteError, Trainer, train
from training.runtime.run import SECTIONS, Outcome, RunConflict, open_run
from training.runtime.schedule import Progress
from training.runtime.step_batches import StepBatch
from training.runtime.topology import section_of

ROOT = Path(__file__).parents[1]


def go_on(world: World, folder: Path, settings: dict[str, Any], allow: list[str], poison: int | None = None) -> str:
    """Train a toy with a sample that is not finite; how it ended."""
    config = toy_config(folder, checkpoint_every=1, micro_batch=2, **settings)
    config.run.allow_changes = allow
    try:
        with open_run(config, "ar", world) as run:
            return train(run, ToyPhase(poison=poison)).status
    except (NonFiniteError, RunConflict) as error:
        return str(error)


def test_a_bad_batch_is_left_out_as_the_message_says(two_processes: ProcessGroup, tmp_path: Path) -> None:
    """Sample 29 is in the fourth batch, 24 to 31, in the micro batch of 28 and 29."""
    (message, _) = two_processes.run(go_on, tmp_path, {}, [], 29)
    assert "ar.train.skip_samples=[28]" in message and "ar.train.lr=... run.allow_changes=[ar.train.lr]" in message
    assert "ar.train.max_grad_norm=... run.allow_changes=[ar.train.max_grad_norm]" in message
    assert two_processes.run(go_on, tmp_path, {"skip_samples": [28]}, [], 29) == ["finished"] * 2
    rows = records(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] * 20 for row in rows] == pytest.approx([8, 16, 24, 40, 48, 56])
    (changed,) = map(json.loads, (tmp_path / "toy" / "changes-ar.jsonl").read_text().splitlines())
    assert changed == {"after": "step-00000003", "changed": {"ar.train.skip_samples": [[], [28]]}}
    assert two_processes.run(go_on, tmp_path / "whole", {"skip_samples": [30]}, [], 29) == ["finished"] * 2
    assert_identical(tmp_path, tmp_path / "whole")


def test_learning_rate_and_clipping_change_under_way_on_request_and_other_settings_never(
    one_process: ProcessGroup, tmp_path: Path
) -> None:
    assert "not finite" in one_process.run(go_on, tmp_path, {}, [], 29)[0]
    (refused,) = one_process.run(go_on, tmp_path, {"lr": 0.5}, [])
    assert "ar.train.lr: 0.01 -> 0.5" in refused and "say run.allow_changes=[ar.train.lr], choose another run.name" in refused
    (refused,) = one_process.run(go_on, tmp_path, {"lr": 0.5, "beta1": 0.8}, ["ar.train.lr"])
    assert "ar.train.beta1" in refused and "ar.train.lr" not in refused
    assert one_process.run(go_on, tmp_path, {"lr": 0.5, "max_grad_norm": 0.1}, ["ar.train.lr", "ar.train.max_grad_norm"]) == [
        "finished"
    ]
    (changed,) = map(json.loads, (tmp_path / "toy" / "changes-ar.jsonl").read_text().splitlines())
    assert changed["changed"] == {"ar.train.lr": [0.01, 0.5], "ar.train.max_grad_norm": [1.0, 0.1]}
    assert [row["lr"] > 0.01 for row in records(tmp_path)] == [False] * 3 + [True] * 3
    (refused,) = one_process.run(go_on, tmp_path, {"lr": 0.7}, ["ar.train.lr"])  # finished
    assert "ar.train.lr" in refused and "allow_changes" not in refused


@pytest.mark.parametrize("section", sorted({section_of(phase) for phase in (*SECTIONS, "ar", "base")}))
def test_every_training_may_be_told_to_go_on_as_its_message_says(section: str) -> None:
    load_config(
        None, [f"run.allow_changes=[{section}.train.lr,{section}.train.max_grad_norm]", f"{section}.train.skip_samples=[1]"]
    )


def advice(losses: Sequence[float], made: int) -> str:
    """What is said of a step of two micro batches with such losses, the first ``made`` of which hold the model's own attempts."""
    trainer, ids = object.__new__(Trainer), [[7], [16]]
    trainer.run, trainer.world = SimpleNamespace(phase="rl"), World(0, 1, 0, torch.device("cpu"))  # type: ignore[assignment]
    trainer.settings, trainer.progress, trainer._sample_ids = TrainSettings(skip_samples=[3]), Progress(step=4), ids
    batches: Any = [SimpleNamespace(sample_ids=one) for one in ids]
    with pytest.raises(NonFiniteError) as caught:
        trainer._report_non_finite(StepBatch(16, batches, [16, 16], 0.0, made=made), [torch.tensor(loss) for loss in losses])
    return str(caught.value)


def test_only_stored_samples_are_said_to_be_left_out() -> None:
    """The model's own attempts come again as they were."""
    skipped = "start the same command with this batch left out (rl.train.skip_samples=[3,16]), or with a lower learning rate"
    assert all(skipped in advice(losses, made) for losses, made in (((1, math.nan), 1), ((1, 1), 1), ((math.nan, 1), 0)))
    for losses, made in (((math.nan, 1), 1), ((1, math.nan), 2), ((1, 1), 2)):
        assert "start the same command with a lower learning rate (rl.train.lr=... run.allow" in advice(losses, made)


def test_what_cannot_change_under_way_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"run.allow_changes: 'vae.latent_dim' cannot change under way"):
        load_config(None, ["run.allow_changes=[vae.train.lr,vae.latent_dim]"])


def stopped_in_validation(world: World, folder: Path, number: int, settings: dict[str, Any]) -> Outcome:
    """Train a toy; the last rank is signalled while it collates the ``number``-th batch of its validations."""
    phase, calls = ToyPhase(), []
    assert phase.validation is not None

    def count(numbers: list[int]) -> None:
        calls.append(numbers)
        if len(calls) == number and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    phase.validation.before_collate = count
    with open_run(toy_config(folder, **settings), "ar", world) as run:
        outcome = train(run, phase)
    assert len(calls) == number  # none more is read
    return outcome


@pytest.mark.parametrize(("number", "step"), [(1, 3), (3, 6)])
def test_a_stop_in_a_validation_is_obeyed_at_once_and_the_validation_made_up_for(
    two_processes: ProcessGroup, tmp_path: Path, number: int, step: int
) -> None:
    """In the middle of the training and at its end: two batches a rank in each."""
    settings = toy_settings(validate_every=3, micro_batch=2, ema=0.9)
    for outcome in two_processes.run(stopped_in_validation, tmp_path / "parts", number, settings):
        assert (outcome.status, outcome.steps) == ("interrupted", step)
    two_processes.run(run_with, tmp_path / "parts", 3, "float32", settings)
    two_processes.run(run_with, tmp_path / "whole", 3, "float32", settings)
    assert_identical(tmp_path / "parts", tmp_path / "whole")
    assert [row["step"] for row in records(tmp_path / "parts", "validation")] == [3, 6]


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints_come_by_the_minute_and_go_with_the_end(one_process: ProcessGroup, tmp_path: Path, kept: bool) -> None:
    settings = toy_settings(checkpoint_minutes=1e-9, keep_checkpoints=9)
    one_process.run(run_with, tmp_path, 3, "float32", settings, 36)
    folder = tmp_path / "toy" / "checkpoints" / "ar"
    steps = [int(path.name.removeprefix("step-")) for path in reversed(steps_in(folder))]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    one_process.run(run_with, tmp_path, 3, "float32", {**settings, "keep_finished": kept})
    assert len(steps_in(folder)) == (6 if kept else 0) and folder.exists() == kept


COUNT = """
source slurm/common.sh
for restart in 0 1 2 3; do
    [ $restart = 3 ] && mkdir -p "$RUN_FOLDER/checkpoints/vae" && echo step-00000004 >"$RUN_FOLDER/checkpoints/vae/latest"
    SLURM_RESTART_COUNT=$restart count_restarts
    echo $idle_restarts
done
"""


def test_only_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    environment = {**os.environ, "RUN_FOLDER": str(tmp_path), "SLURM_JOB_ID": "7"}
    result = subprocess.run(["bash", "-c", COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr) == (["0", "1", "2", "0"], "")
