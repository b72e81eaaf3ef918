"""What cannot start on the nodes and GPUs that are asked for is refused before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ladir.config.loader import load_config
from ladir.errors import UnusableError
from tests.distributed import ProcessGroup
from training.runtime.chain import Step
from training.runtime.distributed import World
from training.runtime.ds_config import DeepSpeedConfigError
from training.runtime.job import job
from training.runtime.sampler import BatchSizeError
from training.runtime.topology import Topology, asked_for, check_topology, deepspeed_file, step_problems, unchecked


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        (["--nodes=4", "--gres=gpu:8"], {}, Topology(4, 8)),
        (["--nodes=2", "--gres=gpu:a100:8(S:0-1)", "--cpus-per-task=64"], {}, Topology(2, 8, 64)),
        (["--gres=nvme:1,gpu"], {}, Topology(1, 1)),
        (["--nodes=3", "--gpus-per-node=h100:4"], {}, Topology(3, 4)),
        (["--nodes=3", "--gpus=12", "--cpus-per-gpu=6"], {}, Topology(3, 4, 24)),
        (["--nodes=3", "--gpus=11"], {}, Topology(3, None)),
        (["--nodes=2-4", "--gpus-per-task=2"], {}, Topology(None, 2)),
        (["--nodes=4-4", "--gres=gpu:8"], {}, Topology(4, 8)),
        (["--nodes=1,2", "--gres=gpu"], {}, Topology(None, 1)),
        (["--gpus-per-socket=2", "--exclusive"], {}, Topology(1, None)),
        (["--nodes=4", "--gpus-per-socket=a100:4", "--sockets-per-node=2"], {}, Topology(4, 8)),
        (["--nodes=2", "--time=4:00", "--nodes=8"], {"SBATCH_GRES": "gpu:8"}, Topology(8, 8)),
        (["--nodes=2", "--cpus-per-task=1"], {"PROCESSES_PER_NODE": "3"}, Topology(2, 3, 1, has_gpus=False)),
        (["--gres=gpu:4"], {"PROCESSES_PER_NODE": "3"}, Topology(1, 3)),
        (["--gpus-per-socket=4"], {"PROCESSES_PER_NODE": "8"}, Topology(1, 8)),
        (["--gres=none", "--nodes=1"], {"SBATCH_GPUS_PER_NODE": "2"}, Topology(1, 2)),
        (["--nodes=2", "--gres=gpu:8"], {"GPU_MEMORY": "79.6"}, Topology(2, 8, gpu_gib=79.6)),
        (["--nodes=2", "--gres=gpu:8"], {"GPU_MEMORY": " "}, Topology(2, 8)),
    ],
)
def test_options_of_sbatch_are_understood(options: list[str], variables: dict[str, str], expected: Topology) -> None:
    assert asked_for(options, variables) == expected


@pytest.mark.parametrize("told", ["80GB", "0", "-1", "nan", "inf"])
def test_a_gpus_memory_that_is_no_number_of_gib_is_refused(told: str) -> None:
    with pytest.raises(UnusableError, match=f"^GPU_MEMORY={told} is no number of GiB: .*GPU_MEMORY=80"):
        asked_for(["--gres=gpu:8"], {"GPU_MEMORY": told})


@pytest.mark.parametrize(
    ("gpus", "per_node", "nodes", "processes"),
    [(1, 8, 1, 1), (8, 8, 1, 8), (32, 8, 4, 8), (12, 8, 2, 6), (9, 8, 3, 3), (11, 8, 11, 1)],
)
def test_gpus_are_on_the_fewest_nodes_that_have_as_many_each(gpus: int, per_node: int, nodes: int, processes: int) -> None:
    assert Topology.of(gpus, per_node, 80.0) == Topology(nodes, processes, gpu_gib=80.0)


def test_every_phase_of_the_8b_files_is_checked_for_the_ranks_that_it_gets() -> None:
    config = load_config("configs/math_8b.yaml")
    step = Step("rollout", "train_denoiser", ("stage=rollout",))
    (problem,) = step_problems(config, step, Topology(4, 8))
    assert problem.startswith(
        "train_denoiser stage=rollout: rollout.train.global_batch=16 cannot be shared equally by 32 ranks: use 32"
    )
    assert problem.endswith("(4 nodes x 8)")
    assert list(step_problems(config, step, Topology(2, 8))) == []
    for unknown in (Topology(None, 8), Topology(4, None)):
        assert list(step_problems(config, step, unknown)) == []
    for other in ("vae", "denoiser", "ar"):
        assert list(step_problems(config, Step(other, f"train_{other}"), Topology(4, 8))) == []


def test_a_group_that_spans_two_nodes_is_refused() -> None:
    """Though all processes together are a whole number of groups; and though nobody knows how many nodes there are."""
    config = load_config(None, ["deepspeed.config=ds_configs/zero3_hpz.json", "vae.train.global_batch=32"])
    step = Step("vae", "train_vae")
    for topology in (Topology(8, 4), Topology(None, 4)):
        (problem,) = step_problems(config, step, topology)
        assert "zero_hpz_partition_size is 8, and a node's 4 processes are no whole number of such groups" in problem
    with pytest.raises(DeepSpeedConfigError, match="a node's 4 processes"):
        check_topology(config, "vae", 32, [4])
    with pytest.raises(DeepSpeedConfigError, match="a node's 4 processes"):
        check_topology(config, "vae", 32, [8] * 24 + [4] * 8)
    check_topology(config, "vae", 32)
    check_topology(config, "vae", 32, [None] * 32)
    for nodes, processes in ((4, 8), (2, 16)):
        assert list(step_problems(config, step, Topology(nodes, processes))) == []
        check_topology(config, "vae", 32, [processes] * 32)
    both = list(step_problems(config, step, Topology(5, 4)))
    assert ["global_batch=32" in both[0], "zero_hpz" in both[1]] == [True, True]


def start_on_uneven_nodes(world: World, folder: str, on_nodes: list[int]) -> str:
    """What a phase says of its start on nodes that have so many of its ranks."""
    own = [f"run.folder={folder}", "vae.train.deepspeed=tests/data/zero3_hpz.json"]
    said = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(on_nodes[world.rank]))
        patch.setattr("training.runtime.job.start", lambda settings: world)
        patch.setattr("training.runtime.job.logger.error", lambda text, *values: said.append(text % values))
        with pytest.raises(SystemExit), job(own, "", lambda config: "vae", trains=True):
            raise AssertionError("it began")
    return "".join(said)


@pytest.mark.distributed
def test_nodes_that_differ_are_refused_by_all_ranks_alike(two_processes: ProcessGroup, tmp_path: Path) -> None:
    """Ranks of the node whose processes are a group do not wait for the others."""
    first, second = two_processes.run(start_on_uneven_nodes, str(tmp_path), [2, 1])
    assert first == second and "zero_hpz_partition_size is 2, and a node's 1 processes are no whole number" in first


@pytest.mark.parametrize(
    ("topology", "entry", "expected"),
    [
        (Topology(None, 8), "train_vae", True),
        (Topology(4, None), "train_vae", True),
        (Topology(4, 8), "train_vae", False),
        (Topology(None, None), "evaluate", False),
    ],
)
def test_trainings_of_which_nobody_knows_the_processes_are_told_of(topology: Topology, entry: str, expected: bool) -> None:
    assert unchecked(Step("vae", entry), topology) is expected


def test_processes_with_too_few_cpus_beside_a_gpu_are_refused() -> None:
    config = load_config(None)
    (problem,) = step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 4))
    assert problem.startswith("encode_latents: 4 CPUs on a node for 8 processes") and "--cpus-per-task=N" in problem
    assert problem.endswith("16 at least")
    assert len(list(step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 15)))) == 1
    assert list(step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 16))) == []
    assert list(step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 1, has_gpus=False))) == []
    assert list(step_problems(config, Step("export", "export"), Topology(2, 8, 4))) == []


def test_the_phases_ask_the_same(tmp_path: Path) -> None:
    config = load_config(None, ["deepspeed.config=ds_configs/zero3_hpz.json", "ar.phase=base", "ar.train.global_batch=96"])
    with pytest.raises(BatchSizeError, match=r"^ar\.train\.global_batch=96 .* 7 ranks"):
        check_topology(config, "base", 7)
    with pytest.raises(DeepSpeedConfigError, match=r"zero_hpz_partition_size is 8, and 12 processes are no whole number"):
        check_topology(config, "base", 12)
    check_topology(config, "base", 16)
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}))
    check_topology(load_config(None, [f"deepspeed.config={file}"]), "vae", 4)  # there it does nothing


def test_a_phase_may_have_a_deepspeed_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that is checked, before a job is queued and by the phase, and that the phase's engine takes."""
    own = ["deepspeed.config=ds_configs/zero2.json", "vae.train.deepspeed=ds_configs/zero3_hpz.json"]
    config = load_config(None, own)
    with pytest.raises(DeepSpeedConfigError, match=r"^ds_configs/zero3_hpz\.json: .*12 processes are no whole number"):
        check_topology(load_config(None, [*own, "vae.train.global_batch=96"]), "vae", 12)
    assert deepspeed_file(config, "vae") == "ds_configs/zero3_hpz.json"
    assert deepspeed_file(config, "denoiser") == "ds_configs/zero2.json"
    config.backbone.compile = True
    (problem,) = step_problems(config, Step("vae", "train_vae"), Topology(None, None))
    assert problem.startswith("train_vae: backbone.compile=true does not go with ZeRO stage 3 (ds_configs/zero3_hpz.json)")
    assert list(step_problems(config, Step("denoiser", "train_denoiser"), Topology(None, None))) == []
    monkeypatch.setattr("training.runtime.job.start", lambda settings: World(0, 1, 0, torch.device("cpu")))
    arguments = [f"run.folder={tmp_path}", "vae.train.deepspeed=ds_configs/zero0.json"]
    for phase, file in (("vae", "ds_configs/zero0.json"), ("denoiser", "ds_configs/zero3.json")):
        with job(arguments, "", lambda config, phase=phase: phase, trains=True) as run:  # type: ignore[misc]
            assert run.config.deepspeed.config == file


@pytest.mark.parametrize("name", ["math", "code", "countdown"])
def test_the_8b_files_take_the_lightest_deepspeed_file_that_the_plan_allows(name: str) -> None:
    """For 8 GPUs of 80 GB, with some GiB to spare; the figures stand in the files."""
    config = load_config(f"configs/{name}_8b.yaml")
    files = {phase: deepspeed_file(config, phase) for phase in ("vae", "denoiser", "rollout", "rl", "ar")}
    two, three = "ds_configs/zero2.json", "ds_configs/zero3.json"
    last = two if name == "countdown" else three
    assert files == {"vae": two, "denoiser": two, "rollout": two, "rl": last, "ar": last}
