"""What is trained: the VAE, the denoiser and the autoregressive LM, as the train loop sees them.

A phase joins a model of :mod:`ladir.models`, samples and a collator; loop, ranks and checkpoints are the runtime's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ladir.config import Config, DenoiserSettings, TrainSettings
from ladir.data.batches import ArCollator, DenoiserCollator, VaeCollator
from ladir.data.encode import EncodedRecord, encode_records, encode_sentence_set
from ladir.data.latents import LatentStore
from ladir.data.prompts import bos_ids, chain_pairs, copy_pairs
from ladir.data.randomness import derive, generator
from ladir.data.records import Record, read_records, read_sentences
from ladir.data.token_lists import TokenLists, TokenPairs
from ladir.errors import UnusableError
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone, build_backbone, for_training, new_lm
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_latent_maps, new_vae, save_denoiser, save_lm, save_vae
from ladir.models.store import folder_fingerprint
from ladir.tokens import load_tokenizer
from training.runtime.distributed import World
from training.runtime.run import RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.telemetry import Telemetry
from training.samples import Show, ar_samples, denoiser_samples, vae_samples

logger = logging.getLogger(__name__)


class Items(Protocol):
    """What samples are taken from: a list, or a store on disk."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """One sample."""


@dataclass
class Samples:
    """Samples with their collator: what the loop draws micro batches from."""

    items: Items
    collator: Callable[[Sequence[Any], Sequence[int], bool], Any]

    @property
    def num_samples(self) -> int:
        return len(self.items)

    def collate(self, indices: list[int], numbers: list[int], training: bool = True) -> Any:
        """One micro batch of the samples at ``indices``, whose places in the run are ``numbers``."""
        return self.collator([self.items[i] for i in indices], numbers, training)


@dataclass
class TrainingPhase(Samples):
    """A model with its losses and samples; ``write(folder, state)`` stores the finished model."""

    name: str
    model: nn.Module
    weights: Mapping[str, float]
    validation: Samples | None
    write: Callable[[Path, Iterator[tuple[str, Tensor]]], None]
    show: Show | None = None

    def on_validate(self, model: nn.Module, telemetry: Telemetry, step: int) -> None:
        """Show samples, where any are wanted."""
        if self.show is not None:
            self.show(model, telemetry, step)

    def save(self, folder: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        """Write the model whose full tensors ``state`` yields (rank 0)."""
        self.write(folder, state)


def read_encoded(config: Config, path: str | None, tokenizer: PreTrainedTokenizerBase) -> Sequence[EncodedRecord]:
    """Records of one file as token ids; bad ones are refused or counted as ``data.on_bad_record`` says."""
    if path is None:
        return []
    encoded, _ = encode_records(read_records(path, config.data), tokenizer, config.data)
    return encoded


def _blocks(config: Config, path: str | None, tokenizer: PreTrainedTokenizerBase) -> TokenLists:
    """All blocks of one file's records."""
    return TokenLists(block for record in read_encoded(config, path, tokenizer) for block in record.blocks)


def vae_phase(config: Config, world: World) -> TrainingPhase:
    """The VAE on every block of the training records and the extra sentences."""
    tokenizer = load_tokenizer(config.backbone)
    with sharded_init(config, config.vae.train, world):
        model = new_vae(config.vae, config.backbone, world.device.type)
    sentences = _blocks(config, config.data.train, tokenizer)
    if config.data.sentences:
        for ids in encode_sentence_set(read_sentences(config.data.sentences), tokenizer, config.data):
            sentences.append(ids)
    held_out = _blocks(config, config.data.validation, tokenizer)
    collator = VaeCollator(
        config.vae,
        model.encoder.vocab_size,
        int(tokenizer.eos_token_id),
        seed=derive(config.run.seed, "vae"),
        pack_tokens=config.vae.train.pack_tokens,
    )
    return TrainingPhase(
        items=sentences,
        collator=collator,
        name="vae",
        model=model,
        weights={"reconstruction": 1.0, "kl": config.vae.beta},
        validation=Samples(held_out, collator) if held_out else None,
        write=lambda folder, state: save_vae(model, folder, state, base=config.backbone.name_or_path),
        show=vae_samples(config, tokenizer, held_out, sentences),
    )


