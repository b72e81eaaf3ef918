"""The pre-flight: a rank that computes wrongly, slowly, or not at all is named before a training begins."""

from __future__ import annotations

import time

import pytest
import torch

from ladir.config import Config
from tests.distributed import ProcessGroup
from training.runtime import distributed, examination
from training.runtime.distributed import RankLostError, SickRankError, World
from training.runtime.examination import Finding, examine, judge, network_in_words


def examined(world: World, ill: str, preflight: str) -> tuple[str, tuple[str, ...]]:
    """What the examination says of two ranks of which the second is ill, and whom it blames."""
    config, product = Config(), torch.mm
    config.deepspeed.preflight = preflight

    def slow(*matrices: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return product(*matrices)

    def spoil(self: World, values: torch.Tensor) -> None:
        values += 1

    add_up = World.add_up
    if world.rank == 1 and ill == "slow":
        torch.mm = slow
    if world.rank == 1 and ill == "wrong":
        World.add_up = lambda self, values: (add_up(self, values), spoil(self, values))[0]  # type: ignore[method-assign, assignment]
    try:
        examine(world, config)
    except SickRankError as error:
        return str(error), error.nodes
    finally:
        torch.mm, World.add_up = product, add_up  # type: ignore[method-assign]
    return "", ()


def test_a_slow_rank_is_refused_where_asked_and_a_wrong_one_always(
    two_processes: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ill, preflight, said in (
        ("slow", "refuse", "times as long as the median rank"),
        ("slow", "warn", ""),
        ("slow", "off", ""),
        ("wrong", "warn", "compute wrongly (rank 1 ("),
    ):
        both = two_processes.run(examined, ill, preflight)
        assert both[0] == both[1]
        message, nodes = both[0]
        assert said in message and bool(message) == bool(said) == bool(nodes)
        assert not message or ("rank 1 (" in message and "sbatch --exclude" in message and nodes == (examination.node_name(),))


def test_only_the_wrong_are_named_and_nobody_where_all_are_alike() -> None:
    found = [Finding(f"rank {rank}", f"node{rank // 2}", 1.0 + rank / 100, 1.0, "") for rank in range(4)]
    assert judge(found, 1.3, refuse=True) == ""
    found[3] = Finding("rank 3", "node1", 2.0, 1.0, "")
    assert "rank 3 takes 1.98 times" in judge(found, 1.3, refuse=False)
    found[0] = Finding("rank 0", "node0", 1.0, 1.0, "a product")
    with pytest.raises(SickRankError, match=r"\(rank 0: a product\)") as raised:
        judge(found, 1.3, refuse=False)
    assert raised.value.nodes == ("node0",)


class Clock:
    """Stands for ``time``: goes on only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now


def network_seen(world: World) -> tuple[list[float], list[str]]:
    """What the examination has measured and logged where the first sum takes 100 s, each later one 2, 3, 4, 5 s."""
    clock, seconds, add_up, told = Clock(), iter((100.0, 2.0, 3.0, 4.0, 5.0)), World.add_up, list[str]()
    found: list[Finding] = []

    def slow(self: World, values: torch.Tensor) -> None:
        add_up(self, values)
        clock.now += next(seconds)

    patch = pytest.MonkeyPatch()
    patch.setattr(examination, "time", clock)
    patch.setattr(World, "add_up", slow)
    patch.setattr(examination, "judge", lambda all_found, *_: found.extend(all_found) or "")
    patch.setattr(examination.logger, "info", lambda text, *words: told.append(text % words))
    try:
        examine(world, Config())
    finally:
        patch.undo()
    return [one.sum_seconds for one in found], told


def test_sums_over_the_ranks_are_timed_when_they_are_warm_and_the_rate_is_logged(two_processes: ProcessGroup) -> None:
    """Also by the products' clock, which stands still here."""
    first, second = two_processes.run(network_seen)
    assert first[0] == second[0] == [2.0, 2.0]
    (line,) = first[1]
    assert line.startswith("before the start, 2 ranks add up 0.0156 MiB in 2000.0 ms: each sends ") and second[1] == []


def test_the_rate_of_the_network_is_that_of_the_slowest_sum() -> None:
    found = [Finding(f"rank {rank}", "node0", 1.0, 0.5 + rank / 6, "") for rank in range(4)]
    assert "4 ranks add up 64 MiB in 1000.0 ms: each sends 0.101 GB/s" in network_in_words(found, 64 << 20)


def test_failures_are_told_apart_for_the_batch_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    blame = distributed._blame
    assert blame(RankLostError("gone", ["node3"]), "refused") == ("lost", ("node3",))
    assert blame(SickRankError("slow", ["node3"]), "refused") == ("sick", ("node3",))
    assert blame(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "fault") == ("device", ("node7",))
    assert blame(torch.distributed.DistBackendError("NCCL error: remote process exited"), "fault") == ("lost", ())
    assert blame(ValueError("a bug"), "fault") == ("fault", ()) and blame(None, "refused") == ("refused", ())
