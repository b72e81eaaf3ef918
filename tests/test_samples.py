"""What TensorBoard shows of a training: samples under ZeRO-3 on two processes, utilisation, metrics, charts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.checkpoint import checkpoint

from ladir.config import BackboneSettings, Config, SampleSettings
from ladir.config.loader import load_config, save_config
from ladir.data.prompts import Frame
from ladir.data.randomness import derive
from ladir.data.records import Record
from ladir.evaluation.metrics import summarise
from ladir.evaluation.results import MethodResult, QuestionResult, Trajectory, write_results
from ladir.inference import decode as decoding
from ladir.inference.decode import decode_thoughts
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone
from ladir.models.metrics import flow_by_time, vae_metrics
from ladir.report import figures, traces
from ladir.report.figures import denoising_figure
from ladir.report.traces import LatentRecorder, spread
from ladir.tasks import countdown
from ladir.tokens import decode_text
from tests.distributed import ProcessGroup
from tests.test_phases import BUILDERS, TRAIN, configure, make_base
from tests.test_reasoner import tokenizer, undecided
from tests.tiny import random_records, tiny_denoiser, tiny_lm, tiny_vae
from training.evaluation.board import draw_results
from training.evaluation.table import result_files
from training.phases import samples
from training.phases.latents import encode
from training.phases.rollout import rollout_phase
from training.phases.samples import markdown_table
from training.runtime import dashboard
from training.runtime.alone import GiveWay
from training.runtime.distributed import World
from training.runtime.files import write_json
from training.runtime.loop import train
from training.runtime.preemption import BrokenOff
from training.runtime.run import Outcome, Run, RunFolder, open_run
from training.runtime.utilisation import as_written, counted_flops, measured_peak

SHOWN = 2
ACTIVE = "3 latents/active_units"
BUILD = {**BUILDERS, "rollout": rollout_phase}
ROLLOUT = {**TRAIN, "max_steps": 1, "micro_batch": 4}


def train_and_show(world: World, folder: Path, variant: list[str]) -> None:
    """VAE, latents, both stages of the denoiser and AR baseline under ZeRO-3, with samples in TensorBoard."""
    settings = ["telemetry.loggers=[tensorboard]", f"telemetry.samples={SHOWN}", "sample.num_steps=3", "sample.max_blocks=2"]
    settings += ["evaluate.ar_max_tokens=6", "sample.max_answer_tokens=4", "rollout.num_steps=2"]
    settings += [f"rollout.train.{name}={value}" for name, value in ROLLOUT.items()]
    config = configure(folder, "shown", 3, 4, [*settings, *variant])
    for phase in ("vae", "latents", "denoiser", "rollout", "ar"):
        with open_run(config, phase, world) as run, pytest.MonkeyPatch.context() as patched:
            patched.setattr(samples, "_GATHERED_TOKENS", 3)
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
    held_out = {phase: read_events(folder.tensorboard(phase) / "validation") for phase in BUILD}
    for phase, titles in (
        ("vae", "sentence"),
        ("denoiser", "thoughts and answer"),
        ("rollout", "thoughts and answer"),
        ("ar", "completion"),
    ):
        (sample,) = held_out[phase].Tensors("samples/text_summary")
        text = sample.tensor_proto.string_val[0].decode()
        assert titles in text and text.count("\n") == SHOWN + 1
        assert "(shortened under ZeRO-3: at most 3 tokens" in text
        assert ("(trained on)" in text) == ("data.validation=null" in variant)
        assert_a_section_of_its_own(events[phase], held_out[phase], phase, "data.validation=null" not in variant)
    assert {"3 latents/vae/mean", "3 latents/vae/posterior_standard_deviation"} <= set(held_out["vae"].Tags()["histograms"])
    for stage in ("denoiser", "rollout"):
        assert {f"3 latents/{stage}/meant", f"3 latents/{stage}/generated"} <= set(held_out[stage].Tags()["histograms"])
        (picture,) = held_out[stage].Images("denoising/block_1")
        assert picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 500
    for phase, names in (
        ("vae", {"1 losses/reconstruction", "1 losses/kl", "2 quality/exact", "2 quality/token_accuracy", ACTIVE}),
        ("denoiser", {"1 losses/flow", "1 losses/flow_t0.00-0.25", "2 quality/stop_accuracy", "2 quality/answer_accuracy"}),
        ("rollout", {"1 losses/flow", "1 losses/rollout", "2 quality/rollout_token_accuracy", "2 quality/rollout_distance"}),
        ("ar", {"1 losses/text", "2 quality/token_accuracy"}),
    ):
        tags = set(events[phase].Tags()["scalars"])
        general = {"4 optimizer/lr", "4 optimizer/grad_norm", "4 optimizer/skipped_steps", "5 speed/mfu", "5 speed/data_wait"}
        expected = names | general | {"5 speed/tokens_per_second_per_device", "5 speed/memory_gib"}
        assert {f"/{phase}/".join(name.split("/")) for name in expected} <= tags
        assert (f"1 losses/{phase}/loss" in held_out[phase].Tags()["scalars"]) == ("data.validation=null" not in variant)
        assert all(0 < event.value < 2 for event in events[phase].Scalars(f"5 speed/{phase}/mfu"))
        assert_charts_find(phase, tags)


def assert_a_section_of_its_own(events: EventAccumulator, held_out: EventAccumulator, phase: str, validated: bool) -> None:
    """The charts of this phase alone: another one's losses have no axis in common with these.  Settings belong to evaluations."""
    (config,) = events.Tensors("custom_scalars__config__")
    (section,) = Layout.FromString(config.tensor_proto.string_val[0]).category
    drawn = {chart.title: list(chart.multiline.tag) for chart in section.chart}
    ((title, charts),) = dashboard.layout(phase).items()
    assert (section.title, drawn) == (title, {name: patterns for name, (_, patterns) in charts.items()})
    scalars = {*events.Tags()["scalars"], *held_out.Tags()["scalars"]}
    for name, (pattern,) in drawn.items():
        # Stage 2 looks at gold chains in its validation only.  Its one step here is a phase's first, which is not timed.
        untimed = phase == "rollout" and name.startswith("time of the slowest rank")
        assert not validated or untimed or any(re.search(pattern, tag) for tag in scalars), f"{phase}: {name} stays empty"
    with pytest.raises(KeyError):
        events.PluginTagToContent("hparams")


