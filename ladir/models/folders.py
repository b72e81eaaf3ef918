"""Which files make a trained LM, VAE or denoiser, and how they come back (see :mod:`ladir.models.store`).

* LM: a Hugging Face folder (or PEFT adapter).
* VAE: ``encoder/`` and, where it was trained, ``decoder/``; our heads.
* Denoiser: the LM in the folder itself; our heads.

What is made of them to be asked: :mod:`ladir.models.exports`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ladir.config import BackboneSettings, DenoiserSettings, VaeSettings
from ladir.errors import UnusableError
from ladir.models.backbone import Backbone, for_training
from ladir.models.denoiser import Denoiser
from ladir.models.loading import build_backbone, load_lm
from ladir.models.pairing import TrainedOn, adapter_base, find_base, noted_fingerprint
from ladir.models.store import (
    HEADS_FILE,
    State,
    load_heads,
    load_settings,
    load_tensors,
    names_damage,
    own_state,
    save_model,
    settings_of,
)
from ladir.models.vae import LatentMaps, ThoughtDecoder, Vae
from ladir.models.weights import ADAPTER_WEIGHTS_NAME, check_lm_files

#: in the folder of a denoiser that was trained jointly with its VAE: that VAE
JOINT_VAE = "vae"


def vae_folder(denoiser: Path, vae: Path) -> Path:
    """The VAE whose latents the model in ``denoiser`` makes: its own, where both were trained jointly, else ``vae``."""
    own = denoiser / JOINT_VAE
    return own if own.is_dir() else vae


def plain_settings(settings: VaeSettings | DenoiserSettings) -> dict[str, Any]:
    """The settings that shape a model, without how it was trained."""
    return {name: value for name, value in asdict(settings).items() if name != "train"}


def save_lm(
    backbone: Backbone,
    folder: str | Path,
    state: State | None = None,
    bidirectional_question: bool = False,
    frame: dict[str, Any] | None = None,
) -> None:
    """Write a causal LM (or its adapters); ``state`` streams the full tensors of ``backbone`` where it is sharded.

    ``bidirectional_question``: how it was trained to read questions, for :func:`reads_questions_both_ways`; ``frame``: what stood
    around them, for :func:`question_frame`.
    """
    settings = {"kind": "lm", "bidirectional_question": bidirectional_question, "frame": frame}
    save_model(backbone, state or own_state(backbone), folder, {"lm.": (backbone, "")}, settings)


def reads_questions_both_ways(folder: str | Path) -> bool:
    """Whether the tokens of a question see each other in an LM that :func:`save_lm` wrote."""
    return bool(load_settings(folder, "lm").get("bidirectional_question", False))


def question_frame(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`save_lm` was told of what stands around a question; None: nothing but <bos>."""
    frame: dict[str, Any] | None = load_settings(folder, "lm").get("frame")
    return frame


def marks_around(decoder: ThoughtDecoder | Vae) -> dict[str, list[int]]:
    """The ids read around latents, as a folder's settings say them."""
    return {"bos": list(decoder.bos), "separator": list(decoder.separator)}


