"""The DeepSpeed adapter: gradients, stale gradients, averages, full weights, on two processes and on one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from ladir.config import BackboneSettings, DeepSpeedSettings, TrainSettings
from tests.distributed import ProcessGroup
from tests.ds_schema import FILE, schema
from tests.toy_phase import ToyModel, ToyPhase
from training.runtime.distributed import World
from training.runtime.ds_checks import OURS, UNSUPPORTED, known_keys
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config, complete_ds_config, read_ds_config
from training.runtime.engine import Engine

STAGES = [0, 2, 3]


def make_engine(world: World, stage: int | str, dtype: str = "float32", **train: Any) -> Engine:
    """``stage``: of ZeRO, the rest of a name in ds_configs/, or a file of its own."""
    settings = dataclasses.replace(TrainSettings(), weight_decay=0.0, max_grad_norm=0.0, **train)
    file = str(stage) if str(stage).endswith(".json") else f"ds_configs/zero{stage}.json"
    return Engine(ToyModel(optional_head=True), settings, dtype, DeepSpeedSettings(config=file), world)


def weights(engine: Engine, ema: bool = False) -> dict[str, Tensor]:
    """Full weights on every rank."""
    state = {name: value.float() for name, value in engine.full_state(ema)}
    return engine.world.broadcast(state)


def one_step(engine: Engine, micro_batches: list[list[int]], lr: float = 0.01) -> float:
    """A step on these micro batches (the same on every rank); returns the gradient norm."""
    phase = ToyPhase()
    for number, indices in enumerate(micro_batches):
        outputs = engine.forward(phase.collate(indices, indices, training=False))
        loss = torch.stack([value for name, value in outputs.items() if not name.startswith("metric")]).sum()
        engine.backward(loss / engine.world.size, last=number + 1 == len(micro_batches))
    norm = float(engine.world.sum(engine.gradient_square().reshape(1)).sqrt())
    engine.step(lr)
    return norm


def reference_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[list[int]]) -> float:
    """The same step in plain PyTorch; an unused parameter has gradient zero."""
    phase = ToyPhase()
    for indices in micro_batches:
        outputs = model(phase.collate(indices, indices, training=False))
        torch.stack([value for name, value in outputs.items() if not name.startswith("metric")]).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    norm = float(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    optimizer.step()
    optimizer.zero_grad()
    return norm


STEPS = [[[1, 2], [3, 4]], [[2, 4], [6, 8]], [[2, 6], [3, 5]]]
"""Step 1 uses the odd head, step 2 does not, step 3 only in its second micro batch."""


def unused_branch(world: World, stage: int | str) -> dict[str, Any]:
    engine, model = make_engine(world, stage, beta1=0.0), ToyModel(optional_head=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.0, 0.999), weight_decay=0.0, lr=0.01
    )
    moved, gaps, norms = [], [], []
    for micro_batches in STEPS:
        before = weights(engine)
        norms.append((one_step(engine, micro_batches), reference_step(model, optimizer, micro_batches)))
        after = weights(engine)
        moved.append(float((after["odd_head.weight"] - before["odd_head.weight"]).abs().max()))
        gaps.append(max(float((after[name] - value.detach()).abs().max()) for name, value in model.state_dict().items()))
    saving = engine._engine._config.zero_config.memory_efficient_linear
    return {"moved": moved, "gaps": gaps, "norms": norms, "saving": saving}


def assert_like_the_reference(result: dict[str, Any]) -> None:
    """What :func:`unused_branch` found: the odd head moves only in steps that use it, all else as in plain PyTorch."""
    assert result["moved"][0] > 1e-3 and result["moved"][2] > 1e-3
    assert result["moved"][1] == 0.0
    assert max(result["gaps"]) < 1e-5
    for ours, reference in result["norms"]:
        assert ours == pytest.approx(reference, rel=1e-5)


def unused_branch_undefended(world: World) -> list[float]:
    engine = make_engine(world, 3, beta1=0.0)
    engine.partitions.clear_gradients = lambda: None  # type: ignore[method-assign]
    moved = []
    for micro_batches in STEPS[:2]:
        before = weights(engine)
        one_step(engine, micro_batches)
        moved.append(float((weights(engine)["odd_head.weight"] - before["odd_head.weight"]).abs().max()))
    return moved


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_gradient_keeps_its_value(two_processes: ProcessGroup, stage: int) -> None:
    for result in two_processes.run(unused_branch, stage):
        assert_like_the_reference(result)


@pytest.mark.parametrize("threshold", [0, 239, 240])
def test_weights_that_zero_3_releases_between_uses_are_not_kept_for_the_backward_pass(
    two_processes: ProcessGroup, tmp_path: Path, threshold: int
) -> None:
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    largest = max(parameter.numel() for parameter in ToyModel().parameters())
    for result in two_processes.run(unused_branch, str(file)):
        assert_like_the_reference(result)
        assert result["saving"] == (threshold < largest)


def test_without_the_defence_stale_gradients_are_applied(two_processes: ProcessGroup) -> None:
    assert two_processes.run(unused_branch_undefended)[0][1] > 1e-3


def averages(world: World, stage: int | str, dtype: str) -> dict[str, float]:
    engine = make_engine(world, stage, dtype, ema=0.9)
    expected = weights(engine)
    masters_before = None
    for number in range(4):
        one_step(engine, [[1, 2], [3, 4]])
        decay = min(0.9, (2 + number) / (11 + number))
        now = weights(engine)
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
        masters_before = [master.detach().clone() for master in engine.partitions.masters]
    averaged, plain = weights(engine, ema=True), weights(engine)
    with engine.averaged_weights():
        phase = ToyPhase()
        inside = float(engine.evaluate(phase.collate([1, 2], [0, 1], training=False))["all"])
    model = ToyModel()
    model.load_state_dict(averaged)
    outside = float(model(phase.collate([1, 2], [0, 1], training=False))["all"].detach())
    restored = all(torch.equal(a, b) for a, b in zip(masters_before or [], engine.partitions.masters, strict=True))
    return {
        "gap": max(float((averaged[name] - expected[name]).abs().max()) for name in expected),
        "distance": max(float((averaged[name] - plain[name]).abs().max()) for name in expected),
        "loss_gap": abs(inside - outside),
        "restored": restored,
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_averaged_weights_equal_a_reference(two_processes: ProcessGroup, stage: int, dtype: str, tolerance: float) -> None:
    for result in two_processes.run(averages, stage, dtype):
        assert result["gap"] < tolerance
        assert result["distance"] > 5e-3
        assert result["loss_gap"] < max(tolerance, 1e-5)
        assert result["restored"]


def full_states(world: World, stage: int) -> dict[str, Any]:
    engine, reference = make_engine(world, stage), ToyModel().state_dict()
    yielded = dict(engine.full_state(ema=False))
    names = world.gather(sorted(yielded))
    equal = all(torch.equal(value, reference[name]) for name, value in yielded.items())
    first = engine.frozen_fingerprint()
    changed = ToyModel()
    with torch.no_grad():
        changed.frozen.weight[3, 5] += 1e-3
    settings = DeepSpeedSettings(config=f"ds_configs/zero{stage}.json")
    other = Engine(changed, TrainSettings(), "float32", settings, world).frozen_fingerprint()
    trained = make_engine(world, stage)
    one_step(trained, [[1, 2]])
    return {"names": names, "equal": equal, "fingerprints": (first, other, trained.frozen_fingerprint())}


def test_full_state_and_fingerprint(two_processes: ProcessGroup, one_process: ProcessGroup) -> None:
    seen = set()
    for stage in STAGES:
        results = [*two_processes.run(full_states, stage), *one_process.run(full_states, stage)]
        for result in results:
            assert result["names"][0] == sorted(ToyModel().state_dict())
            assert all(names == [] for names in result["names"][1:])
            assert result["equal"]
            first, other, trained = result["fingerprints"]
            assert first == trained != other
            seen.add(first)
    assert len(seen) == 1


def test_a_ds_config_that_sets_what_we_decide_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    settings = {"train_batch_size": 8, "optimizer": {}, "zero_optimization": {"stage": 1}}
    file.write_text(json.dumps(settings))
    with pytest.raises(DeepSpeedConfigError) as caught:
        read_ds_config(str(file))
    assert "train_batch_size" in str(caught.value) and "global_batch" in str(caught.value)
    assert "optimizer" in str(caught.value) and "stage' is 1" in str(caught.value)
    file.write_text("{")
    with pytest.raises(DeepSpeedConfigError, match=r"ds\.json:1: not JSON"):
        read_ds_config(str(file))
    with pytest.raises(DeepSpeedConfigError, match=r"zero3\.json"):
        read_ds_config("nowhere.json")


ZERO = "zero_optimization"
FAULTS: dict[str, tuple[str, str]] = {
    '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}': (f"{ZERO}.reduce_bucket_size", "Trainer.*500000000"),
    '{"zero_optimization": {"stage": 3, "stage3_max_live_paramters": 1}}': (
        "stage3_max_live_paramters",
        "mean .*live_parameters",
    ),
    '{"zero_optimization": {"stage": 3, "param_persistence_threshold": 1}}': (ZERO, "did you mean .*stage3_param_persist"),
    '{"zero_optimisation": {"stage": 3}}': ("zero_optimisation", "did you mean zero_optimization"),
    '{"stage": 3}': ("'stage'", "did you mean zero_optimization.stage"),
    '{"zero_optimization": {"steps_per_print": 3}}': (f"{ZERO}.steps_per_print", "mean steps_per_print .outside"),
    '{"zero_optimization": {"offload_param": {"devise": "cpu"}, "stage": 3}}': (f"{ZERO}.offload_param.devise", "param.device"),
    '{"zero_optimization": {"overlap_comm": "true"}}': (f"{ZERO}.overlap_comm", "must be true or false"),
    '{"zero_optimization": {"overlap_comm": 1}}': (f"{ZERO}.overlap_comm", "must be true or false"),
    '{"zero_optimization": {"reduce_bucket_size": true}}': (f"{ZERO}.reduce_bucket_size", "a whole number above 0"),
    '{"zero_optimization": {"reduce_bucket_size": 1.5}}': (f"{ZERO}.reduce_bucket_size", "a whole number above 0"),
    '{"zero_optimization": {"reduce_bucket_size": 0}}': (f"{ZERO}.reduce_bucket_size", "a whole number above 0"),
    '{"zero_optimization": {"reduce_bucket_size": NaN}}': (f"{ZERO}.reduce_bucket_size", "a whole number above 0"),
    '{"zero_optimization": {"reduce_bucket_size": null}}': (f"{ZERO}.reduce_bucket_size", "a whole number above 0"),
    '{"zero_optimization": {"stage": "3"}}': (f"{ZERO}.stage", "must be one of 0, 1, 2, 3"),
    '{"zero_optimization": {"stage": 7}}': (f"{ZERO}.stage", "must be one of 0, 1, 2, 3"),
    '{"zero_optimization": true}': (ZERO, "must be an object"),
    '{"zero_optimization": [{"stage": 3}]}': (ZERO, "must be an object"),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}': (f"{ZERO}.offload_optimizer", "must be an object"),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}}': (".device", '"none", "cpu", "nvme"'),
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}': (".device", 'use "cpu"'),
    '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}': (f"{ZERO}.offload_param", "needs stage 3"),
    '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}': (f"{ZERO}.offload_optimizer", "needs stage 2"),
    '{"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}}': (".ratio", "needs stage 3"),
    '{"zero_optimization": {"stage": 3, "cpu_offload": true}}': (f"{ZERO}.cpu_offload", "offload_optimizer"),
    '{"zero_optimization": {"stage": 3, "leaf_module": {}}}': (f"{ZERO}.leaf_module", "deepspeed.leaf_layers"),
    '{"tensor_parallel": {"autotp_size": 2}}': ("tensor_parallel", "split by ZeRO alone"),
    '{"sequence_parallel_size": 2}': ("sequence_parallel_size", "split by ZeRO alone"),
    '{"sparse_attention": {}}': ("sparse_attention", "backbone.attention"),
    '{"compression_training": {}}': ("compression_training", "removed"),
    '{"pipeline": {"stages": 2}}': ("pipeline", "split by ZeRO alone"),
    '{"fp16": {"enabled": "auto"}}': ("fp16", "backbone.dtype"),
    '{"gradient_clipping": "auto"}': ("gradient_clipping", "max_grad_norm"),
    '{"steps_per_print": 0}': ("steps_per_print", "at least 1"),
    '{"communication_data_type": "float8"}': ("communication_data_type", '"fp32", "bf16", "fp16"'),
    '{"data_types": {"grad_dtype": "fp32"}}': ("data_types.grad_dtype", "grad_accum_dtype"),
    '{"steps_per_print": 1, "steps_per_print": 2}': ("steps_per_print", "twice"),
    '{"steps_per_print": 1,}': ("ds.json:1", "not JSON.*no comma before a bracket"),
    "// zero\n{}": ("ds.json:1", "not JSON.*no comments"),
    "[]": ("ds.json", "must hold a JSON object"),
    "null": ("ds.json", "must hold a JSON object"),
    "": ("ds.json:1", "not JSON"),
}


@pytest.mark.parametrize("text", FAULTS)
def test_every_fault_of_a_ds_config_is_one_line_with_file_and_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    key, message = FAULTS[text]
    with pytest.raises(DeepSpeedConfigError, match=message) as caught:
        read_ds_config(str(file))
    assert key in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_all_faults_of_a_ds_config_come_together(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": "auto", "overlap_com": true}, "zero": 1, "optimizer": {}}')
    with pytest.raises(DeepSpeedConfigError) as caught:
        read_ds_config(str(file))
    assert [line.startswith(f"{file}: ") for line in str(caught.value).splitlines()] == [True] * 4
    file.write_bytes('{"steps_per_print": 1}'.encode("utf-16"))
    with pytest.raises(DeepSpeedConfigError, match="not JSON in UTF-8"):
        read_ds_config(str(file))
    with pytest.raises(DeepSpeedConfigError, match=r"is a folder; deepspeed.config and .* may name "):
        read_ds_config(str(tmp_path))


def test_known_keys_are_those_of_the_installed_deepspeed() -> None:
    assert json.loads(FILE.read_text()) == schema(), "write the file anew: python -m tests.ds_schema"
    here = {*known_keys(), *OURS, *UNSUPPORTED}
    assert set(schema()["read"]) - here == set()
    assert {key.partition(".")[0] for key in here} - set(schema()["read"]) == {"autotp_size", "sequence_parallel_size"}


def usable(keys: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Values other than DeepSpeed's own for every key of a section that a file may hold."""
    found: dict[str, Any] = {}
    for name, entry in keys.items():
        full = f"{prefix}.{name}"
        if full in OURS or full in UNSUPPORTED or name in ("stage", "nvme_path"):
            continue
        if "keys" in entry:
            found[name] = usable(entry["keys"], full)
        elif "choices" in entry:
            found[name] = entry["choices"][0]
        else:
            values = {
                "boolean": not entry.get("default"),
                "whole number": 7e3,
                "number": 0.5,
                "list": ["all_reduce"],
                "text": "x",
            }
            found[name] = next(value for kind, value in values.items() if kind in entry["types"])
    return found


