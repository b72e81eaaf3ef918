"""Who is asked in an evaluation: LaDiR in its variants and the autoregressive baseline, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.prompts import Frame, parse_completion, prompt_ids
from ladir.data.records import Record
from ladir.inference.ar import complete
from ladir.inference.asking import Ask, Watch
from ladir.inference.cost import Cost, count_cost
from ladir.inference.decode import Between, between_tokens
from ladir.models.backbone import Backbone
from ladir.models.folders import (
    load_backbone,
    load_denoiser,
    load_readers,
    question_frame,
    reads_questions_both_ways,
    vae_folder,
)
from ladir.models.pairing import TrainedOn, adapter_base, check_tokenizer
from ladir.models.store import load_settings
from ladir.models.verifier import belongs_to, load_verifier
from ladir.reasoner import Reasoner, Trajectory
from ladir.tokens import decode_text, load_tokenizer
from training.evaluation.rows import questions_at_a_time, stage_of
from training.runtime.run import RunFolder
from training.runtime.stages import stage_folder

#: controls of LaDiR's variants that differ from the settings' (``sample``)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "ladir-zero-noise": {"num_trajectories": 1, "sampler": "ode", "initial_noise": 0.0, "answer_temperature": 0.0},
    "ladir-sde": {"sampler": "sde"},
}


@dataclass(frozen=True)
class Sampled:
    """One answer, not judged yet."""

    answer: str
    thoughts: tuple[str, ...]
    stopped: bool = True
    score: float | None = None
    """The probability that it is right, by the verifier."""
    drift: float | None = None
    """How far its thoughts move when they are noised and denoised again."""


@dataclass(frozen=True)
class Answers:
    """The samples of every question of a batch, and what they cost together."""

    samples: list[list[Sampled]]
    cost: Cost
    reading: Cost = field(default_factory=Cost)
    """Decoding latent thoughts to text, which answering does not need."""
    scoring: Cost = field(default_factory=Cost)
    """The verifier's scores, which only rows that choose by them need."""
    drifting: Cost = field(default_factory=Cost)
    """Noising and denoising thoughts again, which only the row -stable needs."""


#: answers a batch of records
Answerer = Callable[[Sequence[Record]], Answers]


def load_answerers(
    configs: Sequence[Config], model: str, samplings: Sequence[str], device: torch.device, give_way: Between | None = None
) -> list[dict[str, Answerer]]:
    """Load one model; how it answers in each of ``samplings``, under the settings of each data set.

    ``give_way`` is called while it answers, after every step and token, and may raise.
    """
    config, folder = configs[0], RunFolder(configs[0])
    if model.startswith("ar"):
        return ar_answerers(configs, folder, samplings, device, stage_of(model), give_way)
    denoiser = stage_folder(folder, stage_of(model), config.evaluate.snapshot)
    load = _exported if folder.export.is_dir() else _trained
    reasoner = load(config, folder, denoiser, device)
    return [{sampling: ladir_answerer(config, reasoner, sampling, give_way) for sampling in samplings} for config in configs]


def _exported(config: Config, folder: RunFolder, denoiser: Path | None, device: torch.device) -> Reasoner:
    """The export, or ``denoiser`` in place of its own."""
    verifier = verifier_of(folder, denoiser)
    return Reasoner.from_pretrained(folder.export, device, config.backbone.attention, denoiser=denoiser, verifier=verifier)


def _trained(config: Config, folder: RunFolder, denoiser: Path | None, device: torch.device) -> Reasoner:
    """A snapshot with the run's VAE, while there is no export (whether they belong together was looked at before)."""
    assert denoiser is not None  # else the run was not ready
    vae, backbone, tokenizer = vae_folder(denoiser, folder.model("vae")), config.backbone, load_tokenizer(config.backbone)
    trained_on = TrainedOn.of(load_settings(denoiser, "denoiser"))
    check_tokenizer(trained_on, tokenizer, adapter_base(denoiser) or denoiser, denoiser)
    model, _ = load_denoiser(denoiser, backbone, device)
    decoder, encoder = load_readers(vae, backbone, device, config.sample.reencode)
    found = verifier_of(folder, denoiser)
    verifier = None if found is None else load_verifier(found, device)
    return Reasoner(model, decoder, tokenizer, config.sample, encoder, trained_on, verifier=verifier)


def verifier_of(folder: RunFolder, denoiser: Path | None) -> Path | None:
    """The run's verifier, where it is one of this denoiser (None: the export's)."""
    found = folder.model("verifier")
    return found if found.is_dir() and belongs_to(found, denoiser or folder.export) else None


