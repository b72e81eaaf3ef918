"""The VAE as the train loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

from ladir.config import Config
from ladir.data.batches import VaeCollator
from ladir.data.randomness import derive
from ladir.data.token_lists import Joined
from ladir.data.token_store import TokenStore
from ladir.models.folders import new_vae, save_vae
from ladir.models.loading import check_lm
from ladir.tokens import load_tokenizer, ordinary_ids
from training.phases.base import Samples, TrainingPhase
from training.phases.samples import vae_samples
from training.phases.tokens import Tokens
from training.runtime.distributed import World
from training.runtime.sharding import sharded_init


def vae_phase(config: Config, world: World) -> TrainingPhase:
    """The VAE on every block of the training records and the extra sentences."""
    tokenizer = load_tokenizer(config.backbone)
    check_lm(config.backbone, tokenizer)
    tokens = Tokens(config, world, tokenizer)
    sentences = Joined(_blocks(tokens.records(config.data.train)), tokens.sentences(config.data.sentences))
    held_out = _blocks(tokens.records(config.data.validation))
    with sharded_init(config, config.vae.train, world):  # last: what is wrong with the records is told before it is loaded
        model = new_vae(config.vae, config.backbone, world.device.type)
    collator = VaeCollator(
        config.vae,
        ordinary_ids(tokenizer),
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


def _blocks(records: TokenStore | None) -> Sequence[list[int]]:
    """All blocks of some records."""
    return [] if records is None else records.blocks
