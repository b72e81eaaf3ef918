"""Joint training of VAE and denoiser as the train loop sees it: stage 1 in another form, under the same name."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config, LatentSettings
from ladir.data.grounding import GroundedSentences
from ladir.data.joint import JointCollator, JointRecords
from ladir.data.latent_parts import Moments
from ladir.data.latents import LatentRecord
from ladir.data.prompts import Frame
from ladir.models.denoiser import Denoiser
from ladir.models.folders import JOINT_VAE, load_vae, load_vae_to_train, save_denoiser, save_vae
from ladir.models.joint import Joint
from ladir.models.loading import build_backbone, check_lm
from ladir.models.store import folder_fingerprint, load_settings, update_settings
from ladir.models.vae import Vae
from ladir.tokens import load_tokenizer
from training.phases.base import Samples, TrainingPhase
from training.phases.denoiser import denoiser_collator, denoiser_weights, mark_texts, stored_latents, trained_on
from training.phases.latent_report import Judged, report_latents, stored_records
from training.phases.latents import encoded_rows
from training.phases.lengths import check_records
from training.phases.samples import Show, vae_samples
from training.phases.tokens import Tokens
from training.phases.vae import vae_collator, vae_weights
from training.runtime.alone import GiveWay, apart
from training.runtime.distributed import World
from training.runtime.ending import in_words
from training.runtime.preemption import StopRequest
from training.runtime.run import Run, RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: before the names of figures of the VAE inside, among the denoiser's
OF_THE_VAE = "vae_"

#: records whose sentences are shown, as in the VAE's training
_SHOWN_RECORDS = 256


def joint_phase(config: Config, world: World, stop: StopRequest | None = None) -> TrainingPhase:
    """Both, from the run's VAE and a fresh denoiser standardised as that VAE's latents are."""
    tokenizer = load_tokenizer(config.backbone)
    lm = check_lm(config.backbone, tokenizer)
    folder, frame = RunFolder(config), Frame.of(tokenizer, config.data.chat_template)
    store, encoded = stored_latents(config, folder, world, stop)
    check_records(config, lm, [store, encoded], frame)
    tokens = Tokens(config, world, tokenizer, stop)
    records, held_out = (_records(config, tokens, named, frame) for named in (config.data.train, config.data.validation))
    with sharded_init(config, config.denoiser.train, world):
        vae = load_vae_to_train(folder.model("vae"), config.backbone, config.vae, world.device.type)
        backbone = build_backbone(config.backbone, world.device.type)
        denoiser = Denoiser(backbone, config.denoiser, config.vae.latents_per_block, store.mean, store.std)
    if config.denoiser.init_from_vae:
        denoiser.init_from_vae(vae)
    denoiser.init_marks(mark_texts(config, tokenizer))
    model = Joint(vae, denoiser)
    sentences = vae_collator(config, tokenizer, config.denoiser.train, "joint/vae", vae)
    teacher = denoiser_collator(config, store, tokenizer, config.denoiser.train, "denoiser", frame)
    collator = JointCollator(teacher, sentences, config.data.max_blocks)

    def write(target: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        write_joint(model, target, state, config.backbone.name_or_path)
        known = trained_on(store, tokenizer, frame)
        saved = {**load_settings(target, "denoiser")["trained_on"], "tokenizer": known.tokenizer, "frame": known.frame}
        update_settings(target, trained_on={**saved, "longest_question": known.longest_question})

    return TrainingPhase(
        items=records,
        collator=collator,
        name="denoiser",
        model=model,
        weights={**vae_weights(config.vae), **denoiser_weights(config.denoiser)},
        validation=Samples(held_out, collator) if held_out else None,
        write=write,
        show=_of_the_vae(config, tokenizer, held_out, records),
    )


def report_joint(run: Run) -> bool:
    """Add to a finished training's outcome what the latents of the VAE inside are good for, unless that is there (collective).

    The records are those of encode_latents' report, encoded anew and standardised by what comes out.  False where a stop was
    asked for: the next start looks again.
    """
    done = run.outcome
    if done is None or any(name.startswith(OF_THE_VAE) for name in done.metrics):
        return True
    gc.collect()  # the engine is gone, and its memory with it
    torch.cuda.empty_cache()
    vae, tokenizer = run.folder.model(run.phase) / JOINT_VAE, load_tokenizer(run.config.backbone)
    figures = report_latents(run, vae, int(tokenizer.eos_token_id), lambda give_way: _encoded_anew(run, vae, give_way))
    if figures:
        named = {f"{OF_THE_VAE}{name}": value for name, value in figures.items()}
        with Telemetry(run, done.steps) as telemetry:
            telemetry.record("validation", done.steps, named)
        run.finish(replace(done, metrics={**done.metrics, **named}))
        logger.info("the VAE that was trained along: %s", in_words(figures))
    return figures is not None


def _encoded_anew(run: Run, folder: Path, give_way: GiveWay) -> Judged:
    """The report's records with the latents that the VAE in ``folder`` makes."""
    known, settings = stored_records(run.folder, run.config.latents.report_sentences), run.config.latents
    vae = apart(lambda: load_vae(folder, run.config.backbone, run.world.device, encoder_only=True), give_way)
    trained, held_out = (list(_latents_of(vae, records, settings, give_way)) for records in (known.trained, known.held_out))
    moments = Moments.none(vae.settings.latent_dim)
    moments.add(torch.cat([record.mu for record in trained]).flatten(0, 1).numpy())
    return Judged(trained, held_out, *(torch.from_numpy(values).float() for values in (moments.mean, moments.std())))


