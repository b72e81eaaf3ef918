"""Muon over the partitions of every ZeRO stage equals the obvious one on whole matrices, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ladir.config import DeepSpeedSettings, LoraSettings, TrainSettings
from ladir.config.loader import load_config
from ladir.data.batches import DenoiserBatch
from ladir.models.denoiser import Denoiser
from ladir.models.orthogonal import orthogonalised, step_scale
from tests.distributed import ProcessGroup
from tests.tiny import collator, random_records, tiny_denoiser, tiny_lm, tiny_vae
from training.runtime import checkpoint
from training.runtime.distributed import World
from training.runtime.engine import Engine, fresh_heads
from training.runtime.muon import Part, Sharing, layer_matrices, owners, work

LR, DECAY, MOMENTUM, BETAS, CLIP, HEADS_FACTOR = 0.01, 0.1, 0.9, (0.9, 0.98), 0.05, 3.0
"""The clipping norm is one that every step exceeds."""


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    least = min(rows, columns)
    values = 0.2 + torch.rand(least, generator=generator, dtype=torch.float64)
    matrix = u[:, :least] * values @ v[:, :least].T
    result = u[:, :least].T @ orthogonalised(matrix[None])[0] @ v[:, :least]
    assert torch.allclose(result, torch.diag(result.diagonal()), atol=1e-9)
    assert result.diagonal().min() > 0.3 and result.diagonal().max() < 1.3
    assert torch.allclose(orthogonalised(3 * matrix[None]), orthogonalised(matrix[None]), atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 96, 96), (5, 64, 24), (3, 24, 64)])
def test_bfloat16_steps_in_the_same_direction(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded, exact = orthogonalised(matrices.bfloat16()).float(), orthogonalised(matrices)
    assert torch.linalg.matrix_norm(rounded, 2).max() < 1.3
    assert torch.cosine_similarity(rounded.flatten(1), exact.flatten(1)).min() > 0.99


def test_nothing_moves_where_there_is_no_gradient() -> None:
    assert orthogonalised(torch.zeros(1, 3, 5)).abs().max() == 0


def model() -> Denoiser:
    return tiny_denoiser(tiny_lm("llama", dtype=torch.float32), answer_every=1)


def batch(model: nn.Module, start: int) -> DenoiserBatch:
    assert isinstance(model, Denoiser)
    return collator(model)(random_records(3, seed=start), range(start, start + 3))


def total(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for name, value in outputs.items() if not name.startswith("metric")]).sum() / 100


def make_engine(world: World, stage: str, optimizer: str = "muon") -> Engine:
    train = TrainSettings(
        optimizer=optimizer,
        momentum=MOMENTUM,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        ema=0.9,
        heads_lr_factor=HEADS_FACTOR,
    )
    return Engine(model(), train, "float32", DeepSpeedSettings(config=f"ds_configs/zero{stage}.json"), world)


def engine_steps(engine: Engine, steps: range) -> dict[str, Tensor]:
    """The weights on every rank after steps of two micro batches a step, which the ranks share."""
    world = engine.world
    for step in steps:
        parts = [10 * step, 10 * step + 5]
        for number, start in enumerate(mine := parts[world.rank :: world.size]):
            engine.backward(total(engine.forward(batch(engine.model, start))), last=number + 1 == len(mine))
        engine.step(LR)
    return world.broadcast(dict(engine.full_state(ema=False)))


def reference_steps(steps: range, optimizer: str = "muon") -> dict[str, Tensor]:
    """The same in plain PyTorch, a matrix at a time."""
    trained = model()
    matrices = {n: p for n, p in trained.named_parameters() if optimizer == "muon" and ".layers." in n and p.ndim == 2}
    groups = [
        {"params": [p], "weight_decay": DECAY if p.ndim >= 2 else 0.0, "lr": LR * (1 if ".lm." in n else HEADS_FACTOR)}
        for n, p in trained.named_parameters()
        if n not in matrices
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    momenta = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
    for step in steps:
        for start in (10 * step, 10 * step + 5):
            total(trained(batch(trained, start))).backward()
        assert torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP) > CLIP
        adamw.step()
        with torch.no_grad():
            for name, parameter in matrices.items():
                assert parameter.grad is not None
                momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * parameter.grad
                ahead = MOMENTUM * momenta[name] + (1 - MOMENTUM) * parameter.grad
                parameter *= 1 - LR * DECAY
                parameter -= LR * step_scale(*parameter.shape) * orthogonalised(ahead[None])[0]
        trained.zero_grad()
    return {name: value.detach() for name, value in trained.state_dict().items()}


def gap(world: World, stage: str, optimizer: str) -> float:
    ours, reference = engine_steps(make_engine(world, stage, optimizer), range(3)), reference_steps(range(3), optimizer)
    moved = model().state_dict()
    assert min(float((reference[n] - moved[n]).abs().max()) for n in reference if n.endswith("proj.weight")) > 1e-3
    return max(float((ours[name] - reference[name]).abs().max()) for name in ours)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["0", "2", "3", "3_offload_optimizer"])
def test_every_stage_steps_as_the_reference_does(two_processes: ProcessGroup, one_process: ProcessGroup, stage: str) -> None:
    """With fresh heads that learn at a rate of their own."""
    for result in [*two_processes.run(gap, stage, "muon"), *one_process.run(gap, stage, "muon")]:
        assert result < 2e-5
    for result in two_processes.run(gap, stage, "adamw"):
        assert result < 2e-5


def test_what_is_not_the_lms_own_is_a_fresh_head() -> None:
    heads = fresh_heads(model())
    assert "latent_out.weight" in heads and "marks.weight" in heads and not any(".lm." in name for name in heads)
    adapted = tiny_vae(lora=LoraSettings(rank=2))
    assert not any("lora_" in name for name in fresh_heads(adapted)) and "queries.weight" in fresh_heads(adapted)


def save_and_go_on(world: World, stage: str, folder: Path) -> dict[str, Tensor]:
    engine = make_engine(world, stage)
    engine_steps(engine, range(2))
    checkpoint.save(folder, engine, {"step": 2}, keep=1)
    return engine_steps(engine, range(2, 4))


def load_and_go_on(world: World, stage: str, folder: Path) -> dict[str, Tensor]:
    engine = make_engine(world, stage)
    path = checkpoint.find(folder, world)
    assert path is not None
    checkpoint.load(path, engine)
    return engine_steps(engine, range(2, 4))


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "other"), [("3", "2"), ("2", "0")])
def test_a_checkpoint_brings_the_momentum_back(
    two_processes: ProcessGroup, one_process: ProcessGroup, stage: str, other: str, tmp_path: Path
) -> None:
    whole = two_processes.run(save_and_go_on, stage, tmp_path)[0]
    again = two_processes.run(load_and_go_on, stage, tmp_path)[0]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    elsewhere = one_process.run(load_and_go_on, other, tmp_path)[0]
    assert max(float((elsewhere[name] - value).abs().max()) for name, value in whole.items()) < 2e-5


def test_the_matrices_of_an_8b_model_are_shared_out_evenly() -> None:
    """By shapes alone; in the order of the layers four ranks would do everything, one of them nearly all."""
    settings = load_config("configs/math_8b.yaml", []).backbone
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings.scratch))
    shapes = [p.shape for name, p in lm.named_parameters() if name in layer_matrices(lm)]
    assert len(shapes) == 32 * 7
    works = [work(*shape) for shape in shapes]
    for ranks in (2, 8, 32):
        loads = [0] * ranks
        for owner, one in zip(owners(works, ranks), works, strict=True):
            loads[owner] += one
        assert max(loads) <= 1.02 * sum(works) / ranks


def shared_out(world: World) -> tuple[float, set[torch.dtype], int]:
    """How far matrices, halves of which two ranks hold in float32, are from those that one works on alone; what is sent."""
    numbers = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=numbers) for shape in ((4, 6), (6, 4), (8, 8))]
    halves = [matrix.view(2, -1)[world.rank].clone() for matrix in whole]
    parts = [
        Part((m.shape[0], m.shape[1]), world.rank * half.numel(), half.numel()) for m, half in zip(whole, halves, strict=True)
    ]
    sent, exchange = list[Tensor](), World.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "exchange", lambda own, given, counts: sent.extend(given) or exchange(own, given, counts))
        Sharing(world, parts, torch.bfloat16).orthogonalise(halves)
    alone = [step_scale(*m.shape) * orthogonalised(m.bfloat16()[None])[0] for m in whole]
    gaps = [half - m.reshape(2, -1)[world.rank].float() for half, m in zip(halves, alone, strict=True)]
    return float(max(gap.abs().max() for gap in gaps)), {part.dtype for part in sent}, sum(part.numel() for part in sent)


@pytest.mark.distributed
def test_halves_go_to_the_owner_and_back_in_the_precision_of_the_work(two_processes: ProcessGroup) -> None:
    """Each element once to and once fro, and not the whole matrices to everybody."""
    found = two_processes.run(shared_out)
    assert [(gap, dtypes) for gap, dtypes, _ in found] == [(0.0, {torch.bfloat16})] * 2
    assert sum(numbers for *_, numbers in found) == 2 * (24 + 24 + 64)


def exchanged(world: World) -> list[list[float]]:
    """Rank r gives r + 1 numbers to rank 0 and none to rank 1."""
    sent = [torch.full((world.rank + 1,), float(world.rank), dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)]
    return [part.tolist() for part in world.exchange(sent, [1, 2] if world.is_main else [0, 0])]


@pytest.mark.distributed
def test_ranks_exchange_as_many_numbers_as_they_have(two_processes: ProcessGroup) -> None:
    assert two_processes.run(exchanged) == [[[0.0], [1.0, 1.0]], [[], []]]
