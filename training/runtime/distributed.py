"""Process set-up: one environment for torchrun, the deepspeed launcher, srun and plain python."""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from ladir.config import DeepSpeedSettings
from ladir.errors import UnusableError
from ladir.installation import missing_package
from training.runtime.failures import Kind, node_name, tell_batch_script, tell_launcher
from training.runtime.logs import configure_logging
from training.runtime.preemption import INTERRUPTED_STATUS
from training.runtime.rendezvous import GatheringError, LaunchError, check_numbers, meet

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STARTERS = "start with torchrun, deepspeed or srun"
FIRST_PORT, NUM_PORTS = 20000, 12000  # below the ports that Linux gives to outgoing connections
PORT_STEP = 1009  # from one start of a job to the next, which may find the first one's port taken
_FIRST_SECONDS = 0.001  # between two looks at what is waited for; then more and more of them


class RankLostError(RuntimeError):
    """Another rank died, or did not answer in time."""

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        """``nodes``: of the ranks that were lost, where that is known."""
        super().__init__(message)
        self.nodes = tuple(nodes)


class SickRankError(RuntimeError):
    """Before anything was loaded a rank was found to compute wrongly or slowly."""

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class World:
    """The processes of this job, and which one this is."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes shared files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks, as float64 on the CPU (one all-reduce, none for a single process)."""
        if self.size == 1:
            return values.detach().to("cpu", torch.float64)
        total = values.detach().to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def add_up(self, values: Tensor) -> None:
        """Put the sum over all ranks in the place of ``values``, on their device and in their dtype."""
        if self.size > 1:
            dist.all_reduce(values)

    def exchange(self, sent: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Give rank r the flat tensor ``sent[r]``; returns what every rank gave to this one, ``counts[r]`` elements.

        All are of one dtype, on this rank's device; their bytes travel as they are.
        """
        if self.size == 1:
            return list(sent)
        given = torch.cat(list(sent))
        received = given.new_empty(sum(counts))
        width = given.element_size()
        into, out_of = ([width * count for count in counts], [width * part.numel() for part in sent])
        dist.all_to_all_single(received.view(torch.uint8), given.view(torch.uint8), into, out_of)
        return list(received.split(list(counts)))

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of every value over all ranks (one all-reduce, none for a single process)."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The small Python objects of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's small Python object, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, on every rank; an error there that a user can mend is raised on every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except (UnusableError, OSError) as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def meet(self, meanwhile: Callable[[], object]) -> None:
        """Wait for all ranks; ``meanwhile`` is called again and again, and signals are handled, which a barrier does not let."""
        if self.size > 1:
            # A thread that loads a model may have changed this process' default dtype (training.runtime.alone.apart).
            coming = dist.all_reduce(torch.zeros(1, dtype=torch.float32, device=self.device), async_op=True)
            until(coming.is_completed, meanwhile, most_seconds=0.05)
            coming.wait()  # raises where one was lost

    def wait_at_most(self, minutes: float) -> None:
        """From now on a collective that takes longer ends this process with an error (all process groups)."""
        if self.size > 1:
            for group in c10d._world.pg_map:
                c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def until(done: Callable[[], bool], meanwhile: Callable[[], object], most_seconds: float = 0.5) -> None:
    """Look whether it is ``done`` again and again, less and less often, and call ``meanwhile`` between two looks.

    ``most_seconds`` between two.
    """
    pause = _FIRST_SECONDS
    while not done():
        meanwhile()
        time.sleep(pause)
        pause = min(2 * pause, most_seconds)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def start(settings: DeepSpeedSettings) -> World:
    """Join the job this process was started for.

    Ranks come from RANK, WORLD_SIZE, LOCAL_RANK (torchrun, deepspeed), else from an srun step, else this is the only
    process.  Raises :class:`LaunchError` when they are incomplete, or the others do not come.
    """
    complete_environment(os.environ)
    configure_logging(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    store = None if dist.is_initialized() else meet(os.environ, settings.start_seconds)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
        # Else DeepSpeed counts "devices" by running numactl in every step (4 ms).
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed  # slow to import, and --help must not wait for it
    import deepspeed.ops

    if not torch.cuda.is_available():
        # The shared-memory collectives would be compiled on first use: a minute, and a compiler is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(minutes=settings.timeout_minutes),
            verbose=False,
        )
    del store  # the group has made its own
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def stop() -> None:
    """Leave the job (end of an entry point)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_as_program(main: Callable[[], None]) -> NoReturn:
    """Run the entry point ``main``, then end the process with its status but without taking the interpreter apart.

    DeepSpeed's engine keeps process groups in cycles that are never freed.  Destroyed while the interpreter ends, gloo's threads
    now and then abort a process whose work is done (PyTorch pull request 179291), and its job counts as failed.
    """
    status = 0
    try:
        main()
    except SystemExit as error:
        status = _status(error)
        if status:
            tell_launcher(_reason(error), follows=isinstance(error.__cause__, RankLostError))
            tell_batch_script(*_blame(error.__cause__, "refused"))
    except KeyboardInterrupt:  # before there is something to save, or while the process ends
        logger.error("stopped by Ctrl-C")
        tell_launcher("stopped by Ctrl-C")
        tell_batch_script("refused")
        status = 128 + signal.SIGINT
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        tell_launcher(missing_package(error) or traceback.format_exc())
        tell_batch_script(*_blame(error, "fault" if missing_package(error) is None else "refused"))
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(error: SystemExit) -> int:
    """What the interpreter would make of it: a number is the status, anything else a message."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    logger.error("%s", error.code)
    return 1


def _blame(error: BaseException | None, otherwise: Kind) -> tuple[Kind, tuple[str, ...]]:
    """What kind of failure it is, and which nodes are to blame."""
    if isinstance(error, RankLostError):
        return "lost", error.nodes
    if isinstance(error, SickRankError):
        return "sick", error.nodes
    if isinstance(error, GatheringError):  # who has lost rank 0 does not know why, and rank 0's node may
        return ("lost" if isinstance(error.__cause__, dist.DistError) else "absent"), ()
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, dist.DistBackendError) and "CUDA error" in str(error)):
        return "device", (node_name(),)
    if isinstance(error, RuntimeError) and is_lost_rank(error):
        return "lost", ()
    return otherwise, ()


def _reason(error: SystemExit) -> str:
    """Why the program ended, as it has said: the error behind it, a message, else the status alone."""
    if error.__cause__ is not None:
        return str(error.__cause__)
    if error.code == INTERRUPTED_STATUS:
        return "interrupted; the same command continues"
    return error.code if isinstance(error.code, str) else f"ended with status {error.code}, as said above"


def complete_environment(environment: Any) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in ``environment`` where they are missing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environment and "SLURM_STEP_ID" in environment:
        _from_slurm(environment)
    if "RANK" not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise LaunchError(f"WORLD_SIZE={environment['WORLD_SIZE']} is set but RANK is not: {_STARTERS}, or unset WORLD_SIZE")
        environment.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        environment.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())})
    missing = [name for name in names if name not in environment]
    if missing:
        raise LaunchError(
            f"RANK is set but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: "
            f"{_STARTERS}, or unset RANK to run as one process"
        )
    check_numbers(environment)
    if torch.cuda.is_available():  # where a process sees only its own GPU (--gpus-per-task=1), that one is number 0
        environment["LOCAL_RANK"] = str(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())


def _from_slurm(environment: Any) -> None:
    """One process per srun task.  A batch step has no SLURM_STEP_ID, so plain python there stays one process."""
    size = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if environment.get("WORLD_SIZE", str(size)) != str(size):
        raise LaunchError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but this srun step has {size} task{'s' * (size != 1)}: unset WORLD_SIZE, "
            f"or start it with srun --ntasks={environment['WORLD_SIZE']}"
        )
    environment.update({"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": str(size)})
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if size == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
        return
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(
            environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        )
    job, restarts = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + PORT_STEP * restarts) % NUM_PORTS))


def _first_host(nodes: str) -> str:
    """The first of a step's nodes."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"MASTER_ADDR is not set, and {shlex.join(command)} named no node ({error}): set MASTER_ADDR to the first node's name"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