class Shown:
    """A TensorBoard that counts."""

    #: how often it may be asked before there is a stop
    patience = 99
    ranks = 1
    #: whether rank 0 works alone
    counting = False

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[str] = []

    def give_way(self) -> None:
        if self.counting:
            self.patience -= 1
        if self.patience < 0:
            raise BrokenOff

    @contextmanager
    def passes(self, gathered: bool) -> Iterator[GiveWay]:
        self.gathered = gathered
        yield self.give_way

    def alone(self, work: Callable[[GiveWay], None]) -> None:
        self.counting = True
        with suppress(BrokenOff):
            work(self.give_way)
        self.counting = False

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Not looked at."""

    def text(self, name: str, text: str, step: int) -> None:
        self.texts.append(text)

    def image(self, name: str, pixels: Any, step: int) -> None:
        self.images.append(name)


def test_no_more_is_decoded_than_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks at their first and their last step, and from noise on some steps of one question's first blocks, whose text
    changes, which are drawn; by a decoder fit for a CPU."""
    monkeypatch.setattr(samples, "_DRAWN_BLOCKS", 2)
    monkeypatch.setattr(samples, "_DRAWN_STEPS", 3)
    settings = ["sample.num_steps=5", "sample.max_blocks=3", "sample.max_answer_tokens=3", "sample.max_thought_tokens=4"]
    config = load_config(None, [*settings, "telemetry.samples=3", "backbone.attention=flex", "backbone.dtype=bfloat16"])
    records = [replace(record, question=[5 + i, 9]) for i, record in enumerate(random_records(3))]
    model, decoder, words, shown = undecided(tiny_denoiser(tiny_lm())), tiny_vae().thought_decoder, tokenizer(), Shown()
    recorder = LatentRecorder.without_vae(model, words, config.sample, Frame(), [])
    questions = [decode_text(words, record.question) for record in records]
    recorded = recorder.record(questions, 1, config.run.seed)
    all_steps = [only for (only,) in recorder.read(recorded, decoder)]
    rows: list[int] = []

    def counted(decoder: Any, tokenizer: Any, z: torch.Tensor, max_tokens: int, between: GiveWay | None) -> list[str]:
        rows.append(len(z))
        return decode_thoughts(decoder, tokenizer, z, max_tokens)  # a stop inside has a test of its own

    def loaded(folder: Path, backbone: BackboneSettings, device: torch.device) -> Any:
        assert (device.type, backbone.attention, backbone.dtype) == ("cpu", "auto", "auto")
        return decoder

    monkeypatch.setattr(samples, "load_thought_decoder", loaded)
    monkeypatch.setattr(traces, "decode_thoughts", counted)
    show: Any = samples.denoiser_samples(config, words, records, records, Path("vae"), Frame())  # type: ignore[arg-type]
    pictures: list[tuple[str, list[str]]] = []

    def drawn(latents: np.ndarray, texts: list[str], names: list[str], title: str) -> Figure:
        assert len(latents) == len(texts) == len(names)
        pictures.append((title, names))
        return denoising_figure(latents, texts, names, title)

    monkeypatch.setattr(figures, "denoising_figure", drawn)
    show(model, shown, 1)
    first_and_last, drawn_steps = 2 * sum(len(trace.blocks) for trace in all_steps), 2 * (1 + 3)
    assert sum(rows) == first_and_last + drawn_steps
    assert shown.images == ["denoising/block_1", "denoising/block_2"]
    changes = [sum(block.texts[0] != block.texts[-1] for block in trace.blocks[:2]) for trace in all_steps]
    chosen = [number for number, count in enumerate(changes) if count == max(changes)]
    assert max(changes) > 0 and pictures[0][0] in {f"block 1 of {questions[number]}" for number in chosen}
    assert [names for _, names in pictures] == [["noise", "2", "4", "5"]] * 2  # evenly, up to the last
    (table,) = shown.texts
    lines = [samples._cell("\n".join([*trace.thoughts, trace.answer])) for trace in all_steps]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[2:]] == lines
    for patience, decoded in ((0, 0), (1, 2 * len(all_steps[0].blocks)), (3, first_and_last)):
        rows.clear()
        shown.texts, shown.images, shown.patience = [], [], patience
        show(model, shown, 1)
        assert (sum(rows), shown.images) == (decoded, []) and len(shown.texts) == (patience == 3)


