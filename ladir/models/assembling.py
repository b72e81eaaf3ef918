"""An export (see :mod:`ladir.models.exports`) out of the folders that trainings left: files are copied, no model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ladir.config import ExportSettings, SampleSettings
from ladir.errors import UnusableError
from ladir.models.card import CardFacts, write_card
from ladir.models.exports import DECODER_FOLDER, DECODER_HEAD, ENCODER_FOLDER, VERIFIER_FOLDER, dtype_of
from ladir.models.folders import saved_marks
from ladir.models.merging import merge_adapter
from ladir.models.pairing import (
    TrainedOn,
    adapter_base,
    base_fingerprint,
    check_tokenizer,
    check_vae,
    find_base,
    name_base,
)
from ladir.models.store import (
    HEADS_FILE,
    SETTINGS_FILE,
    folder_fingerprint,
    load_settings,
    load_tensors,
    update_settings,
    written_aside,
)
from ladir.models.verifier import check_verifier
from ladir.models.weights import ADAPTER_CONFIG_NAME, check_file, check_lm_files, save_tensors, weight_files
from ladir.tokens import save_tokenizer

_BASE_FOLDER = "base"
_LM_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*.safetensors"]


def assemble_export(
    denoiser_folder: str | Path,
    vae_folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    sample: SampleSettings,
    how: ExportSettings | None = None,
    facts: CardFacts | None = None,
    verifier: str | Path | None = None,
) -> None:
    """Make an export folder from trained model folders; it appears whole or not at all.

    ``facts``: what its model card says beside that; ``verifier``: the folder of one trained on this denoiser.  Files are copied;
    with ``how.merge_lora`` weights are read a shard at a time.  An export that is there already is replaced; UnusableError where
    ``folder`` holds anything else, and for parts that are no model folders, damaged, or not of one kin.
    """
    how = how or ExportSettings()
    final = Path(folder).resolve()  # a link stays one
    parts = _look_at(Path(denoiser_folder), Path(vae_folder), tokenizer)
    if verifier is not None:
        check_verifier(Path(verifier), parts.denoiser)
    with written_aside(final) as aside:
        _place_lm(parts.denoiser, aside, parts.base, dtype_of(parts.denoiser) if how.merge_lora else None)
        shutil.copyfile(parts.denoiser / HEADS_FILE, aside / HEADS_FILE)
        _place_thought_decoder(parts, aside / DECODER_FOLDER, how)
        if sample.reencode:
            target = aside / ENCODER_FOLDER
            _place_lm(parts.vae / "encoder", target / "encoder", parts.base, dtype_of(parts.vae) if how.merge_lora else None)
            _copy([parts.vae / HEADS_FILE, parts.vae / SETTINGS_FILE], target)
        if verifier is not None:
            _copy([Path(verifier) / HEADS_FILE, Path(verifier) / SETTINGS_FILE], aside / VERIFIER_FOLDER)
        save_tokenizer(tokenizer, aside)
        copied = _copy_base(parts, aside) if how.copy_base else None
        settings = {**parts.saved, "sample": asdict(sample), "trained_on": asdict(parts.trained_on)}
        update_settings(aside, **settings, base_place=name_base(aside, final, copied))  # a folder that has them is whole
        write_card(aside, replace(facts or CardFacts(), base=(facts or CardFacts()).base or parts.base))


@dataclass(frozen=True)
class _Parts:
    """Trained folders that belong together; ``base``: the LM under the adapters, ``decoder``: the LM that reads thoughts."""

    denoiser: Path
    vae: Path
    saved: dict[str, Any]
    trained_on: TrainedOn
    base: str | None
    decoder: str
    shared: bool


def _look_at(denoiser: Path, vae: Path, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """UnusableError where something is missing, damaged or belongs to something else; nothing large is loaded."""
    saved, vae_saved = load_settings(denoiser, "denoiser"), load_settings(vae, "vae")
    for folder in (denoiser, vae):
        check_file(folder / HEADS_FILE)
    parts = [denoiser, vae / "encoder", *([vae / "decoder"] if vae_saved["settings"]["decoder"] == "trained" else [])]
    for lm in parts:  # before fingerprints are compared: a VAE with a damaged file would be taken for another one
        check_lm_files(lm)
    trained_on = TrainedOn.of(saved)
    fingerprint = folder_fingerprint(vae)
    check_vae(trained_on, fingerprint, denoiser, vae)
    base = _base_of(denoiser, adapter_base(denoiser), trained_on.base)
    encoder_base = _base_of(vae, adapter_base(vae / "encoder"), vae_saved.get("base_fingerprint"))
    frozen = vae_saved["settings"]["decoder"] == "frozen"
    decoder = _base_of(vae, vae_saved["base"], vae_saved.get("base_fingerprint")) if frozen else str(vae / "decoder")
    if decoder is None:
        raise UnusableError(f"{vae} does not name the LM that decodes its thoughts; train it anew")
    shared = base is not None and frozen
    if (shared and not _is_same(base, decoder)) or (base and encoder_base and not _is_same(base, encoder_base)):
        raise UnusableError(
            f"{denoiser} is adapters on {base}, {vae} was trained on {encoder_base or decoder}: another LM would read the "
            "thoughts; train the one of the two anew that stands on the wrong LM"
        )
    for lm in {Path(name) for name in (base, decoder) if name and Path(name).is_dir()}:
        check_lm_files(lm)
    check_tokenizer(trained_on, tokenizer, denoiser if base is None else base, denoiser)
    base = base or encoder_base
    trained_on = replace(trained_on, vae=fingerprint, base=base_fingerprint(base))
    return _Parts(denoiser, vae, saved, trained_on, base, decoder, shared)


def _base_of(folder: Path, named: str | None, expected: str | None) -> str | None:
    return None if named is None else find_base(folder, named, expected=expected)


def _is_same(one: str | None, other: str | None) -> bool:
    """Whether two names are of one LM: equal, or of folders with equal weights."""
    return one == other or base_fingerprint(one) == base_fingerprint(other) is not None


def _place_lm(source: Path, target: Path, base: str | None, merge: torch.dtype | None) -> None:
    """The LM of a model folder, or its adapters, or what comes of merging them, in a dtype."""
    if merge is not None and base is not None and (source / ADAPTER_CONFIG_NAME).is_file():
        merge_adapter(source, _local(base), target, merge)
    else:
        _copy((file for file in source.iterdir() if file.is_file() and file.name not in (HEADS_FILE, SETTINGS_FILE)), target)


def _place_thought_decoder(parts: _Parts, target: Path, how: ExportSettings) -> None:
    """The decoding head; its LM where it is not the denoiser's without adapters, nor one of the Hub that is named, not copied."""
    shared = parts.shared and not how.merge_lora
    named = not shared and not Path(parts.decoder).is_dir() and not how.copy_base
    target.mkdir()
    if not shared and not named:
        _copy(_lm_files(_local(parts.decoder)), target)
    heads = load_tensors(parts.vae / HEADS_FILE)
    save_tensors({name: tensor for name, tensor in heads.items() if name.startswith(DECODER_HEAD)}, target / HEADS_FILE)
    base = parts.decoder if named else None
    marks = {name: list(ids) for name, ids in saved_marks(load_settings(parts.vae, "vae")).items()}
    update_settings(target, kind="thought_decoder", base=base, shared=shared, vae=parts.trained_on.vae, **marks)


