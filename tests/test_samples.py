"""What TensorBoard shows of a training: samples under ZeRO-3 on two processes, utilisation, metrics, charts."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.checkpoint import checkpoint

from ladir.config import BackboneSettings
from ladir.config.loader import load_config
from ladir.data.randomness import derive
from ladir.inference.decode import decode_thoughts
from ladir.models.metrics import flow_by_time, vae_metrics
from ladir.report import traces
from ladir.report.traces import LatentRecorder, spread
from ladir.tasks import countdown
from ladir.tokens import decode_text
from tests.distributed import ProcessGroup
from tests.test_phases import BUILDERS, TRAIN, configure, make_base
from tests.test_reasoner import tokenizer, undecided
from tests.tiny import random_records, tiny_denoiser, tiny_lm, tiny_vae
from training.phases import samples
from training.phases.latents import encode
from training.phases.rollout import rollout_phase
from training.phases.samples import markdown_table
from training.runtime import dashboard
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import RunFolder, open_run
from training.runtime.utilisation import as_written, counted_flops, measured_peak

SHOWN = 2
BUILD = {**BUILDERS, "rollout": rollout_phase}
ROLLOUT = {**TRAIN, "max_steps": 1, "micro_batch": 4}


def train_and_show(world: World, folder: Path, variant: list[str]) -> None:
    """VAE, latents, both stages of the denoiser and AR baseline under ZeRO-3, with samples in TensorBoard."""
    settings = ["telemetry.tensorboard=true", f"telemetry.samples={SHOWN}", "sample.num_steps=3", "sample.max_blocks=2"]
    settings += ["evaluate.ar_max_tokens=6", "sample.max_answer_tokens=4", "rollout.num_steps=2"]
    settings += [f"rollout.train.{name}={value}" for name, value in ROLLOUT.items()]
    config = configure(folder, "shown", 3, 4, [*settings, *variant])
    for phase in ("vae", "latents", "denoiser", "rollout", "ar"):
        with open_run(config, phase, world) as run:
            if phase == "latents":
                assert encode(run)
            else:
                assert train(run, BUILD[phase](config, world)).finished


@pytest.mark.distributed
@pytest.mark.parametrize(
    "variant", [[], ["backbone.lora.rank=4"], ["data.validation=null"]], ids=["full", "lora", "nothing-held-out"]
)
def test_every_phase_shows_its_samples_on_two_ranks(
    two_processes: ProcessGroup, one_process: ProcessGroup, tmp_path: Path, variant: list[str]
) -> None:
    write_puzzles(tmp_path)
    one_process.run(make_base, tmp_path)
    two_processes.run(train_and_show, tmp_path, variant, timeout=280)
    folder = RunFolder(configure(tmp_path, "shown", 3, 4, []))
    events = {phase: read_events(folder.tensorboard(phase)) for phase in BUILD}
    for phase, titles in (
        ("vae", "sentence"),
        ("denoiser", "thoughts and answer"),
        ("rollout", "thoughts and answer"),
        ("ar", "completion"),
    ):
        (sample,) = events[phase].Tensors("samples/text_summary")
        text = sample.tensor_proto.string_val[0].decode()
        assert titles in text and text.count("\n") == SHOWN + 1
        assert ("(trained on)" in text) == ("data.validation=null" in variant)
        assert_one_layout_and_settings(events[phase], phase)
    assert {"latents/mean", "latents/posterior_standard_deviation"} <= set(events["vae"].Tags()["histograms"])
    for stage in ("denoiser", "rollout"):
        assert {"latents/meant", "latents/generated"} <= set(events[stage].Tags()["histograms"])
        (picture,) = events[stage].Images("denoising/block_1")
        assert picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 500
    for phase, names in (
        ("vae", {"losses/reconstruction", "losses/kl", "quality/exact", "quality/token_accuracy", "latents/active_units"}),
        (
            "denoiser",
            {"losses/flow", "losses/flow_t0.00-0.25", "losses/answer", "quality/stop_accuracy", "quality/answer_accuracy"},
        ),
        ("rollout", {"losses/flow", "losses/rollout", "quality/rollout_token_accuracy", "quality/rollout_distance"}),
        ("ar", {"losses/text", "quality/token_accuracy"}),
    ):
        tags = set(events[phase].Tags()["scalars"])
        general = {"optimizer/lr", "optimizer/grad_norm", "optimizer/skipped_steps", "speed/mfu", "speed/data_wait"}
        assert names | general | {"speed/tokens_per_second_per_device", "speed/memory_gib"} <= tags
        assert ("validation/loss" in tags) == ("data.validation=null" not in variant)
        assert all(0 < event.value < 2 for event in events[phase].Scalars("speed/mfu"))
        assert_charts_find(tags)


def assert_one_layout_and_settings(events: EventAccumulator, phase: str) -> None:
    """The charts' layout, the same for every phase, and the phase's own settings as HPARAMS, with their results."""
    (config,) = events.Tensors("custom_scalars__config__")
    categories = Layout.FromString(config.tensor_proto.string_val[0]).category
    drawn = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in categories}
    asked = {title: {name: patterns for name, (_, patterns) in charts.items()} for title, charts in dashboard.layout().items()}
    assert drawn == asked
    found = {tag: HParamsPluginData.FromString(content) for tag, content in events.PluginTagToContent("hparams").items()}
    metrics = [info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == list(dashboard.RESULT_METRICS)
    settings = found["_hparams_/session_start_info"].session_start_info.hparams
    assert settings[f"{phase}.train.max_steps"].number_value == (ROLLOUT if phase == "rollout" else TRAIN)["max_steps"]
    assert found["_hparams_/session_end_info"].session_end_info.status == Status.STATUS_SUCCESS


class Shown:
    """A TensorBoard that counts."""

    shows_samples = True

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[str] = []

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Not looked at."""

    def text(self, name: str, text: str, step: int) -> None:
        self.texts.append(text)

    def image(self, name: str, pixels: Any, step: int) -> None:
        self.images.append(name)


