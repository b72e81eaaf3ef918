"""Exports: what is made of a trained denoiser and its VAE to be asked and passed on, and how it comes back.

A denoiser's folder (see :mod:`ladir.models.folders`) with ``vae/`` (the thought decoder), ``vae_encoder/`` where blocks are
encoded again, ``verifier/`` where one was trained, ``base/`` where the LM under the adapters was copied, and the tokenizer.  Made
of trained folders by :mod:`ladir.models.assembling`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from ladir.config import BackboneSettings
from ladir.errors import UnusableError
from ladir.models.backbone import Backbone, choose_dtype
from ladir.models.card import CARD_FILE, write_card
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_denoiser, load_vae, marks_around, save_denoiser, save_vae, saved_marks
from ladir.models.loading import load_lm
from ladir.models.pairing import TrainedOn, adapter_base, check_tokenizer, check_vae, find_base, name_base
from ladir.models.store import (
    HEADS_FILE,
    SETTINGS_FILE,
    heads_fingerprint,
    load_settings,
    load_tensors,
    own_state,
    save_model,
    update_settings,
    weights_fingerprint,
    without_adapters,
    written_aside,
)
from ladir.models.vae import ThoughtDecoder, Vae
from ladir.models.verifier import Verifier, check_verifier, load_verifier, save_verifier
from ladir.models.weights import check_file, check_lm_files
from ladir.tokens import load_tokenizer, save_tokenizer

DECODER_HEAD = "from_latent."
DECODER_FOLDER = "vae"
#: the encoding half of the VAE, as a VAE's folder without decoder
ENCODER_FOLDER = "vae_encoder"
VERIFIER_FOLDER = "verifier"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_REASON = 300  # characters


@dataclass(frozen=True)
class Export:
    """What an export holds; ``sample``: its default controls; ``encoder`` and ``verifier``: where it has one; ``card``: its model
    card."""

    denoiser: Denoiser
    thought_decoder: ThoughtDecoder
    tokenizer: PreTrainedTokenizerBase
    sample: dict[str, Any]
    encoder: Vae | None
    trained_on: TrainedOn
    card: str | None = None
    verifier: Verifier | None = None


@dataclass(frozen=True)
class _Found:
    """An export that was looked at: its settings, those of the denoiser taken, and where the LMs under the adapters lie."""

    folder: Path
    source: Path
    sample: dict[str, Any]
    decoder: dict[str, Any]
    trained_on: TrainedOn
    denoiser_base: str | None
    encoder_base: str | None
    verifier: Path | None


def load_export(
    folder: str | Path,
    device: torch.device,
    attention: str,
    dtype: str | None,
    other: str | Path | None = None,
    base: str | Path | None = None,
    verifier: str | Path | None = None,
) -> Export:
    """An export folder, or one of the Hub by its id, on ``device``.

    ``other``: the folder of another denoiser for it; ``base``: the folder of the LM under the adapters, where it is not where the
    export says; ``verifier``: the folder of another verifier than the export's, which is of no use to another denoiser.
    UnusableError for what is missing, damaged or does not belong together, before an LM is loaded.
    """
    folder = local_export(folder)
    found = _look_at(folder, Path(other or folder), base, None if verifier is None else Path(verifier))
    tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(folder)))
    settings = BackboneSettings(attention=attention, dtype=dtype or _dtype_here(found.source, device))
    check_tokenizer(found.trained_on, tokenizer, found.denoiser_base or found.source, found.folder)
    denoiser, _ = load_denoiser(found.source, settings, device, found.denoiser_base)
    thoughts = _load_thought_decoder(found, denoiser, settings, device)
    encoder = found.folder / ENCODER_FOLDER
    vae = load_vae(encoder, settings, device, encoder_only=True, base=found.encoder_base) if encoder.is_dir() else None
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    judge = None if found.verifier is None else load_verifier(found.verifier, device)
    return Export(denoiser, thoughts, tokenizer, found.sample, vae, found.trained_on, text, judge)


def local_export(name: str | Path) -> Path:
    """The folder of an export; that of an id of the Hub (``owner/name``, where nothing here has this name) is fetched.

    UnusableError where it cannot be.
    """
    folder = Path(name)
    if folder.exists() or _HUB_ID.fullmatch(str(name)) is None or _meant(folder) is not None:
        return folder
    try:
        return Path(snapshot_download(str(name)))
    except (OSError, ValueError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:_REASON]
        raise UnusableError(f"{name}: no such folder, and no model of the Hub that can be fetched ({reason})") from error


def _meant(folder: Path) -> Path | None:
    """The export near a folder that is none."""
    near = [place / "export" for place in (folder, *list(folder.parents)[:2])]
    return next((place for place in near if (place / SETTINGS_FILE).is_file()), None)


def _look_at(folder: Path, source: Path, base: str | Path | None, verifier: Path | None) -> _Found:
    """Whether everything is there, whole, and belongs together; nothing large is read."""
    _check_is_export(folder)
    own, taken = load_settings(folder, "denoiser"), load_settings(source, "denoiser")
    decoder = load_settings(folder / DECODER_FOLDER, "thought_decoder")
    trained_on = TrainedOn.of(taken)
    check_vae(trained_on, decoder.get("vae"), source, folder / DECODER_FOLDER)
    if decoder["shared"] and adapter_base(source) is None:
        raise UnusableError(
            f"{source}: its thoughts are read by the LM without the denoiser's adapters, and there are none: was the LM saved "
            "there with them merged in? Then the LM that reads thoughts is lost: give the adapters back, or export again with "
            "export.merge_lora=true, which keeps it"
        )
    encoder = folder / ENCODER_FOLDER
    bases = _base_of(source, source, taken, base), _base_of(encoder / "encoder", folder, own, base)
    holders, lms = [source, folder / DECODER_FOLDER], [source, *(Path(lm) for lm in bases if lm and Path(lm).is_dir())]
    if encoder.is_dir():
        load_settings(encoder, "vae")
        holders, lms = [*holders, encoder], [*lms, encoder / "encoder"]
    if not (decoder["shared"] or decoder["base"]):
        lms.append(folder / DECODER_FOLDER)
    _check_files(folder, holders, lms)
    if verifier is None and source == folder and (folder / VERIFIER_FOLDER).is_dir():
        verifier = folder / VERIFIER_FOLDER
    if verifier is not None:
        check_verifier(verifier, source)
    return _Found(folder, source, own["sample"], decoder, trained_on, *bases, verifier)


def _base_of(lm: Path, model: Path, saved: Mapping[str, Any], given: str | Path | None) -> str | None:
    """Where the LM under the adapters in ``lm`` lies, a part of ``model`` with its settings; None where it has none."""
    named = adapter_base(lm)
    return None if named is None else find_base(model, named, saved.get("base_place"), TrainedOn.of(saved).base, given)


def _check_files(folder: Path, with_heads: Sequence[Path], lms: Sequence[Path]) -> None:
    for holder in with_heads:
        check_file(holder / HEADS_FILE)
    for lm in lms:
        check_lm_files(lm)
    if not (folder / TOKENIZER_CONFIG_FILE).is_file():
        raise UnusableError(f"{folder / TOKENIZER_CONFIG_FILE} is missing; copy the folder again, or export it anew")


def _check_is_export(folder: Path) -> None:
    """UnusableError for a folder that is none or lacks the decoder; names the export that may have been meant."""
    if (folder / SETTINGS_FILE).is_file() and (folder / DECODER_FOLDER).is_dir():
        return
    meant = _meant(folder)
    hint = f"did you mean {meant}?" if meant else "training/export.py writes runs/<name>/export"
    if not folder.is_dir():
        raise UnusableError(f"{folder}: no such folder; {hint}")
    lacks = DECODER_FOLDER + os.sep if (folder / SETTINGS_FILE).is_file() else SETTINGS_FILE
    raise UnusableError(f"{folder} is no export ({lacks} is missing); {hint}")


def _load_thought_decoder(found: _Found, denoiser: Denoiser, settings: BackboneSettings, device: torch.device) -> ThoughtDecoder:
    folder = found.folder / DECODER_FOLDER
    weights = load_tensors(folder / HEADS_FILE)
    from_latent = nn.Linear(denoiser.latent_dim, denoiser.backbone.hidden_size)
    from_latent.load_state_dict({name.removeprefix(DECODER_HEAD): value for name, value in weights.items()})
    if found.decoder["shared"]:
        backbone = denoiser.backbone
    else:
        lm = load_lm(settings, device.type, found.decoder["base"] or str(folder), device)
        backbone = Backbone(lm).to(device).eval()
    return ThoughtDecoder(backbone, from_latent.to(device, denoiser.dtype), **saved_marks(found.decoder))


def _dtype_here(folder: Path, device: torch.device) -> str:
    """The dtype of a folder's heads, as a setting's value; float32 where ``device`` only emulates bfloat16."""
    return choose_dtype("auto", device.type) if dtype_of(folder) == torch.bfloat16 else "float32"


def dtype_of(folder: Path) -> torch.dtype:
    """What the heads of a denoiser or a VAE are saved in, and its LM was trained in."""
    heads = load_tensors(folder / HEADS_FILE)
    return next((heads[name].dtype for name in ("marks.weight", "queries.weight") if name in heads), torch.float32)


def save_export(parts: Export, folder: str | Path) -> None:
    """Write an export out of loaded parts; the folder appears whole or not at all.

    A model that is there already is replaced; UnusableError where ``folder`` holds anything else.
    """
    final = Path(folder).resolve()
    with written_aside(folder) as aside:
        save_denoiser(parts.denoiser, aside, sample=parts.sample, trained_on=parts.trained_on)
        save_thought_decoder(parts.thought_decoder, aside / DECODER_FOLDER, shared=parts.denoiser.backbone)
        if parts.encoder is not None:
            save_vae_encoder(parts.encoder, aside / ENCODER_FOLDER)
        if parts.verifier is not None:
            save_verifier(parts.verifier, aside / VERIFIER_FOLDER, heads_fingerprint(aside))
        save_tokenizer(parts.tokenizer, aside)
        # Parts that do not say what they were trained on are tied as they are.
        vae = parts.trained_on.vae or weights_fingerprint(aside / DECODER_FOLDER)
        update_settings(aside / DECODER_FOLDER, vae=vae)
        saved = load_settings(aside, "denoiser")
        update_settings(aside, trained_on={**saved["trained_on"], "vae": vae}, base_place=name_base(aside, final))
        if parts.card is None:
            write_card(aside)
        else:
            (aside / CARD_FILE).write_text(parts.card, encoding="utf-8")


def save_thought_decoder(decoder: ThoughtDecoder, folder: str | Path, shared: Backbone | None = None) -> None:
    """Write the decoding half of a VAE; where its LM is ``shared`` with the denoiser (adapters off), only the head.

    Adapters take no part in decoding and are left out.  UnusableError where they were merged into the shared LM.
    """
    is_shared = decoder.backbone is shared
    if is_shared and not decoder.backbone.has_adapters:
        raise UnusableError(
            "thoughts are read by the denoiser's LM without its adapters, and it has none any more: what read them is lost; load "
            "the export again, or export with export.merge_lora=true, which keeps it"
        )
    holder = nn.ModuleDict({"from_latent": decoder.from_latent})
    lms = {}
    if not is_shared:
        holder["backbone"] = plain = Backbone(decoder.backbone.base)
        lms["backbone.lm."] = (plain, "")
    settings = {"kind": "thought_decoder", "base": None, "shared": is_shared, **marks_around(decoder)}
    save_model(holder, without_adapters(own_state(holder)), folder, lms, settings)


def save_vae_encoder(vae: Vae, folder: str | Path) -> None:
    """Write the encoding half of a VAE."""
    encoder = Vae(vae.encoder, None, vae.settings, vae.bos, vae.separator)
    encoder.load_state_dict({name: value for name, value in vae.state_dict().items() if not name.startswith("own_decoder.")})
    save_vae(encoder, folder)
