"""Which files make a trained LM, VAE, denoiser or export, and how they come back (see :mod:`ladir.models.store`).

* LM: a Hugging Face folder (or PEFT adapter).
* VAE: ``encoder/`` and, where it was trained, ``decoder/``; our heads.
* Denoiser: the LM in the folder itself; our heads.
* Export: a denoiser folder with ``vae/`` (the thought decoder), ``vae_encoder/`` where blocks are encoded again, the tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ladir.config import BackboneSettings, DenoiserSettings, SampleSettings, VaeSettings
from ladir.errors import UnusableError
from ladir.files import replace_folder
from ladir.models.backbone import Backbone, build_backbone, choose_dtype, for_training, load_lm
from ladir.models.denoiser import Denoiser
from ladir.models.store import (
    HEADS_FILE,
    SETTINGS_FILE,
    State,
    load_heads,
    load_settings,
    load_tensors,
    names_damage,
    own_state,
    refuse_foreign,
    save_model,
    settings_of,
    without_adapters,
)
from ladir.models.vae import LatentMaps, ThoughtDecoder, Vae

_ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DECODER_HEAD = "from_latent."
#: of an export: the encoding half of the VAE, as a VAE's folder without decoder
_ENCODER_FOLDER = "vae_encoder"


def plain_settings(settings: VaeSettings | DenoiserSettings) -> dict[str, Any]:
    """The settings that shape a model, without how it was trained."""
    return {name: value for name, value in asdict(settings).items() if name != "train"}


def save_lm(backbone: Backbone, folder: str | Path, state: State | None = None, bidirectional_question: bool = False) -> None:
    """Write a causal LM (or its adapters); ``state`` streams the full tensors of ``backbone`` where it is sharded.

    ``bidirectional_question``: how it was trained to read questions, for :func:`reads_questions_both_ways`.
    """
    settings = {"kind": "lm", "bidirectional_question": bidirectional_question}
    save_model(backbone, state or own_state(backbone), folder, {"lm.": (backbone, "")}, settings)


def reads_questions_both_ways(folder: str | Path) -> bool:
    """Whether the tokens of a question see each other in an LM that :func:`save_lm` wrote."""
    return bool(load_settings(folder, "lm").get("bidirectional_question", False))


def save_vae(vae: Vae, folder: str | Path, state: State | None = None, base: str | None = None) -> None:
    """Write a VAE; ``base`` names the LM that a frozen decoder or an adapter stands on."""
    lms = {"encoder.lm.": (vae.encoder, "encoder")}
    trained = vae.own_decoder is not None and vae.settings.decoder == "trained"
    if trained and vae.own_decoder is not None:
        lms["own_decoder.lm."] = (vae.own_decoder, "decoder")
    settings = {"kind": "vae", "base": base, "settings": plain_settings(vae.settings)}
    save_model(vae, state or own_state(vae), folder, lms, settings, skip=[] if trained else ["own_decoder."])


def save_denoiser(
    denoiser: Denoiser,
    folder: str | Path,
    state: State | None = None,
    sample: dict[str, Any] | None = None,
    origin: str | None = None,
) -> None:
    """Write a denoiser; ``sample`` are the default controls of a :class:`~ladir.reasoner.Reasoner` made from it.

    ``origin``: after stage 2, the fingerprint of the denoiser it started from.
    """
    settings = {
        "kind": "denoiser",
        "settings": plain_settings(denoiser.settings),
        "latents_per_block": denoiser.latents_per_block,
        "latent_dim": denoiser.latent_dim,
        "sample": sample or {},
        "origin": origin,
    }
    save_model(denoiser, state or own_state(denoiser), folder, {"backbone.lm.": (denoiser.backbone, "")}, settings)


def save_thought_decoder(decoder: ThoughtDecoder, folder: str | Path, shared: Backbone | None = None) -> None:
    """Write the decoding half of a VAE; where its LM is ``shared`` with the denoiser (adapters off), only the head.

    Adapters take no part in decoding and are left out.
    """
    is_shared = decoder.backbone is shared
    holder = nn.ModuleDict({"from_latent": decoder.from_latent})
    lms = {}
    if not is_shared:
        holder["backbone"] = plain = Backbone(decoder.backbone.base)
        lms["backbone.lm."] = (plain, "")
    settings = {"kind": "thought_decoder", "base": None, "shared": is_shared}
    save_model(holder, without_adapters(own_state(holder)), folder, lms, settings)


def save_vae_encoder(vae: Vae, export: str | Path) -> None:
    """Add the encoding half of a VAE to an export folder."""
    encoder = Vae(vae.encoder, None, vae.settings)
    encoder.load_state_dict({name: value for name, value in vae.state_dict().items() if not name.startswith("own_decoder.")})
    save_vae(encoder, Path(export) / _ENCODER_FOLDER)


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


def load_vae(folder: str | Path, backbone: BackboneSettings, device: torch.device, encoder_only: bool = False) -> Vae:
    """A trained VAE on ``device``; ``backbone`` gives dtype and attention.  ValueError when the folder is not whole.

    ``encoder_only`` leaves out a decoder of its own: half the memory where nothing is decoded.
    """
    saved = load_settings(folder, "vae")
    settings = settings_of(VaeSettings, saved["settings"], folder)
    encoder = load_backbone(Path(folder) / "encoder", backbone, device)
    decoder = None
    if encoder_only:
        pass
    elif settings.decoder == "trained":
        decoder = load_backbone(Path(folder) / "decoder", backbone, device)
    elif not encoder.has_adapters:
        decoder = Backbone(load_lm(backbone, device.type, saved["base"], device))
    vae = Vae(encoder, decoder, settings)
    load_heads(vae, folder)
    return vae.to(device).eval()


def load_thought_decoder(folder: str | Path, backbone: BackboneSettings, device: torch.device) -> ThoughtDecoder:
    """The decoding half of a trained VAE on ``device``, without its encoder.  ValueError when the folder is not whole."""
    saved = load_settings(folder, "vae")
    trained = saved["settings"]["decoder"] == "trained"
    lm = Backbone(load_lm(backbone, device.type, str(Path(folder) / "decoder") if trained else saved["base"], device))
    from_latent = load_latent_maps(folder).from_latent
    return ThoughtDecoder(lm.to(device).eval(), from_latent.to(device, lm.dtype))


def load_backbone(folder: str | Path, settings: BackboneSettings, device: torch.device, trainable: bool = False) -> Backbone:
    """An LM folder, or the base LM that an adapter folder names with the adapters on it, read straight onto ``device``.

    ``trainable``: adapters to be trained on; the LM then stays where an engine can take it from.
    """
    onto = None if trainable else device
    if not (Path(folder) / _ADAPTER_FILE).is_file():
        return Backbone(load_lm(settings, device.type, str(folder), onto))
    from peft import PeftConfig, PeftModel

    with names_damage(Path(folder) / _ADAPTER_FILE):
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base = load_lm(settings, device.type, name, onto)
    # PEFT reads adapters to the first GPU unless it is told.
    place = {} if trainable else {"torch_device": str(base.device)}
    with names_damage(Path(folder) / _ADAPTER_WEIGHTS):
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, autocast_adapter_dtype=False, **place)
    return Backbone(adapted)


def new_vae(settings: VaeSettings, backbone: BackboneSettings, device_type: str) -> Vae:
    """An untrained VAE on the LM that ``backbone`` names: whole or with adapters, with its own decoder where it needs one."""
    encoder = build_backbone(backbone, device_type)
    if encoder.has_adapters and settings.decoder == "frozen":
        return Vae(encoder, None, settings)
    # A frozen decoder stores activations as well: the gradient passes through it on its way to the latents.
    decoder = for_training(Backbone(load_lm(backbone, device_type)), backbone)
    return Vae(encoder, decoder, settings)


def load_denoiser(folder: str | Path, backbone: BackboneSettings, device: torch.device) -> tuple[Denoiser, dict[str, Any]]:
    """A trained denoiser on ``device`` and the default controls saved with it."""
    denoiser, saved = _denoiser(folder, load_backbone(folder, backbone, device))
    return denoiser.to(device).eval(), saved["sample"]


def load_denoiser_to_train(
    folder: str | Path, backbone: BackboneSettings, settings: DenoiserSettings, device_type: str
) -> Denoiser:
    """A trained denoiser that will be trained on, where an engine may have split its LM; recomputing activations as set.

    Raises UnusableError where it was trained with other ``settings``.
    """
    lm = load_backbone(folder, backbone, torch.device(device_type), trainable=True)
    denoiser, _ = _denoiser(folder, for_training(lm, backbone))
    old, new = plain_settings(denoiser.settings), plain_settings(settings)
    changed = [f"denoiser.{name}: {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name]]
    if changed:
        raise UnusableError(f"{folder} was trained with other settings: {'; '.join(changed)}; give them back, or train it anew")
    return denoiser


def _denoiser(folder: str | Path, backbone: Backbone) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a folder around its LM, and what was saved with it."""
    saved = load_settings(folder, "denoiser")
    d = saved["latent_dim"]
    settings = settings_of(DenoiserSettings, saved["settings"], folder)
    denoiser = Denoiser(backbone, settings, saved["latents_per_block"], torch.zeros(d), torch.ones(d))
    load_heads(denoiser, folder)
    return denoiser, saved