def test_no_more_is_decoded_than_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps of the first question's first blocks, which are drawn, and all finished blocks; by a decoder fit for a CPU."""
    monkeypatch.setattr(samples, "_DRAWN_BLOCKS", 2)
    monkeypatch.setattr(samples, "_DRAWN_STEPS", 3)
    settings = ["sample.num_steps=5", "sample.max_blocks=3", "sample.max_answer_tokens=3", "sample.max_thought_tokens=4"]
    config = load_config(None, [*settings, "telemetry.samples=3", "backbone.attention=flex", "backbone.dtype=bfloat16"])
    records = [replace(record, question=[5 + i, 9]) for i, record in enumerate(random_records(3))]
    model, decoder, words, shown = undecided(tiny_denoiser(tiny_lm())), tiny_vae().thought_decoder, tokenizer(), Shown()
    recorder = LatentRecorder.without_vae(model, words, config.sample)
    recorded = recorder.record([decode_text(words, record.question) for record in records], 1, config.run.seed)
    first, *others = [only for (only,) in recorder.read(recorded, decoder)]
    rows: list[int] = []

    def counted(decoder: Any, tokenizer: Any, z: torch.Tensor, max_tokens: int) -> list[str]:
        rows.append(len(z))
        return decode_thoughts(decoder, tokenizer, z, max_tokens)

    def loaded(folder: Path, backbone: BackboneSettings, device: torch.device) -> Any:
        assert (device.type, backbone.attention, backbone.dtype) == ("cpu", "auto", "auto")
        return decoder

    monkeypatch.setattr(samples, "load_thought_decoder", loaded)
    monkeypatch.setattr(traces, "decode_thoughts", counted)
    show: Any = samples.denoiser_samples(config, words, records, records, Path("vae"))  # type: ignore[arg-type]
    show(model, shown, 1)
    assert len(first.blocks) == 3
    assert sum(rows) == 2 * 3 + 1 + sum(len(trace.blocks) for trace in others)
    assert shown.images == ["denoising/block_1", "denoising/block_2"]
    (table,) = shown.texts
    lines = [samples._cell("\n".join([*trace.thoughts, trace.answer])) for trace in (first, *others)]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[2:]] == lines


def write_puzzles(folder: Path) -> None:
    sizes = ["countdown.train=24", "countdown.validation=6", "countdown.test=4", "countdown.solutions_per_puzzle=1"]
    config = configure(folder, "puzzles", 3, 4, sizes)
    countdown.write(config.countdown, 0, folder / "data")


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


def assert_charts_find(tags: set[str]) -> None:
    """Every scalar but the plain counters has a chart."""
    patterns = [pattern for charts in dashboard.layout().values() for _, (pattern,) in charts.values()]
    uncharted = {tag for tag in tags if not any(re.search(pattern, tag) for pattern in patterns)}
    assert uncharted <= {"optimizer/epoch", "speed/seconds", "speed/tokens_per_second"}


def test_stage_2_has_charts_of_its_own() -> None:
    names = ("rollout", "rollout_token_accuracy", "rollout_distance", "rollout_other_gold")
    tags = [dashboard.tag("train", name) for name in names]
    assert tags == ["losses/rollout", "quality/rollout_token_accuracy", "quality/rollout_distance", "quality/rollout_other_gold"]
    assert_charts_find({*tags, *(dashboard.tag("validation", name) for name in names)})


