"""Encoding every block of the training and validation records with the trained VAE, in parts, on all ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ladir.config import LatentSettings
from ladir.data.columns import TokenRecord
from ladir.data.latent_parts import is_whole, join_parts, write_part
from ladir.data.latents import LatentForm, LatentStore
from ladir.data.rows import check_path, data_files
from ladir.data.token_store import TokenStore
from ladir.errors import UnusableError
from ladir.models.folders import load_vae
from ladir.models.vae import Vae, encode_sentences
from ladir.tokens import load_tokenizer
from training.phases.latent_report import report_latents, stored_records
from training.phases.lengths import check_sentences
from training.phases.tokens import Tokens
from training.runtime.alone import GiveWay
from training.runtime.ending import in_words, tell_end
from training.runtime.files import read_json, remove_folder, write_json
from training.runtime.run import Outcome, Run
from training.runtime.stages import fingerprint
from training.runtime.status import Pace
from training.runtime.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: settings of the data that name files, or say where and how the token store is made
_ASIDE = ("train", "validation", "test", "sentences", "store", "processes", "chat_template", "stream_hub")


class Stopwatch:
    """Seconds of encoding with one VAE over all restarts, kept after every part: ``latents/seconds.json`` (rank 0)."""

    def __init__(self, folder: Path, mark: str) -> None:
        """Goes on from what was noted for the VAE with the fingerprint ``mark``."""
        self._file, self.mark = folder / "seconds.json", mark
        self._before = float(read_json(self._file).get(mark, 0.0))
        self._start = time.perf_counter()
        self.used = False

    def note(self) -> float:
        """Write down the seconds so far; returns them."""
        seconds = self._before + time.perf_counter() - self._start
        write_json(self._file, {self.mark: seconds})
        return seconds


def encode_split(
    run: Run, vae: Vae, tokenizer: PreTrainedTokenizerBase, name: str, named: str | Sequence[str], watch: Stopwatch
) -> bool:
    """Encode the records that a setting names on all ranks and join their parts as ``latents/<name>``, unless they are there.

    False when a signal asked to stop: the parts that are written wait for the next start.
    """
    target = run.folder.latents / name
    tokens = Tokens(run.config, run.world, tokenizer, run.stop)
    source = run.alone(lambda give_way: _source(run, tokens.contents(named, give_way)))
    if source is None:
        return False
    if run.world.on_main(lambda: _is_current(run, name, watch.mark, source)):
        return True
    watch.used = True
    records = tokens.records(named)
    assert records is not None  # something is named
    _check_lengths(run, vae, records)
    form = _form(run, vae)
    parts, alarm = _parts(run, target, watch.mark, source, form), run.alarm()
    if not _encode_parts(run, vae, records, parts, form, watch):
        return False
    run.status.say(f"joining the parts of {target}", fraction=None, seconds_left=None)
    if alarm.meet():
        return False

    def join(give_way: GiveWay) -> bool:
        # By name: a folder's listing may lag behind other nodes' writes, and holds what a killed process left.
        store = join_parts(parts, _firsts(run, len(records)), target, give_way)
        write_json(run.folder.sources, {**read_json(run.folder.sources), name: source})
        watch.note()
        logger.info("encoded %d records (%d latents) into %s", len(store), store.num_latents, target)
        return True

    return run.alone(join) is not None


def _form(run: Run, vae: Vae) -> LatentForm:
    """What is kept of a latent."""
    settings = vae.settings
    sampled = run.config.denoiser.sample_latents
    return LatentForm(settings.latent_dim, settings.latents_per_block, run.config.latents.dtype, logvar=sampled)


def _source(run: Run, contents: Sequence[str]) -> str:
    """Stands for the records of files with such :meth:`~training.phases.tokens.Tokens.contents` as the settings read them."""
    settings = {name: value for name, value in dataclasses.asdict(run.config.data).items() if name not in _ASIDE}
    facts = [*contents, settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _parts(run: Run, target: Path, mark: str, source: str, form: LatentForm) -> Path:
    """Folder of the parts: another one for other weights, data, sizes or forms, so that parts never mix; any number of ranks
    writes the same parts."""
    facts = [mark, source, run.config.latents.records_per_part, dataclasses.asdict(form)]
    return target.with_name(f"{target.name}.parts-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}")


def _firsts(run: Run, num_records: int) -> range:
    """The first record of every part."""
    return range(0, num_records, run.config.latents.records_per_part)


def _encode_parts(run: Run, vae: Vae, records: Sequence[TokenRecord], folder: Path, form: LatentForm, watch: Stopwatch) -> bool:
    """Write this rank's parts that are not there yet; False when a signal asked to stop in between."""
    if run.alone(lambda give_way: _clear(folder, give_way)) is None:
        return False
    firsts, size, pace = _firsts(run, len(records)), run.config.latents.records_per_part, Pace()
    for start in range(0, len(firsts), run.world.size):
        if run.stop_agreed():
            return False
        _tell_part(run, pace, firsts[start], len(records))
        for first in firsts[start + run.world.rank : start + run.world.size][:1]:
            if not is_whole(folder, first):
                mine = range(first, min(first + size, len(records)))
                write_part(folder, first, encoded_rows(vae, records, mine, run.config.latents), watch.mark, form)
                if run.world.is_main:
                    watch.note()
    return True


