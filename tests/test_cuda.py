"""The same code on a CUDA device: engines, resuming, sampling.  Its results are those of a CPU; nothing waits for the device."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladir.models.lean import lean_layers
from ladir.reasoner import Reasoner
from tests.distributed import ProcessGroup
from tests.test_engine import assert_like_the_reference, averages, unused_branch
from tests.test_lean import TOLERANCE, as_transformers_has_it, outcome
from tests.test_loop import assert_identical, run_with, toy_settings
from tests.test_reasoner import QUESTIONS, assert_same, tiny_reasoner
from tests.test_steps import REPLAYED, a_block, assert_replayed_is_plain
from tests.tiny import tiny_lm
from training.runtime.distributed import World
from training.runtime.host_room import HostRoom

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: what runs on CUDA, and there is no GPU here"),
]


@pytest.mark.parametrize("config", ["0", "2", "3", "3_offload"])
def test_an_engine_steps_as_plain_pytorch_on_a_cpu(one_process: ProcessGroup, config: str) -> None:
    """Offloaded state is stepped by DeepSpeed's own kernel, which it compiles first."""
    [result] = one_process.run(unused_branch, config, timeout=280)
    assert_like_the_reference(result)


@pytest.mark.parametrize("config", ["0", "3"])
def test_averaged_weights_equal_a_reference(one_process: ProcessGroup, config: str) -> None:
    [result] = one_process.run(averages, config, "bfloat16")
    assert result["gap"] < 2e-2 and result["distance"] > 5e-3 and result["loss_gap"] < 2e-2 and result["restored"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_continues_exactly(one_process: ProcessGroup, tmp_path: Path, optimizer: str) -> None:
    settings = toy_settings(max_steps=9, ema=0.9, validate_every=4, micro_batch=2, optimizer=optimizer)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one_process.run(run_with, whole, 3, "bfloat16", settings)
    [outcome] = one_process.run(run_with, parts, 3, "bfloat16", settings, 23)
    assert outcome.status == "interrupted"
    one_process.run(run_with, parts, 3, "bfloat16", settings)
    assert_identical(parts, whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_lean_model_gives_transformers_values_and_gradients(kind: str, dtype: torch.dtype) -> None:
    lm, inputs = tiny_lm(kind, dtype=dtype).cuda(), torch.randn(2, 7, 16).to("cuda", dtype)
    with pytest.MonkeyPatch.context() as patch:
        as_transformers_has_it(patch, sys.modules[type(lm).__module__])
        expected = outcome(lm, inputs)
    lean_layers(lm)
    actual = outcome(lm, inputs)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((actual[name] - value).abs().max()) <= TOLERANCE[dtype] * largest, name


def copied_to_the_host(world: World) -> tuple[bool, bool, int]:
    """Whether the room that takes a GPU's state is page-locked, holds that state, and its bytes beyond it."""
    state = torch.randn(1_000_003, device="cuda")
    room = HostRoom()
    ((_, copies, _),) = room.copies([("master", {"weight": state, "bias": state[:7]}, {})])
    same = torch.equal(copies["weight"], state.cpu()) and torch.equal(copies["bias"], state[:7].cpu())
    return copies["weight"].is_pinned(), same, room._bytes.nbytes - state.nbytes


def test_a_checkpoint_s_copy_is_page_locked_and_no_larger_than_the_state(one_process: ProcessGroup, tmp_path: Path) -> None:
    ((pinned, same, beyond),) = one_process.run(copied_to_the_host)
    assert pinned and same and beyond < 1000
    settings = toy_settings(max_steps=6, checkpoint_every=2, ema=0.9)
    one_process.run(run_with, tmp_path / "behind", 3, "bfloat16", {**settings, "checkpoint_in_background": True})
    one_process.run(run_with, tmp_path / "at-once", 3, "bfloat16", settings)
    assert_identical(tmp_path / "behind", tmp_path / "at-once")


def on_cuda(reasoner: Reasoner) -> Reasoner:
    assert reasoner.encoder is not None
    vae = reasoner.encoder.cuda()
    return Reasoner(reasoner.denoiser.cuda(), vae.thought_decoder, reasoner.tokenizer, reasoner.settings, vae)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"guidance_scale": 2.0, "diversity_scale": 0.5, "sampler": "sde"},
        {"restarts": 1, "reencode": True, "spacing": "cosine"},
        {"span": 2},
        {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1, "restart_steps": 5},
        {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1, "restart_steps": 5, "restart_keeps_state": True, "span": 2},
    ],
    ids=lambda controls: "-".join(controls) or "plain",
)
def test_trajectories_are_those_of_a_cpu(attention: str, controls: dict[str, Any]) -> None:
    ours, theirs = (
        made.generate(QUESTIONS, num_trajectories=4, num_steps=6, seed=3)
        for made in (on_cuda(tiny_reasoner(attention=attention, **controls)), tiny_reasoner(attention=attention, **controls))
    )
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        one.latents = one.latents.cpu()
        assert_same(one, other, atol=1e-4)


def unwaiting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, which fails where it waits for the device."""

    def strict(*args: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict


@torch.no_grad()
@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"sampler": "sde", "guidance_scale": 2.0},
        {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1},
        {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1, "restart_keeps_state": True},
    ],
    ids=lambda controls: "-".join(controls) or "plain",
)
def test_no_denoising_step_waits_for_the_device(controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, prefix, owner = a_block(on_cuda(tiny_reasoner(**controls)))
    for name in ("_velocity", "_bent", "_advance"):
        monkeypatch.setattr(sampler, name, unwaiting(getattr(sampler, name)))
    assert torch.isfinite(sampler.sample_span(prefix, list(range(6)), owner, 0, None)).all()


@pytest.mark.parametrize("controls", REPLAYED, ids=lambda controls: "-".join(controls) or "plain")
def test_replayed_steps_equal_plain_ones_and_cost_as_much(controls: dict[str, Any]) -> None:
    assert_replayed_is_plain(on_cuda(tiny_reasoner(num_steps=6, **controls)))
