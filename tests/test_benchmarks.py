"""What the method saves, measured: ours and the obvious way in turn, in one run, on the same weights and inputs.

``make bench``.  Every pair must give the same numbers; nothing is asserted about time.  Seconds are CPU seconds of one thread,
medians of several turns, so that a busy machine changes little.  The ratios are printed and written to ``runs/benchmarks.json``
(another file: ``LADIR_BENCHMARKS``).
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ladir.config import Config, DenoiserSettings, SampleSettings
from ladir.config_loader import load_config
from ladir.data.batches import DenoiserBatch, DenoiserCollator
from ladir.data.latents import LatentRecord
from ladir.inference.cache import Prefix
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from ladir.layout import Mark, template
from ladir.models import flow
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from tests.reference import reference_losses
from tests.tiny import EOS, PAD

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

QUESTION, BLOCKS, LATENTS, ANSWER = 64, 8, 4, 32
REPEATS = int(os.environ.get("LADIR_BENCHMARK_REPEATS", "5"))
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
WEIGHTS = {"flow": 5.0, "answer": 1.0, "stop": 1.0, "token": 0.5}

Report = Callable[..., None]


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Prints a row and keeps it for the JSON file."""
    rows: dict[str, dict[str, Any]] = {}
    path = Path(os.environ.get("LADIR_BENCHMARKS", "runs/benchmarks.json"))

    def add(name: str, **values: Any) -> None:
        rows[name] = values
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        sys.stdout.write(f"\n{name}: {shown}\n")

    yield add
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "repeats": REPEATS, "rows": rows}, indent=1) + "\n")
    sys.stdout.write(f"\nwritten: {path}\n")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Median CPU seconds of each way, run one after another ``repeats`` times, after one run to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def new_denoiser(
    vocab: int = 1000, latents: int = LATENTS, dim: int = 32, shape: dict[str, Any] = SMALL, **settings: Any
) -> Denoiser:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape, vocab_size=vocab, max_position_embeddings=1024)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return Denoiser(Backbone(lm), DenoiserSettings(**settings), latents, torch.zeros(dim), torch.ones(dim))


def records(
    count: int, question: int = QUESTION, blocks: int = BLOCKS, latents: int = LATENTS, answer: int = ANSWER, dim: int = 32
) -> list[LatentRecord]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 36, length)]

    made = []
    for _ in range(count):
        mu = torch.from_numpy(rng.standard_normal((blocks, latents, dim), dtype=np.float32))
        made.append(LatentRecord(ids(question), [ids(5) for _ in range(blocks)], ids(answer), mu, torch.full_like(mu, -4.0)))
    return made


def batch_of(denoiser: Denoiser, samples: list[LatentRecord], **changes: Any) -> DenoiserBatch:
    mean, std = denoiser.latent_mean.numpy(), denoiser.latent_std.numpy()
    settings = replace(denoiser.settings, **{"condition_dropout": 0.0, **changes})
    return DenoiserCollator(settings, mean, std, EOS, 0, len(samples))(samples, list(range(len(samples))))


