"""The method as it is run with a pretrained LM, on sentences: LoRA, frozen decoder, four latents a block, guidance."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ladir.config import BackboneSettings, Config
from ladir.config.loader import load_config
from ladir.data.latents import LatentStore
from ladir.data.prompts import Frame
from ladir.models.folders import question_frame
from ladir.models.loading import new_lm
from ladir.reasoner import Reasoner
from ladir.tokens import build_bpe_tokenizer, decode_text, encode_text, load_tokenizer, vocabulary_size
from tests.distributed import ProcessGroup
from training.evaluation.stages import evaluate
from training.export import export
from training.phases.ar import ar_phase
from training.phases.denoiser import denoiser_phase
from training.phases.latents import encode
from training.phases.rollout import rollout_phase
from training.phases.vae import vae_phase
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import RunFolder, open_run

RECORDS = Path(__file__).parent / "data" / "word_problems.jsonl"
QUESTION = "Emma draws 8 stars a day for 2 weeks. How many stars is that?"
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
#: the families an 8B user comes with, what is their own among it: head sizes, windows, norms, fused projections
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 64},
}
#: those that read <bos> first, and the one whose questions stand in its chat template, asked beside its own AR baseline
WITH_BOS, CHATTY = ("gemma3_text",), "qwen3"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def configure(folder: Path, family: str) -> Config:
    """configs/math_8b.yaml's method in tiny sizes, with adapters."""
    training = {"max_epochs": "null", "max_steps": 2, "global_batch": 4, "micro_batch": 2, "pack_tokens": 128, "lr": "1e-3"}
    return load_config(
        "configs/math_8b.yaml",
        [
            f"run.folder={folder}",
            f"run.name={family}",
            f"backbone.name_or_path={folder}/base-{family}",
            f"backbone.tokenizer={folder}/tokenizer-{family}",
            f"data.chat_template={family == CHATTY}",
            "backbone.dtype=float32",
            "backbone.lora.rank=2",
            "backbone.lora.targets=[all-linear]",
            *(f"data.{split}={RECORDS}" for split in ("train", "validation", "test")),
            "data.input_field=input",
            "data.output_field=output",
            'data.answer_prefixes=["####"]',
            "vae.latent_dim=8",
            "denoiser.draws=2",
            "denoiser.timestep_features=8",
            "rollout.num_steps=2",
            "latents.probe_steps=2",
            *(
                f"{phase}.train.{name}={value}"
                for phase in ("vae", "denoiser", "rollout", "ar")
                for name, value in training.items()
            ),
            "sample.num_steps=2",
            "sample.max_blocks=2",
            "sample.max_thought_tokens=8",
            "sample.max_answer_tokens=4",
            "evaluate.num_questions=2",
            "evaluate.num_trajectories=3",
            "evaluate.ar_max_tokens=8",
            f"evaluate.methods=[{','.join(methods(family))}]",
            "deepspeed.config=ds_configs/zero0.json",
            "telemetry.loggers=[]",
        ],
    )


def methods(family: str) -> list[str]:
    return ["ladir", "ladir-rollout", *(["ar"] if family == CHATTY else [])]


def make_base(config: Config, family: str) -> None:
    settings = replace(config.backbone, scratch={"model_type": family, **_SIZES, **FAMILIES[family]})
    tokenizer, folder = load_tokenizer(config.backbone), str(config.backbone.name_or_path)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    new_lm(settings, vocabulary_size(tokenizer), ids, "cpu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chain(world: World, folder: Path, family: str) -> None:
    """All phases of a run."""
    config = configure(folder, family)
    make_base(config, family)
    phases = {"vae": vae_phase, "latents": None, "denoiser": denoiser_phase, "rollout": rollout_phase}
    for phase, build in {**phases, **({"ar": ar_phase} if family == CHATTY else {})}.items():
        with open_run(config, phase, world) as run:
            assert encode(run) if build is None else train(run, build(config, world)).steps == 2
    for phase, action in (("export", export), ("evaluate", evaluate)):
        with open_run(config, phase, world) as run:
            action(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the records, and for every family that with what is the family's own."""
    folder = tmp_path_factory.mktemp("prose")
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    build_bpe_tokenizer((text for row in rows for text in row.values()), 400).save_pretrained(folder / "tokenizer")
    for family in FAMILIES:
        tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(folder / "tokenizer")))
        if family in WITH_BOS:
            tokenizer.add_special_tokens({"bos_token": "<bos>"})
        if family == CHATTY:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder / f"tokenizer-{family}")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_sentences_go_the_whole_way(family: str, one_process: ProcessGroup, folder: Path) -> None:
    one_process.run(chain, folder, family, timeout=280)
    config = configure(folder, family)
    run = RunFolder(config)
    assert (config.vae.decoder, config.sample.guidance_scale, config.sample.initial_noise) == ("frozen", 4.0, 2.0)
    record = LatentStore.open(run.latents / "train")[4]
    tokenizer = load_tokenizer(config.backbone)
    assert [decode_text(tokenizer, block) for block in record.blocks] == [
        "Two weeks are 2 * 7 = 14 days.",
        "So Emma draws 8 * 14 = 112 stars.",
    ]
    assert record.mu.shape == (2, 4, 8)
    latents = run.outcome("latents")
    assert latents is not None and latents.metrics.keys() >= {
        *("exact", "noisy_exact", "active_units", "probe_flow_explained", "probe_exact", "probe_token_cross_entropy")
    }
    rows = {row["method"]: row for row in json.loads((run.path / "results.json").read_text())["rows"]}
    assert [*rows] == methods(family)
    reasoner = Reasoner.from_pretrained(run.export)
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    assert len(bos) == (family in WITH_BOS) and reasoner.thought_decoder.bos == bos
    if family == CHATTY:
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        frame = Frame.saved(reasoner.trained_on.frame or {})
        assert frame.is_chat and frame.before[0] == start and frame.behind[0] == end and start in frame.behind
        assert question_frame(run.model("ar")) == frame.to_save()
    else:
        assert reasoner.trained_on.frame == Frame(bos).to_save()
    guided, plain = (reasoner.generate([QUESTION], num_trajectories=3, guidance_scale=scale)[0] for scale in (4.0, 1.0))
    assert all(trajectory.latents.shape[1:] == (4, 8) and trajectory.latents.isfinite().all() for trajectory in guided)
    assert not torch.equal(guided[0].latents, plain[0].latents)