def denoiser_phase(config: Config, world: World) -> TrainingPhase:
    """The denoiser on the stored latents, started from the base LM and the VAE's maps."""
    tokenizer = load_tokenizer(config.backbone)
    folder = RunFolder(config)
    store, validation = stored_latents(config, folder, world)
    vae = folder.model("vae")
    with sharded_init(config, config.denoiser.train, world):
        backbone = build_backbone(config.backbone, world.device.type)
        model = Denoiser(backbone, config.denoiser, config.vae.latents_per_block, store.mean, store.std)
    if config.denoiser.init_from_vae:
        model.init_from_vae(load_latent_maps(vae))
    collator = denoiser_collator(config, store, tokenizer, config.denoiser.train, "denoiser")
    return TrainingPhase(
        items=store,
        collator=collator,
        name="denoiser",
        model=model,
        weights=denoiser_weights(config.denoiser),
        validation=Samples(validation, collator) if validation is not None else None,
        write=lambda target, state: save_denoiser(model, target, state),
        show=denoiser_samples(config, tokenizer, validation, store, vae),
    )


def stored_latents(config: Config, folder: RunFolder, world: World) -> tuple[LatentStore, LatentStore | None]:
    """The latents of training and validation records (None where there are none), made by the run's own VAE."""
    store = LatentStore.open(folder.latents / "train")
    store.check_fingerprint(world.broadcast(folder_fingerprint(folder.model("vae")) if world.is_main else None))
    _check_blocks(config, store)
    if config.data.validation is None:
        return store, None
    if not (folder.latents / "validation").is_dir():
        logger.warning("%s: not encoded: training goes without validation", folder.latents / "validation")
        return store, None
    held_out = LatentStore.open(folder.latents / "validation")
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
    config: Config, store: LatentStore, tokenizer: PreTrainedTokenizerBase, train: TrainSettings, name: str
) -> DenoiserCollator:
    """Batches of teacher forcing for the phase ``name``, whose training settings are ``train``."""
    return DenoiserCollator(
        config.denoiser,
        np.asarray(store.mean, dtype=np.float32),
        np.asarray(store.std, dtype=np.float32),
        eos_id=int(tokenizer.eos_token_id),
        seed=derive(config.run.seed, name),
        samples_per_step=train.global_batch,
        prefix=tuple(bos_ids(tokenizer)),
        pack_tokens=train.pack_tokens,
    )


def denoiser_weights(settings: DenoiserSettings) -> dict[str, float]:
    """Weights of the loss terms of teacher forcing."""
    weights = {"flow": settings.flow_weight, "answer": settings.answer_weight, "stop": settings.stop_weight}
    return {**weights, "token": settings.token_weight} if settings.token_weight else weights


def ar_phase(config: Config, world: World) -> TrainingPhase:
    """Chain-of-thought fine-tuning of an LM (or training of a new one, ``ar.from_scratch``)."""
    tokenizer = load_tokenizer(config.backbone)
    if config.ar.from_scratch:
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
        backbone = for_training(Backbone(new_lm(config.backbone, len(tokenizer), ids, world.device.type)), config.backbone)
    else:
        with sharded_init(config, config.ar.train, world):
            backbone = build_backbone(config.backbone, world.device.type)
    records = [encoded.record for encoded in read_encoded(config, config.data.train, tokenizer)]
    held_out = [encoded.record for encoded in read_encoded(config, config.data.validation, tokenizer)]
    prefix = config.data.answer_prefixes[0]
    bidirectional = config.ar.bidirectional_question
    collator = ArCollator(config.ar.train.pack_tokens, bidirectional)
    return TrainingPhase(
        items=TokenPairs.of(itertools.chain(chain_pairs(tokenizer, records, prefix), _copies(config, tokenizer, records))),
        collator=collator,
        name=config.ar.phase,
        model=ArModel(backbone),
        weights={"text": 1.0},
        validation=Samples(TokenPairs.of(chain_pairs(tokenizer, held_out, prefix)), collator) if held_out else None,
        write=lambda folder, state: _write_lm(backbone, tokenizer, folder, state, bidirectional),
        show=ar_samples(config, tokenizer, held_out, records),
    )


def _copies(
    config: Config, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Iterator[tuple[list[int], list[int]]]:
    """Samples that ask to repeat a sentence: ``ar.copy_fraction`` of all."""
    share = config.ar.copy_fraction
    sentences = [block for record in records for block in record.blocks]
    count = round(len(records) * share / (1.0 - share))
    chosen = generator(derive(config.run.seed, "copies"), 0).integers(0, len(sentences), count)
    return copy_pairs(tokenizer, (sentences[i] for i in chosen))


def _write_lm(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Iterator[tuple[str, Tensor]],
    bidirectional_question: bool,
) -> None:
    """The LM with its tokenizer, so that the folder can be named as ``backbone.name_or_path``."""
    own = ((name.removeprefix("backbone."), tensor) for name, tensor in state)
    save_lm(backbone, folder, own, bidirectional_question=bidirectional_question)
    tokenizer.save_pretrained(str(folder))