def test_hyperparameters_are_what_tensorboard_takes() -> None:
    given = {"a": 1, "b": 0.5, "c": "x", "d": None, "e": [1, 2], "f": True}
    assert dashboard.hyperparameters(given) == {"a": 1, "b": 0.5, "c": "x", "d": "None", "e": "[1, 2]", "f": True}


def test_cells_hold_any_text() -> None:
    lines = markdown_table(("a", "b"), [("x | y\n`z`", "<b>*1* _2_</b>"), ("", "|")]).splitlines()
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert lines[2] == "| `x ¦ y`<br>`'z'` | `<b>*1* _2_</b>` |"
    assert all(line.count("|") == 3 for line in lines)


class Layers(nn.Module):
    """Two layers of which the first may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs).tanh())


@pytest.mark.parametrize("frozen", [(), ("first",), ("second",), ("first", "second")])
def test_flops_are_those_of_the_products_that_run(frozen: tuple[str, ...]) -> None:
    """Against the products counted one by one: forward, then a gradient for each weight and each input that needs one."""
    model, inputs = Layers(), torch.randn(4, 6, 5)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    with counted_flops(model) as count:
        model(inputs)
    first, second = 2 * 24 * 5 * 7, 2 * 24 * 7 * 3
    through = "first" not in frozen  # the second layer's input needs a gradient
    expected = first * (1 + through) + second * (1 + through + ("second" not in frozen))
    assert count.flops == expected
    with torch.no_grad(), counted_flops(model) as count:
        model(inputs)
    assert count.flops == first + second
    model(inputs)
    assert count.flops == first + second  # nothing is counted outside


def test_compiled_layers_are_counted_and_stay_as_they_were() -> None:
    model = Layers()
    expected = model(inputs := torch.randn(4, 5))
    model.compile(backend="eager")
    with counted_flops(model) as count:
        model(inputs)
    counted = count.flops
    assert counted > 0
    torch.testing.assert_close(model(inputs), expected)
    assert count.flops == counted


class Recomputed(Layers):
    """Layers whose activations are made again in the backward pass."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, inputs, use_reentrant=False)


def test_a_counted_pass_of_compiled_layers_may_recompute_and_counts_that_not() -> None:
    model, inputs = Recomputed(), torch.randn(4, 5)
    with counted_flops(model) as count:
        model(inputs)
    expected = count.flops
    for layer in (model.first, model.second):
        layer.compile(backend="aot_eager")
    with as_written(model):
        with counted_flops(model) as count:
            output = model(inputs)
        output.sum().backward()
    assert count.flops == expected > 0
    model(inputs).sum().backward()
    assert all(layer._compiled_call_impl is not None for layer in (model.first, model.second))


def test_a_peak_is_measured() -> None:
    assert math.isfinite(peak := measured_peak(torch.device("cpu"), torch.float32)) and peak > 1e6


def test_vae_metrics_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(derive(0, "metrics") % 2**31)
    mean, logvar = torch.randn(6, 2, 3, generator=generator), torch.randn(6, 2, 3, generator=generator)
    mean[:, 0, 1] = 0.5  # an element that says nothing
    found = vae_metrics(torch.tensor([0.0, 2, 0, 1, 0, 0]), 20, mean, logvar)
    rate = {name.removeprefix("metric/"): float(total / count) for name, (total, count) in found.items()}
    assert rate["exact"] == pytest.approx(4 / 6) and rate["token_accuracy"] == pytest.approx(17 / 20)
    assert rate["active_units"] == 5
    assert rate["posterior_std"] == pytest.approx(float((0.5 * logvar).exp().mean()))
    alone = vae_metrics(torch.zeros(1), 3, mean[:1], logvar[:1])
    assert alone["metric/active_units"].tolist() == [0, 0]  # one sentence has no variance


def test_the_flow_loss_by_time_adds_up() -> None:
    losses, t = torch.rand(50, 3), torch.rand(50, 3)
    t[0] = torch.tensor([0.0, 0.25, 1.0])
    losses[0, 0] = 0.0  # of a finished block, which does not count
    found: dict[str, Any] = flow_by_time(losses, t, elements=6)
    assert [name.removeprefix("metric/flow_t") for name in found] == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    for number, (total, count) in enumerate(found.values()):
        inside = (t >= number / 4) & ((t < (number + 1) / 4) | ((number == 3) & (t == 1)))
        assert float(total) == pytest.approx(float(losses[inside].sum()), rel=1e-5)
        assert float(count) == 6 * int((inside & (t > 0)).sum())


@given(st.integers(1, 200), st.integers(1, 30))
def test_steps_are_spread_evenly_up_to_the_last(count: int, most: int) -> None:
    found = spread(count, most)
    assert len(found) == min(count, most) and found[-1] == count and found[0] >= 1
    gaps = {after - before for before, after in itertools.pairwise([0, *found])}
    assert max(gaps) - min(gaps) <= 1
