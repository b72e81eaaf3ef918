"""The models and micro batches of every phase on the meta device: shapes without weights or data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ladir.config import BackboneSettings, Config, DataSettings
from ladir.data.batches import ArCollator, DenoiserCollator, VaeCollator
from ladir.data.columns import TokenRecord
from ladir.data.encode import encode_records
from ladir.data.joint import JointCollator, JointRecord
from ladir.data.latents import LatentRecord
from ladir.data.records import RecordSet, records_of, refuse_empty
from ladir.data.rollout import Golds, RolloutCollator
from ladir.data.rows import data_files, file_rows
from ladir.data.token_lists import GroundedSentence, Joined
from ladir.inference.rollout import Rollout
from ladir.models.adapters import with_lora
from ladir.models.ar import ArModel
from ladir.models.attention import set_attention
from ladir.models.backbone import DTYPES, Backbone, choose_dtype, for_training
from ladir.models.denoiser import Denoiser
from ladir.models.joint import Joint
from ladir.models.vae import Vae
from ladir.tokens import load_tokenizer, vocabulary_size

PHASES = ("vae", "denoiser", "rollout", "rl", "ar")
_DENOISING = ("denoiser", "rollout", "rl")
_META = torch.device("meta")
_ID = 1  # which token stands somewhere does not matter


class PlanError(ValueError):
    """The settings leave open what a plan needs."""


@dataclass(frozen=True)
class Lengths:
    """A record's sizes in tokens, and the number of its blocks."""

    question: int
    blocks: int
    block: int
    answer: int

    @property
    def completion(self) -> int:
        """Tokens of the chain as text: every block with its newline, the answer, <eos>."""
        return self.blocks * (self.block + 1) + self.answer + 1


@dataclass(frozen=True)
class DataSize:
    """How many records there are, the mean one and the longest possible one."""

    samples: int
    mean: Lengths
    longest: Lengths
    measured: bool
    records: Sequence[Lengths] = ()
    """Sizes of every record (its blocks' mean), where they were measured."""


