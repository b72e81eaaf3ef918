"""What the state that denoising steps hand on depends on in sampling, and what depends on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.inference.sampler import BlockSampler, TrajectoryNoise, append_block, step_times
from ladir.models.denoiser import Denoiser
from tests.tiny import randomise, tiny_denoiser, tiny_lm

STEPS, ROWS, SPAN = 3, 3, 2
#: which of the two questions each row answers; the rows of the guidance branch that does not see it come behind them
OWNER = torch.tensor([0, 0, 1])
ALL, NOBODY = [True] * 6, [False] * 6


class Sampled:
    """Three trajectories of two questions (the second is padded on the left), guided, in spans of two blocks."""

    def __init__(self) -> None:
        self.denoiser = tiny_denoiser(tiny_lm(), span=SPAN, carry="hidden", token_weight=0.5)
        generator = torch.Generator().manual_seed(0)
        self.questions = torch.randn(2, 4, 16, dtype=torch.float64, generator=generator)
        self.unconditional = torch.randn(2, 4, 16, dtype=torch.float64, generator=generator)
        self.z = torch.randn(ROWS, SPAN, 2, 3, generator=generator)
        self.begun = torch.randn(2 * ROWS, SPAN, 2, 16, dtype=torch.float64, generator=generator)
        self.before = self.states()

    def prefix(self, questions: Tensor) -> Prefix:
        """What stands before the blocks of every row, of both branches."""
        inputs = torch.cat([questions, self.unconditional])
        prefix, _ = Prefix.start(self.denoiser.backbone, inputs, torch.tensor([4, 3, 4, 3]))
        return prefix.share(torch.cat([OWNER, OWNER + 2]))

    @torch.no_grad()
    def states(self, questions: Tensor | None = None, z: Tensor | None = None, begun: Tensor | None = None) -> Tensor:
        """What each step hands on [S, 2 R, J, L, H]; ``begun``: what the first one is handed (not given: zeros)."""
        settings = SampleSettings(num_steps=STEPS, guidance_scale=2.0, lag=0)
        sampler = _Recorder(self.denoiser, settings, TrajectoryNoise(0, [("", row) for row in range(ROWS)]))
        prefix, z = self.prefix(self.questions if questions is None else questions), self.z if z is None else z
        null = self.denoiser.null_state(z.repeat(2, 1, 1, 1))
        with prefix.cache.read_only():
            sampler._denoise(prefix, list(range(ROWS)), OWNER, z, null if begun is None else begun, step_times(settings), None)
        return torch.stack(sampler.states)

    def effect(self, **changes: Tensor) -> list[list[bool]]:
        """Per step and row, whether its state changes: bit-identical or clearly different, nothing in between."""
        change = (self.states(**changes) - self.before).abs().flatten(2).amax(2)
        assert bool(((change == 0) | (change > 1e-6)).all()), change
        return (change > 0).tolist()


class _Recorder(BlockSampler):
    """Keeps what every step hands on."""

    def __init__(self, denoiser: Denoiser, settings: SampleSettings, noise: TrajectoryNoise) -> None:
        super().__init__(denoiser, settings, noise)
        self.states: list[Tensor] = []

    def _velocity(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        velocity, state = super()._velocity(*arguments)  # type: ignore[arg-type]
        self.states.append(state)
        return velocity, state


def moved(tensor: Tensor, *place: int) -> Tensor:
    """The tensor with other values at a place."""
    changed = tensor.clone()
    changed[place] += 0.3
    return changed


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return Sampled()


@pytest.mark.parametrize("block", range(SPAN))
def test_a_state_depends_on_its_own_row_s_noisy_latents_of_the_whole_span(sampled: Sampled, block: int) -> None:
    first = [True, False, False] * 2
    assert sampled.effect(z=moved(sampled.z, 0, block)) == [first] * STEPS
    each = (sampled.states(z=moved(sampled.z, 0, block)) - sampled.before).abs().flatten(3).amax(3)
    assert bool((each[:, 0] > 0).all())  # of the other block of the span, too


def test_a_state_depends_on_its_own_question_and_what_a_branch_does_not_see_reaches_it_by_the_noisy_latents_alone(
    sampled: Sampled,
) -> None:
    seeing, both = [True, True, False, False, False, False], [True, True, False] * 2
    assert sampled.effect(questions=moved(sampled.questions, 0, 2)) == [seeing, both, both]
    assert sampled.effect(questions=moved(sampled.questions, 1, 0)) == [NOBODY] * STEPS  # padding


def test_a_state_depends_on_the_one_before_it_in_its_own_row_and_branch(sampled: Sampled) -> None:
    base = sampled.states(begun=sampled.begun)
    change = (sampled.states(begun=moved(sampled.begun, 4, 0, 1, 2)) - base).abs().flatten(2).amax(2)
    assert (change > 1e-6).tolist() == [[row == 4 for row in range(6)], *[[row in (1, 4) for row in range(6)]] * (STEPS - 1)]
    assert bool(((change == 0) | (change > 1e-6)).all())
    assert sampled.effect(begun=sampled.begun) == [ALL] * STEPS


def test_no_head_reaches_a_state_and_no_state_what_is_clean() -> None:
    sampled = Sampled()
    denoiser = sampled.denoiser
    assert denoiser.token_head is not None and denoiser.carry_in is not None
    for module in (denoiser.stop_head, denoiser.token_head, denoiser.backbone.base.get_output_embeddings()):
        randomise(module, seed=9)
    assert sampled.effect() == [NOBODY] * STEPS
    found = []
    for seed in (1, 2):
        randomise(denoiser.carry_in, seed)
        prefix = sampled.prefix(sampled.questions)
        with torch.no_grad():
            end = append_block(denoiser, prefix, sampled.z[:, 0])
            cached = [part for layer in prefix.cache.layers for part in (layer.keys, layer.values)]
            found.append([end, denoiser.stop_logit(end), *cached])
    assert all(map(torch.equal, *found))
    assert sampled.effect() == [NOBODY, *[ALL] * (STEPS - 1)]  # the first step is handed nothing
