"""Denoising steps do the same operations on the same shapes every time, and none that waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from tests.tiny import tiny_denoiser, tiny_lm

#: operators that need a value or a size on the host, or bring one from it
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item", "equal", "is_nonzero")
Call = tuple[str, tuple[tuple[int, ...], ...]]


class Operators(TorchDispatchMode):
    """Within, every operator with its tensors' shapes; ``step`` starts a new list."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[Call]] = [[]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func._overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        self.steps[-1].append(("nonzero" if by_mask else name, tuple(tuple(x.shape) for x in tensors)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 20])
@pytest.mark.parametrize("controls", [{}, {"sampler": "sde", "guidance_scale": 2.0, "diversity_scale": 0.5}], ids=["ode", "all"])
def test_a_denoising_step_waits_for_nothing_and_keeps_its_shapes(controls: dict[str, Any], length: int) -> None:
    denoiser = tiny_denoiser(tiny_lm())
    settings = SampleSettings(num_steps=5, **controls)
    branches = 2 if settings.guidance_scale != 1 else 1
    owner = torch.tensor([0, 0, 0, 1, 1])
    questions = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prefix, _ = Prefix.start(
        denoiser.backbone, questions.repeat(branches, 1, 1), torch.tensor([length, length - 1]).repeat(branches)
    )
    prefix = prefix.share(torch.cat([owner + 2 * branch for branch in range(branches)]))
    sampler = BlockSampler(denoiser, settings, TrajectoryNoise(0, [("", i) for i in range(5)]))
    with Operators() as operators:
        sampler.sample_span(prefix, list(range(5)), owner, 0, lambda *_: operators.steps.append([]))
    _, _, *middle, last, after = operators.steps  # what comes before the noise is shown, and the first step with its masks
    assert not after and len(middle) == 3
    for step in (*middle, last):
        waiting = [name for name, _ in step if name in WAITING]
        assert not waiting
    assert middle[0] == middle[1] == middle[2]
    assert len(middle[0]) > 50