def saved_marks(saved: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """:func:`marks_around` of a folder's settings; an older version's VAE reads none."""
    return {name: tuple(saved.get(name, ())) for name in ("bos", "separator")}


def save_vae(vae: Vae, folder: str | Path, state: State | None = None, base: str | None = None) -> None:
    """Write a VAE; ``base`` names the LM that a frozen decoder or an adapter stands on."""
    lms = {"encoder.lm.": (vae.encoder, "encoder")}
    trained = vae.own_decoder is not None and vae.settings.decoder == "trained"
    if trained and vae.own_decoder is not None:
        lms["own_decoder.lm."] = (vae.own_decoder, "decoder")
    settings = {
        "kind": "vae",
        "base": base,
        "base_fingerprint": noted_fingerprint(base),
        **marks_around(vae),
        "settings": plain_settings(vae.settings),
    }
    save_model(vae, state or own_state(vae), folder, lms, settings, skip=[] if trained else ["own_decoder."])


def save_denoiser(
    denoiser: Denoiser,
    folder: str | Path,
    state: State | None = None,
    sample: dict[str, Any] | None = None,
    origin: str | None = None,
    trained_on: TrainedOn | None = None,
    stage: str = "denoiser",
) -> None:
    """Write a denoiser; ``sample`` are the default controls of a :class:`~ladir.reasoner.Reasoner` made from it.

    ``origin``: after stage 2 and 3, the fingerprint of the denoiser it started from; ``stage``: the phase that trained it.
    """
    adapted = denoiser.backbone.has_adapters
    base = noted_fingerprint(str(denoiser.backbone.lm.peft_config["default"].base_model_name_or_path)) if adapted else None
    settings = {
        "kind": "denoiser",
        "settings": plain_settings(denoiser.settings),
        "latents_per_block": denoiser.latents_per_block,
        "latent_dim": denoiser.latent_dim,
        "sample": sample or {},
        "origin": origin,
        "stage": stage,
        "trained_on": asdict(replace(trained_on or TrainedOn(), base=base)),
    }
    save_model(denoiser, state or own_state(denoiser), folder, {"backbone.lm.": (denoiser.backbone, "")}, settings)


def denoiser_stage(folder: str | Path) -> str:
    """The phase that trained the denoiser in a folder; where it does not say (older versions) ``rollout`` if it has an origin."""
    saved = load_settings(folder, "denoiser")
    return str(saved.get("stage") or ("rollout" if saved.get("origin") else "denoiser"))


def load_latent_maps(folder: str | Path) -> LatentMaps:
    """The linear maps of a trained VAE, without its LMs.  ValueError when the folder is not whole."""
    load_settings(folder, "vae")
    weights = load_tensors(Path(folder) / HEADS_FILE)
    maps = []
    for name in ("from_latent", "to_mean"):
        size_out, size_in = weights[f"{name}.weight"].shape
        maps.append(nn.Linear(size_in, size_out))
        maps[-1].load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
    return LatentMaps(*maps)


def load_vae(
    folder: str | Path, backbone: BackboneSettings, device: torch.device, encoder_only: bool = False, base: str | None = None
) -> Vae:
    """A trained VAE on ``device``; ``backbone`` gives dtype and attention.  ValueError when the folder is not whole.

    ``encoder_only`` leaves out a decoder of its own: half the memory where nothing is decoded.  ``base``: as in
    :func:`load_backbone`.
    """
    saved = load_settings(folder, "vae")
    settings = settings_of(VaeSettings, saved["settings"], folder)
    marks = saved_marks(saved)
    encoder = load_backbone(Path(folder) / "encoder", backbone, device, base=base)
    decoder = None
    if encoder_only:
        pass
    elif settings.decoder == "trained":
        decoder = load_backbone(Path(folder) / "decoder", backbone, device)
    elif not encoder.has_adapters:
        decoder = Backbone(load_lm(backbone, device.type, saved["base"], device))
    settings = replace(settings, bos=bool(marks["bos"]), separator=settings.separator if marks["separator"] else "")
    vae = Vae(encoder, decoder, settings, **marks)
    load_heads(vae, folder)
    return vae.to(device).eval()


def load_vae_to_train(folder: str | Path, backbone: BackboneSettings, settings: VaeSettings, device_type: str) -> Vae:
    """A trained VAE that will be trained on, where an engine may have split its LMs; recomputing activations as set.

    Raises UnusableError where it was trained with other ``settings``.
    """
    saved, device = load_settings(folder, "vae"), torch.device(device_type)
    old = settings_of(VaeSettings, saved["settings"], folder)
    _refuse_changes(
        folder, "vae", plain_settings(replace(old, bos=settings.bos, separator=settings.separator)), plain_settings(settings)
    )
    encoder = for_training(load_backbone(Path(folder) / "encoder", backbone, device, trainable=True), backbone)
    decoder = None
    if settings.decoder == "trained":
        decoder = for_training(load_backbone(Path(folder) / "decoder", backbone, device, trainable=True), backbone)
    elif not encoder.has_adapters:
        decoder = for_training(Backbone(load_lm(backbone, device_type, saved["base"])), backbone)
    vae = Vae(encoder, decoder, settings, **saved_marks(saved))
    load_heads(vae, folder)
    return vae


def _refuse_changes(folder: str | Path, section: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [f"{section}.{name}: {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name]]
    if changed:
        raise UnusableError(f"{folder} was trained with other settings: {'; '.join(changed)}; give them back, or train it anew")


def load_thought_decoder(folder: str | Path, backbone: BackboneSettings, device: torch.device) -> ThoughtDecoder:
    """The decoding half of a trained VAE on ``device``, without its encoder.  ValueError when the folder is not whole."""
    saved = load_settings(folder, "vae")
    trained = saved["settings"]["decoder"] == "trained"
    lm = Backbone(load_lm(backbone, device.type, str(Path(folder) / "decoder") if trained else saved["base"], device))
    from_latent = load_latent_maps(folder).from_latent
    return ThoughtDecoder(lm.to(device).eval(), from_latent.to(device, lm.dtype), **saved_marks(saved))


def load_readers(
    folder: str | Path, backbone: BackboneSettings, device: torch.device, encoder: bool
) -> tuple[ThoughtDecoder, Vae | None]:
    """What a reasoner reads blocks with: the decoding half of a trained VAE and, where it is asked for, the encoding half.

    One LM serves both where the VAE has only one (LoRA over a frozen decoder).  ValueError when the folder is not whole.
    """
    if not encoder:
        return load_thought_decoder(folder, backbone, device), None
    whole = load_vae(folder, backbone, device)
    return whole.thought_decoder, whole


def load_backbone(
    folder: str | Path, settings: BackboneSettings, device: torch.device, trainable: bool = False, base: str | None = None
) -> Backbone:
    """An LM folder, or the base LM that an adapter folder names with the adapters on it, read straight onto ``device``.

    ``trainable``: adapters to be trained on; the LM then stays where an engine can take it from.  ``base``: where the LM under
    the adapters lies, if not where they say.
    """
    onto = None if trainable else device
    named = adapter_base(folder)
    if named is None:
        return Backbone(load_lm(settings, device.type, str(folder), onto))
    from peft import PeftModel

    check_lm_files(Path(folder))
    lm = load_lm(settings, device.type, base or find_base(Path(folder), named), onto)
    # PEFT reads adapters to the first GPU unless it is told.
    place = {} if trainable else {"torch_device": str(lm.device)}
    with names_damage(Path(folder) / ADAPTER_WEIGHTS_NAME):
        adapted = PeftModel.from_pretrained(lm, str(folder), is_trainable=trainable, autocast_adapter_dtype=False, **place)
    adapted.peft_config["default"].base_model_name_or_path = base or named  # as the LM is named where it is saved again
    return Backbone(adapted)


def new_vae(
    settings: VaeSettings,
    backbone: BackboneSettings,
    device_type: str,
    bos: Sequence[int] = (),
    separator: Sequence[int] = (),
) -> Vae:
    """An untrained VAE on the LM that ``backbone`` names: whole or with adapters, with its own decoder where it needs one.

    ``bos``: the ids that start a text, which it reads first unless ``settings.bos`` is off; ``separator``: the ids of
    ``settings.separator``.
    """
    encoder, start = build_backbone(backbone, device_type), tuple(bos) if settings.bos else ()
    if encoder.has_adapters and settings.decoder == "frozen":
        return Vae(encoder, None, settings, start, separator)
    # A frozen decoder stores activations as well: the gradient passes through it on its way to the latents.
    decoder = for_training(Backbone(load_lm(backbone, device_type)), backbone)
    return Vae(encoder, decoder, settings, start, separator)


def load_denoiser(
    folder: str | Path, backbone: BackboneSettings, device: torch.device, base: str | None = None
) -> tuple[Denoiser, dict[str, Any]]:
    """A trained denoiser on ``device`` and the default controls saved with it; ``base`` as in :func:`load_backbone`."""
    denoiser, saved = _denoiser(folder, load_backbone(folder, backbone, device, base=base))
    return denoiser.to(device).eval(), saved["sample"]


def load_denoiser_to_train(
    folder: str | Path, backbone: BackboneSettings, settings: DenoiserSettings, device_type: str
) -> Denoiser:
    """A trained denoiser that will be trained on, where an engine may have split its LM; recomputing activations as set.

    Raises UnusableError where it was trained with other ``settings``.
    """
    lm = load_backbone(folder, backbone, torch.device(device_type), trainable=True)
    denoiser, _ = _denoiser(folder, for_training(lm, backbone))
    _refuse_changes(folder, "denoiser", plain_settings(denoiser.settings), plain_settings(settings))
    return denoiser


def _denoiser(folder: str | Path, backbone: Backbone) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a folder around its LM, and what was saved with it."""
    saved = load_settings(folder, "denoiser")
    d = saved["latent_dim"]
    settings = settings_of(DenoiserSettings, saved["settings"], folder)
    denoiser = Denoiser(backbone, settings, saved["latents_per_block"], torch.zeros(d), torch.ones(d))
    load_heads(denoiser, folder)
    return denoiser, saved
