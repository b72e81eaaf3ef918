"""Norms and rotary positions in few operators against transformers' own, forward and backward; what a layer then launches."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from ladir.config import Config, RlSettings, SampleSettings
from ladir.data.batches import DenoiserCollator
from ladir.models import lean
from ladir.models.backbone import Backbone
from ladir.models.later import PassGroup
from ladir.rl.batches import Attempt, JudgedCollator
from ladir.rl.beside import BesideBatch
from ladir.rl.policy import Policy
from tests.tiny import SHAPES, randomise, tiny_lm
from training.planning.models import Lengths, meta_model, micro_batch
from training.planning.trace import trace_inference, trace_training

#: a shape on the meta device, which stands for a GPU
VOCAB, LENGTHS, CONFIG = 64, Lengths(question=9, blocks=3, block=5, answer=5), Config()
CONFIG.backbone.dtype = "bfloat16"
CONFIG.backbone.scratch = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIG.vae.latent_dim, CONFIG.data.max_blocks, CONFIG.rollout.num_steps = 3, 3, 3

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def outcome(lm: PreTrainedModel, inputs: Tensor) -> dict[str, Tensor]:
    """Last hidden states of two rows at positions of their own, and every gradient."""
    lm.zero_grad()
    given = inputs.clone().requires_grad_()
    positions = torch.stack([torch.arange(inputs.shape[1]), torch.arange(inputs.shape[1]) + 3]).to(inputs.device)
    hidden = lm.get_decoder()(inputs_embeds=given, position_ids=positions, use_cache=False).last_hidden_state
    (hidden.double() * torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)).sum().backward()
    found = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    assert given.grad is not None and len(found) > 8
    return {"hidden": hidden.detach(), "inputs": given.grad, **{name: grad.clone() for name, grad in found.items()}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_lean_model_gives_transformers_values_and_gradients(kind: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(kind, dtype=dtype)
    file = sys.modules[type(lm).__module__]
    inputs = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        as_transformers_has_it(patch, file)
        expected = outcome(lm, inputs)
    lean.lean_layers(lm)
    assert hasattr(file.apply_rotary_pos_emb, "plain") and hasattr(type(lm.get_decoder().norm), "plain")
    actual = outcome(lm, inputs)
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "hidden")
    for name, value in expected.items():
        scale = float(value.abs().max()) if name == "hidden" else largest
        assert float((actual[name] - value).abs().max()) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_norm_is_transformers_to_the_last_bit_and_keeps_its_input_and_a_number(dtype: torch.dtype) -> None:
    plain = modeling_llama.LlamaRMSNorm(8, eps=1e-5).to(dtype)
    randomise(plain, seed=2)
    x = torch.randn(3, 5, 8, dtype=dtype, generator=torch.Generator().manual_seed(3), requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        normed = lean._Norm.apply(x, plain.weight, plain.variance_epsilon)
    assert torch.equal(normed, plain(x))
    assert sorted(tensor.numel() for tensor in kept) == [8, 15, 120]


def test_a_norms_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # transformers computes in fp32 whatever it is given
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, weight: lean._Norm.apply(x, weight, 1e-3), (x, weight))


def test_turning_back_is_the_gradient_of_turning() -> None:
    q, k = (torch.randn(2, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    angle = torch.randn(2, 3, 3, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    assert torch.autograd.gradcheck(lambda q, k: lean._Turn.apply(q, k, cos, sin), (q, k))
    plain = modeling_qwen3.apply_rotary_pos_emb
    expected = getattr(plain, "plain", plain)(q, k, cos, sin)
    for actual, value in zip(lean._Turn.apply(q, k, cos, sin), expected, strict=True):
        torch.testing.assert_close(actual, value)


def layer_launches(step: Callable[[int], int]) -> float:
    """Operators that a layer adds to a step: of four layers against two."""
    return (step(4) - step(2)) / 2


def rollout_step(layers: int, gradient_steps: int | None = None) -> int:
    """Ten Euler steps for each block, as the 8B files have it."""
    model = meta_model(CONFIG, "rollout", "none", layers)
    model.settings = replace(CONFIG.rollout, num_steps=10, gradient_steps=gradient_steps)  # type: ignore[assignment]
    return trace_training(model, micro_batch(CONFIG, "rollout", LENGTHS, 2, VOCAB)).launches


def update(layers: int, algorithm: str, together: bool) -> int:
    """The old model's pass and those that learn, of attempts and of gold records."""
    rl = RlSettings(algorithm=algorithm)
    policy = Policy(meta_model(CONFIG, "rl", "none", layers), rl, SampleSettings())  # type: ignore[arg-type]
    gold = micro_batch(CONFIG, "rl", LENGTHS, 2, VOCAB)
    zeros = np.zeros(CONFIG.vae.latent_dim, dtype=np.float32)
    steps = torch.zeros(2, 2, 2, CONFIG.vae.latents_per_block, CONFIG.vae.latent_dim)
    tried = Attempt([1] * 9, [1] * 5, steps[:, 0, 0], 0.7, 0.5, steps=steps, times=((0.8, 0.7), (0.5, 0.4)))
    collate = JudgedCollator.of(DenoiserCollator(CONFIG.denoiser, zeros, zeros + 1, 1, 0, 2), rl, 0)
    batch = collate([tried, tried], [0, 1]).to("meta")
    beside = gold if together and algorithm == "flow_grpo" else None
    old = trace_inference(policy, lambda: policy.remembered(batch, beside), batch).launches
    judged = policy.remembered(batch, beside)
    batches = [BesideBatch.of(judged, gold)] if together else [judged, gold]
    return old + sum(trace_training(policy, batch).launches for batch in batches)


