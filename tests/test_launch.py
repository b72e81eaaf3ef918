"""How a job starts: what is wrong with a launch is one line with the remedy, and nobody waits for half an hour."""

from __future__ import annotations

import gc
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from training.runtime import distributed
from training.runtime.distributed import complete_environment
from training.runtime.failures import Kind
from training.runtime.rendezvous import GatheringError, LaunchError, meet


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    yield found


def place(port: int, rank: int, size: int, address: str = "127.0.0.1") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def together(*places: dict[str, str], seconds: float = 20.0) -> list[Any]:
    """What every process finds, each in a thread of its own: a store, or the error."""
    gc.collect()  # a store that the traceback of an earlier error still holds would answer
    found: list[Any] = [None] * len(places)

    def one(number: int) -> None:
        try:
            found[number] = meet(places[number], seconds)
        except LaunchError as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def said(outcomes: list[Any]) -> str:
    text = [str(outcome) for outcome in outcomes if isinstance(outcome, LaunchError)]
    assert text and not any("\n" in line for line in text)
    return " | ".join(text)


def kinds(outcomes: list[Any]) -> set[Kind]:
    """What a batch script is told of those that failed, as a program ends: with the error behind a status."""
    return {distributed._blame(outcome, "refused")[0] for outcome in outcomes if isinstance(outcome, LaunchError)}


def test_what_may_go_well_at_another_start_is_told_apart_from_what_nobody_but_the_user_mends(port: int) -> None:
    """A process that is late or gone and a port that is taken, against ranks and sizes that are wrong."""
    assert kinds(together(place(port, 0, 2), seconds=0.5)) == {"absent"}
    assert kinds(together(place(port, 1, 2), seconds=0.5)) == {"absent"}
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert kinds(together(place(port, 0, 2), place(port, 1, 2), seconds=0.5)) == {"absent"}
    doubled = together(place(port, 0, 3), place(port, 1, 3), place(port, 1, 3), seconds=2.0)
    assert kinds(doubled) == {"refused", "absent"}  # the doubled one is told of at once, and who tells first is believed
    assert "refused" in kinds(together(place(port, 0, 2), place(port, 1, 4), seconds=2.0))
    with pytest.raises(LaunchError) as raised:
        complete_environment({**place(port, 0, 2), "RANK": "first"})
    assert kinds([raised.value]) == {"refused"}


def test_who_has_lost_rank_0_leaves_it_to_others_to_say_why() -> None:
    error = GatheringError("rank 1 has lost rank 0")
    error.__cause__ = torch.distributed.DistNetworkError("connection reset")
    assert kinds([error]) == {"lost"}


def test_a_job_that_comes_back_meets_at_another_port() -> None:
    """The first one's may be taken there for long."""
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    ports = set()
    for restarts in range(4):
        environment = {**step, "MASTER_ADDR": "node1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
        complete_environment(environment)
        ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 4 and all(distributed.FIRST_PORT <= port < 32768 for port in ports)


def test_all_who_are_expected_meet(port: int) -> None:
    assert not any(isinstance(outcome, LaunchError) for outcome in together(*(place(port, rank, 3) for rank in range(3))))


def test_a_process_that_is_alone_says_who_is_missing(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        LaunchError, match=r"^rank 0 is one of 2 .* 1 did not come .*ranks 1.*unset RANK .*deepspeed.start_seconds"
    ):
        meet(place(port, 0, 2), 0.5)


def test_one_process_in_a_step_of_two_names_srun(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    environment = {**step, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    complete_environment(environment)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(LaunchError, match=r"srun --ntasks=2 python .*srun --ntasks=1"):
        meet(environment, 0.5)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = int(other.getsockname()[1])
        with pytest.raises(LaunchError, match=rf"^port {taken} is taken .*set MASTER_PORT to a free one"):
            meet(place(taken, 0, 1), 5)
        with pytest.raises(
            LaunchError, match=rf"rank 1 has found no rank 0 at 127.0.0.1:{taken}"
        ):  # who listens there says nothing
            meet(place(taken, 1, 2), 0.5)


def test_a_first_rank_that_cannot_be_reached_is_named(port: int) -> None:
    for address in ("127.0.0.1", "no-such-host.invalid"):
        with pytest.raises(LaunchError, match=rf"rank 1 has found no rank 0 at {address}:{port} .*MASTER_ADDR"):
            meet(place(port, 1, 2, address), 0.5)


def test_two_processes_with_one_rank_and_two_sizes_are_told(port: int) -> None:
    doubled = [place(port, 0, 3), place(port, 1, 3), place(port, 1, 3)]
    assert "two processes have RANK=1" in said(together(*doubled, seconds=2.0))


def test_different_sizes_are_told(port: int) -> None:
    assert "WORLD_SIZE=" in said(together(place(port, 0, 2), place(port, 1, 4), seconds=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2 processes, 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1 is not one"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 must be at least 0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must lie between"),
    ],
)
def test_numbers_that_cannot_be_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        complete_environment({**place(20000, 0, 2), **change})


def test_a_size_without_a_rank_or_against_the_step_is_refused() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE=2 is set but RANK is not"):
        complete_environment({"WORLD_SIZE": "2"})
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(LaunchError, match=r"WORLD_SIZE=4, but this srun step has 2 tasks: unset WORLD_SIZE"):
        complete_environment({**step, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"})


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "scontrol"), subprocess.CalledProcessError(1, "scontrol")]
)
def test_a_step_whose_nodes_nobody_names_asks_for_the_address(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(distributed.subprocess, "run", fail)
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(LaunchError, match=r"MASTER_ADDR is not set, and scontrol .*set MASTER_ADDR to the first node's name"):
        complete_environment({**step, "SLURM_STEP_NODELIST": "node[1-2]"})
