"""What a later stage of the denoiser's training stands on: the denoiser of an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.latents import LatentStore
from ladir.data.prompts import Frame
from ladir.errors import UnusableError
from ladir.models.folders import vae_folder
from ladir.models.pairing import TrainedOn, check_vae
from ladir.models.store import load_settings
from training.runtime.distributed import World
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.stages import fingerprint


@dataclass(frozen=True)
class Earlier:
    """The denoiser in ``folder``: what it was trained on, what stands around its questions, and its fingerprint."""

    folder: Path
    trained_on: TrainedOn
    frame: Frame
    fingerprint: str

    @classmethod
    def of(
        cls,
        config: Config,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        store: LatentStore,
        source: Path,
        stage: int,
        stop: StopRequest | None = None,
    ) -> Earlier:
        """For stage number ``stage`` on the latents in ``store``.  UnusableError where it was made from others."""
        if vae_folder(source, source) != source:
            ordinal = {2: "second", 3: "third"}[stage]
            raise UnusableError(
                f"{source} was trained jointly with its VAE (stage=joint), whose latents are stored nowhere: there is no "
                f"{ordinal} stage behind it; train stage 1 with stage=teacher, or leave stage {stage} out"
            )
        before = TrainedOn.of(load_settings(source, "denoiser"))
        check_vae(before, store.fingerprint, source, RunFolder(config).model("vae"))
        # Stage 1's, whose template may have written its day.
        frame = Frame.saved(before.frame) if before.frame else Frame.of(tokenizer, config.data.chat_template)
        origin = fingerprint(world, stop, source, "denoiser")
        return cls(source, before, frame, origin)
