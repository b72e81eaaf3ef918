"""Judged trajectories for the verifier: questions are asked, what was thought is kept with the verdict on the answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config, DenoiserSettings
from ladir.data.judged import JudgedStore, JudgedTrajectory, pack_judged
from ladir.data.question_store import Questions
from ladir.data.randomness import derive, generator
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.inference.asking import Ask, Extras, Watch
from ladir.inference.trajectory import Trajectory
from ladir.models.folders import load_denoiser, load_readers, vae_folder
from ladir.models.pairing import TrainedOn, check_vae
from ladir.models.store import HEADS_FILE, heads_fingerprint, load_settings, settings_of
from ladir.models.vae import ThoughtDecoder
from ladir.models.verifier import drift_features
from ladir.models.weights import save_tensors
from ladir.reasoner import Reasoner
from ladir.tasks import Task, get_task
from ladir.tokens import load_tokenizer
from training.evaluation.answerers import Sampled
from training.evaluation.judging import judge_samples, judges_of
from training.phases.tokens import Tokens
from training.runtime.alarm import APART_MINUTES
from training.runtime.alone import GiveWay
from training.runtime.files import known_sha256, read_json, remove_folder, write_json
from training.runtime.preemption import BrokenOff
from training.runtime.run import Run
from training.runtime.stages import fingerprint
from training.runtime.status import Pace

logger = logging.getLogger(__name__)

#: settings of the verifier that change nothing of what is sampled
_ABOUT_TRAINING = ("enabled", "stage", "held_out", "width", "value_weight", "train")
#: of an evaluation: what a verdict depends on
_ABOUT_VERDICTS = ("task", "check_seconds", "check_memory_mb", "isolation", "tolerance")


def collect(run: Run, denoiser: Path) -> Path | None:
    """Judge trajectories of ``denoiser`` on all ranks, batch by batch; the folder that holds them all.

    Batches that are written already are not asked again.  None when a signal asked to stop: every rank then leaves the batch that
    it is at undone.
    """
    settings, tokenizer = run.config.verifier, load_tokenizer(run.config.backbone)
    vae = reading_vae(run, denoiser)
    task = get_task(run.config.evaluate.task, run.config.evaluate)
    named = settings.questions or run.config.data.train
    records = chosen_questions(Tokens(run.config, run.world, tokenizer, run.stop), named, task)
    if (begun := run.alone(lambda give_way: _begun(run, denoiser, vae, records, give_way))) is None:
        return None
    folder, left = begun
    run.world.wait_at_most(APART_MINUTES)
    run.status.say("loading the models whose trajectories are judged")
    reasoner = load_trained_reasoner(run.config, denoiser, vae, tokenizer, run.world.device) if left else None
    pace = Pace()
    for first in range(0, len(left), run.world.size):
        if run.stop_agreed():
            return None
        done, end = first / len(left), min(left[first] + settings.questions_per_batch, len(records))
        doing = f"collecting judged trajectories, questions {left[first] + 1:,} to {end:,} of {len(records):,}"
        run.status.say(doing, fraction=done, seconds_left=pace.seconds_left(done))
        for start in left[first + run.world.rank :][:1]:
            assert reasoner is not None
            asked = range(start, min(start + settings.questions_per_batch, len(records)))
            with suppress(BrokenOff):  # all ranks meet behind it
                _ask_and_judge(_part(folder, start), run, reasoner, task, {i: records[i] for i in asked})
    run.status.say("reading the judged trajectories", fraction=None, seconds_left=None)
    if run.stop_agreed():
        return None
    run.world.wait_at_most(run.config.deepspeed.timeout_minutes)
    told = run.folder.judged / "seconds.json"
    if run.world.is_main and (left or folder.name not in read_json(told)):  # a stop may have come behind the last batch
        write_json(told, {folder.name: _seconds(folder) / run.world.size})
    return folder


def chosen_questions(tokens: Tokens, named: str | Sequence[str] | None, task: Task) -> Questions:
    """The questions that are asked, each once, drawn from what is ``named`` in an order of their own."""
    if named is None:
        raise UnusableError("verifier.questions is not set, nor data.train: name the questions to ask")
    distinct, config = tokens.questions(named, task).distinct(), tokens.config
    order = generator(derive(config.run.seed, "verifier/questions"), 0).permutation(len(distinct))
    return distinct.chosen(order[: config.verifier.num_questions])


def reading_vae(run: Run, denoiser: Path) -> Path | None:
    """The VAE by which blocks of ``denoiser`` are read as text before the next ones; None where they are not.

    UnusableError where the denoiser was trained on another one's latents, which is seen before anything is loaded or removed.
    """
    saved = load_settings(denoiser, "denoiser")
    as_text = settings_of(DenoiserSettings, saved["settings"], denoiser).context == "text"
    if not (as_text or run.config.sample.reencode):
        return None
    vae = vae_folder(denoiser, run.folder.model("vae"))
    check_vae(TrainedOn.of(saved), fingerprint(run.world, run.stop, vae, "vae"), denoiser, vae)
    return vae


def load_trained_reasoner(
    config: Config, denoiser: Path, vae: Path | None, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Reasoner:
    """Who is asked: the models as they were trained, before they are exported; of the VAE what is needed to read blocks."""
    model, _ = load_denoiser(denoiser, config.backbone, device)
    settings, known = replace(config.sample, verifier_scale=0.0), TrainedOn.of(load_settings(denoiser, "denoiser"))
    if vae is None:
        return Reasoner(model, ThoughtDecoder(model.backbone, model.latent_in), tokenizer, settings, trained_on=known)
    decoder, encoder = load_readers(vae, config.backbone, device, settings.reencode)
    return Reasoner(model, decoder, tokenizer, settings, encoder, known)


def judged_trajectories(folder: Path) -> JudgedStore:
    """All that :func:`collect` keeps, in the order of the questions."""
    return JudgedStore(sorted(folder.glob("*.safetensors")))


def _ask_and_judge(part: Path, run: Run, reasoner: Reasoner, task: Task, records: dict[int, Record]) -> None:
    """Ask and judge one batch of questions, by number; the file appears whole.  BrokenOff where this rank is asked to stop."""
    start, seed = time.perf_counter(), derive(run.config.run.seed, "verifier")
    asks = [Ask(record.question, run.config.verifier.num_trajectories, seed) for record in records.values()]
    give_way = run.stop.give_way
    watch, extras = Watch(between_steps=give_way), Extras(states=True)
    found = reasoner.answer(asks, reasoner.settings, watch, thoughts=False, extras=extras)
    if run.config.verifier.drift:
        reasoner.measure_drift(asks, found, between_steps=give_way)
    samples = [[Sampled(trajectory.answer, ()) for trajectory in group] for group in found]
    judges = judges_of(run.config, run.world.size)
    verdicts = judge_samples(task, judges, list(records.values()), samples, give_way)
    judged = [
        JudgedTrajectory(trajectory.states, verdict.correct, number, _drift_of(trajectory))
        for number, group, judged_group in zip(records, found, verdicts, strict=True)
        for trajectory, verdict in zip(group, judged_group, strict=True)
        if trajectory.states is not None
    ]
    aside = part.with_suffix(".writing")
    save_tensors(pack_judged(judged), aside, metadata={"seconds": f"{time.perf_counter() - start:.6f}"})
    aside.replace(part)


def _drift_of(trajectory: Trajectory) -> Tensor:
    return torch.zeros(2) if trajectory.drifts is None else drift_features(trajectory.drifts)


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"


def _begun(run: Run, denoiser: Path, vae: Path | None, records: Questions, give_way: GiveWay) -> tuple[Path, list[int]]:
    """The folder, alone of its kind, and the first questions of the batches that are not written there yet (rank 0)."""
    folder = run.folder.judged / _digest(run.config, denoiser, vae, records, give_way)
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():  # of other settings, questions or models
        if other.is_dir() and other != folder:
            remove_folder(other, give_way)
    starts = range(0, len(records), run.config.verifier.questions_per_batch)
    return folder, [start for start in starts if not _part(folder, start).is_file()]


def _seconds(folder: Path) -> float:
    """What sampling and judging took in all, of one rank after the other."""
    return sum(_metadata(part) for part in folder.glob("*.safetensors"))


def _metadata(part: Path) -> float:
    with safe_open(part, "pt") as opened:
        return float((opened.metadata() or {}).get("seconds", 0.0))


def _facts(config: Config) -> Iterator[object]:
    """The settings on which samples and verdicts depend."""
    yield config.run.seed
    yield dataclasses.asdict(config.sample)
    verifier, evaluate = dataclasses.asdict(config.verifier), dataclasses.asdict(config.evaluate)
    yield {name: value for name, value in verifier.items() if name not in _ABOUT_TRAINING}
    yield {name: evaluate[name] for name in _ABOUT_VERDICTS}


def _digest(config: Config, denoiser: Path, vae: Path | None, records: Questions, give_way: GiveWay) -> str:
    """Stands for everything that the judged trajectories are made of; ``vae``: by which blocks are read."""
    known = partial(known_sha256, give_way=give_way)
    models = [heads_fingerprint(denoiser, known), None if vae is None else known(vae / HEADS_FILE)]
    digest = hashlib.sha256(json.dumps([*_facts(config), models], default=str).encode())
    digest.update(records.contents.tobytes())
    return digest.hexdigest()[:16]
