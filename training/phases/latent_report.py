"""What a VAE's latents are good for (:func:`ladir.models.probe.latent_report`), found by rank 0 while the others wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ladir.data.latents import LatentRecord, LatentStore
from ladir.data.randomness import derive
from ladir.models.folders import load_thought_decoder
from ladir.models.probe import latent_report
from training.runtime.alone import GiveWay, apart
from training.runtime.run import Run, RunFolder

logger = logging.getLogger(__name__)

#: the probe learns from so many training records at most
_PROBED_RECORDS = 8192


@dataclass(frozen=True)
class Judged:
    """Records that the probe learns from, those it is judged on, and mean and deviation [d] of the training's latents."""

    trained: list[LatentRecord]
    held_out: list[LatentRecord]
    mean: Tensor
    std: Tensor


def report_latents(run: Run, vae: Path, eos_id: int, judged: Callable[[GiveWay], Judged]) -> dict[str, float] | None:
    """Figures of the VAE in a folder, off the clock (collective); None where a stop was asked for.

    ``judged`` gives rank 0 the records with that VAE's latents.  Nothing where ``latents.report_sentences`` is 0.
    """
    if not run.config.latents.report_sentences:
        return {}
    run.status.say("finding out what the latents are good for", fraction=None, seconds_left=None)
    if run.world.is_main:
        logger.info("finding out what the latents are good for (a probe of %d steps)", run.config.latents.probe_steps)
    return run.alone(lambda give_way: _figures(run, vae, eos_id, judged(give_way), give_way))


def _figures(run: Run, vae: Path, eos_id: int, judged: Judged, give_way: GiveWay) -> dict[str, float]:
    steps, noise, device = run.config.latents.probe_steps, run.config.vae.latent_noise, run.world.device
    decoder = apart(lambda: load_thought_decoder(vae, run.config.backbone, device), give_way)
    seed = derive(run.config.run.seed, "latents/report")
    return latent_report(decoder, judged.trained, judged.held_out, judged.mean, judged.std, noise, steps, eos_id, seed, give_way)


def stored_records(folder: RunFolder, sentences: int) -> Judged:
    """Stored records to train the probe on, and such of about so many ``sentences`` to judge it on.

    Without validation records those are the last of the training's, which the probe does not see, but the VAE did.
    """
    store = LatentStore.open(folder.latents / "train")
    apart = LatentStore.open(folder.latents / "validation") if (folder.latents / "validation").is_dir() else None
    held_out: list[LatentRecord] = []
    places = range(len(store) - 1, max(len(store) // 2, 1) - 1, -1) if apart is None else range(len(apart))
    for place in places:
        if sum(len(record.blocks) for record in held_out) >= sentences:
            break
        held_out.append((store if apart is None else apart)[place])
    left = len(store) - (len(held_out) if apart is None else 0)
    trained = [store[place] for place in range(min(left, _PROBED_RECORDS))]
    return Judged(trained, held_out or trained, store.mean, store.std)