def counted_passes(backbone: Backbone) -> list[int]:
    """Grows with every pass of a whole LM, for which ZeRO-3 gathers its weights."""
    passes: list[int] = []
    backbone.base.get_decoder().layers[-1].register_forward_hook(lambda *_: passes.append(1))
    return passes


def write_endlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text ends by itself."""
    monkeypatch.setattr(decoding, "choose_tokens", lambda logits, *_: torch.full(logits.shape[:1], 5))


#: more than samples take where every pass gathers the weights
LONG = ["sample.num_steps=4", "sample.max_blocks=6", "sample.max_answer_tokens=9", "sample.restarts=1", "sample.restart_steps=2"]
LONG += ["evaluate.ar_max_tokens=9", "data.max_block_tokens=8", "telemetry.samples=2"]


def shown_in(
    kind: str, settings: list[str], monkeypatch: pytest.MonkeyPatch, ranks: int = 1, split: bool = False, patience: int = 999
) -> tuple[int, str]:
    """Passes in which the samples of a phase of the ``kind`` are made on one of several ranks, and what is told of them."""
    for name, most in (("STEPS", 2), ("BLOCKS", 3), ("TOKENS", 5)):
        monkeypatch.setattr(samples, f"_GATHERED_{name}", most)
    write_endlessly(monkeypatch)
    config, records, shown = load_config(None, settings), random_records(2), Shown()
    show: Any
    model: Any
    if kind == "vae":
        model, backbone = (vae := tiny_vae()), vae.thought_decoder.backbone
        show = samples.vae_samples(config, tokenizer(), [record.blocks[0] for record in records], [])
    elif kind == "ar":
        model = ArModel(backbone := Backbone(tiny_lm()))
        show = samples.ar_samples(
            config, tokenizer(), [Record("a b", ["c"], "d", "x:1"), Record("c", ["a"], "b", "x:2")], [], Frame()
        )
    else:
        model, decoder = (denoiser := tiny_denoiser(tiny_lm())), tiny_vae().thought_decoder
        backbone = denoiser.backbone
        with torch.no_grad():
            denoiser.stop_head.weight.zero_()
            denoiser.stop_head.bias.fill_(-1.0)  # it never ends by itself
        monkeypatch.setattr(samples, "load_thought_decoder", lambda *_: decoder)
        monkeypatch.setattr(samples, "_draw", lambda *_: None)  # pictures make no passes and take long
        show = samples.denoiser_samples(config, tokenizer(), records, records, Path("vae"), Frame())  # type: ignore[arg-type]
    for parameter in model.parameters() if split else []:
        parameter.all_gather = parameter.partition = lambda: None
    shown.ranks, shown.patience, shown.counting, passes = ranks, patience, True, counted_passes(backbone)
    with suppress(BrokenOff):
        show(model, shown, 1)
    assert shown.gathered == (split and ranks > 1)
    return len(passes), "".join(shown.texts)


@pytest.mark.parametrize(
    ("kind", "whole", "few", "told"),
    [
        ("vae", 9, 5, "at most 5 tokens"),
        ("ar", 9, 5, "at most 5 tokens"),
        ("denoiser", 1 + 6 * (4 + 2 + 1) + 9, 1 + 3 * (2 + 1) + 5, "at most 2 steps, 0 restarts, 3 blocks, 5 tokens"),
    ],
)
def test_samples_take_few_passes_where_each_gathers_the_weights_and_say_so(
    kind: str, whole: int, few: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ranks, split in ((1, False), (1, True), (2, False)):
        passes, text = shown_in(kind, LONG, monkeypatch, ranks, split)
        assert passes == whole and "shortened" not in text
    passes, text = shown_in(kind, LONG, monkeypatch, 2, True)
    assert passes == few and f"(shortened under ZeRO-3: {told}" in text
    short = ["sample.num_steps=1", "sample.max_blocks=2", "sample.max_answer_tokens=3", "evaluate.ar_max_tokens=3"]
    short += ["data.max_block_tokens=2", "telemetry.samples=2"]
    alone, split_up = (shown_in(kind, short, monkeypatch, ranks, True) for ranks in (1, 2))
    assert alone == split_up and 0 < alone[0] < few  # no more than was set, and nothing is said


def test_shown_samples_of_the_8b_configuration_gather_an_eighth_as_often() -> None:
    before = load_config("configs/math_8b.yaml", []).sample
    after = samples._shortened(before)
    gathers = [1 + s.max_blocks * (s.num_steps + 1) + s.max_answer_tokens for s in (before, after)]
    assert gathers == [1305, 153]


@pytest.mark.parametrize("kind", ["vae", "ar", "denoiser"])
def test_a_stop_is_obeyed_within_two_passes_of_a_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the tokens of an answer, of which the last passes consist."""
    for patience in (0, 5):  # of at least nine passes
        settings = [*LONG, "sample.num_steps=1", "sample.max_blocks=1", "sample.restarts=0"]
        passes, text = shown_in(kind, settings, monkeypatch, patience=patience)
        assert 0 < passes <= patience + 2 and not text


