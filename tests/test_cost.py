"""The cost of generating against torch's own count of operations, and against passes counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ladir.inference.ar import complete
from ladir.inference.cost import Cost, count_cost
from ladir.models.backbone import Backbone
from tests.test_reasoner import QUESTIONS, tiny_reasoner
from tests.tiny import EOS, SHAPES, tiny_lm

LONG = " ".join("abcdefghijklmnopqrstuvw")


@pytest.mark.parametrize("kind", SHAPES)
def test_the_baselines_operations_and_passes(kind: str) -> None:
    backbone, prompts = Backbone(tiny_lm(kind)), [[5, 6, 7], [8]]
    with FlopCounterMode(display=False) as counter, count_cost(backbone) as cost:
        texts = complete(backbone, prompts, ["a", "b"], 3, EOS, max_tokens=5, temperature=1.0, seed=0)
    # torch also counts the products of positions and rotary frequencies
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.flops <= counter.get_total_flops()
    steps = sum(len(text) - (len(text) == 5) for group in texts for text in group)  # the last token of a cut text is not read
    assert cost.passes == len(prompts) + steps
    assert cost.seconds > 0


@pytest.mark.parametrize(("guidance", "carry"), [(1.0, "none"), (2.0, "none"), (2.0, "hidden")])
def test_ladirs_operations_and_passes(guidance: float, carry: str) -> None:
    reasoner = tiny_reasoner(guidance_scale=guidance, max_blocks=2, max_answer_tokens=4, carry=carry)
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)  # two blocks each
    with FlopCounterMode(display=False) as counter, count_cost(reasoner.denoiser) as cost:
        groups = reasoner.generate(QUESTIONS, 2, thoughts=False)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    branches = 2 if guidance != 1 else 1
    rows, blocks = 2 * len(QUESTIONS), 2
    # steps and the finished block for every branch; <SOA> and answer tokens for one
    thinking = branches * (len(QUESTIONS) + rows * blocks * (reasoner.settings.num_steps + 1))
    words = [len(trajectory.answer.split()) for group in groups for trajectory in group]
    assert thinking + rows <= cost.passes <= thinking + rows + sum(words)


def test_a_shared_prefix_costs_what_a_copied_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    costs = []
    for shortest in (16, 1000):
        monkeypatch.setattr("ladir.inference.cache.SHORTEST_SHARED", shortest)
        with count_cost(reasoner.denoiser) as cost:
            reasoner.generate([LONG], 3, thoughts=False)
        costs.append(cost)
    assert (costs[0].passes, costs[0].flops) == (costs[1].passes, costs[1].flops)


def test_nothing_counts_outside_and_reading_is_counted_apart() -> None:
    reasoner = tiny_reasoner()
    with count_cost(reasoner.denoiser) as cost:
        groups = reasoner.generate(QUESTIONS, thoughts=False)
    before = (cost.passes, cost.flops)
    with count_cost(reasoner.thought_decoder.backbone, reasoner.thought_decoder.from_latent) as reading:
        reasoner.read_thoughts([trajectory for group in groups for trajectory in group])
    reasoner.generate(QUESTIONS)
    assert (cost.passes, cost.flops) == before
    assert reading.passes > 0 and reading.flops > 0
    assert Cost(6.0, 9, 12).share(3) == Cost(2.0, 3.0, 4.0)