def _clear(folder: Path, give_way: GiveWay) -> bool:
    """Remove the same split's parts of other weights, data, sizes or forms (rank 0)."""
    for other in folder.parent.glob(f"{folder.name.split('.')[0]}.parts-*"):
        if other != folder:
            remove_folder(other, give_way)
    return True


def _tell_part(run: Run, pace: Pace, first: int, count: int) -> None:
    """How far the encoding is."""
    done = first / count
    run.status.say(f"encoding from record {first + 1:,} of {count:,}", fraction=done, seconds_left=pace.seconds_left(done))


def _is_current(run: Run, name: str, mark: str, source: str) -> bool:
    """Whether the latents ``name`` are already those that this VAE makes of these records, whole, with all that is wanted."""
    try:
        store = LatentStore.open(run.folder.latents / name)
    except FileNotFoundError:
        return False
    except UnusableError as error:  # torn: a copy that was cut off, a disk that filled up
        logger.warning("%s; encoding it anew", error)
        return False
    kept = store.form.logvar or not run.config.denoiser.sample_latents
    return store.fingerprint == mark and read_json(run.folder.sources).get(name) == source and kept


def encoded_rows(
    vae: Vae, records: Sequence[TokenRecord], mine: Sequence[int], settings: LatentSettings
) -> Iterator[dict[str, Any]]:
    """Rows of the latent store, in order.  A sentence that occurs several times in the part is encoded once."""
    sentences = sorted({tuple(block) for i in mine for block in records[i].blocks}, key=len)  # alike in length: little padding
    place = {sentence: number for number, sentence in enumerate(sentences)}
    starts = range(0, len(sentences), settings.batch_size)
    encoded = [encode_sentences(vae, sentences[s : s + settings.batch_size], settings.pack_tokens) for s in starts]
    mean, logvar = (torch.cat([part.cpu() for part in parts]).numpy() for parts in zip(*encoded, strict=True))
    for i in mine:
        record = records[i]
        at = [place[tuple(block)] for block in record.blocks]
        yield {
            "question": record.question,
            "blocks": record.blocks,
            "answer": record.answer,
            "mu": mean[at],
            "logvar": logvar[at],
        }


def encode(run: Run) -> bool:
    """Encode all files and record how long that took; False when a signal asked to stop."""
    tokenizer = load_tokenizer(run.config.backbone)
    files = {"train": run.config.data.train, "validation": run.config.data.validation}
    for file in (file for named in files.values() for file in data_files(named)):
        check_path(file)  # before a model is loaded
    run.status.say("loading the VAE")
    vae = load_vae(run.folder.model("vae"), run.config.backbone, run.world.device, encoder_only=True)
    mark = fingerprint(run.world, run.stop, run.folder.model("vae"), "vae")
    watch = Stopwatch(run.folder.latents, mark)
    for name, named in files.items():
        if named is not None and not encode_split(run, vae, tokenizer, name, named, watch):
            return False
    del vae  # a decoder follows
    if watch.used or run.outcome is None:
        seconds = watch.note() if run.world.is_main else 0.0
        figures = _report(run, tokenizer)
        if figures is None:
            return False
        run.finish(Outcome("finished", 0, 0, seconds, figures))
    if run.world.is_main:
        _tell_encoded(run, [name for name, named in files.items() if named is not None])
    return True


def _check_lengths(run: Run, vae: Vae, records: TokenStore) -> None:
    """The LM of the VAE has positions for every block."""
    check_sentences(run.config, vae.encoder.base.config, vae.thought_decoder.marks, records.blocks)


def _report(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, float] | None:
    """What the latents are good for, in TensorBoard and metrics.jsonl, too; None where a stop was asked for: the next start
    looks again."""
    vae, sentences = run.folder.model("vae"), run.config.latents.report_sentences
    figures = report_latents(run, vae, int(tokenizer.eos_token_id), lambda give_way: stored_records(run.folder, sentences))
    if figures:
        with Telemetry(run, 0) as telemetry:
            telemetry.record("validation", 0, figures)
    return figures


def _tell_encoded(run: Run, names: Sequence[str]) -> None:
    stores = {name: LatentStore.open(run.folder.latents / name) for name in names}
    counts = ", ".join(f"{name} {len(store)} records ({store.num_latents} latents)" for name, store in stores.items())
    done = run.folder.outcome(run.phase)
    tell_end(run, f"{counts}; {in_words(done.metrics)}" if done and done.metrics else counts, run.folder.latents)
