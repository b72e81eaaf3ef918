"""What cannot start on the nodes and GPUs that are asked for is refused before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ladir.config.loader import load_config
from training.runtime.chain import Step
from training.runtime.distributed import World
from training.runtime.ds_config import DeepSpeedConfigError
from training.runtime.job import job
from training.runtime.sampler import BatchSizeError
from training.runtime.topology import Topology, asked_for, check_topology, deepspeed_file, step_problems


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
        (["--gpus-per-socket=2", "--exclusive"], {}, Topology(1, None)),
        (["--nodes=2", "--time=4:00", "--nodes=8"], {"SBATCH_GRES": "gpu:8"}, Topology(8, 8)),
        (["--nodes=2"], {"PROCESSES_PER_NODE": "3"}, Topology(2, 3)),
        (["--gres=none", "--nodes=1"], {"SBATCH_GPUS_PER_NODE": "2"}, Topology(1, 2)),
    ],
)
def test_options_of_sbatch_are_understood(options: list[str], variables: dict[str, str], expected: Topology) -> None:
    assert asked_for(options, variables) == expected


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


def test_processes_without_a_cpu_are_refused() -> None:
    config = load_config(None)
    (problem,) = step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 4))
    assert problem.startswith("encode_latents: 4 CPUs on a node for 8 processes") and "--cpus-per-task=N" in problem
    assert list(step_problems(config, Step("latents", "encode_latents"), Topology(2, 8, 8))) == []
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