def test_a_stop_is_obeyed_between_two_tokens_of_what_rank_0_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of all steps, at once: 8B decoders take minutes on a CPU."""
    write_endlessly(monkeypatch)
    denoiser, decoder = undecided(tiny_denoiser(tiny_lm())), tiny_vae().thought_decoder
    settings = SampleSettings(num_steps=2, max_blocks=2, max_answer_tokens=2, max_thought_tokens=9)
    recorder, shown = LatentRecorder.without_vae(denoiser, tokenizer(), settings, Frame(), []), Shown()
    recorded, passes = recorder.record(["a b"], 1, 0), counted_passes(decoder.backbone)
    recorder.read(recorded, decoder)
    assert len(passes) == 9
    passes.clear()
    shown.patience, shown.counting = 2, True
    with pytest.raises(BrokenOff):
        recorder.read(recorded, decoder, between=shown.give_way)
    assert len(passes) == 3


def test_where_thoughts_stand_as_text_samples_stand_behind_the_records_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank has a decoder while a model is trained: each question is thought about behind its own record's sentences."""
    monkeypatch.setattr("ladir.inference.generation.thought_ids", lambda *_, **__: pytest.fail("a decoder was asked"))
    denoiser = undecided(tiny_denoiser(tiny_lm(), context="text"))
    settings = SampleSettings(num_steps=2, max_blocks=3, max_answer_tokens=3)

    def latents(sentences: list[list[list[int]]]) -> list[torch.Tensor]:
        recorder = LatentRecorder.without_vae(denoiser, tokenizer(), settings, Frame(), sentences)
        recorded = recorder.record(["a b", "c"], 1, 0)
        assert all(only.thought_ids is None for (only,) in recorded)
        return [only.latents for (only,) in recorded]

    given = latents([[[5], [6]], [[7, 8, 9]]])
    first, other = latents([[[5], [6]], [[7, 8, 10]]])
    assert torch.equal(first, given[0]) and torch.equal(other[0], given[1][0])
    assert len(given[1]) == 1 or not torch.equal(other[1], given[1][1])
    assert max(map(len, given)) > 1
    recorder = LatentRecorder.without_vae(denoiser, tokenizer(), settings, Frame(), [[[5]], [[6]]])
    for questions, count in ((["a b", "c"], 2), (["a b"], 1)):  # whose sentences would they be
        with pytest.raises(ValueError, match="the sentences of 2 records were given"):
            recorder.record(questions, count, 0)