def backward(model: nn.Module, losses: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The total loss and the norm of all its gradients."""
    model.zero_grad()
    loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items() if name in WEIGHTS]).sum()
    loss.backward()
    return loss.detach(), nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4])
def test_one_pass_against_one_forward_per_block_and_draw(draws: int, report: Report) -> None:
    denoiser, samples = new_denoiser(draws=draws), records(1)
    batch = batch_of(denoiser, samples)
    ways = {
        "ours": lambda: backward(denoiser, denoiser(batch)),
        "obvious": lambda: backward(denoiser, reference_losses(denoiser, samples, batch, [False])),
    }
    ours, obvious = ways["ours"](), ways["obvious"]()
    assert torch.allclose(torch.stack(ours), torch.stack(obvious), rtol=1e-4)
    seconds = in_turn(ways)
    block = LATENTS + 2
    separate = draws * sum(QUESTION + b * block + LATENTS + 1 for b in range(BLOCKS)) + QUESTION + BLOCKS * block + 1 + ANSWER
    tokens = len(template(QUESTION, BLOCKS, LATENTS, draws, ANSWER))
    report(
        f"one_pass_m{draws}",
        ratio=seconds["obvious"] / seconds["ours"],
        ratio_of_tokens=separate / tokens,
        draws_per_second=BLOCKS * draws / seconds["ours"],
        obvious_draws_per_second=BLOCKS * draws / seconds["obvious"],
        examples_per_second=1 / seconds["ours"],
    )


def test_labelled_positions_against_full_logits(report: Report) -> None:
    denoiser = new_denoiser(vocab=32000, draws=4)
    batch = batch_of(denoiser, records(2))
    shape = (*batch.layout.copy.shape, denoiser.backbone.hidden_size)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(0, 1).requires_grad_()
    labels = torch.full((len(states),), -100).index_copy(0, batch.answer_at, batch.answer_labels)

    def labelled() -> Tensor:
        return F.cross_entropy(denoiser.backbone.logits(states[batch.answer_at]), batch.answer_labels, reduction="sum")

    def full() -> Tensor:
        return F.cross_entropy(denoiser.backbone.logits(states), labels, ignore_index=-100, reduction="sum")

    def gradient(way: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(way(), states)[0]

    assert torch.allclose(gradient(labelled), gradient(full), atol=1e-5)
    seconds = in_turn({"ours": lambda: gradient(labelled), "obvious": lambda: gradient(full)})
    report(
        "labelled_logits",
        ratio=seconds["obvious"] / seconds["ours"],
        ratio_of_positions=len(states) / len(batch.answer_at),
        ratio_of_memory=kept_for_backward(full, denoiser) / kept_for_backward(labelled, denoiser),
    )


def kept_for_backward(way: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of all distinct tensors that autograd keeps, but for the weights."""
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = way()
    loss.backward()
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


# --- inference ---------------------------------------------------------------------------------------------------------


class Case:
    """Questions of one length with trajectories that never stop before ``blocks``."""

    def __init__(self, denoiser: Denoiser, questions: int, trajectories: int, length: int, settings: SampleSettings) -> None:
        with torch.no_grad():
            denoiser.stop_head.bias.fill_(-1e4)
            nn.init.normal_(denoiser.time_out.weight, std=0.02)
        self.denoiser, self.settings = denoiser.eval(), settings
        ids = torch.randint(2, 36, (questions, length), generator=torch.Generator().manual_seed(1))
        self.inputs = denoiser.backbone.embed(ids).detach()
        self.owner = torch.arange(questions).repeat_interleave(trajectories)

    def noise(self) -> TrajectoryNoise:
        return TrajectoryNoise(0, [(str(q), i) for i, q in enumerate(self.owner.tolist())])

    @torch.no_grad()
    def cached(self, way: Callable[[Prefix, Tensor], Prefix] = Prefix.share) -> Tensor:
        """Latents [R, B, L, d] behind cached questions."""
        lengths = torch.full((len(self.inputs),), self.inputs.shape[1])
        prefix = way(Prefix.start(self.denoiser.backbone, self.inputs, lengths)[0], self.owner)
        [group] = BlockSampler(self.denoiser, self.settings, self.noise()).think(prefix, self.owner)
        return group.latents

    @torch.no_grad()
    def recomputed(self) -> Tensor:
        """The same with the whole sequence run at every step, all trajectories in one batch."""
        d, s, noise, rows = self.denoiser, self.settings, self.noise(), list(range(len(self.owner)))
        clean = self.inputs[self.owner]
        groups, blocks = list(range(clean.shape[1])), []
        marks = [d.mark(mark).expand(len(rows), 1, -1) for mark in (Mark.BOT, Mark.EOT)]
        for _ in range(s.max_blocks):
            z = s.initial_noise * noise.normal(rows, (d.latents_per_block, d.latent_dim))
            group = torch.tensor([*groups, *[len(groups)] * (d.latents_per_block + 1)])
            visible, positions = (group[None, :] <= group[:, None])[None], torch.arange(len(group))[None]
            for step in range(s.num_steps):
                t = torch.full((len(rows),), 1 - step / s.num_steps)
                inputs = torch.cat([clean, marks[0], d.noisy_inputs(z, t)], dim=1)
                prediction = d.predict(d.backbone(inputs, visible, positions)[:, -d.latents_per_block :])
                z = z - flow.to_velocity(d.settings.objective, prediction, z, t[:, None, None]) / s.num_steps
            blocks.append(z)
            clean = torch.cat([clean, marks[0], d.clean_inputs(z), marks[1]], dim=1)
            groups += [len(groups)] * (d.latents_per_block + 2)
        return torch.stack(blocks, 1)


def test_cached_sampling_against_recomputing(report: Report) -> None:
    settings = SampleSettings(num_steps=5, max_blocks=3)
    shape = {**SMALL, "hidden_size": 128, "intermediate_size": 344}
    case = Case(new_denoiser(shape=shape), questions=20, trajectories=5, length=QUESTION, settings=settings)
    assert torch.allclose(case.cached(), case.recomputed(), atol=1e-4)
    seconds = in_turn({"ours": case.cached, "obvious": case.recomputed}, repeats=min(REPEATS, 3))
    rows, new, block = len(case.owner), LATENTS + 1, LATENTS + 2
    steps = settings.num_steps
    ours = 20 * QUESTION + rows * settings.max_blocks * (steps * new + block)
    obvious = rows * steps * sum(QUESTION + b * block + new for b in range(settings.max_blocks))
    report(
        "cached_reasoning",
        ratio=seconds["obvious"] / seconds["ours"],
        ratio_of_tokens=obvious / ours,
        trajectories_per_second=rows / seconds["ours"],
    )


@pytest.mark.parametrize(("length", "trajectories"), [(16, 100), (256, 20)])
def test_shared_prefixes_against_copies(length: int, trajectories: int, report: Report) -> None:
    config = demo()
    settings = replace(config.sample, num_steps=5, max_blocks=3)
    denoiser = demo_denoiser(config)
    case = Case(denoiser, config.evaluate.questions_per_batch, trajectories, length, settings)
    ways = {"ours": case.cached, "obvious": lambda: case.cached(Prefix.select)}
    assert torch.allclose(ways["ours"](), ways["obvious"](), atol=1e-4)
    seconds = in_turn(ways, repeats=min(REPEATS, 3))
    own = settings.max_blocks * (denoiser.latents_per_block + 2)
    report(
        f"shared_prefix_{length}",
        ratio=seconds["obvious"] / seconds["ours"],
        ratio_of_memory=trajectories * (length + own) / (length + trajectories * own),
        trajectories_per_second=len(case.owner) / seconds["ours"],
    )


# --- ZeRO-3 ------------------------------------------------------------------------------------------------------------


def demo() -> Config:
    return load_config("configs/demo.yaml")


def demo_denoiser(config: Config) -> Denoiser:
    shape = {key: value for key, value in config.backbone.scratch.items() if key != "model_type"}
    config_lm = AutoConfig.for_model("llama", **{**shape, "vocab_size": 120, "pad_token_id": PAD, "eos_token_id": EOS})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_lm, dtype=torch.float32, attn_implementation="eager")
    dim = config.vae.latent_dim
    return Denoiser(Backbone(lm), config.denoiser, config.vae.latents_per_block, torch.zeros(dim), torch.ones(dim))