def as_transformers_has_it(patch: pytest.MonkeyPatch, file: Any = modeling_llama) -> None:
    """Models of that file made from here on have norms and rotary positions in transformers' own operators."""
    patch.setattr(lean, "_LIKE_LLAMA", frozenset())
    turn = file.apply_rotary_pos_emb
    patch.setattr(file, "apply_rotary_pos_emb", getattr(turn, "plain", turn))


@pytest.mark.parametrize("algorithm", ["nft", "flow_grpo"])
def test_an_update_of_few_attempts_launches_less_than_a_third(algorithm: str) -> None:
    """Of what it did with transformers' operators and a pass of their own for gold records; with such a pass half."""
    Backbone(tiny_lm())
    now, apart = (layer_launches(partial(update, algorithm=algorithm, together=together)) for together in (True, False))
    with pytest.MonkeyPatch.context() as patch:
        as_transformers_has_it(patch)
        before = layer_launches(partial(update, algorithm=algorithm, together=False))
    assert 0 < now < before / 3 and apart < before / 2


def test_a_rollout_step_launches_less_than_half_and_a_third_with_gradient_through_four_steps() -> None:
    Backbone(tiny_lm())
    now, through_four = (layer_launches(partial(rollout_step, gradient_steps=steps)) for steps in (None, 4))
    with pytest.MonkeyPatch.context() as patch:
        as_transformers_has_it(patch)
        patch.setattr(PassGroup, "linear", lambda self, layer, x: F.linear(x, layer.weight, layer.bias))
        before = layer_launches(rollout_step)
    assert 0 < now < 0.45 * before and through_four < before / 3


def test_a_lean_model_goes_through_a_pickle_and_a_copy() -> None:
    lm = tiny_lm()
    Backbone(lm)
    inputs = torch.randn(1, 4, 16, dtype=lm.dtype)
    expected = lm.get_decoder()(inputs_embeds=inputs).last_hidden_state
    for again in (pickle.loads(pickle.dumps(lm)), copy.deepcopy(lm)):  # noqa: S301, our own
        assert type(again.get_decoder().norm) is type(lm.get_decoder().norm)
        assert torch.equal(again.get_decoder()(inputs_embeds=inputs).last_hidden_state, expected)


def test_other_architectures_stay_as_they_are() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma", hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=29,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    Backbone(lm)
    assert not any(hasattr(type(module), "plain") for module in lm.modules())  # its norms multiply by 1 + weight
