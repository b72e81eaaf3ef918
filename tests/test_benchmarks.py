"""The benchmark and the GPU check in their smallest form: they run, agree with themselves, and leave what they promise."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.distributed import ProcessGroup
from training.benchmarks.large import CASES, fitting_layers, host_bytes
from training.benchmarks.report import Results, show
from training.benchmarks.scaling import Scaling
from training.benchmarks.setup import Bench, Row, UnequalError
from training.benchmarks.sizes import SIZES
from training.benchmarks.utilisation import Replay, Utilisation, recorded
from training.benchmarks.zero import zero3_step
from training.gpu_check import complete
from training.runtime.distributed import World
from training.runtime.engine import Engine

ROOT = Path(__file__).parents[1]
SMOKE = SIZES["smoke"]


def run(*arguments: str, seconds: float = 280) -> str:
    """Output of a program of this project in a process of its own: it joins a job, as the engine does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_row_runs_and_lands_in_the_json_file(tmp_path: Path) -> None:
    output = run("training/benchmark.py", "--size", "smoke", "--device", "cpu", "--json", str(tmp_path / "results.json"))
    found = json.loads((tmp_path / "results.json").read_text())
    for key in ("one_pass_m1", "one_pass_m4", "cached_reasoning", "labelled_logits_memory", "packing", "zero3_step"):
        assert found[key] > 0
        assert found["rows"][key]["title"] in " ".join(output.split())
    assert found["labelled_logits_memory"] > 1
    steps = {"vae_step", "denoiser_step", "rollout_step", "encoding", "denoising_step"}
    assert set(found["mfu"]) == set(found["of_own_shapes"]) == steps
    assert all(0 < share < 1 for share in found["mfu"].values())
    assert set(found["scaling"]) == set(SMOKE.scaling)
    assert all(len(row["seconds"]) == len(row["values"]) for row in found["scaling"].values())
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_narrow_place_takes_no_word_of_the_tables(terminal: bool) -> None:
    results = Results()
    results.rows.append(Row("packing", "packed rows", "rows padded to the longest one", 0.5, 1.0, at_most=3.0))
    results.utilisation.append(Utilisation("denoiser_step", 0.5, 10**12, 0.25, 4e12))
    results.scaling.append(Scaling("trajectories", (1, 2, 4, 8, 16), (0.1, 0.2, 0.4, 0.8, 1.6)))
    text = io.StringIO()
    show(Console(file=text, width=60, force_terminal=terminal, color_system=None), results, Bench(SMOKE, torch.device("cpu")))
    shown = text.getvalue()
    assert "…" not in shown and (max(map(len, shown.splitlines())) <= 60) == terminal
    names = (
        "rows padded to the longest one",
        "computed less",
        "500.0 ms",
        "matmul peak",
        "of its own products' rate",
        "milliseconds",
    )
    assert all(name in shown for name in (*names, "packed rows", "denoiser_step", "trajectories", "100, 200, 400, 800, 1,600"))


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_the_ratios_of_the_published_size_are_measured(tmp_path: Path) -> None:
    """Shown, not asserted: a busy machine is slow, not wrong.  Each row checks that both ways give the same numbers."""
    arguments = ("--size", "tiny", "--device", "cpu", "--json", str(tmp_path / "tiny.json"))
    sys.stdout.write(run("training/benchmark.py", *arguments, seconds=1800))
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert found["one_pass_m4"] > 0 and found["cached_reasoning"] > 0


def test_the_gpu_check_goes_through_all_its_parts_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "of-an-earlier-run.json").write_text("{}")
    output = run("training/gpu_check.py", "--dry", "--out", str(tmp_path))
    assert "tests: done" in output
    assert "of-an-earlier-run" not in output
    for name in ("attention", "mfu", *CASES):
        assert json.loads((tmp_path / f"{name}.json").read_text())
        assert f"{name}: {{" in output


