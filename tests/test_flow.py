"""The flow on paths whose velocity is known in closed form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladir.config import SampleSettings
from ladir.inference.guidance import Guidance, classifier_free, diversity_force, rescaled
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from ladir.models import flow

OBJECTIVES = ("velocity", "x0", "epsilon", "v")
MEAN, STD = 1.5, 0.4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def to_epsilon(objective: str, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The noise that a prediction at (z_t, t) implies: as the sampler finds it from the velocity."""
    return z_t + (1 - t) * flow.to_velocity(objective, prediction, z_t, t)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 1000))
def test_every_objective_says_the_same(t: float, seed: int) -> None:
    z0, eps = draw(5, 3, seed=seed), draw(5, 3, seed=seed + 1)
    time = torch.tensor(t, dtype=torch.float64)
    z_t = flow.interpolate(z0, eps, time)
    for objective in OBJECTIVES:
        prediction = flow.target(objective, z0, eps, time)
        assert torch.allclose(flow.to_x0(objective, prediction, z_t, time), z0, atol=1e-10)
        assert torch.allclose(flow.to_velocity(objective, prediction, z_t, time), eps - z0, atol=1e-10)
        assert torch.allclose(to_epsilon(objective, prediction, z_t, time), eps, atol=1e-10)


@pytest.mark.parametrize(("source", "goal"), list(itertools.permutations(OBJECTIVES, 2)))
def test_a_wrong_prediction_converts_exactly_too(source: str, goal: str) -> None:
    """What the network predicts is not the truth: its implied (x0, eps) must survive source -> goal -> (x0, eps)."""
    t = torch.tensor([0.05, 0.3, 0.5, 0.95], dtype=torch.float64)[:, None]
    z_t, prediction = draw(4, 3), draw(4, 3, seed=1)
    x0, eps = (convert(source, prediction, z_t, t) for convert in (flow.to_x0, to_epsilon))
    assert torch.allclose(flow.interpolate(x0, eps, t), z_t, atol=1e-12)
    converted = flow.target(goal, x0, eps, t)
    for convert in (flow.to_x0, to_epsilon, flow.to_velocity):
        assert torch.allclose(convert(goal, converted, z_t, t), convert(source, prediction, z_t, t), atol=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_ends_of_the_path_are_finite(objective: str) -> None:
    z0, eps = draw(4, 3).float(), draw(4, 3, seed=1).float()
    for t in (0.0, 1.0):
        time = torch.tensor(t)
        z_t = flow.interpolate(z0, eps, time)
        assert torch.equal(z_t, eps if t else z0)
        prediction = flow.target(objective, z0, eps, time)
        for convert in (flow.to_x0, flow.to_velocity, to_epsilon):
            assert convert(objective, prediction, z_t, time).isfinite().all()
        assert torch.allclose(to_epsilon(objective, prediction, z_t, time), eps, atol=1e-4) or t == 0.0
        assert torch.allclose(flow.to_x0(objective, prediction, z_t, time), z0, atol=1e-4) or t == 1.0


def test_predicted_noise_leads_from_pure_noise_to_data() -> None:
    """A block starts at t = 1, where the noise says nothing of the data: errors of a prediction must not blow up there."""
    z, steps = draw(2000), 50
    for step in range(steps):
        t = torch.tensor(1 - step / steps, dtype=torch.float64)
        eps = z + (1 - t) * exact_velocity(z, float(t)) + 0.01 * draw(2000, seed=step + 1)
        z = z - flow.to_velocity("epsilon", eps, z, t) / steps
    assert abs(z.mean() - MEAN) < 0.15 and abs(z.std() - STD) < 0.1


@pytest.mark.parametrize("function", [flow.to_x0, flow.to_velocity])
def test_unknown_objectives_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="unknown objective 'noise'; valid: velocity, x0, epsilon, v"):
        function("noise", torch.zeros(1), torch.zeros(1), torch.tensor(0.5))


def test_timestep_features_are_bounded_and_tell_times_apart() -> None:
    t = torch.linspace(0, 1, 101)
    features = flow.timestep_features(t, 64)
    assert features.shape == (101, 64) and features.abs().max() <= 1
    distance = torch.cdist(features, features) + 10 * torch.eye(101)
    assert distance.min() > 0.1
    assert torch.allclose(flow.timestep_features(t.double(), 64), features, atol=1e-6)


# --- the sampler's own steps on Gaussian data --------------------------------------------------------------------------


