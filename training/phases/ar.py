"""The autoregressive LM as the train loop sees it: base LM and baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.batches import ArCollator
from ladir.data.prompts import CopyPairs, Frame, FramedPairs
from ladir.data.randomness import derive, generator
from ladir.data.records import Record
from ladir.data.token_lists import Joined
from ladir.data.token_store import TokenStore
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone, for_training
from ladir.models.folders import save_lm
from ladir.models.loading import build_backbone, check_lm, new_lm, scratch_config
from ladir.tokens import load_tokenizer, save_tokenizer, vocabulary_size
from training.phases.base import Samples, TrainingPhase
from training.phases.lengths import check_chains
from training.phases.samples import ar_samples
from training.phases.tokens import Tokens
from training.runtime.distributed import World
from training.runtime.preemption import StopRequest
from training.runtime.sharding import sharded_init

_ROLES = ("pad", "eos", "bos")
#: (prompt ids, completion ids) of every sample
Pairs = Sequence[tuple[list[int], list[int]]]


def ar_phase(config: Config, world: World, stop: StopRequest | None = None) -> TrainingPhase:
    """Chain-of-thought fine-tuning of an LM (or training of a new one, ``ar.from_scratch``)."""
    tokenizer = load_tokenizer(config.backbone)
    size, ids = vocabulary_size(tokenizer), {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    new = config.ar.from_scratch
    lm = scratch_config(config.backbone, size, ids) if new else check_lm(config.backbone, tokenizer)
    tokens = Tokens(config, world, tokenizer, stop)
    records, held_out = tokens.records(config.data.train), tokens.records(config.data.validation)
    frame = Frame.of(tokenizer, config.data.chat_template)
    pairs, validation = chains_of(tokens, records, frame), chains_of(tokens, held_out, frame)
    check_chains(config, lm, Joined(pairs, validation), [records, held_out], frame)
    # Behind the records: what is wrong with them is told before it is loaded.
    if new:
        backbone = for_training(Backbone(new_lm(config.backbone, size, ids, world.device.type)), config.backbone)
    else:
        with sharded_init(config, config.ar.train, world):
            backbone = build_backbone(config.backbone, world.device.type)
    bidirectional = config.ar.bidirectional_question
    collator = ArCollator(config.ar.train.pack_tokens, bidirectional)
    return TrainingPhase(
        items=pairs if records is None else Joined(pairs, _copies(config, tokenizer, records)),
        collator=collator,
        name=config.ar.phase,
        model=ArModel(backbone),
        weights={"text": 1.0},
        validation=Samples(validation, collator) if validation else None,
        write=lambda folder, state: write_lm(backbone, tokenizer, folder, state, bidirectional, frame),
        show=ar_samples(config, tokenizer, _texts(held_out), _texts(records), frame),
    )


def _texts(records: TokenStore | None) -> Sequence[Record]:
    return [] if records is None else records.texts


def chains_of(tokens: Tokens, records: TokenStore | None, frame: Frame) -> Pairs:
    """Every record as a prompt and its completion."""
    if records is None:
        return []
    return FramedPairs(records, tokens.chains(records), frame) if frame.is_chat else tokens.chains(records)


def _copies(config: Config, tokenizer: PreTrainedTokenizerBase, records: TokenStore) -> Pairs:
    """Samples that ask to repeat a sentence: ``ar.copy_fraction`` of all."""
    share = config.ar.copy_fraction
    count = round(len(records) * share / (1.0 - share))
    chosen = generator(derive(config.run.seed, "copies"), 0).integers(0, len(records.blocks), count)
    return CopyPairs(tokenizer, records.blocks, chosen)


def write_lm(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Iterator[tuple[str, Tensor]],
    bidirectional_question: bool,
    frame: Frame,
) -> None:
    """The LM with its tokenizer, so that the folder can be named as ``backbone.name_or_path``."""
    own = ((name.removeprefix("backbone."), tensor) for name, tensor in state)
    save_lm(backbone, folder, own, bidirectional_question=bidirectional_question, frame=frame.to_save())
    save_tokenizer(tokenizer, folder)
