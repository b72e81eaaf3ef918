"""The real phases on two processes under ZeRO-3 against one process without ZeRO; encoding stopped on one rank."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladir.config import Config
from ladir.config.loader import load_config
from ladir.data.encode import encode_records
from ladir.data.latents import LatentStore
from ladir.data.prompts import chain_pairs
from ladir.data.records import Record, read_records
from ladir.errors import UnusableError
from ladir.layout import Mark
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.folders import reads_questions_both_ways
from ladir.models.loading import new_lm
from ladir.tasks import countdown
from ladir.tokens import encode_text, load_tokenizer
from tests.distributed import ProcessGroup
from training.phases import ar as ar_module
from training.phases import latents as encode_latents
from training.phases import vae as vae_module
from training.phases.ar import ar_phase
from training.phases.base import TrainingPhase
from training.phases.denoiser import denoiser_phase
from training.phases.joint import joint_phase, report_joint
from training.phases.vae import vae_phase
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import RunFolder, open_run

BUILDERS = {"vae": vae_phase, "denoiser": denoiser_phase, "ar": ar_phase}
SCRATCH = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 128}"  # fmt: skip # noqa: E501
STEPS = 3
# A large epsilon keeps AdamW from dividing gradients that are rounding errors by others of their kind.
TRAIN = {"max_epochs": "null", "max_steps": STEPS, "global_batch": 8, "lr": "1e-2", "eps": "1e-3", "ema": 0.5, "log_every": 1}
VARIANTS = {
    "frozen": [],
    "trained": ["vae.decoder=trained"],
    "lora": ["backbone.lora.rank=4"],
    "trained-lora": ["backbone.lora.rank=4", "vae.decoder=trained"],
    "full": ["denoiser.token_weight=0.5", "denoiser.answer_every=2"],
    "carry": ["denoiser.carry=hidden", "denoiser.carry_probability=0.7", "denoiser.carry_own_rollout=0.5", "denoiser.span=2"],
    "carry-zero2": ["denoiser.carry=hidden", "denoiser.carry_probability=0.7", "deepspeed.config=ds_configs/zero2.json"],
    "both-ways": ["ar.bidirectional_question=true"],
    "grounded": ["backbone.lora.rank=4", "vae.objective=grounded"],
    "joint": ["stage=joint", "denoiser.span=2"],
    "lora-parts": ["backbone.lora.rank=4", "backbone.logits_parts=3"],
    "hpz": ["deepspeed.config=tests/data/zero3_hpz.json"],
    "full-parts": [
        "denoiser.token_weight=0.5",
        "denoiser.context=text",
        "denoiser.lm_weight=0.5",
        "rollout.enabled=false",
        "backbone.logits_parts=3",
    ],
}


def configure(folder: Path, name: str, stage: int, micro: int, overrides: list[str]) -> Config:
    """Settings of run ``name`` on the puzzles and the base LM of ``folder``."""
    settings = [f"{phase}.train.{key}={value}" for phase in BUILDERS for key, value in {**TRAIN, "micro_batch": micro}.items()]
    data = [f"data.{split}={folder}/data/{split}.jsonl" for split in ("train", "validation")]
    sizes = ["vae.latent_dim=8", "vae.latents_per_block=2", "denoiser.draws=2", "denoiser.timestep_features=8"]
    return load_config(
        None,
        [
            f"run.folder={folder}",
            f"run.name={name}",
            f"backbone.name_or_path={folder}/base",
            "backbone.dtype=float32",
            f"backbone.scratch={SCRATCH}",
            'data.answer_prefixes=["####"]',
            f"deepspeed.config=ds_configs/zero{stage}.json",
            "telemetry.loggers=[]",
            "latents.report_sentences=8",
            "latents.probe_steps=2",
            *settings,
            *data,
            *sizes,
            *overrides,
        ],
    )


def split_parameters(model: nn.Module, world: World) -> dict[str, tuple[int, int]]:
    """(elements held here, elements that are this rank's share) of every parameter of an LM that has not its share alone."""
    wrong = {}
    for name, parameter in model.named_parameters():
        if ".lm." in name and "lora_" not in name:
            numel = getattr(parameter, "ds_numel", parameter.numel())
            mine = parameter.data.numel() + (parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0)
            if mine != math.ceil(numel / world.size):
                wrong[name] = (mine, math.ceil(numel / world.size))
    return wrong


def run_phase(world: World, folder: Path, name: str, phase: str, stage: int, micro: int, overrides: list[str]) -> dict[str, Any]:
    """Train a phase; returns what was not split when it had been built."""
    config = configure(folder, name, stage, micro, overrides)
    with open_run(config, phase, world) as run:
        built: TrainingPhase = (joint_phase if config.stage == "joint" else BUILDERS[phase])(config, world)
        whole = split_parameters(built.model, world)
        assert train(run, built).steps == STEPS
    return whole


def make_base(world: World, folder: Path) -> None:
    config = configure(folder, "base", 0, 8, [f"backbone.tokenizer={folder}/data/tokenizer"])
    tokenizer = load_tokenizer(config.backbone)
    torch.manual_seed(0)
    new_lm(config.backbone, len(tokenizer), {"eos_token_id": tokenizer.eos_token_id}, "cpu").save_pretrained(str(folder / "base"))
    tokenizer.save_pretrained(str(folder / "base"))


def encode(world: World, folder: Path, name: str, overrides: list[str], stop_at: int | None = None) -> bool:
    """Encode the puzzles; the last rank is signalled before its batch number ``stop_at``."""
    config = configure(folder, name, 0, 8, ["latents.records_per_part=4", "latents.batch_size=4", *overrides])
    real, calls = encode_latents.encode_sentences, []

    def signalled(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if stop_at == len(calls) and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return real(*arguments)

    encode_latents.encode_sentences = signalled
    try:
        with open_run(config, "latents", world) as run:
            return encode_latents.encode(run)
    finally:
        encode_latents.encode_sentences = real


@pytest.fixture(scope="module")
def folder(one_process: ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puzzles, a base LM, and the run ``encoded`` with a VAE and its latents."""
    folder = tmp_path_factory.mktemp("phases")
    sizes = ["countdown.train=30", "countdown.validation=6", "countdown.test=4", "countdown.max_number=9"]
    settings = load_config(None, [*sizes, "countdown.max_value=40", "countdown.solutions_per_puzzle=1"])
    countdown.write(settings.countdown, 0, folder / "data")
    one_process.run(make_base, folder)
    one_process.run(run_phase, folder, "encoded", "vae", 0, 8, [])
    assert one_process.run(encode, folder, "encoded", []) == [True]
    return folder


#: what there is of several ranks only
OF_RANKS = ("data_wait_worst", "memory_rank", "rank_slowest", "rank_slowdown")


def losses(folder: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    speeds = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "data_wait", "memory_gib", "seconds", *OF_RANKS)
    spreads = ("latent_std", "active_units")  # within a micro batch, and those have other sizes
    hidden = ("kind", "phase", *speeds, *spreads)
    return [{key: value for key, value in row.items() if key not in hidden} for row in rows]


def weights(folder: Path, name: str, phase: str) -> dict[str, Tensor]:
    """Everything a finished phase has written, by file and name."""
    root = folder / name / "models" / phase
    files = sorted(root.rglob("*.safetensors"))
    return {f"{file.relative_to(root)}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("phase", "variant"),
    [
        ("vae", "frozen"),
        ("vae", "trained"),
        ("vae", "lora"),
        ("vae", "trained-lora"),
        ("vae", "lora-parts"),
        ("denoiser", "full"),
        ("denoiser", "full-parts"),
        ("denoiser", "lora"),
        ("denoiser", "carry"),
        ("denoiser", "carry-zero2"),
        ("denoiser", "hpz"),
        ("ar", "frozen"),
        ("ar", "full-parts"),
        ("ar", "both-ways"),
        ("vae", "grounded"),
        ("denoiser", "joint"),
    ],
)
def test_two_ranks_of_zero3_train_what_one_process_trains(
    one_process: ProcessGroup, two_processes: ProcessGroup, folder: Path, phase: str, variant: str
) -> None:
    """Losses, metrics, gradient norms and weights; and no rank holds more than its share of any LM, frozen ones included.

    Logits in parts are compared with all at once, weights kept a second time by groups of ranks (hpZ) with whole ones.  A first
    pass under ZeRO-2, which splits no weights, stands beside one under ZeRO-3.
    """
    names = [f"{phase}-{variant}-{ranks}" for ranks in (1, 2)]
    for name in names:
        if phase == "denoiser":
            for part in ("models/vae", "latents"):
                shutil.copytree(folder / "encoded" / part, folder / name / part)
    plain = ("logits_parts", "deepspeed.config")
    at_once = [setting for setting in VARIANTS[variant] if not any(name in setting for name in plain)]
    one_process.run(run_phase, folder, names[0], phase, 0, 8, at_once)
    whole = two_processes.run(run_phase, folder, names[1], phase, 3, 2, VARIANTS[variant])
    assert [bool(parameters) for parameters in whole] == [variant == "carry-zero2"] * 2
    expected, actual = losses(folder, names[0]), losses(folder, names[1])
    assert len(expected) == STEPS + 1  # the last is the validation
    for row, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert expected[0]["loss"] != expected[1]["loss"]
    one, two = weights(folder, names[0], phase), weights(folder, names[1], phase)
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def run_compiled(world: World, folder: Path, name: str) -> int:
    """Train the VAE with compiled layers under ZeRO-2 (of the traced graphs no kernels are made); how many graphs were traced."""
    compiled, graphs = Backbone.compile_layers, torch._dynamo.utils.counters["stats"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "compile_layers", lambda backbone: compiled(backbone, backend="aot_eager"))
        before = graphs["unique_graphs"]
        run_phase(world, folder, name, "vae", 2, 2, ["backbone.compile=true"])
    return graphs["unique_graphs"] - before


@pytest.mark.distributed
def test_two_ranks_of_zero2_with_compiled_layers_train_what_one_process_trains(
    one_process: ProcessGroup, two_processes: ProcessGroup, folder: Path
) -> None:
    one_process.run(run_phase, folder, "as-written", "vae", 0, 8, [])
    assert min(two_processes.run(run_compiled, folder, "compiled")) > 0
    for row, other in zip(losses(folder, "as-written"), losses(folder, "compiled"), strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    one, two = weights(folder, "as-written", "vae"), weights(folder, "compiled", "vae")
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def collated_and_written(world: World, folder: Path, bidirectional: bool) -> tuple[bool, bool]:
    """Whether the baseline's batches are causal text, and what its folder says, where nothing was trained."""
    name = f"untrained-{bidirectional}"
    with open_run(configure(folder, name, 0, 8, [f"ar.bidirectional_question={bidirectional}"]), "ar", world) as run:
        built = ar_phase(run.config, world)
        batch = built.collator([built.items[0]], [0], True)
        built.write(run.folder.model("ar"), iter(built.model.state_dict().items()))
        return batch.rows.layout.boundaries is not None, reads_questions_both_ways(run.folder.model("ar"))


def test_the_baseline_reads_questions_as_it_is_set(one_process: ProcessGroup, folder: Path) -> None:
    assert one_process.run(collated_and_written, folder, False) == [(True, False)]
    assert one_process.run(collated_and_written, folder, True) == [(False, True)]


class InMemory:
    """Stands for the token stores: every record read, tokenized and kept by this process alone."""

    def __init__(self, config: Config, world: World, tokenizer: Any, stop: Any = None) -> None:
        self._settings, self._tokenizer = config.data, tokenizer

    def records(self, named: str) -> Any:
        encoded, _ = encode_records(read_records(named, self._settings), self._tokenizer, self._settings)
        return Held([block for one in encoded for block in one.blocks], [one.record for one in encoded])

    def sentences(self, named: None) -> list[list[int]]:
        return []

    def chains(self, records: Held) -> list[tuple[list[int], list[int]]]:
        return list(chain_pairs(self._tokenizer, records.texts, self._settings.answer_prefixes[0]))


@dataclass(frozen=True)
class Held:
    blocks: list[list[int]]
    texts: list[Record]
    longest_question: int = 1

    def __len__(self) -> int:
        return len(self.texts)


def run_in_memory(world: World, folder: Path, name: str, phase: str, settings: list[str]) -> None:
    module = {"vae": vae_module, "ar": ar_module}[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Tokens", InMemory)
        run_phase(world, folder, name, phase, 0, 8, settings)


@pytest.mark.parametrize(("phase", "settings"), [("vae", []), ("ar", ["ar.copy_fraction=0.4"])])
def test_stored_tokens_train_what_tokens_in_memory_train(
    one_process: ProcessGroup, folder: Path, phase: str, settings: list[str]
) -> None:
    """Bit by bit: losses, validation and weights."""
    one_process.run(run_in_memory, folder, f"{phase}-held", phase, settings)
    one_process.run(run_phase, folder, f"{phase}-stored", phase, 0, 8, settings)
    assert losses(folder, f"{phase}-held") == losses(folder, f"{phase}-stored")
    one, two = (weights(folder, f"{phase}-{data}", phase) for data in ("held", "stored"))
    assert one.keys() == two.keys() and all(torch.equal(two[name], value) for name, value in one.items())


def build_denoiser(world: World, folder: Path, name: str, settings: list[str]) -> str:
    try:
        with open_run(configure(folder, name, 0, 8, settings), "denoiser", world) as run:
            denoiser_phase(run.config, world)
    except UnusableError as error:
        return str(error)
    return ""


def marks_and_words(world: World, folder: Path, settings: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a denoiser that is built: its <BOT>, <EOT> and <SOA>, and what the LM has for a line break, <eos> and ####."""
    config = configure(folder, "encoded", 0, 8, ["rollout.enabled=false", *settings])
    with open_run(config, "denoiser", world):
        model = denoiser_phase(config, world).model
    assert isinstance(model, Denoiser)
    tokenizer = load_tokenizer(config.backbone)
    ids = [encode_text(tokenizer, "\n"), [tokenizer.eos_token_id], encode_text(tokenizer, "####")]
    words = torch.stack([model.backbone.embed(torch.tensor(of_one)).mean(0) for of_one in ids])
    return model.marks.weight[: Mark.NULL].detach(), words.detach()


def joint_reports(world: World, folder: Path) -> list[dict[str, float]]:
    """Figures of a joint training that moves nothing: at its end, after a report that a stop broke off, after a whole one."""
    config, found = configure(folder, "still", 0, 8, [*VARIANTS["joint"], "denoiser.train.lr=1e-30"]), []
    for stopped in (True, False, False):
        with open_run(config, "denoiser", world) as run:
            train(run, joint_phase(config, world))
            run.stop.requested = stopped
            assert report_joint(run) is not stopped
            assert run.outcome is not None
            found.append(run.outcome.metrics)
    return found


def test_joint_training_reports_on_its_vae_as_the_encoding_does(one_process: ProcessGroup, folder: Path) -> None:
    for part in ("models/vae", "latents"):
        shutil.copytree(folder / "encoded" / part, folder / "still" / part)
    ((before, after, again),) = one_process.run(joint_reports, folder)
    assert not any(name.startswith("vae_") for name in before) and again == after
    encoded = json.loads((folder / "encoded" / "outcome-latents.json").read_text())["metrics"]
    assert {"exact", "noisy_exact", "active_units", "probe_flow_explained", "probe_exact"} <= encoded.keys()
    assert {name.removeprefix("vae_"): value for name, value in after.items() if name not in before} == pytest.approx(
        encoded, 1e-4
    )
    rows = [json.loads(line) for line in (folder / "still" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "vae_exact" in row]
    assert (row["kind"], row["step"]) == ("validation", STEPS) and {row["step"] for row in rows} == {*range(1, STEPS + 1)}


def test_latents_of_another_vae_are_refused(one_process: ProcessGroup, folder: Path) -> None:
    shutil.copytree(folder / "encoded", folder / "changed")
    heads = folder / "changed" / "models" / "vae" / "heads.safetensors"
    save_file({name: value + 1 for name, value in load_file(heads).items()}, heads)
    (message,) = one_process.run(build_denoiser, folder, "changed", [])
    assert "these latents were made by the VAE" in message and "encode_latents.py again" in message


@pytest.mark.parametrize(
    ("settings", "alike"),
    [(["denoiser.context=text"], True), (["denoiser.context=text", "denoiser.init_marks=false"], False), ([], False)],
)
def test_marks_start_as_what_a_plain_chain_has_there(
    one_process: ProcessGroup, folder: Path, settings: list[str], alike: bool
) -> None:
    ((marks, words),) = one_process.run(marks_and_words, folder, settings)
    assert torch.allclose(marks, words) is alike
    assert words.unique(dim=0).shape == words.shape


@pytest.mark.distributed
def test_an_encoding_stopped_on_one_rank_continues_on_both(two_processes: ProcessGroup, folder: Path) -> None:
    shutil.copytree(folder / "encoded" / "models", folder / "stopped" / "models")
    assert two_processes.run(encode, folder, "stopped", [], 3) == [False, False]
    assert two_processes.run(encode, folder, "stopped", []) == [True, True]
    paths = [RunFolder(configure(folder, name, 0, 8, [])).latents / "train" for name in ("encoded", "stopped")]
    one, two = (LatentStore.open(path) for path in paths)
    assert len(one) == len(two) and one.fingerprint == two.fingerprint
    for index in range(len(one)):
        assert one[index].question == two[index].question and one[index].blocks == two[index].blocks
        torch.testing.assert_close(one[index].mu, two[index].mu, rtol=1e-4, atol=1e-5)


def test_validation_latents_of_another_vae_are_refused_and_those_of_no_validation_are_not_read(
    one_process: ProcessGroup, folder: Path
) -> None:
    shutil.copytree(folder / "encoded", folder / "mixed")
    stats = folder / "mixed" / "latents" / "validation" / "stats.json"
    stats.write_text(json.dumps({**json.loads(stats.read_text()), "fingerprint": "of another"}))
    (message,) = one_process.run(build_denoiser, folder, "mixed", [])
    assert f"{stats.parent}: these latents were made by the VAE of another" in message
    assert one_process.run(build_denoiser, folder, "mixed", ["data.validation=null"]) == [""]
