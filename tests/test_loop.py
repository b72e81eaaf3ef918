"""The train loop on one and two processes: accumulation, ranks, resume, bad numbers, signals."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ladir.config import Config
from ladir.config.loader import load_config
from tests.distributed import ProcessGroup
from tests.toy_phase import ToyPhase, toy_config
from training.runtime.allowance import Allowance
from training.runtime.distributed import RankLostError, World
from training.runtime.loop import NonFiniteError, train
from training.runtime.run import Outcome, Run, RunConflict, open_run, relevant_settings

#: ZeRO-3 that keeps the weights a second time over every two ranks (hpZ)
GROUPS_OF_TWO = "tests/data/zero3_hpz.json"
HIDDEN = ("phase", "kind", "tokens_per_second", "tokens_per_second_per_device", "mfu", "data_wait", "memory_gib", "seconds",
          "data_wait_worst", "memory_rank", "rank_slowest", "rank_slowdown")  # fmt: skip


def run_toy(
    world: World,
    folder: Path,
    stage: int = 3,
    dtype: str = "float32",
    stop_at: int | None = None,
    by: signal.Signals = signal.SIGUSR2,
    **train_settings: Any,
) -> Outcome:
    """Train the toy; rank ``world.size - 1`` is signalled while it collates the sample of number ``stop_at``."""
    phase = ToyPhase()
    if stop_at is not None and world.rank == world.size - 1:

        def signal_once(numbers: list[int]) -> None:
            if stop_at in numbers:
                os.kill(os.getpid(), by)

        phase.before_collate = signal_once
    with open_run(toy_config(folder, stage, dtype, **train_settings), "ar", world) as run:
        return train(run, phase)


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The logged numbers, without what depends on time."""
    rows = [json.loads(line) for line in (folder / "toy" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in HIDDEN} for row in rows if row["kind"] == kind]


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "toy" / "models" / "ar" / "model.safetensors")


def assert_close(folder: Path, reference: Path, tolerance: float) -> None:
    for row, expected in zip(records(folder), records(reference), strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
    ours, theirs = model(folder), model(reference)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)


def assert_identical(folder: Path, reference: Path) -> None:
    assert records(folder) == records(reference)
    assert records(folder, "validation") == records(reference, "validation")
    ours, theirs = model(folder), model(reference)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_ranks_accumulation_and_stages_change_nothing(
    two_processes: ProcessGroup, one_process: ProcessGroup, tmp_path: Path
) -> None:
    """Global batch 8 as 1 x 8, 2 x 4, 4 x 2, 8 x 1 and on two ranks, with ZeRO 0, 2 and 3: the same losses and weights."""
    one_process.run(run_toy, tmp_path / "reference", 0, "float32", None)
    reference = tmp_path / "reference"
    for stage, micro in [(3, 8), (3, 4), (3, 2), (3, 1), (2, 2), (0, 2)]:
        settings = toy_settings(micro_batch=micro)
        folder = tmp_path / f"one-{stage}-{micro}"
        one_process.run(run_with, folder, stage, "float32", settings)
        assert_close(folder, reference, 2e-5)
        if micro <= 4:
            folder = tmp_path / f"two-{stage}-{micro}"
            two_processes.run(run_with, folder, stage, "float32", settings)
            assert_close(folder, reference, 2e-5)
    assert len({row["loss"] for row in records(reference)}) == 6


def toy_settings(**settings: Any) -> dict[str, Any]:
    return settings


def run_with(
    world: World,
    folder: Path,
    stage: int,
    dtype: str,
    settings: dict[str, Any],
    stop_at: int | None = None,
    by: signal.Signals = signal.SIGUSR2,
) -> Outcome:
    return run_toy(world, folder, stage, dtype, stop_at, by, **settings)