def data_size(config: Config, most: int | None = None) -> DataSize:
    """From ``plan.*``, else measured in a local ``data.train``, else half the limits.  PlanError where the count is unknown.

    ``most``: of a file so many rows are looked at, None: all.
    """
    data, plan = config.data, config.plan
    limits = Lengths(data.max_question_tokens, data.max_blocks, data.max_block_tokens, data.max_answer_tokens)
    measured = _measure(config, most)
    samples, mean, longest, records = measured or (None, None, limits, ())
    half = Lengths(*(max(1, value // 2) for value in (limits.question, limits.blocks, limits.block, limits.answer)))
    mean = mean or half
    samples = plan.samples or samples
    if samples is None:
        raise PlanError("plan.samples is not set and data.train is no local file: say how many training records there are")
    mean = Lengths(
        plan.question_tokens or mean.question,
        plan.blocks or mean.blocks,
        plan.block_tokens or mean.block,
        plan.answer_tokens or mean.answer,
    )
    return DataSize(samples, mean, longest, measured is not None, records)


def _measure(config: Config, most: int | None) -> tuple[int, Lengths, Lengths, list[Lengths]] | None:
    """Number, mean, longest and all sizes of the records in a local file; None where file or tokenizer are not at hand."""
    files = data_files(config.data.train)
    if not files or not all(Path(file).is_file() for file in files):
        return None
    try:
        tokenizer = load_tokenizer(config.backbone)
    except (OSError, ValueError):
        return None
    read = [encode_records(_read(file, config.data, most), tokenizer, config.data)[0] for file in files]
    encoded = Joined(*read)
    if not encoded:
        return None
    columns: list[Sequence[int]] = [
        [len(record.question) for record in encoded],
        [len(record.blocks) for record in encoded],
        [len(block) for record in encoded for block in record.blocks],
        [len(record.answer) for record in encoded],
    ]
    mean = Lengths(*(max(1, round(float(np.mean(column)))) for column in columns))
    records = [
        Lengths(len(record.question), len(record.blocks), sum(map(len, record.blocks)) // len(record.blocks), len(record.answer))
        for record in encoded
    ]
    return len(encoded), mean, Lengths(*(max(column) for column in columns)), records


def _read(file: str, settings: DataSettings, most: int | None) -> RecordSet:
    """The records of its first ``most`` rows; UnusableError where it has none."""
    found = records_of(itertools.islice(file_rows(file), most), settings)
    refuse_empty(file, found.total)
    return found


def lm_config(backbone: BackboneSettings) -> PretrainedConfig:
    """The LM's architecture: of ``name_or_path`` where it is at hand without network, else ``backbone.scratch``."""
    if backbone.name_or_path:
        try:
            return AutoConfig.from_pretrained(backbone.name_or_path, local_files_only=True)
        except (OSError, ValueError):
            pass  # not a local folder and not in the cache
    arguments = dict(backbone.scratch)
    if "model_type" not in arguments:
        raise PlanError(
            f"the architecture of {backbone.name_or_path} is not at hand without network: download its config.json and "
            "name the folder in backbone.name_or_path, or describe it in backbone.scratch (see configs/math_8b.yaml)"
        )
    if "vocab_size" not in arguments:
        try:
            arguments["vocab_size"] = vocabulary_size(load_tokenizer(backbone))
        except (OSError, ValueError) as error:
            raise PlanError(f"backbone.scratch.vocab_size is not set, and there is no tokenizer to count: {error}") from error
    return AutoConfig.for_model(arguments.pop("model_type"), **arguments)


def shortened(architecture: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    """The architecture with its first ``layers`` layers (None: all)."""
    text = architecture.get_text_config()
    total = int(text.num_hidden_layers)
    if layers is not None:
        by_layer = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == total}
        for name, value in {**by_layer, "num_hidden_layers": layers}.items():
            setattr(text, name, value[:layers] if isinstance(value, list) else value)
    return architecture


def layer_period(model: nn.Module, architecture: PretrainedConfig) -> int | None:
    """The smallest even number of layers after which all repeat, in kinds and shapes; None where there is none."""
    total, kinds = int(architecture.num_hidden_layers), getattr(architecture, "layer_types", None)
    layers = [layer for name, layer in model.named_modules() if name.rpartition(".")[0].endswith(".layers")]
    if len(layers) != total:
        return None
    shapes = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in layers]
    facts = [
        (shape, type(layer), kinds[i] if kinds else None) for i, (shape, layer) in enumerate(zip(shapes, layers, strict=True))
    ]
    periods = (n for n in range(2, total, 2) if total % n == 0 and all(fact == facts[i % n] for i, fact in enumerate(facts)))
    return next(periods, None)


def _backbone(
    config: Config, checkpointing: str, device: torch.device, adapters: bool = True, layers: int | None = None
) -> Backbone:
    settings = config.backbone
    dtype = choose_dtype(settings.dtype, "cuda" if device == _META else device.type)
    # SDPA stands for all fused kernels: their memory is SDPA's without the dense mask.
    lm = AutoModelForCausalLM.from_config(
        shortened(lm_config(settings), layers), dtype=DTYPES[dtype], attn_implementation="eager"
    )
    if device != _META:
        set_attention(lm, settings.attention, device.type)
    elif settings.attention != "eager" and lm._supports_sdpa:
        lm.set_attn_implementation("sdpa")
    planned = replace(settings, activation_checkpointing=checkpointing, compile=False)
    return for_training(Backbone(with_lora(lm, settings.lora) if adapters else lm), planned)


def new_model(config: Config, phase: str, checkpointing: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """The model that ``phase`` trains, on ``device``, with random weights (on the meta device without any).

    ``layers``: of the LM, where not all.
    """
    with device:
        if phase == "vae":
            return _new_vae(config, checkpointing, device, layers)
        encoder = _backbone(config, checkpointing, device, layers=layers)
        if phase in _DENOISING and not learns_text(config, phase):
            d = config.vae.latent_dim
            denoiser = Denoiser(encoder, config.denoiser, config.vae.latents_per_block, torch.zeros(d), torch.ones(d))
            if trains_jointly(config, phase):
                return Joint(_new_vae(config, checkpointing, device, layers), denoiser)
            if phase != "rollout":
                return denoiser
            return Rollout(
                denoiser, config.rollout, config.data.max_blocks, recompute=checkpointing != "none", sample=config.sample
            )
        return ArModel(encoder)


def trains_jointly(config: Config, phase: str) -> bool:
    """Whether stage 1 trains the VAE along."""
    return phase == "denoiser" and config.stage == "joint"


def learns_text(config: Config, phase: str) -> bool:
    """Whether stage 3 is the AR baseline's, which learns from its own completions."""
    return phase == "rl" and config.rl.policy == "text"


def vae_has_one_lm(config: Config) -> bool:
    """Whether the VAE's halves are one LM: adapters on, to encode, and off, to decode."""
    return config.backbone.lora.rank > 0 and config.vae.decoder == "frozen"


def _new_vae(config: Config, checkpointing: str, device: torch.device, layers: int | None) -> Vae:
    encoder = _backbone(config, checkpointing, device, layers=layers)
    decoder = None if vae_has_one_lm(config) else _backbone(config, checkpointing, device, False, layers)
    return Vae(encoder, decoder, config.vae, bos_of(config), separator_of(config))


def bos_of(config: Config) -> tuple[int, ...]:
    """A <bos> that the VAE reads; tokenizers without one are not told apart, which costs a token a sentence too many."""
    return (_ID,) if config.vae.bos else ()


def separator_of(config: Config) -> tuple[int, ...]:
    """A separator that the VAE's decoder reads, counted as one token."""
    return (_ID,) if config.vae.separator else ()


def meta_model(config: Config, phase: str, checkpointing: str, layers: int | None = None) -> nn.Module:
    """The model that ``phase`` trains, without weights; ``layers``: of the LM, where not all."""
    return new_model(config, phase, checkpointing, _META, layers)


@dataclass(frozen=True)
class StepKind:
    """What a step of the denoiser's trainings has: answers (with stop and last clean blocks), and a first pass for the carried
    state, where the settings know one."""

    answers: bool = True
    first_pass: bool = True


#: takes the most memory
LARGEST = StepKind()


def step_kinds(config: Config, phase: str) -> Iterator[tuple[float, StepKind]]:
    """Kinds of a training's steps, each with its share of them.

    Stage 3's attempts have their answers in every step: an upper bound where only their thoughts are learned from
    (rl.policy=latents).  Stage 2's steps with blocks of the model's own have none.
    """
    if phase not in _DENOISING or learns_text(config, phase):
        yield 1.0, LARGEST
        return
    d = config.denoiser
    answers = 1.0 if phase == "rl" else 1 / d.answer_every
    if phase == "rollout":
        answers *= 1 - config.rollout.own_context
    carried = d.carry_probability if d.carry != "none" else 1.0  # none of the kinds has one then
    for kind in (StepKind(*has) for has in itertools.product((True, False), repeat=2)):
        share = (answers if kind.answers else 1 - answers) * (carried if kind.first_pass else 1 - carried)
        if share > 0:
            yield share, kind


def micro_batch(
    config: Config,
    phase: str,
    lengths: Lengths,
    count: int,
    vocab_size: int,
    device: torch.device | str = _META,
    kind: StepKind = LARGEST,
) -> Any:
    """``count`` samples of the given sizes, as the phase's collator makes them in a step of this ``kind``."""
    numbers = list(range(count))
    if phase == "vae":
        collate = _vae_collator(config, config.vae.train.pack_tokens, vocab_size)
        return collate(_sentences(config, lengths, count), numbers, training=False).to(device)
    if phase in _DENOISING and not learns_text(config, phase):
        d = config.vae.latent_dim
        latents = torch.zeros(lengths.blocks, config.vae.latents_per_block, d)
        blocks = [[_ID] * lengths.block] * lengths.blocks
        record = LatentRecord([_ID] * lengths.question, blocks, [_ID] * lengths.answer, latents, latents)
        zeros = np.zeros(d, dtype=np.float32)
        every = 1 if kind.answers else 2
        numbers = [count * (every - 1) + number for number in numbers]  # of step 0, or of step 1, which then has no answers
        settings = replace(config.denoiser, answer_every=every, carry_probability=float(kind.first_pass))
        pack = getattr(config, phase).train.pack_tokens
        collator = DenoiserCollator(settings, zeros, zeros + 1, _ID, 0, max(count, 1), pack_tokens=pack)
        if phase == "rl" and config.rl.algorithm == "flow_grpo":  # a noisy copy for every random step
            collator = replace(collator, settings=replace(settings, draws=config.rl.random_steps))
        if trains_jointly(config, phase):
            whole = JointRecord(TokenRecord(record.question, blocks, record.answer), _sentences(config, lengths, lengths.blocks))
            joint = JointCollator(collator, _vae_collator(config, pack, vocab_size), lengths.blocks)
            return joint([whole] * count, numbers).to(device)
        if phase != "rollout":
            return collator([record] * count, numbers).to(device)
        behind_true_blocks = replace(config.rollout, own_context=0.0)  # the larger of the two: it has the answer
        return RolloutCollator(collator, behind_true_blocks, 0)([Golds(record)] * count, numbers).to(device)
    pair = ([_ID] * (lengths.question + 1), [_ID] * lengths.completion)
    pack = (config.rl if phase == "rl" else config.ar).train.pack_tokens
    return ArCollator(pack, config.ar.bidirectional_question)([pair] * count, numbers).to(device)


def _sentences(config: Config, lengths: Lengths, count: int) -> list[Any]:
    """So many sentences, with what follows them where the VAE learns that."""
    if config.vae.objective != "grounded":
        return [[_ID] * lengths.block] * count
    follows = [_ID] * ((lengths.blocks - 1) * lengths.block // 2 + lengths.answer)
    return [GroundedSentence([_ID] * lengths.block, [_ID] * lengths.question, follows)] * count


def _vae_collator(config: Config, pack_tokens: int, vocab_size: int) -> VaeCollator:
    return VaeCollator(config.vae, range(vocab_size), _ID, 0, pack_tokens, bos_of(config), separator_of(config))
