"""What ZeRO-3 costs on one process: the engine's step against the same in plain PyTorch."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ladir.config import Config, TrainSettings
from ladir.config.loader import load_config
from ladir.data.batches import DenoiserBatch
from ladir.models.denoiser import Denoiser
from training.benchmarks.setup import Bench, Row, UnequalError, released
from training.benchmarks.sizes import SIZES
from training.phases.denoiser import denoiser_weights
from training.planning.models import Lengths
from training.runtime.distributed import World, start, stop
from training.runtime.ds_config import REPOSITORY
from training.runtime.engine import Engine

_WARM_UP_STEPS = 2
#: part of a change's length by which the two may differ: AdamW's first steps go by a gradient's sign, however small it is
_SAME_WAY = 0.1
_DEMO_LENGTHS, _DEMO_VOCABULARY, _DEMO_ROUNDS = Lengths(question=5, blocks=2, block=5, answer=7), 120, 9

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


class PlainTraining:
    """What the engine does, in plain PyTorch: clipping, AdamW on float32 weights, averaged weights."""

    def __init__(self, model: Denoiser, config: Config) -> None:
        train = config.denoiser.train
        self.model, self._train, self._weights = model.train(), train, denoiser_weights(config.denoiser)
        self._parameters = list(model.parameters())
        # The model's own memory where it is in float32 already.
        self._masters = [p.detach().float().requires_grad_() for p in self._parameters]
        self._optimizer = _adamw(self._masters, train)
        self._ema = [p.detach().clone() for p in self._masters] if train.ema else []
        self._steps = 0

    def __call__(self, batch: DenoiserBatch) -> None:
        total_loss(self.model(batch), batch, self._weights).backward()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, self._train.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._parameters[0].dtype != torch.float32:
            torch._foreach_copy_([p.detach() for p in self._parameters], [p.detach() for p in self._masters])
        self._steps += 1
        if self._ema:
            decay = min(self._train.ema, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._ema, [p.detach() for p in self._masters], 1 - decay)


class EngineTraining:
    """The same through the training runtime's engine."""

    def __init__(self, model: Denoiser, config: Config, world: World) -> None:
        self._train, self._weights = config.denoiser.train, denoiser_weights(config.denoiser)
        self.engine = Engine(model, self._train, config.backbone.dtype, config.deepspeed, world)

    def __call__(self, batch: DenoiserBatch) -> None:
        self.engine.backward(total_loss(self.engine.forward(batch), batch, self._weights), last=True)
        float(self.engine.gradient_square())
        self.engine.step(self._train.lr)


def _adamw(parameters: Sequence[Tensor], train: TrainSettings) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)


def total_loss(losses: dict[str, Tensor], batch: DenoiserBatch, weights: dict[str, float]) -> Tensor:
    """Weighted means over the batch's labels."""
    terms = [weight * losses[name] / max(batch.counts[name], 1.0) for name, weight in weights.items() if name in losses]
    return torch.stack(terms).sum()


def zero3_rows(bench: Bench) -> list[Row]:
    """The denoiser's step under ZeRO-3 on one process, at the benchmark's size and (with tiny) at the demo's."""
    world = start(bench.config.deepspeed)
    rows = []
    try:
        if bench.size.name == "tiny":
            # First: for large weights DeepSpeed replaces torch's linear layer in the whole process, the plain step's too.
            with released():
                rows.append(zero3_step(_demo(bench.device), "zero3_step_demo", world))
        rows.append(zero3_step(bench, "zero3_step", world))
        return rows
    finally:
        stop()


def _demo(device: torch.device) -> Bench:
    """The demo's model, settings and micro batch: hooks and Python code weigh most there."""
    config = load_config(str(REPOSITORY / "configs" / "demo.yaml"))
    config.backbone.name_or_path = None
    config.denoiser.train.optimizer = "adamw"  # as in the plain way: Muon's cost is not ZeRO's
    config.backbone.scratch.update(vocab_size=_DEMO_VOCABULARY, eos_token_id=1, pad_token_id=0)
    size = replace(
        SIZES["tiny"],
        scratch=config.backbone.scratch,
        lengths=_DEMO_LENGTHS,
        latents=config.vae.latents_per_block,
        latent_dim=config.vae.latent_dim,
        records=config.denoiser.train.micro_batch,
        rounds=_DEMO_ROUNDS,
    )
    bench = Bench(size, device)
    bench.config = config
    return bench


def zero3_step(bench: Bench, key: str, world: World) -> Row:
    """ZeRO-3 against plain PyTorch; ``ratio`` below 1 is what ZeRO-3 costs."""
    config, size = bench.config, bench.size
    plain = PlainTraining(bench.denoiser(), config)
    ours = EngineTraining(bench.denoiser(), config, world)
    batch = bench.denoiser_batch(bench.records([size.lengths] * size.records), config.denoiser.draws)
    begun = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
    ways = {"ours": lambda: ours(batch), "obvious": lambda: plain(batch)}
    for way in ways.values():
        for _ in range(_WARM_UP_STEPS):
            way()
    whole = dict(ours.engine.full_state(ema=False))
    for name, parameter in plain.model.named_parameters():
        value = whole[name].to(bench.device)
        bench.check_equal(f"{key}: {name}", value, parameter.detach())
        # How far they went: a few small steps hide in the rounding of the weights themselves.
        ours_went, went = (float((to - begun[name]).float().norm()) for to in (value, parameter.detach()))
        if abs(ours_went - went) > _SAME_WAY * went:
            raise UnequalError(f"{key}: {name} was moved by {ours_went:.3g} and by {went:.3g}: one of the two does not train it")
    seconds = bench.in_turn(ways, warm_up=False)
    return Row(
        key,
        f"ZeRO-3 on one process, {sum(p.numel() for p in plain.model.parameters()) / 1e6:.1f}M parameters",
        "plain PyTorch",
        seconds["ours"],
        seconds["obvious"],
        details={"overhead": seconds["ours"] / seconds["obvious"] - 1, "deepspeed_ms": deepspeed_parts(ways["ours"], 1)},
    )


def deepspeed_parts(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Milliseconds of wall time per step in DeepSpeed's functions, by cProfile (which slows Python code down, some twofold)."""
    profile = cProfile.Profile()
    for _ in range(repeats):
        profile.runcall(step)
    found = dict.fromkeys([*_PARTS, "own code"], 0.0)
    for (file, _, function), (_, _, own, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "deepspeed" in file:
            found["own code"] += 1e3 * own / repeats
            for part, names in _PARTS.items():
                found[part] += 1e3 * cumulative / repeats if function in names else 0.0
    return found
