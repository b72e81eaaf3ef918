"""Steps of the large shapes on one device through the training engine: memory beside what plan.py predicts, time, MFU."""

from __future__ import annotations

import gc
import statistics
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from ladir.config import Config
from training.benchmarks.setup import Bench
from training.benchmarks.sizes import Size
from training.benchmarks.zero import total_loss
from training.phases.denoiser import denoiser_weights
from training.planning.memory import Zero, holdings, weights_of
from training.planning.models import meta_model, micro_batch, new_model
from training.planning.predict import Planner
from training.planning.prediction import Machine, Prediction
from training.runtime.distributed import World
from training.runtime.ds_config import read_ds_config
from training.runtime.engine import Engine
from training.runtime.topology import Topology
from training.runtime.utilisation import counted_flops, measured_peak

#: share of the host's free memory that offloaded state may take, and most layers: what a GPU holds does not grow with them then,
#: and setting up the host's memory takes most of the time
_HOST_SHARE, _OFFLOADED_LAYERS = 0.8, 3
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Case:
    """A training phase as it would be run on one GPU."""

    name: str
    phase: str
    lora_rank: int
    deepspeed: str
    micro_batch: int

    def config(self, size: Size, device_type: str) -> Config:
        """The settings; every record is of the size's lengths."""
        config = size.config(device_type)
        config.backbone.lora.rank = self.lora_rank
        config.backbone.activation_checkpointing = "full"
        config.deepspeed.config = self.deepspeed
        lengths, data, train = size.lengths, config.data, getattr(config, self.phase).train
        data.max_question_tokens, data.max_answer_tokens = lengths.question, lengths.answer
        data.max_blocks, data.max_block_tokens = lengths.blocks, lengths.block
        config.plan.samples = train.global_batch = train.micro_batch = self.micro_batch
        return config


CASES = {
    case.name: case
    for case in (
        Case("denoiser-lora", "denoiser", 16, "ds_configs/zero2.json", 16),
        Case("vae-lora", "vae", 16, "ds_configs/zero2.json", 256),
        Case("denoiser-full-offload", "denoiser", 0, "ds_configs/zero3_offload.json", 4),
        Case("vae-full-offload", "vae", 0, "ds_configs/zero3_offload.json", 64),
    )
}


def host_bytes(config: Config, phase: str, layers: int) -> int:
    """Host memory of the phase at so many layers, by plan.py's rules."""
    shallow = with_layers(config, layers)
    zero = Zero.of(read_ds_config(config.deepspeed.config), 1, 2)
    weights = weights_of(meta_model(shallow, phase, "none"))
    return holdings(weights, zero, averaged=False).host


def with_layers(config: Config, layers: int) -> Config:
    """The same settings with another number of layers."""
    config = deepcopy(config)
    config.backbone.scratch["num_hidden_layers"] = layers
    return config


def fitting_layers(config: Config, phase: str, budget: int) -> int:
    """Most layers whose offloaded state fits into ``budget`` bytes of host memory (it grows by as much with each)."""
    layers = int(config.backbone.scratch["num_hidden_layers"])
    most, half = host_bytes(config, phase, layers), host_bytes(config, phase, max(1, layers // 2))
    per_layer = (most - half) / max(1, layers - layers // 2)
    if most <= budget or per_layer <= 0:
        return layers
    return max(1, layers - int(-(-(most - budget) // per_layer)))


def predict(config: Config, phase: str) -> Prediction:
    """What plan.py says of one GPU that is large enough."""
    return Planner(config, Machine(Topology(1, 1, gpu_gib=2.0**20), reserve=0, flops=1.0, mfu=1.0)).training(phase)


def measure(case: Case, size: Size, world: World) -> dict[str, Any]:
    """Train a few steps of ``case``; GiB where a key says so, memory measured on CUDA only; ``peak`` in FLOP/s."""
    device = world.device
    config = case.config(size, device.type)
    layers = fitting_layers(config, case.phase, int(_HOST_SHARE * psutil.virtual_memory().available))
    if host_bytes(config, case.phase, layers):
        layers = min(layers, _OFFLOADED_LAYERS)
    all_layers = int(config.backbone.scratch["num_hidden_layers"])
    config = with_layers(config, layers)
    predicted = predict(config, case.phase)
    torch.manual_seed(0)
    model = new_model(config, case.phase, config.backbone.activation_checkpointing, device)
    train = getattr(config, case.phase).train
    bench = Bench(replace(size, scratch=config.backbone.scratch), device)
    engine = Engine(model, train, config.backbone.dtype, config.deepspeed, world)
    vocabulary = config.backbone.scratch["vocab_size"]
    batch = micro_batch(config, case.phase, size.lengths, case.micro_batch, vocabulary, device)
    weights = denoiser_weights(config.denoiser) if case.phase == "denoiser" else {"reconstruction": 1.0, "kl": config.vae.beta}
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def finish(losses: dict[str, Tensor]) -> None:
        engine.backward(total_loss(losses, batch, weights), last=True)
        float(engine.gradient_square())
        engine.step(train.lr)

    def step() -> None:
        finish(engine.forward(batch))

    with counted_flops(engine.model) as count:
        losses = engine.forward(batch)
    finish(losses)  # what it recomputes does not count
    del losses
    seconds = statistics.median(bench.seconds(step) for _ in range(_TIMED_STEPS))
    measured = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    peak = measured_peak(device, bench.dtype, bench.now)
    return {
        "layers": layers,
        "of_layers": all_layers,
        "micro_batch": case.micro_batch,
        "predicted_gib": predicted.peak / 2**30,
        "measured_gib": measured,
        "predicted_host_gib": predicted.host_per_node / 2**30,
        "seconds": seconds,
        "tokens_per_second": batch.num_tokens / seconds,
        "mfu": count.flops / seconds / peak,
        "peak": peak,
    }
