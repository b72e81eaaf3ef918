"""Before anything is loaded: every device multiplies matrices, all add up numbers; one that is wrong, slow or absent is named.

A node whose GPU is throttled, or whose memory errs, holds up or spoils a job of any size.  Found here it costs seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
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
    sum_seconds: float
    """The fastest sum over the ranks."""
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
    if world.is_main:
        logger.info("%s", network_in_words(found, _sum_bytes(world.device)))
        if warning:
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
    total = torch.full((numbers,), float(world.rank + 1), device=world.device)
    world.add_up(total)  # and the connections are there
    wrong += [] if bool((total == world.size * (world.size + 1) / 2).all()) else ["a sum over the ranks"]
    seconds = _fastest(lambda: _multiply(*there, times), world.device)
    sum_seconds = _fastest(lambda: world.add_up(total), world.device)
    return Finding(name_of(world), node_name(), seconds, sum_seconds, " and ".join(wrong))


def _multiply(left: Tensor, right: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(left, right)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest round."""
    return min(_timed(work, device) for _ in range(_ROUNDS))


def _timed(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _sum_bytes(device: torch.device) -> int:
    """Size of what is added up."""
    return _SIZES[device.type][2] * torch.float32.itemsize


def network_in_words(found: Sequence[Finding], size: int) -> str:
    """How fast ``size`` bytes are added up over the ranks.

    All ranks wait for one another in a sum, so that a slow link makes all of them slow and none stands out: what is said is the
    rate, which another start or another cluster is compared with.  As in NVIDIA's nccl-tests (``busbw``) it is what each rank
    sends in a ring, 2 (n - 1) / n of the bytes, in the time of the sum.
    """
    ranks = len(found)
    seconds = max(one.sum_seconds for one in found)
    rate = 2 * (ranks - 1) / ranks * size / max(seconds, 1e-9) / 1e9
    return (
        f"before the start, {ranks} ranks add up {size / 2**20:.3g} MiB in {seconds * 1e3:.1f} ms: each sends {rate:.3g} GB/s "
        "(a rate far below that of the links is a slow network)"
    )


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
