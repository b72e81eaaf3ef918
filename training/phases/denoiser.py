"""The denoiser's stage 1 as the train loop sees it: behind the true blocks."""

from __future__ import annotations

import logging

import numpy as np
from transformers import PreTrainedTokenizerBase

from ladir.config import Config, DenoiserSettings, TrainSettings
from ladir.data.batches import DenoiserCollator
from ladir.data.latents import LatentStore
from ladir.data.prompts import Frame
from ladir.data.randomness import derive
from ladir.errors import UnusableError
from ladir.layout import Mark
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_latent_maps, save_denoiser
from ladir.models.loading import build_backbone, check_lm
from ladir.models.pairing import TrainedOn
from ladir.tokens import encode_text, load_tokenizer, tokenizer_fingerprint
from training.phases.base import Samples, TrainingPhase
from training.phases.lengths import check_records
from training.phases.samples import denoiser_samples
from training.runtime.distributed import World
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.stages import fingerprint

logger = logging.getLogger(__name__)


def denoiser_phase(config: Config, world: World, stop: StopRequest | None = None) -> TrainingPhase:
    """The denoiser on the stored latents, started from the base LM and the VAE's maps."""
    tokenizer = load_tokenizer(config.backbone)
    lm = check_lm(config.backbone, tokenizer)
    folder, frame = RunFolder(config), Frame.of(tokenizer, config.data.chat_template)
    store, validation = stored_latents(config, folder, world, stop)
    check_records(config, lm, [store, validation], frame)
    vae = folder.model("vae")
    with sharded_init(config, config.denoiser.train, world):
        backbone = build_backbone(config.backbone, world.device.type)
        model = Denoiser(backbone, config.denoiser, config.vae.latents_per_block, store.mean, store.std)
    if config.denoiser.init_from_vae:
        model.init_from_vae(load_latent_maps(vae))
    model.init_marks(mark_texts(config, tokenizer))
    collator = denoiser_collator(config, store, tokenizer, config.denoiser.train, "denoiser", frame)
    return TrainingPhase(
        items=store,
        collator=collator,
        name="denoiser",
        model=model,
        weights=denoiser_weights(config.denoiser),
        validation=Samples(validation, collator) if validation is not None else None,
        write=lambda target, state: save_denoiser(model, target, state, trained_on=trained_on(store, tokenizer, frame)),
        show=denoiser_samples(config, tokenizer, validation, store, vae, frame),
    )


def mark_texts(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[Mark, list[int]]:
    """Token ids of what a plain chain has in the places of marks; none where finished blocks do not stand as text.

    Marks of which a tokenizer makes nothing are left out.
    """
    if not config.denoiser.init_marks or config.denoiser.context != "text":
        return {}
    texts = {
        Mark.BOT: encode_text(tokenizer, "\n"),
        Mark.EOT: [int(tokenizer.eos_token_id)],
        Mark.SOA: encode_text(tokenizer, config.data.answer_prefixes[0]),
    }
    return {mark: ids for mark, ids in texts.items() if ids}


def trained_on(store: LatentStore, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> TrainedOn:
    """What is kept with a denoiser, to tell what belongs to it and how it is asked."""
    words = tokenizer_fingerprint(tokenizer)
    return TrainedOn(store.fingerprint, words, longest_question=store.longest_question, frame=frame.to_save())


def stored_latents(
    config: Config, folder: RunFolder, world: World, stop: StopRequest | None = None
) -> tuple[LatentStore, LatentStore | None]:
    """The latents of training and validation records (None where there are none), made by the run's own VAE."""
    store = LatentStore.open(folder.latents / "train", config.denoiser)
    store.check_fingerprint(fingerprint(world, stop, folder.model("vae"), "vae"))
    _check_blocks(config, store)
    if config.denoiser.sample_latents and not store.form.logvar:
        raise UnusableError(
            f"{store.folder}: it holds no log-variances, from which denoiser.sample_latents=true draws; run "
            "training/encode_latents.py with this setting, which encodes again, or set denoiser.sample_latents=false"
        )
    if config.data.validation is None:
        return store, None
    if not (folder.latents / "validation").is_dir():
        logger.warning("%s: not encoded: training goes without validation", folder.latents / "validation")
        return store, None
    held_out = LatentStore.open(folder.latents / "validation", config.denoiser)
    held_out.check_fingerprint(store.fingerprint)
    return store, held_out


def _check_blocks(config: Config, store: LatentStore) -> None:
    """UnusableError where records were encoded that have more blocks than the settings allow now: stage 2 would cut them."""
    if store.most_blocks > config.data.max_blocks:
        raise UnusableError(
            f"{store.folder}: a record there has {store.most_blocks} blocks, more than data.max_blocks={config.data.max_blocks}; "
            "set data.max_blocks as it was for training/encode_latents.py, or encode again"
        )


def denoiser_collator(
    config: Config, store: LatentStore, tokenizer: PreTrainedTokenizerBase, train: TrainSettings, name: str, frame: Frame
) -> DenoiserCollator:
    """Batches of teacher forcing for the phase ``name``, trained as ``train`` says, with ``frame`` around questions."""
    return DenoiserCollator(
        config.denoiser,
        np.asarray(store.mean, dtype=np.float32),
        np.asarray(store.std, dtype=np.float32),
        eos_id=int(tokenizer.eos_token_id),
        seed=derive(config.run.seed, name),
        samples_per_step=train.global_batch,
        prefix=frame.before,
        suffix=frame.behind,
        pack_tokens=train.pack_tokens,
    )


def denoiser_weights(settings: DenoiserSettings) -> dict[str, float]:
    """Weights of the loss terms of teacher forcing."""
    weights = {"flow": settings.flow_weight, "answer": settings.answer_weight, "stop": settings.stop_weight}
    optional = {"token": settings.token_weight, "lm": settings.lm_weight}
    return weights | {name: weight for name, weight in optional.items() if weight}
