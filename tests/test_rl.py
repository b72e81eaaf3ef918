"""What stage 3 computes: groups, DiffusionNFT and tokens against written-out references, a toy whose best is known, rewards."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladir.config import Config, RlSettings, SampleSettings
from ladir.config.checks import validate
from ladir.config.loader import ConfigError, load_config
from ladir.data.batches import ArCollator, DenoiserBatch
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.evaluation.results import Trajectory, judge
from ladir.inference.cache import Prefix
from ladir.inference.sampler import BlockSampler, KeptSteps, TrajectoryNoise, step_times
from ladir.layout import Mark
from ladir.models import flow
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.reference import clean_group, objective_target, plain_forward, question_groups, span_hidden
from ladir.rl.batches import Attempt, JudgedBatch, JudgedCollator
from ladir.rl.beside import BesideBatch
from ladir.rl.groups import advantages, has_signal, optimality
from ladir.rl.lines import Answered, Group, Line, best_and_worst, figures
from ladir.rl.nft import nft_loss
from ladir.rl.policy import Policy
from ladir.rl.rewards import reward_function
from ladir.rl.steps import path_divergence, path_log_density
from ladir.rl.text import JudgedTextCollator, TextPolicy
from ladir.rl.tokens import clipped, clipped_loss
from ladir.spans import with_room
from ladir.tasks import get_task
from tests.tiny import EOS, assert_same_gradients, collator, gradients, random_records, tiny_denoiser, tiny_lm
from training.reinforcement.steps import share_attempts
from training.runtime.distributed import World

# --- groups ------------------------------------------------------------------------------------------------------------


def test_a_reward_counts_relative_to_its_group() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0.5, 0.25, 0.75, 0.5]])
    assert has_signal(rewards).tolist() == [True, False, False, True]
    found = advantages(rewards)
    torch.testing.assert_close(found[0], torch.tensor([3.0, -1, -1, -1], dtype=torch.float64) / 3**0.5)
    assert not found[1:3].any()
    assert found.sum(-1).abs().max() < 1e-12
    assert optimality(rewards, 1.0)[0].tolist() == pytest.approx([1.0, *[0.5 - 0.5 / 3**0.5] * 3])
    assert optimality(rewards, 2.0)[0].tolist() == pytest.approx([0.5 + 0.25 * 3**0.5, *[0.5 - 0.25 / 3**0.5] * 3])


# --- DiffusionNFT ------------------------------------------------------------------------------------------------------


def written_out(new: Tensor, old: Tensor, target: Tensor, r: float, beta: float) -> Tensor:
    """Equation 5 of arXiv 2509.16117, of one block."""
    positive = (1 - beta) * old + beta * new
    negative = (1 + beta) * old - beta * new
    return r * ((positive - target) ** 2).sum() + (1 - r) * ((negative - target) ** 2).sum()


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_the_loss_is_the_papers(beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, target = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    new.requires_grad_()
    r = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    loss = nft_loss(new, old, target, r, beta)
    expected = torch.stack([written_out(new[i], old[i], target[i], float(r[i]), beta) for i in range(4)])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.sum(), new, retain_graph=True)[0] for value in (loss, expected)), rtol=1e-12, atol=1e-12
    )


def test_at_the_old_model_good_attempts_pull_and_bad_ones_push() -> None:
    old, target = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    new = old.clone().requires_grad_()
    nft_loss(new, old, target, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), 1.0).sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, 2 * (old - target) * torch.tensor([1.0, 0.0, -1.0])[:, None, None])


@pytest.mark.parametrize("objective", ["velocity", "epsilon", "v"])
def test_a_mixture_of_predictions_is_the_mixture_of_their_velocities(objective: str) -> None:
    generator = torch.Generator().manual_seed(3)
    new, old, z_t = torch.randn(3, 5, 2, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)[:, None, None]
    mixed = flow.to_velocity(objective, (1 - 1.7) * old + 1.7 * new, z_t, t)
    apart = (1 - 1.7) * flow.to_velocity(objective, old, z_t, t) + 1.7 * flow.to_velocity(objective, new, z_t, t)
    torch.testing.assert_close(mixed, apart)


def test_of_two_modes_the_rewarded_one_is_left() -> None:
    """A number that is -1 or 1; a small network learns the flow, then that 1 is good."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)

    def predict(model: nn.Module, z: Tensor, t: Tensor) -> Tensor:
        clean: Tensor = model(torch.cat([z, t], -1))
        return clean

    @torch.no_grad()
    def sample(model: nn.Module, count: int) -> Tensor:
        z = torch.randn(count, 1)
        for now, then in itertools.pairwise(torch.linspace(1, 0, 9)):
            z = z + (then - now) * (z - predict(model, z, now.expand(count, 1))) / now
        return z

    def step(loss: Callable[[Tensor, Tensor], Tensor], z0: Tensor) -> None:
        t = torch.rand(len(z0), 1)
        z_t = (1 - t) * z0 + t * torch.randn_like(z0)
        optimizer.zero_grad()
        loss(z_t, t).mean().backward()
        optimizer.step()

    for _ in range(300):
        z0 = torch.randint(0, 2, (128, 1)) * 2.0 - 1 + 0.05 * torch.randn(128, 1)
        step(lambda z_t, t, z0=z0: (predict(network, z_t, t) - z0).square(), z0)  # type: ignore[misc]
    assert 0.3 < float((sample(network, 500) > 0).float().mean()) < 0.7
    old = nn.Sequential(*(type(layer)(*layer.weight.T.shape) if isinstance(layer, nn.Linear) else nn.SiLU() for layer in network))
    old.load_state_dict(network.state_dict())
    for _ in range(40):
        z0 = sample(old, 128)
        r = optimality((z0[:, 0] > 0).double()[None], 1.0)[0].float() if bool(has_signal((z0[:, 0] > 0).double()[None])) else None
        if r is None:
            break
        for _ in range(4):

            def loss(z_t: Tensor, t: Tensor, z0: Tensor = z0, r: Tensor = r) -> Tensor:
                with torch.no_grad():
                    before = predict(old, z_t, t)
                return nft_loss(predict(network, z_t, t)[:, None], before[:, None], z0[:, None], r, 1.0)

            step(loss, z0)
        with torch.no_grad():
            for kept, new in zip(old.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 0.5)
    samples = sample(network, 500)
    assert float((samples > 0).float().mean()) > 0.97
    assert float((samples - 1).abs().median()) < 0.25


