"""Denoising steps do the same operations on the same shapes every time, and none that waits for the device.

So they can be captured and replayed; on a CPU a recording stands for the graph.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.inference.cost import count_cost
from ladir.inference.graphs import Graphs
from ladir.inference.sampler import BlockSampler, TrajectoryNoise, append_block
from ladir.reasoner import Reasoner
from tests.test_reasoner import tiny_reasoner
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
@pytest.mark.parametrize(
    ("carry", "controls"),
    [
        ("none", {}),
        ("none", {"sampler": "sde", "guidance_scale": 2.0, "diversity_scale": 0.5}),
        ("hidden", {"guidance_scale": 2.0, "restarts": 1, "restart_steps": 5}),
        ("hidden", {"guidance_scale": 2.0, "restarts": 1, "restart_steps": 5, "restart_keeps_state": True}),
    ],
    ids=["ode", "all", "carry", "carry-through-restarts"],
)
def test_a_denoising_step_waits_for_nothing_and_keeps_its_shapes(carry: str, controls: dict[str, Any], length: int) -> None:
    denoiser = tiny_denoiser(tiny_lm(), carry=carry)
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
    _, *steps, after = operators.steps  # what comes before the noise is shown is no step
    assert not after and len(steps) == 5 * (1 + settings.restarts)
    rounds = [steps[start + 1 : start + 5] for start in range(0, len(steps), 5)]  # without the first step, which makes the masks
    for step in itertools.chain(*rounds):
        waiting = [name for name, _ in step if name in WAITING]
        assert not waiting
    for one, two, three, _ in rounds:
        assert one == two == three == rounds[0][0]
    assert len(rounds[0][0]) > 50


# --- replaying ---------------------------------------------------------------------------------------------------------

#: what a captured step must not change: state, guidance, steps of another number after a restart, several blocks
REPLAYED: list[dict[str, Any]] = [
    {},
    {"sampler": "sde", "guidance_scale": 2.0, "diversity_scale": 0.5},
    {"restarts": 1, "restart_steps": 5},
    {"span": 2},
    {"carry": "hidden"},
    {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1, "restart_steps": 5},
    {"carry": "hidden", "guidance_scale": 2.0, "restarts": 1, "restart_steps": 5, "restart_keeps_state": True},
    {"carry": "hidden", "span": 2, "restarts": 1, "restart_steps": 2, "restart_keeps_state": True},
]


@torch.no_grad()
def a_block(reasoner: Reasoner) -> tuple[BlockSampler, Prefix, Tensor]:
    """A sampler, the shared prefix of a question of 20 tokens, and which question each of 6 trajectories answers."""
    owner = torch.zeros(6, dtype=torch.int64, device=reasoner.denoiser.marks.weight.device)
    prefix = reasoner._question_prefix([" ".join("abcdefghijklmnopqrst")], owner, reasoner.settings.guidance_scale != 1.0)
    noise = TrajectoryNoise(0, [("question", row) for row in range(6)])
    return BlockSampler(reasoner.denoiser, reasoner.settings, noise), prefix, owner


@torch.no_grad()
def assert_replayed_is_plain(reasoner: Reasoner) -> None:
    """Three spans of replayed steps, one behind another, are those of plain ones, and count the same operations."""
    found = []
    graphs = Graphs()
    for taken in (graphs, None):
        sampler, prefix, owner = a_block(reasoner)
        sampler.graphs = taken
        with count_cost(sampler.denoiser) as cost, graphs.counted(cost):
            spans = []
            for number in range(3):
                spans.append(sampler.sample_span(prefix, list(range(6)), owner, number, None))
                for block in spans[-1].unbind(1):
                    append_block(sampler.denoiser, prefix, block)
        found.append((torch.stack(spans), cost.passes, cost.flops))
    (ours, *counts), (theirs, *expected) = found
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert counts == expected


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: the operators between begin and end are done again on the same tensors, in their places."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        Recording.replays += 1
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for place, value in zip(*(torch.utils._pytree.tree_leaves(out) for out in (result, again)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.mark.parametrize("controls", REPLAYED, ids=lambda controls: "-".join(controls) or "plain")
def test_steps_that_are_replayed_in_place_equal_plain_ones(controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in (
        ("CUDAGraph", Recording),
        ("Stream", lambda _: stream),
        ("current_stream", lambda _: stream),
        ("stream", lambda _: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Recording, "replays", 0)
    reasoner = tiny_reasoner(num_steps=6, **controls)
    assert_replayed_is_plain(reasoner)
    rounds = [6, *[reasoner.settings.restart_steps] * reasoner.settings.restarts]
    lag = (reasoner.denoiser.settings.span - 1) * reasoner.settings.lag
    assert Recording.replays == 3 * sum(steps + lag - 1 for steps in rounds if steps + lag >= 4)