class PlainStep:
    """What the engine does, in plain PyTorch: micro batches, clipping, AdamW, averaged weights."""

    def __init__(self, config: Config) -> None:
        train = config.denoiser.train
        self.model, self.train = demo_denoiser(config).train(), train
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        self.parameters = parameters
        self.ema = [p.detach().clone() for p in parameters]
        self.steps = 0

    def __call__(self, batches: list[DenoiserBatch], seconds: dict[str, float]) -> None:
        for batch in batches:
            with timed(seconds, "forward"):
                losses = total(self.model(batch), batches)
            with timed(seconds, "backward"):
                losses.backward()
        with timed(seconds, "norm"):
            float(nn.utils.clip_grad_norm_(self.parameters, self.train.max_grad_norm))
        with timed(seconds, "step"):
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            decay = min(self.train.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)


class ZeroStep:
    """The same through the training runtime's engine."""

    def __init__(self, config: Config, world: Any) -> None:
        from training.runtime.engine import Engine

        self.train = config.denoiser.train
        self.engine = Engine(demo_denoiser(config), self.train, "float32", config.deepspeed, world)

    def __call__(self, batches: list[DenoiserBatch], seconds: dict[str, float]) -> None:
        for number, batch in enumerate(batches):
            with timed(seconds, "forward"):
                losses = total(self.engine.forward(batch), batches)
            with timed(seconds, "backward"):
                self.engine.backward(losses, last=number + 1 == len(batches))
        with timed(seconds, "norm"):
            float(self.engine.gradient_square())
        with timed(seconds, "step"):
            self.engine.step(self.train.lr)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start


