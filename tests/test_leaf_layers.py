"""ZeRO-3 with LM layers as single units gives the losses and weights of ZeRO-3 with all its hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ladir.config import DeepSpeedSettings, LoraSettings, TrainSettings
from ladir.data.batches import DenoiserBatch, VaeBatch, VaeCollator
from ladir.models.backbone import with_activation_checkpointing
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae
from tests.distributed import ProcessGroup
from tests.tiny import EOS, VOCAB, collator, random_records, tiny_denoiser, tiny_lm, tiny_vae, tokens
from training.runtime.distributed import World
from training.runtime.engine import Engine


def model_of(what: str) -> Vae | Denoiser:
    if what.startswith("denoiser"):
        carry = {"carry": "hidden", "carry_probability": 0.7} if what == "denoiser with a carry" else {}
        denoiser = tiny_denoiser(tiny_lm("llama", dtype=torch.float32), answer_every=1, **carry)
        with_activation_checkpointing(denoiser.backbone, "full" if what == "denoiser recomputed" else "none")
        return denoiser
    lora = LoraSettings(rank=2) if what == "vae lora" else None
    return tiny_vae("qwen3", lora=lora, decoder="trained" if what == "vae trained" else "frozen")


def batch_of(model: Vae | Denoiser, first: int) -> VaeBatch | DenoiserBatch:
    if isinstance(model, Denoiser):
        return collator(model, samples_per_step=100)(random_records(3, seed=first), range(first, first + 3))
    rng = np.random.default_rng(first)
    return VaeCollator(model.settings, range(VOCAB), EOS, 0)([tokens(rng, 2, 5) for _ in range(3)], range(first, first + 3))


def trained(world: World, what: str, leaf_layers: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses of three steps, the weights after them, and the number of layers that are units."""
    deepspeed = DeepSpeedSettings(config="ds_configs/zero3.json", leaf_layers=leaf_layers)
    engine = Engine(model_of(what), TrainSettings(max_grad_norm=0.0), "float32", deepspeed, world)
    losses = []
    for step in range(3):
        outputs = engine.forward(batch_of(engine.model, 100 * step + 10 * world.rank))  # type: ignore[arg-type]
        loss = torch.stack([value for name, value in outputs.items() if not name.startswith("metric")]).sum()
        losses.append(loss.item())
        engine.backward(loss / 100, last=True)
        engine.step(0.01)
    units = sum(getattr(module, "_z3_leaf", False) for module in engine.model.modules())
    return losses, world.broadcast(dict(engine.full_state(ema=False))), units


def both_ways(world: World, what: str) -> dict[str, Any]:
    (losses, weights, none), (leaf_losses, leaf_weights, units) = trained(world, what, False), trained(world, what, True)
    assert none == 0
    gap = max(float((leaf_weights[name] - value).abs().max()) for name, value in weights.items())
    return {"losses": (losses, leaf_losses), "gap": gap, "units": units}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "has_units"),
    [
        ("denoiser", True),
        ("denoiser recomputed", True),
        ("denoiser with a carry", True),
        ("vae trained", True),
        ("vae frozen", True),
        ("vae lora", False),  # encoder and decoder share their layers: a unit would be reduced twice in one backward pass
    ],
)
def test_layers_as_units_change_nothing(two_processes: ProcessGroup, what: str, has_units: bool) -> None:
    for result in two_processes.run(both_ways, what):
        assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
        assert result["gap"] < 1e-6
        assert bool(result["units"]) == has_units
