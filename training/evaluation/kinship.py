"""What is asked belongs together: the export is of the run's models, and every other denoiser of the export's VAE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ladir.errors import UnusableError
from ladir.models.exports import DECODER_FOLDER
from ladir.models.folders import denoiser_stage, vae_folder
from ladir.models.pairing import TrainedOn, check_vae
from ladir.models.store import folder_fingerprint, load_settings
from training.evaluation.rows import model_of, sampling_of, stage_of
from training.runtime.alone import GiveWay, unbroken
from training.runtime.files import known_sha256, read_json
from training.runtime.run import Run, RunFolder
from training.runtime.stages import stage_folder


def check_export(run: Run, methods: Sequence[str]) -> None:
    """UnusableError, on all ranks, where the export was made of other models, or a denoiser trained on another VAE's latents."""
    models = dict.fromkeys(model_of(sampling_of(method)[0]) for method in methods)
    asked = [model for model in models if not model.startswith("ar")]
    if problem := unbroken(run.world, run.stop, lambda give_way: _problem(run, asked, give_way) if asked else ""):
        raise UnusableError(problem)


def _problem(run: Run, models: Sequence[str], give_way: GiveWay) -> str:
    snapshot = run.config.evaluate.snapshot
    try:
        if not run.folder.export.is_dir():  # of snapshots, which then have the run's own VAE
            for model in models:
                _check_trained(run.folder, run.folder.model(run.folder.snapshot(stage_of(model), snapshot)), give_way)
            return ""
        _check_is_current(run.folder, give_way)
        vae = run.folder.export / DECODER_FOLDER
        others = [stage_folder(run.folder, stage_of(model), snapshot) for model in models]
        for other in [folder for folder in others if folder is not None]:
            _check_pair(other, vae)
    except UnusableError as error:
        return str(error)
    return ""


def _check_is_current(folder: RunFolder, give_way: GiveWay) -> None:
    """UnusableError where a model was trained anew since it was exported; what has no record of it is not looked at."""
    made_of = read_json(folder.inputs("export"))
    denoiser = folder.model(denoiser_stage(folder.export))
    vae = vae_folder(denoiser, folder.model("vae"))
    digest = partial(known_sha256, give_way=give_way)
    kept = [(vae, "vae", made_of.get("vae")), (denoiser, "denoiser", made_of.get("denoiser", [None, None])[1])]
    for model, kind, before in kept:
        if before is not None and model.is_dir() and folder_fingerprint(model, kind, digest) != before:
            raise UnusableError(
                f"{folder.export} was made before {model} was trained anew: run training/export.py, then the same command again"
            )


def _check_trained(folder: RunFolder, denoiser: Path, give_way: GiveWay) -> None:
    """UnusableError where a denoiser was trained on latents of another VAE than the run's."""
    vae = vae_folder(denoiser, folder.model("vae"))
    fingerprint = folder_fingerprint(vae, "vae", partial(known_sha256, give_way=give_way))
    check_vae(TrainedOn.of(load_settings(denoiser, "denoiser")), fingerprint, denoiser, vae)


def _check_pair(denoiser: Path, vae: Path) -> None:
    """As loading will, but for the warning where it is not known."""
    trained_on, fingerprint = TrainedOn.of(load_settings(denoiser, "denoiser")), load_settings(vae, "thought_decoder").get("vae")
    if trained_on.vae is not None and fingerprint is not None:
        check_vae(trained_on, fingerprint, denoiser, vae)