@pytest.mark.parametrize("free", [samples._READING_BYTES, samples._READING_BYTES - 1, None])
def test_thoughts_are_decoded_on_the_gpu_where_there_is_room_and_else_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, free: int | None, tmp_path: Path
) -> None:
    loaded: list[tuple[str, str]] = []

    def load(_: Path, settings: BackboneSettings, device: torch.device) -> str:
        loaded.append((device.type, settings.dtype))
        if free is None and device.type == "cuda":
            raise torch.OutOfMemoryError("no room")
        return device.type

    monkeypatch.setattr(samples, "load_thought_decoder", load)
    monkeypatch.setattr(samples, "free_bytes", lambda _: free)
    settings = BackboneSettings(dtype="bfloat16")
    on_gpu = free == samples._READING_BYTES
    assert samples._decoder(settings, tmp_path, torch.device("cuda")) == ("cuda" if on_gpu else "cpu")
    assert loaded == [("cuda", "bfloat16")] + ([] if on_gpu else [("cpu", "auto")])


def write_puzzles(folder: Path) -> None:
    sizes = ["countdown.train=24", "countdown.validation=6", "countdown.test=4", "countdown.solutions_per_puzzle=1"]
    config = configure(folder, "puzzles", 3, 4, sizes)
    countdown.write(config.countdown, 0, folder / "data")


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    events.Reload()
    return events


def assert_charts_find(phase: str, tags: set[str]) -> None:
    """Every scalar but the plain counters and the sum's one part has a chart, in the phase's own section."""
    (charts,) = dashboard.layout(phase).values()
    uncharted = {tag for tag in tags if not any(re.search(pattern, tag) for _, (pattern,) in charts.values())}
    counters = {f"4 optimizer/{phase}/epoch", f"5 speed/{phase}/seconds", f"5 speed/{phase}/tokens_per_second"}
    counters |= {f"5 speed/{phase}/memory_rank", f"5 speed/{phase}/rank_slowest"}  # which one it is has no curve
    assert uncharted <= counters | {f"1 losses/{phase}/text"}  # the loss itself


def test_stage_2_has_charts_of_its_own() -> None:
    names = ("rollout", "rollout_token_accuracy", "rollout_distance", "rollout_other_gold")
    tags = [dashboard.tag("rollout", name) for name in names]
    assert tags == ["1 losses/rollout/rollout", *(f"2 quality/rollout/{name}" for name in names[1:])]
    assert_charts_find("rollout", set(tags))


