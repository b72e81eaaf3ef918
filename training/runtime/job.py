"""What every entry point does around its work: settings, processes, run folder, and errors a user can act on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from ladir.config import Config
from ladir.config.loader import parse_args
from ladir.data.records import BadRecords
from ladir.errors import UnusableError
from ladir.models.backbone import choose_dtype
from training.planning.fitting import check_state
from training.runtime.checkpoint import CheckpointError
from training.runtime.distributed import LaunchError, RankLostError, SickRankError, World, start, stop
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config
from training.runtime.ending import given_settings
from training.runtime.examination import examine
from training.runtime.files import lacks_room
from training.runtime.loop import NonFiniteError
from training.runtime.preemption import INTERRUPTED_STATUS, BrokenOff
from training.runtime.run import Run, RunConflict, open_run
from training.runtime.sampler import BatchSizeError
from training.runtime.topology import GIB, Topology, check_topology, deepspeed_file

logger = logging.getLogger(__name__)

#: errors whose message says all: no traceback is shown for them
USER_ERRORS = (
    BadRecords,
    BatchSizeError,
    CheckpointError,
    DeepSpeedConfigError,
    FileNotFoundError,
    LaunchError,
    NonFiniteError,
    RankLostError,
    RunConflict,
    SickRankError,
    UnusableError,
)


def _on_this_node() -> int | None:
    """How many of the processes this node has, where the launcher says so."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the latter is what DeepSpeed's says
    return None if told is None else int(told)


def _topology(world: World) -> Topology:
    """All ranks as on one node; a GPU has what the smallest has."""
    memory = torch.cuda.get_device_properties(world.device).total_memory if world.device.type == "cuda" else 0
    smallest = -world.largest([-memory])[0]
    return Topology(1, world.size, has_gpus=smallest > 0, gpu_gib=smallest / GIB or None)


@contextmanager
def job(argv: Sequence[str] | None, description: str, phase: Callable[[Config], str], trains: bool = False) -> Iterator[Run]:
    """``with job(argv, __doc__, lambda config: "vae", trains=True) as run:`` - the opened run of this process' job.

    ``trains``: it makes an engine, so that the DeepSpeed file is looked at before anything is loaded.
    Exits with status 2 and one message for errors that are the user's to mend; others go through.  After an error the
    process just ends: leaving in good order takes all ranks, and the others may be waiting for this one elsewhere.  Exits with
    ``INTERRUPTED_STATUS`` where the work was interrupted and waits to be continued.
    """
    config, arguments = parse_args(argv, description)
    interrupted = False
    try:
        if trains:
            config.deepspeed.config = deepspeed_file(config, phase(config))
            check_ds_config(config.backbone, config.deepspeed.config)
        on_this_node = _on_this_node()  # a start without a launcher sets such a variable itself
        world = start(config.deepspeed)
        if trains:
            check_topology(config, phase(config), world.size, world.gather(on_this_node))
            topology = _topology(world)
            world.on_main(lambda: check_state(config, phase(config), topology))
        examine(world, config)
        config.backbone.dtype = world.broadcast(choose_dtype(config.backbone.dtype, world.device.type))
        try:
            with open_run(config, phase(config), world) as run:
                run.given = given_settings(arguments)
                yield run
            interrupted = run.interrupted
        except BrokenOff:  # before there was something to save, on all ranks
            interrupted = True
            logger.info("%s interrupted before it began, what is read is kept: the same command continues", phase(config))
        if interrupted:
            world.barrier()  # a launcher ends the others as soon as one ends with another status than 0
    except USER_ERRORS as error:
        logger.error("%s", error)
        raise SystemExit(2) from error
    except (OSError, SafetensorError) as error:
        if not lacks_room(error) and not isinstance(error, PermissionError):
            raise
        remedy = f"make room in {config.run.folder}" if lacks_room(error) else "give back the permission"
        logger.error("%s: %s, then start the same command again", error, remedy)
        raise SystemExit(2) from error
    stop()
    if interrupted:
        raise SystemExit(INTERRUPTED_STATUS)
