"""Encoding every block of the training and validation records with the trained VAE, in parts, on all ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ladir.config import LatentSettings
from ladir.data.columns import TokenRecord
from ladir.data.latents import LatentStore
from ladir.data.rows import check_path, data_files
from ladir.errors import UnusableError
from ladir.models.folders import load_vae
from ladir.models.store import folder_fingerprint
from ladir.models.vae import Vae, encode_sentences
from ladir.tokens import load_tokenizer
from training.phases.tokens import Tokens
from training.runtime.ending import tell_end
from training.runtime.files import read_json, sha256, write_json
from training.runtime.run import Outcome, Run, RunFolder

logger = logging.getLogger(__name__)

#: the others wait while rank 0 joins all parts: a hundred gigabytes and more
_MERGE_MINUTES = 24 * 60

#: settings of the data that name files, or say where and how the token store is made
_ASIDE = ("train", "validation", "test", "sentences", "store", "processes")


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
    """Encode the records of what a setting names on all ranks and merge their parts into ``latents/<name>``, unless it is there and whole.

    False when a signal asked to stop: the parts that are written wait for the next start.
    """
    target = run.folder.latents / name
    source = run.world.on_main(lambda: _source(run, named))
    if run.world.broadcast(_is_current(run.folder, name, watch.mark, source) if run.world.is_main else False):
        return True
    watch.used = True
    records = Tokens(run.config, run.world, tokenizer).records(named)
    assert records is not None  # something is named
    parts = _parts(run, target, watch.mark, source)
    if not _encode_parts(run, vae, records, parts, watch):
        return False
    run.world.wait_at_most(_MERGE_MINUTES)
    run.world.barrier()
    if run.world.is_main:
        for torn in target.parent.glob(f".{name}.*"):  # of a process that was killed while it merged
            shutil.rmtree(torn)
        # By name: a folder's listing may lag behind other nodes' writes, and holds what a killed process left.
        store = LatentStore.merge([parts / part for part in _part_names(run, len(records))], target)
        write_json(run.folder.sources, {**read_json(run.folder.sources), name: source})
        shutil.rmtree(parts)
        watch.note()
        logger.info("encoded %d records (%d latents) into %s", len(store), store.num_latents, target)
    run.world.barrier()
    run.world.wait_at_most(run.config.deepspeed.timeout_minutes)
    return True


def _source(run: Run, named: str | Sequence[str]) -> str:
    """Stands for the records of the files (of Hub ids: their names) as the settings read them."""
    settings = {name: value for name, value in dataclasses.asdict(run.config.data).items() if name not in _ASIDE}
    sources = [sha256(Path(path)) if Path(path).is_file() else path for path in data_files(named)]
    facts = [*sources, settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _parts(run: Run, target: Path, mark: str, source: str) -> Path:
    """Folder of the parts: another one for other weights, data, ranks or sizes, so that parts never mix."""
    facts = [mark, source, run.world.size, run.config.latents.records_per_part]
    return target.with_name(f"{target.name}.parts-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}")


def _part_names(run: Run, num_records: int) -> list[str]:
    """Names of all ranks' parts: the first record of their round, and the rank."""
    ranks = run.world.size
    rounds = range(0, num_records, run.config.latents.records_per_part * ranks)
    return [_part_name(first, rank) for first in rounds for rank in range(min(ranks, num_records - first))]


def _part_name(first: int, rank: int) -> str:
    return f"{first:09d}-{rank:05d}"


def _encode_parts(run: Run, vae: Vae, records: Sequence[TokenRecord], folder: Path, watch: Stopwatch) -> bool:
    """Write this rank's parts that are not there yet; False when a signal asked to stop in between."""
    if run.world.is_main:
        for other in folder.parent.glob(f"{folder.name.split('.')[0]}.parts-*"):
            if other != folder:
                shutil.rmtree(other)
    settings, latents = vae.settings, run.config.latents
    width = latents.records_per_part * run.world.size
    for first in range(0, len(records), width):
        if run.stop_agreed():
            return False
        mine = range(first + run.world.rank, min(first + width, len(records)), run.world.size)
        part = folder / _part_name(first, run.world.rank)
        if mine and not _is_whole(part):
            rows = _rows(vae, records, mine, latents)
            LatentStore.write(part, rows, watch.mark, settings.latent_dim, settings.latents_per_block)
            if run.world.is_main:
                watch.note()
    return True


def _is_whole(part: Path) -> bool:
    """Whether a part is written, and was not cut short since (in a copy, say)."""
    try:
        LatentStore.open(part)
        return True
    except (FileNotFoundError, UnusableError):
        return False


def _is_current(folder: RunFolder, name: str, mark: str, source: str) -> bool:
    """Whether the latents ``name`` are already those that this VAE makes of these records, whole."""
    try:
        return LatentStore.open(folder.latents / name).fingerprint == mark and read_json(folder.sources).get(name) == source
    except FileNotFoundError:
        return False
    except UnusableError as error:  # torn: a copy that was cut off, a disk that filled up
        logger.warning("%s; encoding it anew", error)
        return False


def _rows(vae: Vae, records: Sequence[TokenRecord], mine: Sequence[int], settings: LatentSettings) -> Iterator[dict[str, Any]]:
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
            "index": i,
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
    vae = load_vae(run.folder.model("vae"), run.config.backbone, run.world.device, encoder_only=True)
    mark = run.world.broadcast(folder_fingerprint(run.folder.model("vae")) if run.world.is_main else "")
    watch = Stopwatch(run.folder.latents, mark)
    for name, named in files.items():
        if named is not None and not encode_split(run, vae, tokenizer, name, named, watch):
            return False
    if watch.used or run.outcome is None:
        run.finish(Outcome("finished", 0, 0, watch.note() if run.world.is_main else 0.0, {}))
    if run.world.is_main:
        _tell_encoded(run, [name for name, named in files.items() if named is not None])
    return True


def _tell_encoded(run: Run, names: Sequence[str]) -> None:
    stores = {name: LatentStore.open(run.folder.latents / name) for name in names}
    counts = ", ".join(f"{name} {len(store)} records ({store.num_latents} latents)" for name, store in stores.items())
    tell_end(run, counts, run.folder.latents)