@pytest.mark.parametrize(("stage", "dtype"), [(3, "float32"), (3, "bfloat16"), (2, "bfloat16"), (0, "float32")])
def test_interrupted_runs_joined_equal_an_undisturbed_one(
    two_processes: ProcessGroup, tmp_path: Path, stage: int, dtype: str
) -> None:
    """A signal and a Ctrl-C on one rank, in the middle of an epoch (20 samples, batch 8) and of a log interval."""
    settings = toy_settings(max_steps=9, ema=0.9, log_every=2, validate_every=4, micro_batch=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_processes.run(run_with, whole, stage, dtype, settings)
    steps = []
    for stop_at, by in ((23, signal.SIGUSR2), (47, signal.SIGINT)):
        outcomes = two_processes.run(run_with, parts, stage, dtype, settings, stop_at, by)
        assert {outcome.status for outcome in outcomes} == {"interrupted"}
        assert (parts / "toy" / "INTERRUPTED").is_file()
        steps.append(outcomes[0].steps)
    last = two_processes.run(run_with, parts, stage, dtype, settings)
    assert [outcome.finished for outcome in last] == [True, True]
    assert not (parts / "toy" / "INTERRUPTED").exists()
    assert 0 < steps[0] < steps[1] < 9
    assert_identical(parts, whole)


@pytest.fixture(scope="module")
def four_processes() -> Iterator[ProcessGroup]:
    """Four of them, for groups of two."""
    group = ProcessGroup(4)
    yield group
    group.close()


def run_in_groups(world: World, folder: Path, file: str, stop_at: int | None = None) -> tuple[Outcome, float]:
    """Train the toy under a DeepSpeed file; also the largest part of a trained weight that this rank held a second time."""
    phase, held = ToyPhase(), [0.0]

    def look(model: torch.nn.Module, *inputs: object) -> None:
        for weight in model.parameters():
            second = getattr(weight, "ds_secondary_tensor", None)
            if weight.requires_grad and second is not None and weight.ds_numel % world.size == 0:
                held.append(second.numel() / weight.ds_numel)

    phase.model.register_forward_pre_hook(look)
    if stop_at is not None and world.rank == world.size - 1:
        phase.before_collate = lambda numbers: os.kill(os.getpid(), signal.SIGUSR2) if stop_at in numbers else None
    config = toy_config(folder, max_steps=7, ema=0.9, validate_every=3, checkpoint_every=2, micro_batch=1, global_batch=8)
    config.deepspeed.config = file
    with open_run(config, "ar", world) as run:
        return train(run, phase), max(held)


@pytest.mark.distributed
def test_two_groups_of_two_ranks_train_what_four_do_and_go_on_where_they_were_stopped(
    four_processes: ProcessGroup, tmp_path: Path
) -> None:
    """hpZ: every group of ranks holds all weights a second time."""
    plain, grouped, parts = (tmp_path / name for name in ("plain", "grouped", "parts"))
    for folder, file, second in ((plain, "ds_configs/zero3.json", 0.0), (grouped, GROUPS_OF_TWO, 0.5)):
        assert [held for _, held in four_processes.run(run_in_groups, folder, file)] == [second] * 4
    assert len(records(grouped, "validation")) == 3
    assert_close(grouped, plain, 1e-6)
    stopped = four_processes.run(run_in_groups, parts, GROUPS_OF_TWO, 35)
    assert {outcome.status for outcome, _ in stopped} == {"interrupted"} and 0 < stopped[0][0].steps < 7
    assert all(outcome.finished for outcome, _ in four_processes.run(run_in_groups, parts, GROUPS_OF_TWO))
    assert_identical(parts, grouped)


def test_batches_made_by_other_processes_are_the_same(two_processes: ProcessGroup, tmp_path: Path) -> None:
    for name, settings in (("thread", toy_settings()), ("processes", toy_settings(data_processes=2))):
        two_processes.run(run_with, tmp_path / name, 2, "float32", settings)
    assert_identical(tmp_path / "processes", tmp_path / "thread")


def test_snapshots_are_the_models_of_shorter_trainings(two_processes: ProcessGroup, tmp_path: Path) -> None:
    """Beside an interruption; a snapshot has no last step's and no checkpoint's state."""
    constant = toy_settings(schedule="constant", warmup_fraction=0.0, ema=0.9)
    settings = toy_settings(**constant, max_steps=6, snapshot_every=2)
    two_processes.run(run_with, tmp_path / "long", 3, "float32", settings, 27)
    two_processes.run(run_with, tmp_path / "long", 3, "float32", settings)
    models = tmp_path / "long" / "toy" / "models"
    assert sorted(path.name for path in models.iterdir()) == ["ar", "ar-2", "ar-4"]
    for steps in (2, 4):
        two_processes.run(run_with, tmp_path / str(steps), 3, "float32", toy_settings(**constant, max_steps=steps))
        short, kept = model(tmp_path / str(steps)), load_file(models / f"ar-{steps}" / "model.safetensors")
        assert short.keys() == kept.keys() and all(torch.equal(short[name], kept[name]) for name in short)
        outcome = json.loads((models.parent / f"outcome-ar-{steps}.json").read_text())
        assert (outcome["status"], outcome["steps"], outcome["samples"]) == ("unfinished", steps, steps * 8)


@pytest.mark.parametrize("stage", ["3_offload_optimizer", "3_offload"])
def test_offloaded_states_train_and_continue_the_same(two_processes: ProcessGroup, tmp_path: Path, stage: Any) -> None:
    settings = toy_settings(micro_batch=2, ema=0.9)
    two_processes.run(run_with, tmp_path / "reference", 3, "float32", settings)
    assert {o.status for o in two_processes.run(run_with, tmp_path / "parts", stage, "float32", settings, 23)} == {"interrupted"}
    two_processes.run(run_with, tmp_path / "parts", stage, "float32", settings)
    assert_close(tmp_path / "parts", tmp_path / "reference", 2e-5)


def finish_twice(world: World, folder: Path) -> tuple[Outcome, Outcome, str]:
    first = run_toy(world, folder)
    second = run_toy(world, folder)
    try:
        run_toy(world, folder, lr=0.5)
    except RunConflict as error:
        return first, second, str(error)
    return first, second, ""


def test_a_finished_phase_returns_at_once_and_other_settings_are_refused(two_processes: ProcessGroup, tmp_path: Path) -> None:
    for first, second, conflict in two_processes.run(finish_twice, tmp_path):
        assert first == second and first.finished and first.steps == 6
        assert "ar.train.lr: 0.01 -> 0.5" in conflict and "run.name" in conflict
    assert not list(tmp_path.rglob("*.tmp"))


def test_stage_2_depends_on_how_its_blocks_are_denoised() -> None:
    def relevant(phase: str, *changes: str) -> dict[str, Any]:
        return relevant_settings(dataclasses.asdict(load_config(None, changes)), phase)

    for change in ("sample.num_steps=5", "sample.initial_noise=2", "sample.guidance_interval=[0,0.5]", "rollout.lag=1"):
        assert relevant("rollout", change) != relevant("rollout") and relevant("denoiser", change) == relevant("denoiser")
    assert relevant("rollout", "sample.max_blocks=5") == relevant("rollout", "sample.sampler=sde") == relevant("rollout")
    own = "rollout.num_steps=7"
    assert relevant("rollout", own, "sample.num_steps=5") == relevant("rollout", own) == relevant("rollout", "sample.num_steps=7")


def test_a_vae_begun_without_bos_or_separator_does_not_go_on_with_them(tmp_path: Path) -> None:
    run = Run(load_config(None, [f"run.folder={tmp_path}"]), "vae", World(0, 1, 0, torch.device("cpu")))
    run.folder.checkpoints("vae").mkdir(parents=True)
    before = dataclasses.asdict(run.config)
    del before["vae"]["bos"], before["vae"]["separator"]
    run.folder.config("vae").write_text(yaml.safe_dump(before))
    assert all(change in str(run._conflict({})) for change in ("vae.bos: False -> True", "vae.separator: '' -> '\\n'"))
    run.config.vae.bos, run.config.vae.separator = False, ""
    assert run._conflict({}) == ""


def poisoned(world: World, folder: Path) -> str:
    config = toy_config(folder, checkpoint_every=2, micro_batch=2)
    try:
        with open_run(config, "ar", world) as run:
            train(run, ToyPhase(poison=29))
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("group", ["one_process", "two_processes"])
def test_a_nan_in_a_batch_stops_the_run_before_it_does_harm(group: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Sample number 29 is in step 4, micro batch 3 of 4 by numbers 28, 29: rank 0 of 2."""
    processes: ProcessGroup = request.getfixturevalue(group)
    messages = processes.run(poisoned, tmp_path)
    assert len(set(messages)) == 1
    expected = ToyPhaseOrder().ids([28, 29])
    assert "step 4" in messages[0] and f"rank 0, samples [{expected}]" in messages[0]
    checkpoints = tmp_path / "toy" / "checkpoints" / "ar"
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-00000002"]
    assert [row["step"] for row in records(tmp_path)] == [1, 2, 3]
    processes.run(run_with, tmp_path, 3, "float32", toy_settings(checkpoint_every=2, micro_batch=2))
    clean = tmp_path / "clean"
    processes.run(run_with, clean, 3, "float32", toy_settings(checkpoint_every=2, micro_batch=2))
    assert_identical(tmp_path, clean)


def raise_at(world: World, folder: Path, number: int) -> list[str]:
    """What a traceback says behind an error that rises while the sample of that number is collated."""
    phase = ToyPhase()

    def fail(numbers: list[int]) -> None:
        if number in numbers:
            raise OSError("no such disk")

    phase.before_collate = fail
    try:
        with open_run(toy_config(folder), "ar", world) as run:
            train(run, phase)
    except OSError as error:
        return list(error.__notes__)
    return []


def test_any_error_tells_samples_phase_rank_and_step(one_process: ProcessGroup, tmp_path: Path) -> None:
    samples, place = one_process.run(raise_at, tmp_path, 17)[0]
    assert samples == f"This happened while samples {ToyPhaseOrder().ids([16, 17, 18, 19])} were made into a batch."
    assert re.fullmatch(r"This happened in phase ar, rank 0, step 2 \(gradients computed\), samples \[.*\]\.", place)


def test_a_signal_before_the_first_step_needs_no_checkpoint(two_processes: ProcessGroup, tmp_path: Path) -> None:
    """What step 0 would save follows from the seed; at 8B it would take a preemption's whole grace time."""
    for outcome in two_processes.run(run_toy, tmp_path / "stopped", 3, "float32", 4):
        assert (outcome.status, outcome.steps) == ("interrupted", 0)
    assert not (tmp_path / "stopped" / "toy" / "checkpoints").exists()
    two_processes.run(run_toy, tmp_path / "stopped")
    two_processes.run(run_toy, tmp_path / "whole")
    assert_identical(tmp_path / "stopped", tmp_path / "whole")


def stop_while_the_model_is_written(world: World, folder: Path) -> tuple[Outcome, Outcome]:
    """A run that ends between its last checkpoint and its model, continued; and one that is not disturbed."""
    phase, write = ToyPhase(), ToyPhase.save

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    ToyPhase.save = fail  # type: ignore[method-assign, assignment]
    try:
        with open_run(toy_config(folder / "stopped", log_every=4), "ar", world) as run:
            train(run, phase)
    except KeyboardInterrupt:
        pass
    finally:
        ToyPhase.save = write  # type: ignore[method-assign]
    return run_toy(world, folder / "stopped", log_every=4), run_toy(world, folder / "whole", log_every=4)


def test_a_run_stopped_while_its_model_is_written_logs_nothing_twice(one_process: ProcessGroup, tmp_path: Path) -> None:
    stopped, whole = one_process.run(stop_while_the_model_is_written, tmp_path)[0]
    assert_identical(tmp_path / "stopped", tmp_path / "whole")
    assert stopped.metrics == whole.metrics and stopped.metrics.keys() >= {"loss", "validation/loss"}


def patience_at_the_end(world: World, folder: Path) -> list[Any]:
    """Longest waits in force, in order, and when the model was written and the outcome recorded."""
    events: list[Any] = []
    wait, finish, phase = World.wait_at_most, Run.finish, ToyPhase()
    config = toy_config(folder)

    def write(target: Path, state: Any) -> None:
        ToyPhase.save(phase, target, state)
        events.append("written")

    def record(run: Run, outcome: Outcome, snapshot: int | None = None) -> None:
        events.append("recorded")
        finish(run, outcome, snapshot)

    World.wait_at_most = lambda self, minutes: events.append(minutes)  # type: ignore[method-assign]
    Run.finish, phase.save = record, write  # type: ignore[method-assign]
    try:
        with open_run(config, "ar", world) as run:
            train(run, phase)
    finally:
        World.wait_at_most, Run.finish = wait, finish  # type: ignore[method-assign]
    return events


def test_the_others_wait_long_while_rank_0_brings_the_model_to_disk(one_process: ProcessGroup, tmp_path: Path) -> None:
    events = one_process.run(patience_at_the_end, tmp_path)[0]
    start = events.index("written")
    assert events[start - 1 : start + 2] == [Config().deepspeed.timeout_minutes, "written", "recorded"]
    assert Config().deepspeed.step_timeout_minutes in events[:start]


class ToyPhaseOrder:
    """Which samples stand at given numbers of a toy run."""

    def ids(self, numbers: list[int]) -> list[int]:
        from training.runtime.sampler import DataOrder

        order = DataOrder(ToyPhase().num_samples, 8, 0)
        return [order.index(number) for number in numbers]


def bounded_by_seconds(world: World, folder: Path) -> Outcome:
    return run_toy(world, folder, max_steps=None, max_seconds=0.5, log_every=1000)


def test_seconds_bound_a_run_on_all_ranks_alike(two_processes: ProcessGroup, tmp_path: Path) -> None:
    outcomes = two_processes.run(bounded_by_seconds, tmp_path)
    assert outcomes[0].steps == outcomes[1].steps >= 1
    assert outcomes[0].seconds == outcomes[1].seconds >= 0.5
    assert records(tmp_path)[-1]["step"] == outcomes[0].steps


def initial_weights(world: World, folder: Path, phase: str) -> list[torch.Tensor]:
    with open_run(toy_config(folder), phase, world):
        return [torch.randn(3), torch.nn.Linear(2, 2).weight.detach()]


def test_initial_weights_follow_from_the_seed(two_processes: ProcessGroup, tmp_path: Path) -> None:
    (first, other), (again, _), (ar, _) = (two_processes.run(initial_weights, tmp_path, name) for name in ("base", "base", "ar"))
    for value, on_other_rank, repeated, of_other_phase in zip(first, other, again, ar, strict=True):
        assert torch.equal(value, on_other_rank) and torch.equal(value, repeated)
        assert not torch.equal(value, of_other_phase)


def test_epochs_bound_a_run(one_process: ProcessGroup, tmp_path: Path) -> None:
    settings = toy_settings(max_steps=None, max_epochs=2.0)
    outcome = one_process.run(run_with, tmp_path, 0, "float32", settings)[0]
    assert (outcome.steps, outcome.samples) == (5, 40)
    assert records(tmp_path)[-1]["epoch"] == 2.0
    assert dataclasses.asdict(outcome)["metrics"].keys() >= {"all", "odd", "loss", "size", "validation/loss"}


def hang_on_rank_one(world: World, folder: Path, die: bool) -> str:
    """Rank 1 sleeps, or ends, while it collates step 3."""
    phase = ToyPhase()

    def stall(numbers: list[int]) -> None:
        if world.rank == 1 and 16 in [number // 8 * 8 for number in numbers]:
            if die:
                os._exit(1)
            time.sleep(25)

    phase.before_collate = stall
    config = toy_config(folder)
    config.deepspeed.step_timeout_minutes = 0.1
    try:
        with open_run(config, "ar", world) as run:
            train(run, phase)
    except RankLostError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("die", [False, True])
def test_a_rank_that_hangs_or_dies_ends_the_others(two_processes: ProcessGroup, tmp_path: Path, die: bool) -> None:
    """Long before the 30 minutes that ranks may take over a start or a checkpoint."""
    (message, _), (_, other) = two_processes.outcomes(hang_on_rank_one, tmp_path, die)
    two_processes.close()
    # Step 3 is collated while step 2 runs, so a death may already be noticed there.
    assert re.search(r"rank 0, step [23] \(.*\), samples \[\[", message) and "step_timeout_minutes" in message
    assert re.search(r"Now rank 1 does not answer, last seen in step [12] \(.*\), samples \[\[\d+, ", message)
    assert not die or (other is not None and "died" in other)


def test_a_row_counts_the_tokens_that_were_trained_on(one_process: ProcessGroup, tmp_path: Path) -> None:
    """Also the last one, of fewer steps than ``log_every``: the samples after it were only read."""
    one_process.run(run_with, tmp_path, 3, "float32", toy_settings(max_steps=5, log_every=2))
    rows = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    starts = [0.0, *(row["seconds"] for row in rows)]
    tokens = [row["tokens_per_second"] * (row["seconds"] - start) for row, start in zip(rows, starts, strict=False)]
    assert tokens == pytest.approx([96, 96, 48])  # 8 samples of 6 a step


def raise_in_validation(world: World, folder: Path) -> str:
    """Rank 0 fails while it shows samples; what every rank raises."""
    phase = ToyPhase()

    def show(model: object, telemetry: object, step: int) -> None:
        if world.is_main:
            raise ArithmeticError("no such picture")

    phase.on_validate = show  # type: ignore[attr-defined]
    config = toy_config(folder, 3, ema=0.9)
    config.deepspeed.timeout_minutes = 0.3
    try:
        with open_run(config, "ar", world) as run:
            train(run, phase)
    except (ArithmeticError, RankLostError) as error:
        return type(error).__name__
    return ""


def test_an_error_while_one_rank_shows_samples_is_the_one_that_is_told(tmp_path: Path) -> None:
    """Averaged weights are not swapped back then, which would wait for the others and end in an error about them."""
    group = ProcessGroup(2)
    try:
        assert group.run(raise_in_validation, tmp_path) == ["ArithmeticError", "RankLostError"]
    finally:
        group.close()


def shown_at(world: World, folder: Path, share: float) -> list[int]:
    """Steps at which samples are shown that take far longer than a step."""
    phase, shown = ToyPhase(), list[int]()

    def show(model: object, telemetry: object, step: int) -> None:
        assert not gc.isenabled()
        shown.append(step)
        if world.is_main:
            time.sleep(0.3)

    phase.on_validate = show  # type: ignore[attr-defined]
    config = toy_config(folder, **toy_settings(max_steps=6, validate_every=1))
    config.telemetry.samples_share = share
    with open_run(config, "ar", world) as run:
        train(run, phase)
    assert gc.isenabled() and not gc.get_freeze_count()
    return shown


def test_samples_take_no_more_than_their_share_of_a_training(two_processes: ProcessGroup, tmp_path: Path) -> None:
    assert two_processes.run(shown_at, tmp_path / "little", 0.02) == [[1, 6]] * 2
    assert two_processes.run(shown_at, tmp_path / "much", 1e6) == [[1, 2, 3, 4, 5, 6]] * 2


def test_an_allowance_is_a_share_and_the_first_time_is_free() -> None:
    allowance = Allowance(0.1)
    assert allowance.covers(0.0)
    allowance.took(2.0)
    assert not allowance.covers(39.9) and allowance.covers(40.0)
    resumed = Allowance(0.1)
    resumed.load(allowance.state())
    assert not resumed.covers(39.9) and resumed.covers(40.0)


def fail_in_a_validation(world: World, folder: Path) -> Outcome:
    """The second validation fails once; the same command then continues."""
    settings = toy_settings(max_steps=6, checkpoint_every=2, validate_every=4, ema=0.9)
    phase = ToyPhase()

    def show(model: object, telemetry: object, step: int) -> None:
        if step == 4:
            raise ArithmeticError("no")

    phase.on_validate = show  # type: ignore[attr-defined]
    with pytest.raises(ArithmeticError), open_run(toy_config(folder / "failed", 3, **settings), "ar", world) as run:
        train(run, phase)
    run_toy(world, folder / "whole", 3, **settings)
    return run_toy(world, folder / "failed", 3, **settings)


def test_what_fails_in_a_validation_costs_no_step(one_process: ProcessGroup, tmp_path: Path) -> None:
    assert one_process.run(fail_in_a_validation, tmp_path)[0].finished
    assert_identical(tmp_path / "failed", tmp_path / "whole")
    assert [row["step"] for row in records(tmp_path / "failed", "validation")] == [4, 6]
    kept = sorted(path.name for path in (tmp_path / "failed" / "toy" / "checkpoints" / "ar").glob("step-*"))
    assert kept[-1] == "step-00000006"
