"""Whether all processes of a job have come, before anything slow begins: what is wrong with a launch is said within a minute.

PyTorch's own rendezvous waits as long as a collective may take, half an hour, and does not say for whom.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from training.runtime.ports import is_taken

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_SAY_AFTER_SECONDS = 10.0


class LaunchError(RuntimeError):
    """The processes were started in a way that leaves ranks unknown, doubled or alone."""


class GatheringError(LaunchError):
    """The processes have not found one another, which may go well at another start: one is late or gone, or the port is taken."""


def check_numbers(environment: Mapping[str, str]) -> None:
    """Raise :class:`LaunchError` where RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT cannot be."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise LaunchError(f"{name}={environment[name]!r} is no number: start with torchrun, deepspeed or srun") from None
    rank, size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if not 0 <= rank < size:
        raise LaunchError(
            f"RANK={rank} is not one of WORLD_SIZE={size} processes, 0 to {size - 1}: set both anew, or start with torchrun, "
            "deepspeed or srun, which do"
        )
    if numbers["LOCAL_RANK"] < 0:
        raise LaunchError(f"LOCAL_RANK={numbers['LOCAL_RANK']} must be at least 0: it numbers the processes of a machine")
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} must lie between 1 and 65535: set it to a free port")


def meet(environment: Mapping[str, str], seconds: float) -> dist.TCPStore:
    """Wait until all processes of the job have come; returns the store they met at, to be kept until the group is made.

    Raises :class:`GatheringError` where the port is taken, a rank is missing, or the first one cannot be reached, after
    ``seconds`` at most (deepspeed.start_seconds); :class:`LaunchError` where two have one rank, or sizes differ.
    """
    outcome: list[dist.TCPStore | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_meet(environment, time.monotonic() + seconds, seconds))
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.append(error)

    # A store's constructor waits for ever where somebody else listens on the port and says nothing.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds + 2)
    if not outcome:
        raise GatheringError(_unreachable(environment, seconds))
    found = outcome[0]
    if isinstance(found, BaseException):
        raise found
    return found


def _meet(environment: Mapping[str, str], end: float, seconds: float) -> dist.TCPStore:
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = _open_store(environment, seconds)
    attempt = f"ladir/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        agreed = int(store.compare_set(f"{attempt}/size", "", str(size)))
        if agreed != size:
            raise LaunchError(f"rank {rank} was started with WORLD_SIZE={size}, another one with {agreed}: give all the same")
        if store.add(f"{attempt}/rank-{rank}", 1) > 1:
            raise LaunchError(f"two processes have RANK={rank}: every one needs a rank of its own; unset RANK under srun")
        _wait_for_all(store, attempt, rank, size, end, seconds)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise GatheringError(f"rank {rank} has lost rank 0 while processes gathered: what rank 0 says is the cause") from error
    return store


def _open_store(environment: Mapping[str, str], seconds: float) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT, which rank 0 keeps (under torchrun its agent does)."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    main = environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + seconds
    # Tried with plain sockets first: PyTorch writes pages about a port that is taken or silent.
    if main and is_taken(port):
        raise GatheringError(
            f"port {port} is taken on this machine, by another job or a second process with RANK=0: set MASTER_PORT to a free "
            "one (torchrun --master-port, deepspeed --master_port)"
        )
    if not main and not _answers(address, port, end):
        raise GatheringError(_unreachable(environment, seconds))
    try:
        left = timedelta(seconds=max(end - time.monotonic(), 1))
        return dist.TCPStore(address, port, is_master=main, timeout=left, wait_for_workers=False, multi_tenant=True)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise GatheringError(_unreachable(environment, seconds)) from error


def _answers(address: str, port: int, end: float) -> bool:
    """Whether somebody listens there before ``end``."""
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, 5)).close()
            return True
        except OSError:  # not yet, or no such name
            time.sleep(min(_POLL_SECONDS, left))
    return False


def _unreachable(environment: Mapping[str, str], seconds: float) -> str:
    address, port, rank = (environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return (
        f"rank {rank} has found no rank 0 at {address}:{port} within {seconds:g} seconds: check that it was started, MASTER_ADDR "
        "and MASTER_PORT, or raise deepspeed.start_seconds"
    )


def _wait_for_all(store: dist.TCPStore, attempt: str, rank: int, size: int, end: float, seconds: float) -> None:
    """Return when every rank is there; rank 0 then lets the others go, and says whom it waits for."""
    told = time.monotonic() + _SAY_AFTER_SECONDS
    while missing := [other for other in range(size) if not store.check([f"{attempt}/rank-{other}"])]:
        if time.monotonic() > end:
            raise GatheringError(_alone(missing, rank, size, seconds))
        if rank == 0 and time.monotonic() > told:
            logger.info("waiting for %d of %d processes (ranks %s)", len(missing), size, _listed(missing))
            told = end + 1
        time.sleep(_POLL_SECONDS)
    # The store lives in rank 0, which must not go on to close it before everybody has looked.
    if store.add(f"{attempt}/ready", 1) < size and rank == 0:
        while store.add(f"{attempt}/ready", 0) < size and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _alone(missing: list[int], rank: int, size: int, seconds: float) -> str:
    if "SLURM_STEP_ID" in os.environ:
        remedy = (
            f"start all with srun --ntasks={size} python ..., or this one alone with srun --ntasks=1 (or env -u SLURM_STEP_ID)"
        )
    else:
        remedy = f"start {size} processes with torchrun, deepspeed or srun, or unset RANK and WORLD_SIZE to run as one"
    return (
        f"rank {rank} is one of {size} processes, and {len(missing)} did not come within {seconds:g} seconds (ranks "
        f"{_listed(missing)}): {remedy}; where starting takes longer raise deepspeed.start_seconds"
    )