def exact_velocity(z: Tensor, t: float) -> Tensor:
    """E[eps - z0 | z_t = z] for z0 ~ N(MEAN, STD^2): everything is jointly Gaussian."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = z - (1 - t) * MEAN
    return (t * centred - (1 - t) * STD**2 * centred) / variance - MEAN


def exact_transport(noise: Tensor) -> Tensor:
    """Where the ODE takes a starting point: the flow of Gaussians keeps the number of standard deviations."""
    return MEAN + STD * noise


class GaussianSampler(BlockSampler):
    """The sampler with the network replaced by the exact velocity."""

    def __init__(self, settings: SampleSettings, count: int, seed: int = 0) -> None:
        self.settings = settings
        self.noise = TrajectoryNoise(seed, [("", i) for i in range(count)])

    def run(self, z: Tensor) -> list[Tensor]:
        """z at t = 1 and after every step."""
        path = [z]
        times = torch.linspace(1.0, 0.0, self.settings.num_steps + 1).tolist()
        [fresh] = self._fresh_noise(list(range(len(z))), self.settings.num_steps, z[:, None])
        for (t, t_next), noise in zip(itertools.pairwise(times), fresh, strict=True):
            path.append(self._advance(path[-1], exact_velocity(path[-1], t), t, t_next, noise))
        return path


def test_the_ode_transports_noise_to_data() -> None:
    noise = draw(200, 1, 1)
    ends = {n: GaussianSampler(SampleSettings(num_steps=n), 200).run(noise)[-1] for n in (50, 100, 200)}
    errors = [float((end - exact_transport(noise)).abs().max()) for end in ends.values()]
    assert errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)  # Euler is of first order
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_every_marginal_along_the_way_is_the_paths(sampler: str) -> None:
    count, steps = 4000, 100
    path = GaussianSampler(SampleSettings(num_steps=steps, sampler=sampler), count, seed=3).run(draw(count, 1, 1, seed=2))
    for step in (20, 50, 80, 95, 100):
        t = 1 - step / steps
        std = ((1 - t) ** 2 * STD**2 + t**2) ** 0.5
        z = path[step]
        assert float(z.mean()) == pytest.approx((1 - t) * MEAN, abs=0.05 * std + 0.01)
        assert float(z.std()) == pytest.approx(std, rel=0.06)


def test_the_sde_forgets_its_start_and_the_ode_does_not() -> None:
    noise = draw(2000, 1, 1)
    for sampler, low, high in (("ode", 0.99, 1.0), ("sde", -0.1, 0.6)):
        end = GaussianSampler(SampleSettings(num_steps=50, sampler=sampler), 2000).run(noise)[-1]
        correlation = float(torch.corrcoef(torch.stack([noise.flatten(), end.flatten()]))[0, 1])
        assert low <= correlation <= high + 1e-9


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_a_perfect_network_reaches_the_data_in_any_number_of_steps(sampler: str) -> None:
    z0 = draw(6, 2, 3, seed=4)
    for steps in (1, 2, 7):
        gaussian = GaussianSampler(SampleSettings(num_steps=steps, sampler=sampler), 6)
        z = draw(6, 2, 3, seed=5)
        [fresh] = gaussian._fresh_noise(list(range(6)), gaussian.settings.num_steps, z[:, None])
        for (t, t_next), noise in zip(itertools.pairwise(torch.linspace(1.0, 0.0, steps + 1).tolist()), fresh, strict=True):
            z = gaussian._advance(z, (z - z0) / t, t, t_next, noise)
        assert torch.allclose(z, z0, atol=1e-10)


@pytest.mark.parametrize("sampler", ["ode", "sde"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_noise_keeps_its_scale_along_the_way(sampler: str, scale: float) -> None:
    """z_t = (1 - t) x0 + t k e with e standard normal, for the scale k that a block starts from."""
    count, steps, x0 = 4000, 10, 3.0
    gaussian = GaussianSampler(SampleSettings(num_steps=steps, sampler=sampler, initial_noise=scale), count, seed=5)
    z = scale * draw(count, 1, 1, seed=6)
    [fresh] = gaussian._fresh_noise(list(range(count)), steps, z[:, None])
    for number, noise in enumerate(fresh):
        t, t_next = 1 - number / steps, 1 - (number + 1) / steps
        z = gaussian._advance(z, (z - x0) / t, t, t_next, noise)
        assert float(z.mean()) == pytest.approx((1 - t_next) * x0, abs=0.08 * scale * t_next + 1e-9)
        assert float(z.std()) == pytest.approx(scale * t_next, rel=0.06, abs=1e-9)


def test_one_sde_step_has_the_posteriors_mean_and_variance() -> None:
    """z_s | z_t, x0 by Bayes from z_s ~ N((1-s) x0, s^2) and z_t | z_s ~ N(a z_s, t^2 - a^2 s^2), a = (1-t)/(1-s)."""
    t, s, z_t, x0, count = 0.7, 0.4, 0.9, -0.3, 20000
    a = (1 - t) / (1 - s)
    likelihood = t**2 - a**2 * s**2
    variance = 1 / (1 / s**2 + a**2 / likelihood)
    mean = variance * ((1 - s) * x0 / s**2 + a * z_t / likelihood)
    z = torch.full((count, 1, 1), z_t, dtype=torch.float64)
    sampler = GaussianSampler(SampleSettings(sampler="sde"), count, seed=9)
    noise = sampler.noise.normal(list(range(count)), (1, 1))
    stepped = sampler._advance(z, (z - x0) / t, t, s, noise)
    assert float(stepped.mean()) == pytest.approx(mean, abs=4 * (variance / count) ** 0.5)
    assert float(stepped.var()) == pytest.approx(variance, rel=0.05)


# --- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    c, u = draw(3, 2), draw(3, 2, seed=1)
    assert torch.allclose(classifier_free(c, u, 1.0), c)
    assert torch.equal(classifier_free(c, u, 0.0), u)
    assert torch.allclose(classifier_free(c, u, 4.0), u + 4 * (c - u))


def test_guidance_holds_in_its_interval_and_keeps_the_spread_of_the_unguided_block() -> None:
    c, u, z = draw(3, 2, 4, 5), draw(3, 2, 4, 5, seed=1), draw(3, 2, 4, 5, seed=2)
    t = torch.tensor([[0.0, 0.25], [0.5, 0.75], [0.8, 1.0]], dtype=torch.float64)
    found = Guidance(3.0, 0.25, 0.75).velocity(c, u, z, t)
    for row, block in itertools.product(range(3), range(2)):
        guided = 0.25 <= float(t[row, block]) <= 0.75
        assert torch.allclose(found[row, block], (u + 3 * (c - u) if guided else c)[row, block])
    strong, t = Guidance(4.0, rescale=1.0).velocity(c, u, z, t), t[..., None, None]
    whole, plain = (z - t * v for v in (u + 4 * (c - u), c))
    for row, block in list(itertools.product(range(3), range(2)))[1:]:  # at t = 0 nothing moves
        scaled = whole[row, block] * plain[row, block].std() / whole[row, block].std()
        assert torch.allclose((z - t * strong)[row, block], scaled)
        part = Guidance(4.0, rescale=0.7).velocity(c, u, z, t[..., 0, 0])
        assert torch.allclose((z - t * part)[row, block], 0.7 * scaled + 0.3 * whole[row, block])
    lone = draw(2, 1, 1)
    assert torch.equal(rescaled(lone, 2 * lone, 1.0), lone)  # one number has no spread


def test_diversity_force_does_not_grow_with_the_number_of_trajectories() -> None:
    sizes = [float(diversity_force(draw(count, 2, 3), [count]).square().mean().sqrt()) for count in (25, 100, 400)]
    assert max(sizes) < 1.5 * min(sizes)


def test_diversity_force_is_the_written_out_mean() -> None:
    z, owner = draw(7, 2, 3), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    force = diversity_force(z, [3, 1, 3])
    for i in range(7):
        group = [j for j in range(7) if owner[j] == owner[i]]
        distances = [float((z[a] - z[b]).norm()) for a in group for b in group if a != b]
        expected = torch.zeros(2, 3, dtype=torch.float64)
        if distances:
            s2 = sorted(distances)[(len(distances) - 1) // 2] ** 2
            for j in group:
                d2 = float((z[i] - z[j]).square().sum())
                expected += 2 * (1 - d2 / s2) * torch.exp(torch.tensor(-d2 / s2)) * (z[i] - z[j]) / (len(group) - 1)
        assert torch.allclose(force[i], expected, atol=1e-8)
    assert torch.equal(force[3], torch.zeros(2, 3, dtype=torch.float64))


def test_diversity_force_never_acts_across_questions_and_survives_twins() -> None:
    z = draw(4, 2, 3)
    force = diversity_force(z, [2, 2])
    moved = z.clone()
    moved[2:] += 5.0
    assert torch.equal(diversity_force(moved, [2, 2])[:2], force[:2])
    twins = z[:1].expand(3, -1, -1).float()
    assert torch.equal(diversity_force(twins, [3]), torch.zeros(3, 2, 3))