def total(losses: dict[str, Tensor], batches: list[DenoiserBatch]) -> Tensor:
    """Weighted means over the labels of the whole step."""
    counts = {name: sum(batch.counts[name] for batch in batches) for name in WEIGHTS}
    return torch.stack([WEIGHTS[name] * losses[name] / max(counts[name], 1.0) for name in WEIGHTS]).sum()


#: DeepSpeed's functions by what they do: "hooks" run around every module and hold "gather", "step" holds "adam"
_PARTS = {
    "hooks": (
        "pre_sub_module_forward_function",
        "post_sub_module_forward_function",
        "pre_sub_module_backward_function",
        "post_sub_module_backward_function",
    ),
    "gather": ("fetch_sub_module", "release_sub_module"),
    "reduce": ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue"),
    "step": ("_prepare_sub_group", "_optimizer_step", "_reassign_or_swap_out_partitioned_parameters", "_release_sub_group"),
    "adam": ("_optimizer_step",),
}


def test_zero3_step_against_plain(report: Report) -> None:
    from training.runtime.distributed import start, stop

    config = demo()
    world = start(config.deepspeed)
    try:
        _zero3_against_plain(config, world, report)
    finally:
        stop()


def _zero3_against_plain(config: Config, world: Any, report: Report) -> None:
    plain, zero = PlainStep(config), ZeroStep(config, world)
    sizes = {"question": 5, "blocks": 2, "latents": config.vae.latents_per_block, "answer": 7, "dim": config.vae.latent_dim}
    samples = records(config.denoiser.train.micro_batch, **sizes)
    batches = [batch_of(plain.model, samples)]
    ways = {"ours": (zero, dict[str, float]()), "obvious": (plain, dict[str, float]())}
    for way, _ in ways.values():
        for _step in range(2):
            way(batches, {})
    whole = dict(zero.engine.full_state(ema=False))
    for name, parameter in plain.model.named_parameters():
        assert torch.allclose(parameter, whole[name], atol=1e-4), name
    turns = 4 * REPEATS
    seconds = in_turn({name: lambda way=way, parts=parts: way(batches, parts) for name, (way, parts) in ways.items()}, turns)  # type: ignore[misc]
    report(
        "zero3_step",
        ratio=seconds["ours"] / seconds["obvious"],
        overhead=seconds["ours"] / seconds["obvious"] - 1,
        milliseconds={name: 1e3 * value for name, value in seconds.items()},
        **{
            f"{name}_parts": {part: 1e3 * value / (turns + 1) for part, value in parts.items()}
            for name, (_, parts) in ways.items()
        },
        deepspeed=deepspeed_parts(lambda: zero(batches, {}), turns),
    )


def deepspeed_parts(step: Callable[[], None], turns: int) -> dict[str, float]:
    """Milliseconds of wall time per step in DeepSpeed's functions, by cProfile (which slows Python code down, some twofold)."""
    profile = cProfile.Profile()
    for _ in range(turns):
        profile.runcall(step)
    found = dict.fromkeys([*_PARTS, "own code"], 0.0)
    for (file, _, function), (_, _, own, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "deepspeed" in file:
            found["own code"] += 1e3 * own / turns
            for part, names in _PARTS.items():
                found[part] += 1e3 * cumulative / turns if function in names else 0.0
    return found
