"""Stage 3 as a training: two processes under ZeRO-3 against one; stopped anywhere in an iteration; rewards that are none."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ladir.config import Config
from ladir.models.backbone import Backbone
from ladir.rl.policy import Policy
from ladir.rl.text import TextPolicy
from tests.distributed import ProcessGroup
from tests.test_phases import configure, folder, losses, run_phase, weights  # noqa: F401
from tests.test_status import words_said
from training.evaluation import judging
from training.phases import rl
from training.phases.rl import rl_phase
from training.phases.rl_text import rl_text_phase
from training.reinforcement import steps
from training.reinforcement.asking import Asker
from training.runtime import loop
from training.runtime.alarm import APART_MINUTES
from training.runtime.distributed import World
from training.runtime.engine import Engine
from training.runtime.loop import NonFiniteError, Trainer, train
from training.runtime.preemption import BrokenOff
from training.runtime.profiling import MemorySnapshot
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
TEXT = {"policy": "text", "answers": 1}
SAMPLE = ["sample.num_steps=2", "sample.max_blocks=2", "sample.max_answer_tokens=3", "sample.max_thought_tokens=4"]
#: what was measured of an iteration and of ranks, which depends on the clock
SECONDS = (
    "sampling_seconds", "judging_seconds", "learning_seconds", "rank_slowest", "rank_slowdown", "memory_rank", "data_wait_worst",
)  # fmt: skip


def settings(micro: int, **changes: Any) -> list[str]:
    train = [f"rl.train.{key}={value}" for key, value in {**TRAIN, "micro_batch": micro}.items()]
    return [*SAMPLE, *train, *(f"rl.{key}={value}" for key, value in {**RL, **changes}.items())]


def reinforce(world: World, root: Path, name: str, stage: int, micro: int, **changes: Any) -> str:
    """Stage 3 of run ``name``."""
    config = configure(root, name, stage, 8, settings(micro, **changes))
    with open_run(config, "rl", world) as run:
        return train(run, rl_phase(config, world)).status


#: where the last rank is asked to stop: the function that is being called then
PLACES: dict[str, tuple[Any, str]] = {
    "thinking": (Backbone, "forward"),  # of which the first ones are a step's or a token's
    "judging": (judging, "judge"),
    "rewarding": (Asker, "_group"),
    "remembering": (Policy, "remembered"),
    "remembering text": (TextPolicy, "remembered"),
    "learning": (Trainer, "accumulate"),
    "validation": (loop, "validate"),
}


def stopped(world: World, root: Path, name: str, policy: str, place: str, at: int) -> tuple[str, int, bool]:
    """A start of stage 3 under ZeRO-3 whose last rank gets a signal as it calls a function the ``at``-th time; how it ended, how
    often that was called, and whether the mark was left by which a job comes again."""
    (owner, function), calls = PLACES[place], []
    text = policy == "text"
    overrides = [*settings(3, **TEXT), "evaluate.ar_max_tokens=4"] if text else settings(3)
    config = configure(root, name, 3, 8, overrides)
    with open_run(config, "ar-rl" if text else "rl", world) as run, pytest.MonkeyPatch.context() as patch:
        phase = (rl_text_phase if text else rl_phase)(config, world, run.stop)
        real = getattr(owner, function)

        def signalled(*about: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGUSR2)
                while not run.stop.requested:  # handled by the main thread, which this may not be
                    time.sleep(0.001)
            return real(*about, **named)

        if world.rank == world.size - 1:
            patch.setattr(owner, function, signalled)
        return train(run, phase).status, len(calls), run.interrupted


def prepared(root: Path, *names: str, of: str = "stage1") -> None:
    """Runs of the same denoiser, that of another run."""
    for name in names:
        for part in ("models/vae", "models/denoiser", "latents"):
            shutil.copytree(root / of / part, root / name / part)


@pytest.fixture(scope="module")
def start(one_process: ProcessGroup, folder: Path) -> Path:  # noqa: F811
    """The folder with the run ``stage1``, which has a denoiser."""
    for part in ("models/vae", "latents"):
        shutil.copytree(folder / "encoded" / part, folder / "stage1" / part)
    one_process.run(run_phase, folder, "stage1", "denoiser", 0, 8, [])
    return folder


@pytest.fixture(scope="module")
def baseline(one_process: ProcessGroup, folder: Path) -> Path:  # noqa: F811
    """The folder with the run ``text``, which has an AR baseline."""
    one_process.run(run_phase, folder, "text", "ar", 0, 8, [])
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
    """The same questions, noises and rewards; losses, figures and weights."""
    prepared(start, "one", "two")
    assert one_process.run(reinforce, start, "one", 0, 8, timeout=280) == ["finished"]
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


#: one start after the other: where it is stopped, at which call, and how many steps have been made then
STOPS = [
    ("thinking", 5, 0),
    ("rewarding", 2, 0),
    ("remembering", 2, 0),
    ("learning", 1, 1),
    ("judging", 2, 1),  # in the middle of the first iteration, whose attempts are made again
    ("validation", 1, 4),
]


@pytest.mark.distributed
def test_stopped_wherever_it_was_a_run_goes_on_as_if_nothing_had_been(two_processes: ProcessGroup, start: Path) -> None:
    """On all ranks, though one alone was asked; at once; with a checkpoint; bit for bit."""
    if not (start / "two" / "models" / "rl").is_dir():
        prepared(start, "two")
        two_processes.run(reinforce, start, "two", 3, 3, timeout=280)
    prepared(start, "parts")
    for place, at, steps_made in STOPS:
        answers = two_processes.run(stopped, start, "parts", "latents", place, at, timeout=280)
        assert answers == [("interrupted", 0, True), ("interrupted", at, True)], place
        assert newest(start, "parts", "rl") == steps_made and (start / "parts" / "INTERRUPTED").is_file(), place
    assert two_processes.run(reinforce, start, "parts", 3, 3, timeout=280) == ["finished"] * 2
    assert_same_weights(start, "two", "parts", rtol=0, atol=0)
    assert metrics(start, "parts") == metrics(start, "two")


def newest(root: Path, name: str, phase: str) -> int:
    """The step of the newest checkpoint; 0 where there is none: what it would hold follows from the seed."""
    found = RunFolder(configure(root, name, 0, 8, [])).checkpoints(phase) / "latest"
    return int(found.read_text(encoding="utf-8").strip().removeprefix("step-")) if found.is_file() else 0


def stopped_while_loading(world: World, root: Path) -> bool:
    """The last rank gets a signal as it has loaded the old model; whether nothing more is loaded."""
    config, loaded = configure(root, "loading", 3, 8, settings(3)), []
    with open_run(config, "rl", world) as run, pytest.MonkeyPatch.context() as patch:
        real = rl.load_denoiser

        def signalled(*about: Any) -> Any:
            if world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            return real(*about)

        patch.setattr(rl, "load_denoiser", signalled)
        patch.setattr(rl, "load_readers", loaded.append)
        with pytest.raises(BrokenOff):
            rl_phase(config, world, run.stop)
    return not loaded


@pytest.mark.distributed
def test_a_stop_is_obeyed_between_two_models_that_are_loaded(two_processes: ProcessGroup, start: Path) -> None:
    prepared(start, "loading")
    assert two_processes.run(stopped_while_loading, start) == [True, True]


def test_the_vae_is_in_memory_where_somebody_reads_blocks(one_process: ProcessGroup, start: Path) -> None:
    """A reward of answers alone reads none, and a step is learned all the same."""
    prepared(start, "unread")
    assert one_process.run(unread, start, "unread") == [("finished", 0)]
    assert one_process.run(loading, start, "unread") == [1]


def loaded(patch: pytest.MonkeyPatch) -> list[Any]:
    """What was loaded of the VAE, from now on."""
    found, real = [], rl.load_readers
    patch.setattr(rl, "load_readers", lambda *about: found.append(about) or real(*about))
    return found


def unread(world: World, root: Path, name: str) -> tuple[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        found = loaded(patch)
        return reinforce(world, root, name, 0, 8, reward="answer", updates=STEPS), len(found)


def loading(world: World, root: Path, name: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        found = loaded(patch)
        rl_phase(configure(root, name, 0, 8, settings(8)), world)
        return len(found)


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


def out_of_memory(world: World, root: Path, name: str) -> list[str]:
    """What is said of memory that runs out while questions are answered."""
    prepared(root, name)
    config = configure(root, name, 0, 8, settings(4))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as caught:
        patch.setattr(MemorySnapshot, "dumped", lambda self: iter([str(self._file)]))
        with open_run(config, "rl", world) as run:
            phase = rl_phase(config, world)
            patch.setattr("ladir.reasoner.Reasoner.answer", full)
            train(run, phase)
    return list(caught.value.__notes__)


def full(*about: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_while_questions_are_answered_is_explained(one_process: ProcessGroup, start: Path) -> None:
    (notes,) = one_process.run(out_of_memory, start, "full")
    assert notes[0].startswith("Lower rl.questions_per_batch") and not any("micro_batch" in note for note in notes)
    assert notes[-1].endswith("full/memory/rl/rank-00000.pickle")


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
    assert one_process.run(by_steps, start, "steps", 0, 8) == ["finished"]
    rows = metrics(start, "steps")
    assert rows[0]["step_ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[1]["step_ratio"] != 1 and rows[0]["grad_norm"] > 0 and "nft" not in rows[0]
    assert rows[0]["kl"] == 0 < rows[1]["kl"]


BY_STEPS = {
    "algorithm": "flow_grpo", "policy": "latents", "random_steps": 1, "anchor_weight": 0, "kl_weight": 0.04, "step_clip": 0.2,
}  # fmt: skip


def by_steps(world: World, root: Path, name: str, stage: int, micro: int) -> str:
    return reinforce(world, root, name, stage, micro, **BY_STEPS)


@pytest.mark.distributed
def test_two_ranks_learn_from_random_steps_what_one_process_learns(
    one_process: ProcessGroup, two_processes: ProcessGroup, start: Path
) -> None:
    if not (start / "steps" / "models" / "rl").is_dir():
        prepared(start, "steps")
        one_process.run(by_steps, start, "steps", 0, 8)
    prepared(start, "steps-split")
    assert two_processes.run(by_steps, start, "steps-split", 3, 3, timeout=280) == ["finished"] * 2
    for row, other in zip(metrics(start, "steps"), metrics(start, "steps-split"), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert_same_weights(start, "steps", "steps-split", rtol=1e-3, atol=5e-5)


LORA = "backbone.lora.rank=4"


def by_adapters(world: World, root: Path, name: str, stage: int, micro: int) -> tuple[str, int, list[int]]:
    """Stage 3 of adapters, whose present ones sample; how it ended, how many the old model has, and how many of them every copy
    of the old weights changed."""
    config = configure(root, name, stage, 8, [*settings(micro, old_decay=0), LORA])
    real, adapters, changed = Engine.copy_old_weights, 0, []

    def copied(engine: Engine, target: torch.nn.Module) -> None:
        nonlocal adapters
        own = {name: parameter for name, parameter in target.named_parameters() if "lora_" in name}
        before, adapters = {name: parameter.detach().clone() for name, parameter in own.items()}, len(own)
        real(engine, target)
        changed.append(sum(not parameter.equal(before[name]) for name, parameter in own.items()))

    with open_run(config, "rl", world) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "copy_old_weights", copied)
        return train(run, rl_phase(config, world)).status, adapters, changed


@pytest.mark.distributed
def test_adapters_learn_on_two_ranks_of_zero3_what_they_do_in_one_process_and_are_what_samples(
    one_process: ProcessGroup, two_processes: ProcessGroup, start: Path
) -> None:
    """In the second iteration the old model is the new one: every adapter was copied, under its name."""
    for part in ("models/vae", "latents"):
        shutil.copytree(start / "encoded" / part, start / "adapted" / part)
    one_process.run(run_phase, start, "adapted", "denoiser", 0, 8, [LORA])
    prepared(start, "adapters", "adapters-split", of="adapted")
    ((status, count, changed),) = one_process.run(by_adapters, start, "adapters", 0, 8)
    assert status == "finished" and count > 0 and changed == [0, count]
    outcomes = two_processes.run(by_adapters, start, "adapters-split", 3, 3, timeout=280)
    assert outcomes == [(status, count, changed)] * 2
    rows = metrics(start, "adapters")
    for first, second in (rows[:2], rows[2:4]):
        assert first["nft_distance"] == pytest.approx(0, abs=1e-9) and first["token_ratio"] == pytest.approx(1, abs=1e-5)
        assert second["nft_distance"] > 1e-9
    for row, other in zip(rows, metrics(start, "adapters-split"), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert_same_weights(start, "adapters", "adapters-split", rtol=1e-3, atol=5e-5)


def by_text(world: World, root: Path, name: str) -> tuple[str, list[str]]:
    """How it ended, and what its status said meanwhile."""
    overrides = [*settings(8, **TEXT), "evaluate.ar_max_tokens=4"]
    with pytest.MonkeyPatch.context() as patch, open_run(configure(root, name, 0, 8, overrides), "ar-rl", world) as run:
        said = words_said(patch)
        return train(run, rl_text_phase(run.config, world)).status, said


def test_the_baseline_learns_from_its_own_completions(one_process: ProcessGroup, baseline: Path) -> None:
    ((status, said),) = one_process.run(by_text, baseline, "text")
    assert status == "finished"
    for words in ("reading and tokenizing", "loading the model", "loading the model that answers", "making the engine"):
        assert any(line.startswith(words) for line in said)
    place = said.index("step 3: waits for its batch")
    assert said[place + 1] == "step 3: answers 4 questions, 3 times each"
    first, second, *_ = (row for row in losses(baseline, "text") if "answers" in row)
    assert first["token_ratio"] == pytest.approx(1, abs=1e-5) and second["token_ratio"] != first["token_ratio"]
    assert {"reward", "signal", "pass@3", "text"} <= first.keys()
    assert (baseline / "text" / "models" / "ar-rl" / "tokenizer.json").is_file()
    assert json.loads((baseline / "text" / "attempts-ar-rl.json").read_text())["step"] == STEPS


@pytest.mark.distributed
def test_the_baseline_is_stopped_in_the_middle_of_a_batch_and_goes_on(two_processes: ProcessGroup, baseline: Path) -> None:
    for name in ("text-whole", "text-parts"):
        shutil.copytree(baseline / "text" / "models" / "ar", baseline / name / "models" / "ar")
    for place, at in (("thinking", 2), ("judging", 2), ("remembering text", 1)):
        answers = two_processes.run(stopped, baseline, "text-parts", "text", place, at, timeout=280)
        assert answers == [("interrupted", 0, True), ("interrupted", at, True)], place
    for name in ("text-whole", "text-parts"):
        answers = two_processes.run(stopped, baseline, name, "text", "judging", 0, timeout=280)
        assert [status for status, *_ in answers] == ["finished"] * 2
    first, second = (weights(baseline, name, "ar-rl") for name in ("text-whole", "text-parts"))
    assert first and {key: second[key].equal(value) for key, value in first.items()} == dict.fromkeys(first, True)
    assert metrics(baseline, "text-parts") == metrics(baseline, "text-whole")


@pytest.mark.distributed
def test_two_ranks_teach_the_baseline_what_one_process_does(
    one_process: ProcessGroup, two_processes: ProcessGroup, baseline: Path
) -> None:
    if not (baseline / "text" / "models" / "ar-rl").is_dir():
        one_process.run(by_text, baseline, "text")
    if not (baseline / "text-whole" / "models" / "ar-rl").is_dir():
        shutil.copytree(baseline / "text" / "models" / "ar", baseline / "text-whole" / "models" / "ar")
        two_processes.run(stopped, baseline, "text-whole", "text", "judging", 0, timeout=280)
    one, two = ([row for row in metrics(baseline, name) if "answers" in row] for name in ("text", "text-whole"))
    assert len(one) == STEPS
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    first, second = (weights(baseline, name, "ar-rl") for name in ("text", "text-whole"))
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")


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


def spoiled(world: World, root: Path, name: str) -> str:
    """Stage 3 in which what the old model predicts for its attempts is no number; how it ended."""
    batch = steps.OwnSteps._batch

    def without_numbers(*about: Any) -> Any:
        found = batch(*about)
        return replace(found, old_prediction=found.old_prediction * math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.OwnSteps, "_batch", without_numbers)
        try:
            return reinforce(world, root, name, 0, 3)
        except NonFiniteError as error:
            return str(error)


def test_attempts_that_are_not_finite_are_not_said_to_be_left_out(one_process: ProcessGroup, start: Path) -> None:
    """They come again as they were; only gold records can be left out."""
    prepared(start, "spoiled")
    (message,) = one_process.run(spoiled, start, "spoiled")
    assert "phase rl, step 1: not finite: loss on rank 0" in message and "skip_samples" not in message
    assert "start the same command with a lower learning rate (rl.train.lr=... run.allow_changes=[rl.train.lr])" in message


@pytest.mark.distributed
def test_a_reward_that_never_returns_on_one_rank_ends_the_run_on_all(two_processes: ProcessGroup, start: Path) -> None:
    prepared(start, "slow")
    for message in two_processes.run(nothing_in_time, start, "slow"):
        assert "rl.reward=tests.toy_reward:never_on_the_last_rank, at question '" in message
        assert "did not return within 0.2 seconds: make it faster, or raise rl.reward_seconds" in message


def nothing_in_time(world: World, root: Path, name: str) -> str:
    return ended(world, root, name, reward="tests.toy_reward:never_on_the_last_rank", reward_seconds=0.2)


def patience_while_asking(world: World, root: Path) -> list[Any]:
    """The longest waits in force, in order, and when questions were asked, and attempts learned from."""
    events: list[Any] = []
    ask, backward = Asker.ask, Engine.backward

    def asked(*arguments: Any) -> Any:
        events.append("asked")
        return ask(*arguments)

    def learned(*arguments: Any, **named: Any) -> None:
        events.append("learned")
        backward(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "wait_at_most", lambda self, minutes: events.append(minutes))
        patch.setattr(Asker, "ask", asked)
        patch.setattr(Engine, "backward", learned)
        reinforce(world, root, "patient", 0, 8)
    return events


def test_ranks_wait_for_the_slowest_ones_answers_as_long_as_in_an_evaluation(one_process: ProcessGroup, start: Path) -> None:
    """Not as long as for one that is lost within a step."""
    prepared(start, "patient")
    (events,) = one_process.run(patience_while_asking, start)
    places = [place for place, event in enumerate(events) if event == "asked"]
    assert len(places) > 1 and all(events[place - 1] == APART_MINUTES for place in places)
    in_steps = [events[place - 1] for place, event in enumerate(events) if event == "learned" and place > places[1]]
    assert APART_MINUTES not in in_steps and Config().deepspeed.step_timeout_minutes in in_steps
