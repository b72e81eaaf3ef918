"""Before anything is loaded: every device multiplies matrices, all add up numbers; one that is wrong, slow or absent is named.

A node whose GPU is throttled, or whose memory errs, holds up or spoils a job of any size.  Found here it costs seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladir.config import Config
from training.runtime.distributed import SickRankError, World, is_lost_rank
from training.runtime.failures import node_name
from training.runtime.heartbeat import Heartbeat
from training.runtime.ranks import name_of, slowest_rank

logger = logging.getLogger(__name__)

#: rows and inner size of the matrices, products in a round, and numbers added up, by device
_SIZES = {"cuda": ((4096, 1024), 100, 1 << 24), "cpu": ((192, 192), 2, 1 << 12)}
_ROUNDS = 4


@dataclass(frozen=True)
class Finding:
    """What one rank has found out about its device."""

    name: str
    node: str
    seconds: float
    """The fastest round of products."""
    wrong: str
    """What came out wrong here; empty: nothing."""


def examine(world: World, config: Config) -> None:
    """Examine all ranks (collective; one alone has nobody to be compared with).

    Raises :class:`~training.runtime.distributed.SickRankError` where one computes wrongly, or with
    ``deepspeed.preflight=refuse`` takes ``telemetry.slow_rank_factor`` times as long as the median one (with ``warn`` it is
    warned of), and :class:`~training.runtime.distributed.RankLostError` where one does not come.
    """
    settings = config.deepspeed
    if settings.preflight == "off" or world.size == 1:
        return
    heartbeat = Heartbeat(world, "preflight")
    world.wait_at_most(settings.step_timeout_minutes)
    try:
        own = measure(world)
        found = world.gather(own)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise heartbeat.rank_lost(error) from error
    world.wait_at_most(settings.timeout_minutes)
    warning = judge(found, config.telemetry.slow_rank_factor, settings.preflight == "refuse")
    if warning and world.is_main:
        logger.warning("%s", warning)


def measure(world: World) -> Finding:
    """This rank's part, in a blink on a CPU and less than a second on a GPU."""
    (rows, inner), times, numbers = _SIZES[world.device.type]
    # -1, 0 and 1: the product's elements are whole numbers that even bfloat16 holds, and their sums exact in any order.
    numbers_of = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-1, 2, shape, generator=numbers_of) for shape in ((rows, inner), (inner, rows)))
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    there = left.to(world.device, dtype), right.to(world.device, dtype)
    sums = (there[0] @ there[1]).float().sum(1).cpu()  # and everything is warm
    wrong = [] if torch.equal(sums, (left @ right.sum(1)).float()) else ["a product"]
    seconds = min(_timed(*there, times, world.device) for _ in range(_ROUNDS))
    total = torch.full((numbers,), float(world.rank + 1), device=world.device)
    world.add_up(total)
    wrong += [] if bool((total == world.size * (world.size + 1) / 2).all()) else ["a sum over the ranks"]
    return Finding(name_of(world), node_name(), seconds, " and ".join(wrong))


def _timed(left: Tensor, right: Tensor, times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def judge(found: Sequence[Finding], factor: float, refuse: bool) -> str:
    """Raise, or return what to warn of; ``found`` is the same on all ranks, and so is what they do."""
    wrong = [one for one in found if one.wrong]
    if wrong:
        named = "; ".join(f"{one.name}: {one.wrong}" for one in wrong)
        raise SickRankError(f"these ranks compute wrongly ({named}): leave their nodes out (sbatch --exclude)", _nodes(wrong))
    slowest = slowest_rank(tuple(one.seconds for one in found))
    if slowest is None or slowest.factor < factor:
        return ""
    one = found[slowest.rank]
    said = f"before the start, {one.name} takes {slowest.factor:.2f} times as long as the median rank for a matrix product"
    remedy = "look at that device (clock, temperature, other processes) or leave its node out (sbatch --exclude)"
    if refuse:
        raise SickRankError(f"{said}: {remedy}, or say deepspeed.preflight=warn", _nodes([one]))
    return f"{said}: {remedy}"


def _nodes(found: Sequence[Finding]) -> list[str]:
    return sorted({one.node for one in found})