# --- the packed pass ---------------------------------------------------------------------------------------------------


def attempts(count: int, seed: int) -> list[Attempt]:
    worth = [(1.0, 0.5), (None, -1.25), (0.2, 0.0), (None, 0.0)]
    records = random_records(count, seed=seed)
    return [
        Attempt(record.question, record.answer, record.mu, *worth[place % 4], ended=place % 3 != 1)
        for place, record in enumerate(records)
    ]


def test_attempts_stand_as_the_text_that_was_read() -> None:
    denoiser, records = tiny_denoiser(tiny_lm(), context="text", lm_weight=1.0, condition_dropout=0.0), random_records(3, seed=8)
    answered = (Answered([5], Trajectory("x", True, "x"), 1.0, True),)
    for record in records:
        line = Line(record.mu, answered, sentences=record.blocks)
        assert Group("q", record.question, (line,)).attempts(1.0)[0].sentences == record.blocks
    tried = [Attempt(r.question, r.answer, r.mu, 1.0, 0.5, sentences=r.blocks) for r in records]
    batch = judged(RlSettings(policy="both"), denoiser)(tried, [0, 1, 2]).attempts
    known = collator(denoiser)(records, [0, 1, 2], True, True)
    assert torch.equal(batch.text_ids, known.text_ids) and torch.equal(batch.table_index, known.table_index)
    assert torch.equal(batch.layout.visible(), known.layout.visible())
    assert len(known.word_labels) and not len(batch.word_labels)  # nobody says that it is right


def judged(settings: RlSettings, denoiser: Denoiser) -> JudgedCollator:
    return JudgedCollator.of(collator(denoiser), settings, seed=23)


def predicted(d: Denoiser, attempt: Attempt, drawn: DenoiserBatch, rows: slice, start: int, draw: int) -> Tensor:
    """What is predicted of a span's noisy copy [J, L, d]: the blocks ``rows`` of the batch, the attempt's from ``start`` on."""
    z0, eps, t = drawn.z0[rows], drawn.eps[rows, draw], drawn.t[rows, draw]
    before = question_groups(d, attempt.question, hidden=False)
    before += [clean_group(d, z) for z in drawn.z0[rows.start - start : rows.start]]
    hidden = span_hidden(d, before, (1 - t[:, None, None]) * z0 + t[:, None, None] * eps, t)
    return F.linear(hidden, d.latent_out.weight, d.latent_out.bias).float()