def _latents_of(vae: Vae, records: Sequence[LatentRecord], settings: LatentSettings, give_way: GiveWay) -> Iterator[LatentRecord]:
    """The same records, encoded as many at a time as sentences are in a batch."""
    for start in range(0, len(records), settings.batch_size):
        give_way()
        some = records[start : start + settings.batch_size]
        for record, row in zip(some, encoded_rows(vae, some, range(len(some)), settings), strict=True):
            yield replace(record, mu=torch.from_numpy(row["mu"]), logvar=None)


def write_joint(model: Joint, target: Path, state: Iterator[tuple[str, Tensor]], base: str | None) -> None:
    """The denoiser in ``target`` and its VAE in a folder within; ``state`` streams the model's tensors, the VAE's first.

    ValueError for a tensor of the VAE behind the denoiser's first one: it would be lost.
    """
    beside, rest = target.with_name(f"{target.name}.vae"), _Peeked(state)
    save_vae(model.vae, beside, rest.named("vae."), base=base)
    save_denoiser(model.denoiser, target, rest.named("denoiser."))
    rest.check_empty()
    beside.rename(target / JOINT_VAE)
    saved = load_settings(target, "denoiser")["trained_on"]
    update_settings(target, trained_on={**saved, "vae": folder_fingerprint(target / JOINT_VAE)})


class _Peeked:
    """A stream of tensors, taken in stretches by the beginning of their names."""

    def __init__(self, state: Iterator[tuple[str, Tensor]]) -> None:
        self._state = state
        self._next: tuple[str, Tensor] | None = next(state, None)

    def named(self, start: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors that come next and begin with ``start``, without it."""
        while self._next is not None and self._next[0].startswith(start):
            name, tensor = self._next
            yield name.removeprefix(start), tensor
            self._next = next(self._state, None)

    def check_empty(self) -> None:
        """ValueError where anything is left."""
        if self._next is not None:
            raise ValueError(f"{self._next[0]} comes where it is not expected")


def _records(config: Config, tokens: Tokens, named: str | Sequence[str] | None, frame: Frame) -> JointRecords:
    records = tokens.records(named)
    if records is None or config.vae.objective == "reconstruct":
        return JointRecords(records or [], None)
    return JointRecords(records, GroundedSentences(records, tokens.tokenizer, config.data.answer_prefixes[0], frame))


def _of_the_vae(config: Config, tokenizer: PreTrainedTokenizerBase, held_out: JointRecords, trained: JointRecords) -> Show | None:
    """The VAE inside is what is shown; what the denoiser makes is read by a decoder that is trained on."""
    shown = [[ids for record in part[:_SHOWN_RECORDS] for ids in record.tokens.blocks] for part in (held_out, trained)]
    show = vae_samples(config, tokenizer, *shown)
    return None if show is None else lambda model, telemetry, step: _shown(show, model, telemetry, step)


def _shown(show: Show, model: object, telemetry: Telemetry, step: int) -> None:
    assert isinstance(model, Joint) and isinstance(model.vae, Vae)
    show(model.vae, telemetry, step)