def load_export(
    folder: str | Path, device: torch.device, attention: str, dtype: str | None, other: str | Path | None = None
) -> tuple[Denoiser, ThoughtDecoder, dict[str, Any], Vae | None]:
    """Denoiser, thought decoder, default controls and, where it has one, VAE encoder of an export folder.

    ``other``: the folder of another denoiser for it.
    """
    sample = load_settings(folder, "denoiser")["sample"]  # names the folder where it is none, before any file is missed
    source = Path(other or folder)
    load_settings(source, "denoiser")
    settings = BackboneSettings(attention=attention, dtype=dtype or _dtype_here(source, device))
    denoiser, _ = load_denoiser(source, settings, device)
    decoder = Path(folder) / "vae"
    saved = load_settings(decoder, "thought_decoder")
    weights = load_tensors(decoder / HEADS_FILE)
    from_latent = nn.Linear(denoiser.latent_dim, denoiser.backbone.hidden_size)
    from_latent.load_state_dict({name.removeprefix(_DECODER_HEAD): value for name, value in weights.items()})
    if saved["shared"]:
        backbone = denoiser.backbone
    else:
        backbone = Backbone(load_lm(settings, device.type, saved["base"] or str(decoder), device)).to(device).eval()
    encoder = Path(folder) / _ENCODER_FOLDER
    vae = load_vae(encoder, settings, device, encoder_only=True) if encoder.is_dir() else None
    return denoiser, ThoughtDecoder(backbone, from_latent.to(device, denoiser.dtype)), sample, vae