def nft_of(new: Denoiser, old: Denoiser, attempt: Attempt, drawn: DenoiserBatch, first: int, beta: float) -> Tensor:
    """An attempt's loss, one sequence per span and draw; its blocks are the batch's from ``first`` on."""
    loss, span = torch.zeros((), dtype=torch.float64), new.settings.span
    for start, draw in itertools.product(range(0, len(attempt.latents), span), range(drawn.t.shape[1])):
        rows = slice(first + start, first + start + span)
        t = drawn.t[rows, draw]
        after = predicted(new, attempt, drawn, rows, start, draw)
        before = predicted(old, attempt, drawn, rows, start, draw).detach()
        wanted = objective_target(new.settings.objective, drawn.z0[rows], drawn.eps[rows, draw], t[:, None, None])
        for place in (t > 0).nonzero()[:, 0].tolist():
            assert attempt.optimality is not None
            loss = loss + written_out(after[place], before[place], wanted[place], attempt.optimality, beta)
    return loss


def logprobs(d: Denoiser, attempt: Attempt, z0: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [A + 1, V] at the answer's places behind finished blocks ``z0`` [B, L, d]."""
    groups = [*question_groups(d, attempt.question, hidden=False), *(clean_group(d, z) for z in z0)]
    groups += [d.marks.weight[Mark.SOA][None], *d.backbone.embed(torch.tensor(attempt.answer)).split(1)]
    hidden = plain_forward(d.backbone, groups)[-len(attempt.answer) - 1 :]
    return (d.backbone.logits(hidden).float() / temperature).log_softmax(-1)


def reference(
    new: Denoiser, old: Denoiser, drawn: DenoiserBatch, tried: Sequence[Attempt], settings: RlSettings, temperature: float
) -> dict[str, Tensor]:
    """Both losses, of one short sequence per span and draw and of one per answer."""
    losses = dict.fromkeys(("nft", "answers"), torch.zeros((), dtype=torch.float64))
    first, span = 0, new.settings.span
    for attempt in tried:
        if attempt.optimality is not None:
            losses["nft"] = losses["nft"] + nft_of(new, old, attempt, drawn, first, settings.beta)
        z0 = drawn.z0[first : first + len(attempt.latents)]
        after, before = logprobs(new, attempt, z0, temperature), logprobs(old, attempt, z0, temperature).detach()
        for place, token in enumerate([*attempt.answer, EOS][: len(attempt.answer) + attempt.ended]):
            ratio = (after[place, token] - before[place, token]).exp()
            bounded = ratio.clamp(1 - settings.token_clip, 1 + settings.token_clip)
            losses["answers"] = losses["answers"] - torch.minimum(ratio * attempt.advantage, bounded * attempt.advantage)
        first += with_room(len(attempt.latents), span)
    return losses


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("latents", {"objective": "x0"}),
        ("both", {"draws": 2, "condition_dropout": 0.5, "token_weight": 0.5}),
        ("both", {"span": 2, "draws": 1, "objective": "v"}),
        ("answer", {"draws": 1}),
    ],
)
def test_a_packed_pass_equals_a_pass_per_block_and_answer(policy: str, changes: dict[str, Any]) -> None:
    new, old = (tiny_denoiser(tiny_lm(seed=seed), seed=seed, **{"draws": 2, **changes}) for seed in (3, 4))
    with torch.no_grad():  # near one another, as models are where ratios are not all clipped
        for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
            mine.copy_(theirs + 0.05 * (mine - theirs))
    settings, tau = dataclasses.replace(RlSettings(), policy=policy, beta=0.8), 0.7
    tried = attempts(5, seed=1)
    sample = SampleSettings(answer_temperature=tau)
    batch = Policy(old, settings, sample).remembered(judged(settings, new)(tried, list(range(5))))
    model = Policy(new, settings, sample)
    losses = {name: value for name, value in model(batch).items() if "/" not in name}
    wanted = {"latents": ["nft"], "answer": ["answers"], "both": ["nft", "answers"]}[policy]
    assert list(losses) == wanted == list(batch.counts)
    torch.stack(list(losses.values())).sum().backward()
    actual = gradients(new)
    new.zero_grad()
    expected = reference(new, old, batch.attempts, tried, settings, tau)
    for name in wanted:
        torch.testing.assert_close(losses[name].double(), expected[name].double(), rtol=2e-5, atol=2e-5)
    torch.stack([expected[name].double() for name in wanted]).sum().backward()
    assert_same_gradients(actual, gradients(new), 2e-5)
    if "answers" in wanted:
        assert batch.counts["answers"] == sum(len(a.answer) + a.ended for a in tried if a.advantage)