def test_two_ways_that_differ_are_not_timed() -> None:
    bench = Bench(SMOKE, torch.device("cpu"))
    numbers = torch.tensor([1.0, 2.0])
    bench.check_equal("a", numbers, numbers * (1 + 1e-6))
    with pytest.raises(UnequalError, match=r"^a: ours and the obvious way differ by 0\.5 of the largest number"):
        bench.check_equal("a", torch.tensor([1.0, 3.0]), numbers)
    with pytest.raises(UnequalError):
        bench.check_equal("a", torch.tensor([1.0, torch.nan]), numbers)


def test_the_products_of_a_step_are_recorded_with_the_gradients_they_need() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model[1].weight.requires_grad_(False)
    with recorded(model) as products:
        model(torch.zeros(2, 4, 3))
        with torch.no_grad():
            model(torch.zeros(6, 3))
    found = [(p.rows, *p.weight.shape, p.input_gradient, p.weight_gradient) for p in products]
    assert found == [(8, 5, 3, False, True), (8, 7, 5, True, False), (6, 5, 3, False, False), (6, 7, 5, False, False)]
    Replay(products)()


def test_exponents_are_those_of_power_laws() -> None:
    values = (1, 2, 4, 8)
    for exponent in (0.5, 1.0, 2.0):
        assert Scaling("n", values, tuple(3 * v**exponent for v in values)).exponent == pytest.approx(exponent)


def test_as_many_layers_are_offloaded_as_the_host_holds() -> None:
    case = CASES["denoiser-full-offload"]
    config = case.config(replace(SMOKE, scratch={**SMOKE.scratch, "num_hidden_layers": 8}), "cpu")
    whole = host_bytes(config, case.phase, 8)
    assert fitting_layers(config, case.phase, whole) == 8
    assert fitting_layers(config, case.phase, host_bytes(config, case.phase, 5)) == 5
    assert fitting_layers(config, case.phase, 0) == 1


def test_what_a_machine_lacks_comes_from_wheels_or_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.gpu_check.NEEDED", ["torch", "ladir_lacks_this"])
    assert complete(tmp_path, tmp_path / "site") == ["ladir_lacks_this"]
    assert not (tmp_path / "site").exists()
    monkeypatch.setattr("sys.path", [*sys.path])
    for name, version in (("ladir_lacks_this", "1.0"), ("pytest", "0.1")):  # the second is here already, and newer
        write_wheel(tmp_path, name, version)
    assert complete(tmp_path, tmp_path / "site") == []
    assert importlib.util.find_spec("ladir_lacks_this") is not None
    assert not (tmp_path / "site" / "pytest.py").exists()


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one empty module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def step_nothing(world: World) -> str:
    """What the ZeRO row says where the engine never changes a weight."""
    step, Engine.step = Engine.step, lambda self, lr: None  # type: ignore[method-assign,assignment]
    try:
        zero3_step(Bench(SMOKE, torch.device("cpu")), "zero3_step", world)
    except UnequalError as error:
        return str(error)
    finally:
        Engine.step = step  # type: ignore[method-assign]
    return ""


def step_in_bfloat16(world: World) -> float:
    """Seconds of the ZeRO row's step where weights are in bfloat16, as on CPUs that multiply it in hardware."""
    bench = Bench(SMOKE, torch.device("cpu"))
    bench.config.backbone.dtype = "bfloat16"
    bench.config.denoiser.train.lr = 5e-3  # a step that the weights' own rounding would swallow or double
    return zero3_step(bench, "zero3_step", world).ours


@pytest.mark.distributed
def test_the_plain_way_keeps_float32_weights_as_the_engine_does(one_process: ProcessGroup) -> None:
    assert one_process.run(step_in_bfloat16)[0] > 0


@pytest.mark.distributed
def test_an_engine_that_trains_nothing_is_not_timed(one_process: ProcessGroup) -> None:
    assert "was moved by 0 and by" in one_process.run(step_nothing)[0]