def _dtype_here(folder: Path, device: torch.device) -> str:
    """The dtype of a folder's heads, as a setting's value; float32 where ``device`` only emulates bfloat16."""
    dtype = load_tensors(folder / HEADS_FILE)["marks.weight"].dtype
    return choose_dtype("auto", device.type) if dtype == torch.bfloat16 else "float32"


def assemble_export(
    denoiser_folder: str | Path,
    vae_folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    sample: SampleSettings,
) -> None:
    """Make an export folder from trained model folders by copying files; no weights but our heads are read.

    An export that is there already is replaced; UnusableError where ``folder`` holds anything else, and for parts that are no
    model folders or damaged.
    """
    final = Path(folder).resolve()  # a link stays one
    refuse_foreign(final)
    aside = final.with_name(final.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    load_settings(denoiser_folder, "denoiser")
    shutil.copytree(denoiser_folder, aside)
    _update_settings(aside, sample=asdict(sample))
    _export_thought_decoder(Path(vae_folder), aside)
    if sample.reencode:
        shutil.copytree(vae_folder, aside / _ENCODER_FOLDER, ignore=shutil.ignore_patterns("decoder"))
    tokenizer.save_pretrained(str(aside))
    replace_folder(aside, final)


def _export_thought_decoder(vae_folder: Path, export: Path) -> None:
    saved = load_settings(vae_folder, "vae")
    base = saved["base"]
    shared = (export / _ADAPTER_FILE).is_file() and saved["settings"]["decoder"] == "frozen"
    source = vae_folder / "decoder" if saved["settings"]["decoder"] == "trained" else Path(base or "")
    target = export / "vae"
    target.mkdir()
    if not shared and source.is_dir():
        for file in _lm_files(source):
            shutil.copy2(file, target)
        base = None
    heads = load_tensors(vae_folder / HEADS_FILE)
    save_file({n: t for n, t in heads.items() if n.startswith(_DECODER_HEAD)}, target / HEADS_FILE)
    _update_settings(target, kind="thought_decoder", base=base, shared=shared)


def _lm_files(folder: Path) -> Iterator[Path]:
    """The files of a Hugging Face LM folder, without ours and the tokenizer's.  UnusableError where one is missing."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = ["config.json", SAFE_WEIGHTS_NAME]
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        names = ["config.json", index.name, *sorted(shards)]
    for name in names:
        if not (folder / name).is_file():
            raise UnusableError(
                f"{folder}, the LM that decodes thoughts, has no {name}: give back the folder that the VAE was trained on, with "
                "weights as safetensors (save_pretrained writes them)"
            )
        yield folder / name


def _update_settings(folder: Path, **changes: Any) -> None:
    path = folder / SETTINGS_FILE
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **changes}, indent=1))
