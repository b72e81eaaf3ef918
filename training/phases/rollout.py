"""Stage 2 of the denoiser's training as the train loop sees it: the answer through blocks that the model generates itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from ladir.config import Config
from ladir.data.randomness import derive
from ladir.data.rollout import GoldStore, RolloutCollator
from ladir.inference.rollout import Rollout
from ladir.models.folders import load_denoiser_to_train, save_denoiser
from ladir.tokens import load_tokenizer
from training.phases.base import Samples, TrainingPhase
from training.phases.denoiser import denoiser_collator, denoiser_weights, stored_latents, trained_on
from training.phases.earlier import Earlier
from training.phases.samples import Show, denoiser_samples
from training.runtime.distributed import World
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.telemetry import Telemetry


def rollout_phase(config: Config, world: World, stop: StopRequest | None = None) -> TrainingPhase:
    """Stage 2, from the denoiser of stage 1 on the same latents.  UnusableError where that is missing or was made otherwise."""
    settings = config.rollout
    tokenizer = load_tokenizer(config.backbone)
    folder = RunFolder(config)
    store, validation = stored_latents(config, folder, world, stop)
    stage_1 = Earlier.of(config, world, tokenizer, store, folder.model("denoiser"), stage=2, stop=stop)
    frame = stage_1.frame
    with sharded_init(config, settings.train, world):
        denoiser = load_denoiser_to_train(stage_1.folder, config.backbone, config.denoiser, world.device.type)
    recompute = config.backbone.activation_checkpointing != "none"
    teacher = denoiser_collator(config, store, tokenizer, settings.train, "rollout/teacher", frame)
    collator = RolloutCollator(teacher, settings, seed=derive(config.run.seed, "rollout"), sample=config.sample)
    show = denoiser_samples(config, tokenizer, validation, store, folder.model("vae"), frame)

    def write(target: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        own = ((name.removeprefix("denoiser."), tensor) for name, tensor in state)
        known = trained_on(store, tokenizer, frame)
        save_denoiser(denoiser, target, own, origin=stage_1.fingerprint, trained_on=known, stage="rollout")

    return TrainingPhase(
        items=GoldStore(store, settings.candidates if settings.gold == "nearest" else 1),
        collator=collator,
        name="rollout",
        model=Rollout(denoiser, settings, config.data.max_blocks, recompute, world.largest, config.sample),
        weights={**denoiser_weights(config.denoiser), "rollout": settings.answer_weight},
        validation=Samples(GoldStore(validation, 1), collator) if validation is not None else None,
        write=write,
        show=_of_the_denoiser(show) if show is not None else None,
    )


def _of_the_denoiser(show: Show) -> Show:
    """The denoiser inside is what is shown."""

    def shown(model: object, telemetry: Telemetry, step: int) -> None:
        assert isinstance(model, nn.Module)
        show(model.denoiser, telemetry, step)

    return shown