@pytest.mark.parametrize(
    ("policy", "changes", "pack"),
    [
        ("latents", {"objective": "x0", "token_weight": 0.5}, 0),
        ("both", {"span": 2, "draws": 1, "carry": "hidden", "carry_probability": 1.0, "time_token": True}, 0),
        ("answer", {"condition_dropout": 0.5}, 40),
    ],
)
def test_attempts_beside_gold_records_learn_in_one_pass_what_they_do_in_two(
    policy: str, changes: dict[str, Any], pack: int
) -> None:
    denoiser, old = (tiny_denoiser(tiny_lm(seed=seed), **{"draws": 2, **changes}) for seed in (3, 3))
    settings, sample = dataclasses.replace(RlSettings(), policy=policy), SampleSettings()
    teacher = dataclasses.replace(collator(denoiser), pack_tokens=pack)
    gold = teacher(random_records(3, seed=8), [0, 1, 2])
    batch = JudgedCollator.of(teacher, settings, seed=23)(attempts(5, seed=1), list(range(5)))
    batch, model = Policy(old, settings, sample).remembered(batch), Policy(denoiser, settings, sample)
    assert_the_same_in_one_pass(model, batch, gold)


def assert_the_same_in_one_pass(model: nn.Module, judged: Any, gold: Any) -> None:
    """Losses, metrics, counts and gradients."""
    both = BesideBatch.of(judged, gold)
    assert both.counts == {**judged.counts, **gold.counts} and both.num_tokens == judged.num_tokens + gold.num_tokens
    expected, found = {**model(judged), **model(gold)}, model(both)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    sides = []
    for losses in (found, expected):
        model.zero_grad()
        torch.stack([value.double() for name, value in losses.items() if "/" not in name]).sum().backward()
        sides.append(gradients(model))
    assert_same_gradients(sides[0], sides[1], 1e-5)


def test_what_does_not_count_teaches_nothing_and_noise_is_the_attempts_own() -> None:
    denoiser = tiny_denoiser(tiny_lm(), draws=2)
    model, collate = Policy(denoiser, RlSettings(), SampleSettings()), judged(RlSettings(), denoiser)
    tried = [attempt for attempt in attempts(8, seed=2) if attempt.optimality is not None]
    nothing = model.remembered(collate(tried[:2], [8, 9], counted=0))
    assert nothing.counts == {"nft": 0.0} and model(nothing)["nft"].item() == 0
    both, second = collate(tried[:2], [8, 9]), collate(tried[1:2], [9])
    blocks = len(tried[1].latents)
    torch.testing.assert_close(both.attempts.eps[-blocks:], second.attempts.eps)
    assert both.attempts.t[-blocks:].equal(second.attempts.t)


# --- steps -------------------------------------------------------------------------------------------------------------


def test_a_random_step_keeps_the_marginals_and_without_randomness_is_eulers() -> None:
    z0, eps, fresh = torch.randn(3, 20000, 1, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    t, s = 0.8, 0.5
    z_t = (1 - t) * z0 + t * eps
    mean, deviation = flow.transition(z_t, eps - z0, t, s, 0.0)
    assert deviation == 0
    torch.testing.assert_close(mean, z_t + (s - t) * (eps - z0))
    for randomness in (0.5, 1.0):
        mean, deviation = flow.transition(z_t, eps - z0, t, s, randomness)
        left = mean + deviation * fresh - (1 - s) * z0
        assert float(left.std()) == pytest.approx(s, rel=0.02)  # noise of the right size, whatever part of it is fresh
    assert deviation == pytest.approx(s / t * (t**2 - ((1 - t) / (1 - s) * s) ** 2) ** 0.5)
    mean, deviation = flow.transition(z_t, eps - z0, 1.0, s)
    assert deviation == s  # from noise alone nothing of it is kept


def test_the_density_of_a_step_is_a_gaussians_and_its_gradient_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(5)
    z_t, velocity, after = torch.randn(3, 4, 2, 2, 3, generator=generator, dtype=torch.float64)
    times = ((0.9, 0.7), (0.5, 0.3))
    velocity.requires_grad_()
    found = path_log_density(z_t, velocity, after, times, randomness=0.7, noise=2.0)
    for place, (t, s) in enumerate(times):
        mean, deviation = flow.transition(z_t[:, place], velocity[:, place], t, s, 0.7)
        expected = torch.distributions.Normal(mean, 2.0 * deviation).log_prob(after[:, place]).mean((-2, -1))
        torch.testing.assert_close(found[:, place], expected)
    old = found.detach()
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)[:, None]

    def loss(velocity: Tensor) -> Tensor:
        return clipped_loss(path_log_density(z_t, velocity, after, times, 0.7, 2.0), old, advantage, 0.5).sum()

    assert torch.autograd.gradcheck(loss, velocity)
    (gradient,) = torch.autograd.grad(loss(velocity), velocity)
    assert gradient[:3].abs().min() > 0 and not gradient[3].any()  # at the start, where all ratios are 1


