"""The VAE as the train loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ladir.config import Config, TrainSettings, VaeSettings
from ladir.data.batches import VaeCollator
from ladir.data.grounding import GroundedSentences
from ladir.data.prompts import Frame, bos_ids
from ladir.data.randomness import derive
from ladir.data.token_lists import Joined
from ladir.data.token_store import TokenStore
from ladir.models.folders import new_vae, save_vae
from ladir.models.loading import check_lm
from ladir.models.vae import Vae
from ladir.tokens import encode_text, load_tokenizer, ordinary_ids
from training.phases.base import Samples, TrainingPhase
from training.phases.lengths import check_sentences
from training.phases.samples import vae_samples
from training.phases.tokens import Tokens
from training.runtime.distributed import World
from training.runtime.preemption import StopRequest
from training.runtime.sharding import sharded_init


def vae_phase(config: Config, world: World, stop: StopRequest | None = None) -> TrainingPhase:
    """The VAE on every block of the training records and the extra sentences."""
    tokenizer = load_tokenizer(config.backbone)
    lm = check_lm(config.backbone, tokenizer)
    tokens = Tokens(config, world, tokenizer, stop)
    trained, held_out = tokens.records(config.data.train), tokens.records(config.data.validation)
    alone = tokens.sentences(config.data.sentences)
    frame = Frame.of(tokenizer, config.data.chat_template)
    sentences, validation = (sentences_of(config, tokenizer, records, frame) for records in (trained, held_out))
    items = Joined(sentences, alone)
    bos, separator = bos_ids(tokenizer), encode_text(tokenizer, config.vae.separator)
    check_sentences(config, lm, len(bos) + len(separator), sentences, alone, validation)
    with sharded_init(config, config.vae.train, world):  # last: what is wrong with the records is told before it is loaded
        model = new_vae(config.vae, config.backbone, world.device.type, bos, separator)
    collator = vae_collator(config, tokenizer, config.vae.train, "vae", model)
    return TrainingPhase(
        items=items,
        collator=collator,
        name="vae",
        model=model,
        weights=vae_weights(config.vae),
        validation=Samples(validation, collator) if validation else None,
        write=lambda folder, state: save_vae(model, folder, state, base=config.backbone.name_or_path),
        show=vae_samples(config, tokenizer, _blocks(held_out), Joined(_blocks(trained), alone)),
    )


def vae_collator(config: Config, tokenizer: PreTrainedTokenizerBase, train: TrainSettings, name: str, vae: Vae) -> VaeCollator:
    """Batches of sentences for the phase ``name``, trained as ``train`` says, with what ``vae`` reads around a sentence."""
    return VaeCollator(
        config.vae,
        ordinary_ids(tokenizer),
        int(tokenizer.eos_token_id),
        seed=derive(config.run.seed, name),
        pack_tokens=train.pack_tokens,
        bos=vae.bos,
        separator=vae.separator,
    )


def vae_weights(settings: VaeSettings) -> dict[str, float]:
    """Weights of the VAE's loss terms."""
    weights = {"reconstruction": 1.0, "kl": settings.beta}
    return {**weights, "grounded": settings.grounded_weight} if settings.objective == "grounded" else weights


def sentences_of(config: Config, tokenizer: PreTrainedTokenizerBase, records: TokenStore | None, frame: Frame) -> Sequence[Any]:
    """All blocks of some records, with what follows each where the decoder learns that."""
    if records is None or config.vae.objective == "reconstruct":
        return _blocks(records)
    return GroundedSentences(records, tokenizer, config.data.answer_prefixes[0], frame)


def _blocks(records: TokenStore | None) -> Sequence[list[int]]:
    """All blocks of some records."""
    return [] if records is None else records.blocks