def test_every_digit_of_the_tokenizer_is_one_token_and_any_text_comes_back(folder: Path) -> None:
    tokenizer = load_tokenizer(load_config(None, [f"backbone.tokenizer={folder}/tokenizer"]).backbone)
    assert vocabulary_size(tokenizer) == 400
    for text in ("So 1,234.50 + 7 = 1241.5 minutes\n", "  Ünknown  wörds ½\t", *RECORDS.read_text(encoding="utf-8").splitlines()):
        ids = encode_text(tokenizer, text)
        assert decode_text(tokenizer, ids) == text
        assert all(sum(character.isdigit() for character in tokenizer.decode([id])) <= 1 for id in ids)
    assert len(encode_text(tokenizer, " 12345")) == 5


#: the driver of ``make prose``, whose jobs are processes forked from one that has imported everything
FORKED = """
import importlib, os, sys, time
from pathlib import Path
import deepspeed, matplotlib, reasoning_gym, tensorboard
from ladir.__main__ import main as ladir_main
from training import demo, evaluate, export, encode_latents, train_ar, train_denoiser, train_vae
from training.jobs import JobResult
from training.runtime.distributed import run_as_program

class Forked:
    def __init__(self, command, log, threads):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.pid, self.begun = os.fork(), time.monotonic()
        if self.pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            place = next(i for i, word in enumerate(command) if word == "ladir" or word.endswith(".py"))
            sys.argv = command[place:]
            name = Path(command[place]).stem
            entry = ladir_main if name == "ladir" else importlib.import_module(f"training.{name}").main
            run_as_program(lambda: sys.exit(entry(command[place + 1:])))

    seconds = property(lambda self: time.monotonic() - self.begun)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return JobResult(os.waitstatus_to_exitcode(status), self.seconds, 0.0) if pid else None

    def stop(self):
        os.kill(self.pid, 9)

demo.Job, demo.POLL_SECONDS = Forked, 0.02
demo.main(sys.argv[1:])
"""


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="NOT TESTED: requirements-examples.txt")
def test_make_prose_goes_from_data_to_report(tmp_path: Path) -> None:
    training = {"max_steps": 2, "global_batch": 4, "micro_batch": 4}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    overrides = [
        f"run.folder={tmp_path}",
        "gym.train=24",
        "gym.validation=4",
        "gym.test=4",
        "gym.templates=[16,43,58]",
        "gym.held_out_templates=1",
        "gym.vocabulary=400",
        *(f"backbone.scratch.{name}={value}" for name, value in shape.items()),
        "vae.latent_dim=8",
        *(f"{phase}.train.{name}={value}" for phase in ("ar", "vae", "denoiser") for name, value in training.items()),
        "sample.num_steps=2",
        "sample.max_blocks=2",
        "evaluate.num_questions=2",
        "evaluate.num_trajectories=2",
        "evaluate.questions_per_batch=2",
        "evaluate.ar_max_tokens=16",
        "evaluate.methods=[ar,ladir]",
    ]
    command = [sys.executable, "-c", FORKED, "--ranks=1", "--config=configs/gsm_symbolic.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[10/10] report" in done.stdout and "held out: pass@1 on questions of kinds" in done.stdout
    run = tmp_path / "prose"
    templates = {
        name: {json.loads(line)["template"] for line in (run / "data" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "test", "test_held_out")
    }
    assert templates["test"] <= templates["train"] and not templates["test_held_out"] & templates["train"]
    rows = {name: json.loads((run / name).read_text())["rows"] for name in ("results.json", "results-held-out.json")}
    assert all([row["method"] for row in found] == ["ar", "ladir"] for found in rows.values())
    assert "results-held-out.json" in (run / "report" / "report.html").read_text()
