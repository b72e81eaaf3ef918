"""The pre-flight: a rank that computes wrongly, slowly, or not at all is named before a training begins."""

from __future__ import annotations

import time

import pytest
import torch

from ladir.config import Config
from tests.distributed import ProcessGroup
from training.runtime import distributed, examination
from training.runtime.distributed import RankLostError, SickRankError, World
from training.runtime.examination import Finding, examine, judge


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
    found = [Finding(f"rank {rank}", f"node{rank // 2}", 1.0 + rank / 100, "") for rank in range(4)]
    assert judge(found, 1.3, refuse=True) == ""
    found[3] = Finding("rank 3", "node1", 2.0, "")
    assert "rank 3 takes 1.98 times" in judge(found, 1.3, refuse=False)
    found[0] = Finding("rank 0", "node0", 1.0, "a product")
    with pytest.raises(SickRankError, match=r"\(rank 0: a product\)") as raised:
        judge(found, 1.3, refuse=False)
    assert raised.value.nodes == ("node0",)


def test_failures_are_told_apart_for_the_batch_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    blame = distributed._blame
    assert blame(RankLostError("gone", ["node3"]), "refused") == ("lost", ("node3",))
    assert blame(SickRankError("slow", ["node3"]), "refused") == ("sick", ("node3",))
    assert blame(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "fault") == ("device", ("node7",))
    assert blame(torch.distributed.DistBackendError("NCCL error: remote process exited"), "fault") == ("lost", ())
    assert blame(ValueError("a bug"), "fault") == ("fault", ()) and blame(None, "refused") == ("refused", ())