def test_the_divergence_from_the_start_is_that_of_gaussians() -> None:
    """Per element, of the new model's steps from the start's, in float64, and its gradient that of finite differences."""
    z_t, velocity, start = torch.randn(3, 4, 2, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    times = ((1.0, 0.8), (0.5, 0.3))
    velocity.requires_grad_()
    found = path_divergence(z_t, velocity, start, times, randomness=0.7, noise=2.0)
    for place, (t, s) in enumerate(times):
        means, deviations = zip(*(flow.transition(z_t[:, place], v[:, place], t, s, 0.7) for v in (velocity, start)), strict=True)
        steps = [torch.distributions.Normal(mean, 2.0 * own) for mean, own in zip(means, deviations, strict=True)]
        expected = torch.distributions.kl_divergence(*steps).mean((-2, -1))
        torch.testing.assert_close(found[:, place], expected)
        after = steps[0].sample((40000,))
        drawn = (steps[0].log_prob(after) - steps[1].log_prob(after)).mean((0, -2, -1))
        torch.testing.assert_close(drawn, expected, rtol=0.05, atol=0.02)
    assert torch.autograd.gradcheck(lambda v: path_divergence(z_t, v, start, times, 0.7, 2.0).sum(), velocity)
    assert not path_divergence(z_t, start, start, times, 0.7, 2.0).any()


def test_a_packed_pass_at_kept_steps_finds_the_noise_that_the_sampler_drew() -> None:
    """Ratios are 1 at the start, and their gradient is not zero."""
    denoiser = tiny_denoiser(tiny_lm(), objective="velocity")
    sample = SampleSettings(num_steps=5, max_blocks=2, initial_noise=1.5)
    settings = RlSettings(algorithm="flow_grpo", random_steps=2, step_randomness=0.6)
    noise, steps = (TrajectoryNoise(3, [("what?", n) for n in range(3)]) for _ in range(2)), [1, 3]
    drawing, again = noise
    kept, question = KeptSteps(steps, settings.step_randomness), [4, 5, 6]
    inputs = denoiser.backbone.embed(torch.tensor([question] * 3))
    with torch.no_grad():
        prefix, _ = Prefix.start(denoiser.backbone, inputs, torch.tensor([3] * 3))
        sampler = BlockSampler(denoiser, sample, drawing, kept=kept)
        lines = {
            row: group.latents[place]
            for group in sampler.sample(prefix, torch.zeros(3, dtype=torch.int64))
            for place, row in enumerate(group.rows)
        }
    shape, times = (1, denoiser.latents_per_block, denoiser.latent_dim), step_times(sample)
    between = tuple((times[step], times[step + 1]) for step in steps)
    tried = [
        Attempt(
            question, [], lines[row] * denoiser.latent_std + denoiser.latent_mean, 0.9, 0.0, steps=kept.of(row), times=between
        )
        for row in range(3)
    ]
    model = Policy(denoiser, settings, sample)
    batch = model.remembered(judged(settings, denoiser)(tried, [0, 1, 2]))
    assert batch.attempts.t[0].tolist() == pytest.approx([0.8, 0.4]) and batch.counts == {
        "steps": 2.0 * sum(map(len, lines.values()))
    }
    first = 0
    for row in range(3):
        for _ in range(len(lines[row])):
            again.normal([row], shape)  # what the block starts from
            fresh = sample.initial_noise * again.normal([row], (1, 2, *shape[1:]))[0, 0]
            assert batch.old_prediction is not None and batch.after is not None
            for place, (t, s) in enumerate(between):
                z_t = (1 - t) * batch.attempts.z0[first] + t * batch.attempts.eps[first, place]
                mean, deviation = flow.transition(z_t, batch.old_prediction[first, place], t, s, settings.step_randomness)
                torch.testing.assert_close((batch.after[first, place] - mean) / deviation, fresh[place], rtol=1e-4, atol=1e-4)
            first += 1
    losses = model(batch)
    ratio, count = losses["metric/step_ratio"].tolist()
    assert ratio / count == pytest.approx(1) and losses["metric/step_clipped"][0] == 0
    losses["steps"].backward()
    assert denoiser.latent_out.weight.grad is not None and denoiser.latent_out.weight.grad.abs().max() > 1e-4
    assert "kl" not in losses
    assert_divergence_from_the_start(model, batch)


def assert_divergence_from_the_start(model: Policy, batch: JudgedBatch) -> None:
    """Zero at the start; after a change what the two predictions' steps say, where something is learned."""
    denoiser = model.denoiser
    started = model.compared(batch)
    assert model(started)["kl"].item() == 0
    learned = started.learned.clone()
    learned[0] = False
    with torch.no_grad():
        denoiser.latent_out.bias.add_(0.1)
    z_t = flow.interpolate(batch.attempts.z0[:, None], batch.attempts.eps, batch.attempts.t[..., None, None])
    expected = torch.zeros(())
    for place, (t, s) in enumerate(batch.times):
        _, deviation = flow.transition(z_t[:, place], z_t[:, place], t, s, model.settings.step_randomness)
        kept = (s**2 - deviation**2) ** 0.5
        moved = 0.1 * (kept * (1 - t) - (1 - s) * t) / (model.sample.initial_noise * deviation)
        expected = expected + 0.5 * moved**2 * learned.sum()
    losses = model(dataclasses.replace(started, learned=learned))
    torch.testing.assert_close(losses["kl"], expected, rtol=1e-4, atol=1e-6)


# --- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_start_with_ratio_one_and_a_gradient() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    new = old.clone().requires_grad_()
    loss = clipped_loss(new, old, advantage, 0.2)
    assert loss.tolist() == [-1.0, 2.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient.tolist() == [-1.0, 2.0, 0.0]
    moved = old + torch.tensor([0.3, -0.3, 0.3])
    assert clipped(moved, old, advantage, 0.2).tolist() == [True, True, False]
    assert clipped(old - torch.tensor([0.3, -0.3, 0.3]), old, advantage, 0.2).tolist() == [False] * 3


def test_an_lms_completions_learn_as_answers_do() -> None:
    """Packed, against one sequence each."""
    new, old = (ArModel(Backbone(tiny_lm(seed=seed))) for seed in (3, 3))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.01)
    settings, temperature = RlSettings(policy="text"), 0.8
    worth = [(1.5, True), (-0.5, False), (0.0, True), (1.0, True)]
    tried = [
        Attempt(record.question, record.answer, torch.zeros(0), None, advantage, ended)
        for record, (advantage, ended) in zip(random_records(4, seed=6), worth, strict=True)
    ]
    collate = JudgedTextCollator(ArCollator(pack_tokens=64), EOS)
    batch = TextPolicy(old, settings, temperature).remembered(collate(tried, list(range(4)), counted=3))
    losses = TextPolicy(new, settings, temperature)(batch)
    losses["answers"].backward()
    actual = gradients(new)
    new.zero_grad()

    def logprobs(model: ArModel, attempt: Attempt) -> Tensor:
        ids = torch.tensor([*attempt.question, *attempt.answer])
        hidden = plain_forward(model.backbone, list(model.backbone.embed(ids).split(1)))
        return (model.backbone.logits(hidden[len(attempt.question) - 1 :]).float() / temperature).log_softmax(-1)

    expected = torch.zeros((), dtype=torch.float64)
    for attempt in tried[:3]:
        after, before = logprobs(new, attempt), logprobs(old, attempt).detach()
        for place, token in enumerate([*attempt.answer, EOS][: len(attempt.answer) + attempt.ended]):
            ratio = (after[place, token] - before[place, token]).exp()
            expected = expected - torch.minimum(ratio * attempt.advantage, ratio.clamp(0.8, 1.2) * attempt.advantage)
    torch.testing.assert_close(losses["answers"].double(), expected, rtol=2e-5, atol=2e-5)
    expected.backward()
    assert_same_gradients(actual, gradients(new), 2e-5)
    assert batch.counts == {"answers": sum(len(attempt.answer) + attempt.ended for attempt in tried[:2])}


def test_completions_beside_chains_learn_in_one_pass_what_they_do_in_two() -> None:
    new, old = (ArModel(Backbone(tiny_lm(seed=seed))) for seed in (3, 3))
    settings = RlSettings(policy="text")
    tried = [
        Attempt(record.question, record.answer, torch.zeros(0), None, advantage)
        for record, advantage in zip(random_records(4, seed=6), (1.5, -0.5, 0.0, 1.0), strict=True)
    ]
    collate = ArCollator(pack_tokens=24)
    judged = TextPolicy(old, settings, 0.8).remembered(JudgedTextCollator(collate, EOS)(tried, list(range(4))))
    chains = collate([(record.question, [*record.answer, EOS]) for record in random_records(7, seed=2)], list(range(7)))
    assert_the_same_in_one_pass(TextPolicy(new, settings, 0.8), judged, chains)


# --- lines of thought --------------------------------------------------------------------------------------------------


def group(rewards: Sequence[Sequence[float]]) -> Group:
    lines = [
        Line(
            torch.full((1, 2, 3), float(n)),
            tuple(
                Answered([n, m], Trajectory(f"{n}{m}", value > 0, f"{n}", stopped=n > 0), value, True)
                for m, value in enumerate(row)
            ),
        )
        for n, row in enumerate(rewards)
    ]
    return Group("what?", [7, 8], tuple(lines))


def test_thoughts_are_worth_their_answers_mean_and_answers_what_others_to_them_are_not() -> None:
    tried = group([[1, 1], [1, 0], [0, 0]]).attempts(1.0)
    assert [attempt.optimality for attempt in tried] == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.0, 0.0])
    assert [attempt.advantage for attempt in tried] == [0, 0, 1, -1, 0, 0]
    single = group([[1], [0]]).attempts(1.0)
    assert [(attempt.optimality, attempt.advantage) for attempt in single] == [(1.0, 1.0), (0.0, -1.0)]
    alike = group([[1, 0], [0, 1]]).attempts(1.0)
    assert [attempt.optimality for attempt in alike] == [None] * 4 and all(attempt.teaches for attempt in alike)
    assert not any(attempt.teaches for attempt in group([[1], [1]]).attempts(1.0))