def test_what_is_accepted_deepspeed_accepts(tmp_path: Path) -> None:
    config = {name: usable(entry["keys"], name) for name, entry in known_keys().items() if "keys" in entry}
    config[ZERO] |= {"stage": 3}
    single = {name: entry for name, entry in known_keys().items() if "keys" not in entry}
    config |= usable(single, "")
    (tmp_path / "ds.json").write_text(json.dumps(config))
    read = read_ds_config(str(tmp_path / "ds.json"))
    completed = complete_ds_config(read, TrainSettings(), torch.float32, 1)
    accepted = DeepSpeedConfig(completed)
    assert accepted.zero_config.reduce_bucket_size == 7000 and accepted.zero_config.param_persistence_threshold == 7000


def test_compiled_layers_are_refused_under_zero_3_only() -> None:
    for stage in STAGES:
        file = f"ds_configs/zero{stage}.json"
        check_ds_config(BackboneSettings(), file)
        if stage < 3:
            check_ds_config(BackboneSettings(compile=True), file)
    with pytest.raises(DeepSpeedConfigError, match=r"nowhere\.json: no such file"):
        check_ds_config(BackboneSettings(), "nowhere.json")
    with pytest.raises(DeepSpeedConfigError, match=r"backbone\.compile=true .*zero3\.json.*take .*zero2\.json"):
        check_ds_config(BackboneSettings(compile=True), "ds_configs/zero3.json")


def waits(world: World, minutes: float) -> set[float]:
    """How long the process groups of an engine that was just made wait for other ranks, in minutes."""
    settings = DeepSpeedSettings(config="ds_configs/zero3.json", timeout_minutes=minutes)
    Engine(ToyModel(), TrainSettings(), "float32", settings, world)
    return {group._get_backend(world.device).options._timeout.total_seconds() / 60 for group in c10d._world.pg_map}


def test_every_process_group_waits_as_long_as_is_set_before_the_first_step(two_processes: ProcessGroup) -> None:
    """DeepSpeed makes some of its own, which would wait for half an hour."""
    assert two_processes.run(waits, 7.0) == [{7.0}] * 2
    two_processes.run(waits, DeepSpeedSettings().timeout_minutes)
