"""Stage 3 as a training: two processes under ZeRO-3 against one; stopped in the middle of an iteration; rewards that are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy_reward
from tests.distributed import ProcessGroup
from tests.test_phases import configure, folder, losses, run_phase, weights  # noqa: F401
from training.phases.rl import rl_phase
from training.phases.rl_text import rl_text_phase
from training.reinforcement import steps
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import RunFolder, open_run
from training.runtime.stages import last_denoiser

STEPS = 4
RL = {
    "prompts": 4, "group": 3, "updates": 2, "answers": 2, "policy": "both", "questions_per_batch": 1,
    "reward": "tests.toy_reward:letters", "old_decay": 0.3,
}  # fmt: skip
TRAIN = {
    "max_steps": STEPS, "global_batch": 4, "lr": "1e-2", "eps": "1e-3", "ema": 0.5, "log_every": 1, "checkpoint_every": 1,
    "keep_checkpoints": 9, "keep_finished": True, "max_grad_norm": 0,
}  # fmt: skip
SAMPLE = ["sample.num_steps=2", "sample.max_blocks=2", "sample.max_answer_tokens=3", "sample.max_thought_tokens=4"]
#: what was measured of an iteration and of ranks, which depends on the clock
SECONDS = (
    "sampling_seconds", "judging_seconds", "learning_seconds", "rank_slowest", "rank_slowdown", "memory_rank", "data_wait_worst",
)  # fmt: skip


def settings(micro: int, **changes: Any) -> list[str]:
    train = [f"rl.train.{key}={value}" for key, value in {**TRAIN, "micro_batch": micro}.items()]
    return [*SAMPLE, *train, *(f"rl.{key}={value}" for key, value in {**RL, **changes}.items())]


def reinforce(world: World, root: Path, name: str, stage: int, micro: int, stop_after: int | None = None, **changes: Any) -> str:
    """Stage 3 of run ``name``; the last rank is asked to stop after so many of its questions."""
    config = configure(root, name, stage, 8, settings(micro, **changes))
    toy_reward.questions_left = stop_after if world.rank == world.size - 1 else None
    with open_run(config, "rl", world) as run:
        return train(run, rl_phase(config, world)).status


def prepared(root: Path, *names: str) -> None:
    """Runs of the same denoiser."""
    for name in names:
        for part in ("models/vae", "models/denoiser", "latents"):
            shutil.copytree(root / "stage1" / part, root / name / part)


@pytest.fixture(scope="module")
def start(one_process: ProcessGroup, folder: Path) -> Path:  # noqa: F811
    """The folder with the run ``stage1``, which has a denoiser."""
    for part in ("models/vae", "latents"):
        shutil.copytree(folder / "encoded" / part, folder / "stage1" / part)
    one_process.run(run_phase, folder, "stage1", "denoiser", 0, 8, [])
    return folder


def metrics(root: Path, name: str) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in SECONDS} for row in losses(root, name)]


def assert_same_weights(root: Path, one: str, two: str, **tolerance: float) -> None:
    first, second = weights(root, one, "rl"), weights(root, two, "rl")
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.distributed
def test_two_ranks_of_zero3_learn_what_one_process_learns(
    one_process: ProcessGroup, two_processes: ProcessGroup, start: Path
) -> None:
    """The same questions, noises and rewards; losses, figures and weights; also stopped on one rank while it samples."""
    prepared(start, "one", "two")
    assert one_process.run(reinforce, start, "one", 0, 8, timeout=280) == ["finished"]
    assert two_processes.run(reinforce, start, "two", 3, 3, 3, timeout=280) == ["interrupted"] * 2
    assert two_processes.run(reinforce, start, "two", 3, 3, timeout=280) == ["finished"] * 2
    expected, actual = metrics(start, "one"), metrics(start, "two")
    assert len(expected) == len(actual) == STEPS + 2  # the last two are the distance from the start, and the validation
    for row, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert expected[0]["signal"] > 0 and {"nft", "answers", "flow", "reward", "pass@1", "pass@6"} <= expected[0].keys()
    assert "reward" not in expected[1] and expected[2]["reward"] != expected[0]["reward"]
    assert expected[0]["token_ratio"] == pytest.approx(1, abs=1e-5) and expected[0]["nft_distance"] == pytest.approx(0, abs=1e-9)
    assert expected[1]["nft_distance"] > 1e-6 and expected[-2]["start_distance"] > 1e-6
    assert_same_weights(start, "one", "two", rtol=1e-3, atol=5e-5)


@pytest.mark.distributed
def test_few_attempts_go_beside_their_gold_records_and_learn_the_same(
    one_process: ProcessGroup, two_processes: ProcessGroup, start: Path
) -> None:
    """In one process, and on two ranks under ZeRO-3."""
    prepared(start, "apart", "beside", "beside-split")
    assert one_process.run(apart, start, "apart") == ["finished"]
    assert one_process.run(reinforce, start, "beside", 0, 64) == ["finished"]
    assert two_processes.run(reinforce, start, "beside-split", 3, 64, timeout=280) == ["finished"] * 2
    for name in ("beside", "beside-split"):
        assert_same_weights(start, "apart", name, rtol=1e-3, atol=5e-5)
        for row, other in zip(metrics(start, "apart"), metrics(start, name), strict=True):
            assert other == pytest.approx(row, rel=1e-3, abs=1e-4)


def apart(world: World, root: Path, name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "MOST_TOGETHER", 0)
        return reinforce(world, root, name, 0, 64)


def test_a_run_goes_on_in_the_middle_of_an_iteration_as_if_nothing_had_been(one_process: ProcessGroup, start: Path) -> None:
    if not (start / "one" / "models" / "rl").is_dir():
        prepared(start, "one")
        one_process.run(reinforce, start, "one", 0, 8)
    run = RunFolder(configure(start, "one", 0, 8, settings(8)))
    assert last_denoiser(run) == run.model("rl") and last_denoiser(run, before="rl") == run.model("denoiser")
    shutil.copytree(start / "one", start / "again")
    again = RunFolder(configure(start, "again", 0, 8, settings(8)))
    again.outcome_file("rl").unlink()
    shutil.rmtree(again.model("rl"))
    for step in range(2, STEPS + 1):
        shutil.rmtree(again.checkpoints("rl") / f"step-{step:08d}")
    assert one_process.run(reinforce, start, "again", 0, 8) == ["finished"]
    assert_same_weights(start, "one", "again", rtol=0, atol=0)
    assert metrics(start, "again") == metrics(start, "one")


def test_random_denoising_steps_are_learned_from(one_process: ProcessGroup, start: Path) -> None:
    """The ratio is 1 at the start, and a step is made all the same; then the distance from the start counts, too."""
    prepared(start, "steps")
    assert one_process.run(by_steps, start, "steps") == ["finished"]
    rows = metrics(start, "steps")
    assert rows[0]["step_ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[1]["step_ratio"] != 1 and rows[0]["grad_norm"] > 0 and "nft" not in rows[0]
    assert rows[0]["kl"] == 0 < rows[1]["kl"]


def by_steps(world: World, root: Path, name: str) -> str:
    return reinforce(
        world, root, name, 0, 8, algorithm="flow_grpo", policy="latents", random_steps=1, anchor_weight=0, kl_weight=0.04
    )


def by_text(world: World, root: Path, name: str) -> str:
    overrides = [*settings(8, policy="text", answers=1), "evaluate.ar_max_tokens=4"]
    with open_run(configure(root, name, 0, 8, overrides), "ar-rl", world) as run:
        return train(run, rl_text_phase(run.config, world)).status


def test_the_baseline_learns_from_its_own_completions(one_process: ProcessGroup, folder: Path) -> None:  # noqa: F811
    one_process.run(run_phase, folder, "text", "ar", 0, 8, [])
    assert one_process.run(by_text, folder, "text") == ["finished"]
    first, second, *_ = (row for row in losses(folder, "text") if "answers" in row)
    assert first["token_ratio"] == pytest.approx(1, abs=1e-5) and second["token_ratio"] != first["token_ratio"]
    assert {"reward", "signal", "pass@3", "text"} <= first.keys()
    assert (folder / "text" / "models" / "ar-rl" / "tokenizer.json").is_file()


def ended(world: World, root: Path, name: str, **changes: Any) -> str:
    try:
        return reinforce(world, root, name, 0, 8, **changes)
    except ValueError as error:
        return str(error)


def test_a_reward_that_is_no_number_ends_the_run(one_process: ProcessGroup, start: Path) -> None:
    prepared(start, "hostile")
    (message,) = one_process.run(nothing_learned, start, "hostile")
    assert "rl.reward=tests.toy_reward:nan_for_the_last gave nan, which is not finite, at question '" in message
    assert not (start / "hostile" / "checkpoints" / "rl").is_dir()


def nothing_learned(world: World, root: Path, name: str) -> str:
    return ended(world, root, name, reward="tests.toy_reward:nan_for_the_last")


@pytest.mark.distributed
def test_a_reward_that_never_returns_on_one_rank_ends_the_run_on_all(two_processes: ProcessGroup, start: Path) -> None:
    prepared(start, "slow")
    for message in two_processes.run(nothing_in_time, start, "slow"):
        assert "rl.reward=tests.toy_reward:never_on_the_last_rank, at question '" in message
        assert "did not return within 0.2 seconds: make it faster, or raise rl.reward_seconds" in message


def nothing_in_time(world: World, root: Path, name: str) -> str:
    return ended(world, root, name, reward="tests.toy_reward:never_on_the_last_rank", reward_seconds=0.2)