def _copy_base(parts: _Parts, export: Path) -> Path | None:
    """A copy of the LM under the adapters of an export, in the export; None where it has none."""
    if parts.base is None or not any(export.rglob(ADAPTER_CONFIG_NAME)):
        return None
    _copy(_lm_files(_local(parts.base)), export / _BASE_FOLDER)
    return export / _BASE_FOLDER


def _copy(files: Iterable[Path], target: Path) -> None:
    """Copies with the permissions of new files: what is copied may have been closed to others, or to writing."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


def _local(lm: str) -> Path:
    """The folder of an LM; one of the Hub is fetched, unless it is in the cache."""
    if Path(lm).is_dir():
        return Path(lm)
    try:
        return Path(snapshot_download(lm, allow_patterns=_LM_FILES))
    except (OSError, ValueError) as error:
        raise UnusableError(f"the LM {lm!r} cannot be fetched from the Hub: {error}") from error


def _lm_files(folder: Path) -> Iterator[Path]:
    """The files of a Hugging Face LM folder, without ours and the tokenizer's.  UnusableError where one is missing."""
    weights = weight_files(folder)
    if not weights or not (folder / CONFIG_NAME).is_file():
        missing = CONFIG_NAME if weights else SAFE_WEIGHTS_NAME
        raise UnusableError(
            f"{folder} has no {missing}: give back the folder of the LM that was trained on, with weights as safetensors "
            "(save_pretrained writes them)"
        )
    yield from weights
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (folder / name).is_file() and not (name == SAFE_WEIGHTS_INDEX_NAME and weights == [folder / SAFE_WEIGHTS_NAME]):
            yield folder / name