def test_losses_and_quality_come_first_and_no_two_phases_share_a_chart() -> None:
    """TensorBoard sorts groups by name, and draws tags of one name together."""
    names = ("loss", "exact", "active_units", "lr", "mfu")
    groups = [dashboard.tag("vae", name).split("/")[0] for name in names]
    assert groups == sorted(groups) and [group[2:] for group in groups[:2]] == ["losses", "quality"]
    phases = ("base", "vae", "denoiser", "rollout", "ar", "ar.2")
    for phase, other in itertools.permutations(phases, 2):
        assert dashboard.layout(phase).keys() != dashboard.layout(other).keys()
        tags = [dashboard.tag(other, name) for name in (*names, "flow_t0.00-0.25", "text")]
        (charts,) = dashboard.layout(phase).values()
        assert not [tag for tag in tags for _, (pattern,) in charts.values() if re.search(pattern, tag)]


def test_hyperparameters_are_what_tensorboard_takes() -> None:
    given = {"a": 1, "b": 0.5, "c": "x", "d": None, "e": [1, 2], "f": True}
    assert dashboard.hyperparameters(given) == {"a": 1, "b": 0.5, "c": "x", "d": "null", "e": "[1, 2]", "f": True}


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


def hparams_of(folder: Path) -> dict[str, Any]:
    """The settings of a row of HPARAMS."""
    found = read_events(folder).PluginTagToContent("hparams")
    assert "_hparams_/experiment" not in found  # the first one read would name the columns of all rows
    values = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_an_evaluation_is_a_row_of_what_is_not_the_default_and_of_what_came_out(tmp_path: Path) -> None:
    config = Config()
    config.run.folder, config.run.name, config.run.seed = str(tmp_path), "mine", 3
    config.denoiser.train.lr, config.sample.num_steps, config.evaluate.methods = 0.25, 7, ["ladir", "ar"]
    run = Run(config, "evaluate", World(0, 1, 0, torch.device("cpu")))
    run.occupy()
    run.prepare()
    trained = copy.deepcopy(config)
    trained.denoiser.train.lr, trained.denoiser.train.log_every, trained.sample.num_steps = 0.5, 3, 99
    save_config(trained, run.folder.config("denoiser"))  # it was trained with another rate than the evaluation's file names
    write_json(run.folder.outcome_file("denoiser"), dataclasses.asdict(Outcome("finished", 12, 48, 1.0, {})))
    for rate in (True, False):  # a second evaluation takes the place of the first
        questions = [QuestionResult("1 2", [Trajectory("3", rate, "3")] * 10)]
        rows = [MethodResult(method, summarise(questions), 1.0, 1.0) for method in ("ladir", "ar")]
        write_results(result_files(run)[0], rows, task="countdown", num_questions=1, num_trajectories=10, seed=3)
        draw_results(run)
    folder = run.folder.tensorboard("evaluate")
    assert len(list(folder.iterdir())) == 1
    expected = {"run.seed": 3.0, "denoiser.train.lr": 0.5, "sample.num_steps": 7.0, "evaluate.methods": "[ladir, ar]"}
    assert hparams_of(folder) == expected
    events = read_events(folder)
    assert {f"pass@{k}/{method}" for k in (1, 10) for method in ("ladir", "ar")} == set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("pass@1/ladir")] == [(12, 0.0)]
    config.evaluate.name = "mine"
    for step, rate in ((20, False), (40, True), (20, True)):  # the first is asked once more
        config.evaluate.snapshot = step
        write_json(run.folder.outcome_file(f"denoiser-{step}"), dataclasses.asdict(Outcome("unfinished", step, 48, 1.0, {})))
        questions = [QuestionResult("1 2", [Trajectory("3", rate, "3")] * 10)]
        row = MethodResult("ladir", summarise(questions), 1.0, 1.0)
        write_results(result_files(run)[0], [row], task="countdown", num_questions=1, num_trajectories=10, seed=3)
        draw_results(run)
    curve = read_events(run.folder.tensorboard("evaluate-mine-snapshots")).Scalars("pass@1/ladir")
    assert sorted((event.step, event.value) for event in curve) == [(20, 1.0), (40, 1.0)]
    config.telemetry.loggers, config.evaluate.name = [], "quiet"
    draw_results(run)
    assert not run.folder.tensorboard("evaluate-quiet").exists()
