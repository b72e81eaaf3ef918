"""The denoiser's stages in a run folder: which there are, and which stands on which."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ladir.errors import UnusableError
from ladir.models.folders import denoiser_stage
from ladir.models.store import folder_fingerprint, load_settings
from training.runtime.alone import GiveWay, unbroken
from training.runtime.distributed import World
from training.runtime.files import known_sha256
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder


def fingerprint(world: World, stop: StopRequest | None, model: Path, kind: str) -> str:
    """:func:`~ladir.models.store.folder_fingerprint` of a model, by rank 0 for all: it reads every weight (collective).

    Raises BrokenOff, on all ranks, where any was asked to stop meanwhile.
    """
    return unbroken(world, stop, lambda give_way: folder_fingerprint(model, kind, partial(known_sha256, give_way=give_way)))


#: the phases that train the denoiser, in their order
STAGES = ("denoiser", "rollout", "rl")


def last_denoiser(folder: RunFolder, before: str | None = None, give_way: GiveWay = lambda: None) -> Path:
    """The denoiser of the last stage that was trained (of those before ``before``).

    UnusableError where that stage started from another model than those of the present earlier stages.  ``give_way`` is called
    between two pieces of weights that are read for that.
    """
    stages = STAGES if before is None else STAGES[: STAGES.index(before)]
    there = [stage for stage in stages if folder.model(stage).is_dir()]
    if len(there) < 2:
        return folder.model(there[0] if there else stages[0])
    *earlier, last = there
    origin, digest = load_settings(folder.model(last), "denoiser")["origin"], partial(known_sha256, give_way=give_way)
    if "denoiser" in there and origin not in [folder_fingerprint(folder.model(stage), "denoiser", digest) for stage in earlier]:
        model, known = folder.model(last), " or ".join(str(folder.model(stage)) for stage in earlier)
        raise UnusableError(
            f"{model} was trained from another denoiser than {known}: delete {model}, {folder.checkpoints(last)} and "
            f"{folder.outcome_file(last)} and train that stage anew, or leave it out"
        )
    return folder.model(last)


def stage_folder(folder: RunFolder, stage: str, snapshot: int | None) -> Path | None:
    """The denoiser of a stage, or its snapshot, where it is not the one in the export, which has that of the last stage."""
    if snapshot is not None:
        return folder.model(folder.snapshot(stage, snapshot))
    return None if denoiser_stage(folder.export) == stage else folder.model(stage)