def ladir_answerer(config: Config, reasoner: Reasoner, sampling: str, give_way: Between | None = None) -> Answerer:
    """LaDiR as the settings say, or in one of its variants; ``give_way`` is called again and again, and may raise."""
    own = dict(VARIANTS.get(sampling, {}))
    number = own.pop("num_trajectories", config.evaluate.num_trajectories)
    stable = f"{sampling}-stable" in config.evaluate.methods

    def answer(records: Sequence[Record]) -> Answers:
        reasoner.settings = config.sample
        settings = reasoner.settings_with(**own)
        asks = [Ask(record.question, number, config.run.seed) for record in records]
        with count_cost(*reasoner.answering()) as cost, reasoner.graphs.counted(cost):
            groups = reasoner.answer(asks, settings, Watch(between_steps=give_way), thoughts=False, scores=False)
        with count_cost(reasoner.denoiser) as scoring, reasoner.graphs.counted(scoring):
            reasoner.score(asks, groups, settings, between_steps=give_way)
        with count_cost(reasoner.denoiser) as drifting, reasoner.graphs.counted(drifting):
            if stable:
                reasoner.measure_drift(asks, groups, settings, between_steps=give_way)
        with count_cost(reasoner.thought_decoder.backbone, reasoner.thought_decoder.from_latent) as reading:
            reasoner.read_thoughts([trajectory for group in groups for trajectory in group], give_way)
        return Answers([list(map(_sampled, group)) for group in groups], cost, reading, scoring, drifting)

    return answer


def _sampled(trajectory: Trajectory) -> Sampled:
    thoughts = tuple(trajectory.thoughts)
    return Sampled(trajectory.answer, thoughts, trajectory.stopped, trajectory.score, trajectory.drift)


@dataclass(frozen=True)
class Reading:
    """How an autoregressive LM was trained to read questions: what stands around them, whether their tokens see each other."""

    frame: Frame | None
    bidirectional: bool

    @classmethod
    def of(cls, model: Path) -> Reading:
        """As the LM's folder says."""
        saved = question_frame(model)
        return cls(None if saved is None else Frame.saved(saved), reads_questions_both_ways(model))


def ar_answerers(
    configs: Sequence[Config],
    folder: RunFolder,
    samplings: Sequence[str],
    device: torch.device,
    phase: str = "ar",
    give_way: Between | None = None,
) -> list[dict[str, Answerer]]:
    """The autoregressive baseline that ``phase`` trained: samples (``ar``) and one greedy answer (``ar-greedy``).

    One each under every data set's settings; ``give_way`` is called after every token, and may raise.
    """
    settings, snapshot = configs[0].backbone, configs[0].evaluate.snapshot
    model = folder.model(folder.snapshot(phase, snapshot))
    backbone = load_backbone(model, settings, device).to(device).eval()
    tokenizer, reading = load_tokenizer(settings), Reading.of(model)
    return [
        {sampling: ar_answerer(config, tokenizer, backbone, reading, sampling == "ar-greedy", give_way) for sampling in samplings}
        for config in configs
    ]


def ar_answerer(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    reading: Reading,
    greedy: bool,
    give_way: Between | None = None,
) -> Answerer:
    """The baseline as the settings say; ``give_way`` is called after every token, and may raise."""
    samples, temperature = (1, 0.0) if greedy else (config.evaluate.num_trajectories, config.evaluate.ar_temperature)
    size = questions_at_a_time(config.evaluate, greedy)

    def answer(records: Sequence[Record]) -> Answers:
        with count_cost(backbone) as cost:
            texts = complete(
                backbone,
                [prompt_ids(tokenizer, record.question, reading.frame) for record in records],
                [record.question for record in records],
                samples,
                int(tokenizer.eos_token_id),
                config.evaluate.ar_max_tokens,
                temperature,
                config.run.seed,
                bidirectional_question=reading.bidirectional,
                top_p=config.evaluate.ar_top_p,
                most_rows=size * samples,
                on_tokens=between_tokens(give_way),
            )
        return Answers([[sampled_of(ids) for ids in group] for group in texts], cost)

    def sampled_of(ids: list[int]) -> Sampled:
        text, prefixes = decode_text(tokenizer, ids), config.data.answer_prefixes
        chain = parse_completion(text, prefixes, programs=config.evaluate.task == "code")
        return Sampled(chain.answer, tuple(chain.thoughts), stopped=len(ids) < config.evaluate.ar_max_tokens)

    return answer