def test_figures_of_an_iteration() -> None:
    found = {name: total / count for name, (total, count) in figures([group([[1], [0]]), group([[0], [0]])]).items()}
    assert found == {
        "reward": 0.25, "reward_spread": 0.25, "signal": 0.5, "pass@1": 0.25, "pass@2": 0.5, "distinct_correct": 0.5,
        "answer_tokens": 2.0, "stopped": 0.5,
    }  # fmt: skip
    shown = best_and_worst([group([[0], [0]]), group([[0], [1]])])
    assert [(question, answer.reward) for question, answer in shown] == [("what?", 1), ("what?", 0)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_attempts_in_as_many_batches(ranks: int) -> None:
    tried = list(enumerate(attempts(4, 1) * 5))
    for count in (1, 2, 7, 20):
        shares = [share_attempts(tried[:count], 3, World(rank, ranks, 0, torch.device("cpu"))) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        counted = [number for share in shares for part, used in share for number, _ in part[:used]]
        assert sorted(counted) == list(range(count))
        assert all(0 < len(part) <= 3 for share in shares for part, _ in share)


# --- rewards -----------------------------------------------------------------------------------------------------------

PUZZLE = Record("1 2 3 -> 6", (), "", "line 1", {"numbers": [1, 2, 3], "target": 6})


def rewarded(settings: RlSettings, *tries: tuple[str, tuple[str, ...]], stopped: bool = True) -> list[float]:
    task = get_task("countdown")
    entries = [judge(task, PUZZLE, answer, thoughts, stopped) for answer, thoughts in tries]
    return reward_function(settings)([PUZZLE] * len(entries), entries, [0.5] * len(entries))


def test_a_checkers_verdicts_are_rewards() -> None:
    right, wrong = ("1 + 2 + 3", ("2 + 1 = 3", "3 + 3 = 6")), ("1 + 2 + 3", ("2 + 1 = 3",))
    assert rewarded(RlSettings(reward="answer"), right, wrong) == [1, 1]
    assert rewarded(RlSettings(reward="chain"), right, wrong) == [1, 0]
    assert rewarded(RlSettings(reward="both"), right, wrong) == [1, 0.5]
    costly = RlSettings(length_weight=0.5, unstopped_weight=0.25)
    assert rewarded(costly, right) == [0.75] and rewarded(costly, right, stopped=False) == [0.5]
    task = get_task("maths")
    entry = judge(task, dataclasses.replace(PUZZLE, answer="6"), "6", ())
    with pytest.raises(UnusableError, match=r"rl\.reward=chain: the checker of this task cannot judge thoughts"):
        reward_function(RlSettings(reward="chain"))([PUZZLE], [entry], [0.0])


@pytest.mark.parametrize("answer", ["6", "3 + 3", "2 * 3", "6 = 6", "1 + 2 + 3 = 6 6", "( 1 + 2 + 3", "1 * 2 * 3 * 1", ""])
@pytest.mark.parametrize("thoughts", [("6 = 6",), ("3 + 3 = 6",), ("5 + 1 = 6",), ()])
def test_a_target_without_the_numbers_earns_nothing(answer: str, thoughts: tuple[str, ...]) -> None:
    for reward in ("answer", "chain", "both"):
        assert rewarded(RlSettings(reward=reward), (answer, thoughts)) == [0.0]


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (lambda questions, *_: [float("nan")] * len(questions), "gave nan, which is not finite, at question '1 2 3 -> 6'"),
    "error": (lambda *_: 1 / 0, r"failed \(ZeroDivisionError: division by zero\) at question '1 2 3 -> 6'"),
    "short": (lambda *_: [], "gave 0 numbers for 1 attempts"),
    "text": (lambda questions, *_: ["good"], "gave 'good', no number, at question '1 2 3 -> 6'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_reward_that_is_none_names_the_function_and_the_question(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, message = HOSTILE[name]
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(reward=function))
    with pytest.raises(UnusableError, match=f"rl.reward=my_rewards:reward {message}"):
        rewarded(RlSettings(reward="my_rewards:reward"), ("6", ()))


def test_a_reward_that_does_not_return_in_time_names_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(reward=lambda *_: forever.wait()))
    message = r"=my_rewards:reward, at question '1 2 3 -> 6', did not return within 0\.05 seconds: .* rl\.reward_seconds"
    with pytest.raises(UnusableError, match=message):
        rewarded(RlSettings(reward="my_rewards:reward", reward_seconds=0.05), ("6", ()))
    forever.set()


HOLDING = """
import re
from ladir.rl.limits import TimeLimit
limit = TimeLimit(0.1, grace=0.1)
assert limit(lambda: 1, "the first") == 1
limit(lambda: re.match("(a+)+$", "a" * 60 + "b"), "the second")
"""


def test_a_call_that_keeps_the_interpreter_to_itself_ends_the_process_with_its_name() -> None:
    found = subprocess.run([sys.executable, "-c", HOLDING], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == -signal.SIGKILL
    assert found.stderr == "the second did not return within 0.1 seconds\n"


def test_a_reward_of_ones_own_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    function = lambda *given: seen.append(given) or [3]  # noqa: E731
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(reward=function))
    assert rewarded(RlSettings(reward="my_rewards:reward"), ("6", ("a", "b"))) == [3.0]
    assert seen == [(["1 2 3 -> 6"], [["a", "b"]], ["6"], [PUZZLE])]
    with pytest.raises(UnusableError, match="there is no function lost in my_rewards"):
        reward_function(RlSettings(reward="my_rewards:lost"))
    with pytest.raises(UnusableError, match="nowhere_to_be_found cannot be imported"):
        reward_function(RlSettings(reward="nowhere_to_be_found:f"))


@pytest.mark.parametrize(
    ("answer", "length", "changes", "form"),
    [
        ("6", 0.5, {}, True),
        ("7", 0.5, {}, True),  # a wrong answer has a form, too
        (" ", 0.5, {}, False),
        ("6", 1.0, {}, False),  # cut off at its limit
        ("6", 0.5, {"stopped": False}, False),
        ("6", 0.5, {"undecided": True}, False),
    ],
)
def test_checker_and_form_are_added_by_their_weights(
    answer: str, length: float, changes: dict[str, bool], form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my_rewards", types.SimpleNamespace(reward=lambda *_: [3]))
    right = answer == "6" and not changes.get("undecided")
    entry = Trajectory(answer, right, answer, **{"stopped": True, **changes})
    for reward, own in (("my_rewards:reward", 3 + 2 * right), ("answer", right)):  # of which the checker's is the reward itself
        settings = RlSettings(reward=reward, checker_weight=2, format_weight=0.25)
        assert reward_function(settings)([PUZZLE], [entry], [length]) == [own + 0.25 * form]


def test_settings_that_cannot_learn_are_refused() -> None:
    def errors(**changes: Any) -> list[str]:
        config = Config()
        config.rl, config.sample.answer_temperature = dataclasses.replace(config.rl, **changes), 0.0
        return [error for error in validate(config) if error.startswith("rl.")]

    assert errors() == []
    assert "must be one of answer, chain, both" in errors(reward="nonsense")[0]
    assert "set sample.answer_temperature above 0, or rl.policy=latents" in errors(policy="both")[0]
    assert "or rl.answers=1" in errors(answers=4)[0]
    assert "must be at least 2" in errors(group=1)[0]
    assert "thoughts alone" in errors(answers=2, reward="chain")[1]
    assert "set rl.answers=1" in errors(policy="text", answers=2)[0] and errors(policy="text") == []
    assert "the last of sample.num_steps=10 steps is never random" in errors(algorithm="flow_grpo", random_steps=10)[0]


def test_flow_grpo_refuses_what_its_densities_do_not_hold() -> None:
    config = load_config(None, ["rl.algorithm=flow_grpo", "rl.random_steps=1"])
    assert validate(config) == []
    changed = ["denoiser.span=2", "denoiser.carry=hidden", "sample.guidance_scale=2", "sample.restarts=1", "sample.sampler=sde"]
    for setting in changed:
        name, _, value = setting.partition("=")
        with pytest.raises(ConfigError, match=rf"{name}={value}(\.0)?: rl.algorithm=flow_grpo needs {name}="):
            load_config(None, ["rl.algorithm=flow_grpo", setting])
