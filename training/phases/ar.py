"""The autoregressive LM as the train loop sees it: base LM and baseline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.batches import ArCollator
from ladir.data.prompts import chain_pairs, copy_pairs
from ladir.data.randomness import derive, generator
from ladir.data.records import Record
from ladir.data.token_lists import TokenPairs
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone, for_training
from ladir.models.folders import save_lm
from ladir.models.loading import build_backbone, check_lm, new_lm, scratch_config
from ladir.tokens import load_tokenizer, save_tokenizer, vocabulary_size
from training.phases.base import Samples, TrainingPhase, read_encoded
from training.phases.samples import ar_samples
from training.runtime.distributed import World
from training.runtime.sharding import sharded_init

_ROLES = ("pad", "eos", "bos")


def ar_phase(config: Config, world: World) -> TrainingPhase:
    """Chain-of-thought fine-tuning of an LM (or training of a new one, ``ar.from_scratch``)."""
    tokenizer = load_tokenizer(config.backbone)
    size, ids = vocabulary_size(tokenizer), {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    if config.ar.from_scratch:
        scratch_config(config.backbone, size, ids)
    else:
        check_lm(config.backbone, tokenizer)
    records = [encoded.record for encoded in read_encoded(config, config.data.train, tokenizer)]
    held_out = [encoded.record for encoded in read_encoded(config, config.data.validation, tokenizer)]
    # Behind the records: what is wrong with them is told before it is loaded.
    if config.ar.from_scratch:
        backbone = for_training(Backbone(new_lm(config.backbone, size, ids, world.device.type)), config.backbone)
    else:
        with sharded_init(config, config.ar.train, world):
            backbone = build_backbone(config.backbone, world.device.type)
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
    save_tokenizer(tokenizer, folder)
