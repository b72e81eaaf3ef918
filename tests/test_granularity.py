"""Blocks of one sentence, of several, and the whole chain as one block: every phase, stage 2 included, to answers and table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ladir.config import Config
from ladir.config.loader import load_config
from ladir.data.latents import LatentStore
from ladir.errors import UnusableError
from ladir.models.loading import new_lm
from ladir.models.store import folder_fingerprint, load_settings
from ladir.reasoner import Reasoner
from ladir.tasks import countdown
from ladir.tokens import load_tokenizer
from tests.distributed import ProcessGroup
from training.evaluation.stages import evaluate
from training.export import export
from training.phases.denoiser import denoiser_phase
from training.phases.latents import encode
from training.phases.rollout import rollout_phase
from training.phases.vae import vae_phase
from training.runtime.distributed import World
from training.runtime.loop import train
from training.runtime.run import RunFolder, open_run
from training.runtime.stages import last_denoiser

SCRATCH = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"  # fmt: skip # noqa: E501
TRAINING = {"max_epochs": "null", "max_steps": 2, "global_batch": 8, "micro_batch": 4, "lr": "1e-3"}
SENTENCES = 3


def configure(folder: Path, sentences_per_block: int) -> Config:
    """Settings of a run on the Countdown-4 puzzles of ``folder``, whose chains have three sentences."""
    training = [f"{phase}.train.{key}={value}" for phase in ("vae", "denoiser", "rollout") for key, value in TRAINING.items()]
    return load_config(
        None,
        [
            f"run.folder={folder}",
            f"run.name=blocks-{sentences_per_block}",
            f"data.sentences_per_block={sentences_per_block}",
            f"backbone.name_or_path={folder}/base",
            f"backbone.scratch={SCRATCH}",
            "backbone.dtype=float32",
            "backbone.activation_checkpointing=full",
            *(f"data.{split}={folder}/data/{split}.jsonl" for split in ("train", "validation", "test")),
            'data.answer_prefixes=["####"]',
            "vae.latent_dim=8",
            "vae.latents_per_block=2",
            "denoiser.draws=2",
            "rollout.num_steps=2",
            *training,
            "sample.num_steps=2",
            "sample.max_blocks=3",
            "sample.max_thought_tokens=32",
            "evaluate.num_trajectories=2",
            "evaluate.methods=[ladir,ladir-rollout,ladir-zero-noise]",
            "telemetry.loggers=[]",
            "latents.report_sentences=0",
        ],
    )


def chain(world: World, folder: Path, sentences_per_block: int) -> dict[str, Any]:
    """All phases; what the training records look like and what came out."""
    config = configure(folder, sentences_per_block)
    run_folder = RunFolder(config)
    for phase, build in (("vae", vae_phase), ("latents", None), ("denoiser", denoiser_phase), ("rollout", rollout_phase)):
        with open_run(config, phase, world) as run:
            if build is not None:
                train(run, build(config, world))
            else:
                assert encode(run)
    with open_run(config, "export", world) as run:
        export(run)
        made = (run_folder.export / "ladir.json").stat().st_mtime_ns
        export(run)  # finds it there, and an evaluation under way keeps its answers
        assert (run_folder.export / "ladir.json").stat().st_mtime_ns == made
        whole = (run_folder.export / "heads.safetensors").read_bytes()
        (run_folder.export / "heads.safetensors").write_bytes(whole[:-1])
        export(run)  # mends what was cut off
        assert (run_folder.export / "heads.safetensors").read_bytes() == whole
        made = (run_folder.export / "ladir.json").stat().st_mtime_ns
        run.config.sample.num_steps += 1
        export(run)
        assert (run_folder.export / "ladir.json").stat().st_mtime_ns > made
        run.config.sample.num_steps -= 1
    with open_run(config, "evaluate", world) as run:
        evaluate(run)
    store = LatentStore.open(run_folder.latents / "train")
    blocks = [[len(block) for block in store[i].blocks] for i in range(len(store))]
    return {"exported": last_denoiser(run_folder).name, "blocks": blocks}


def make_base(world: World, folder: Path) -> None:
    config = load_config(None, [f"backbone.scratch={SCRATCH}", f"backbone.tokenizer={folder}/data/tokenizer"])
    tokenizer = load_tokenizer(config.backbone)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id}
    new_lm(config.backbone, len(tokenizer), ids, "cpu").float().save_pretrained(str(folder / "base"))
    tokenizer.save_pretrained(str(folder / "base"))


@pytest.fixture(scope="module")
def folder(one_process: ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puzzles and a base LM."""
    folder = tmp_path_factory.mktemp("granularity")
    sizes = ["countdown.numbers=4", "countdown.train=12", "countdown.validation=2", "countdown.test=2", "countdown.max_number=9"]
    countdown.write(load_config(None, [*sizes, "countdown.max_value=40"]).countdown, 0, folder / "data")
    one_process.run(make_base, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("sentences_per_block", "sizes"), [(1, [5, 5, 5]), (2, [11, 5]), (0, [17])])
def test_any_number_of_sentences_makes_a_block(
    sentences_per_block: int, sizes: list[int], one_process: ProcessGroup, folder: Path
) -> None:
    """A sentence ``a op b = c`` has five tokens; a newline stands between the sentences of a block."""
    result = one_process.run(chain, folder, sentences_per_block, timeout=280)[0]
    assert all(blocks == sizes for blocks in result["blocks"])
    run = RunFolder(configure(folder, sentences_per_block))
    rows = json.loads((run.path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["ladir", "ladir-rollout", "ladir-zero-noise"]
    assert rows[1]["training_seconds"] > rows[0]["training_seconds"]
    trajectory = Reasoner.from_pretrained(run.export).generate(["1 2 3 4 -> 10"], max_blocks=2)[0][0]
    assert 1 <= len(trajectory.thoughts) <= 2 and trajectory.latents.shape[1:] == (2, 8)


@pytest.mark.distributed
def test_stage_2_is_exported_only_on_top_of_the_stage_1_it_started_from(one_process: ProcessGroup, folder: Path) -> None:
    config = configure(folder, 1)
    run = RunFolder(config)
    if not run.export.is_dir():
        one_process.run(chain, folder, 1, timeout=280)
    assert load_settings(run.export, "denoiser")["origin"] is not None
    heads = run.model("denoiser") / "heads.safetensors"
    before = heads.read_bytes()
    heads.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        with pytest.raises(UnusableError, match="trained from another denoiser"):
            last_denoiser(run)
    finally:
        heads.write_bytes(before)
    assert last_denoiser(run) == run.model("rollout")


def refusals(world: World, folder: Path) -> dict[str, str]:
    """What is said to the next step after the VAE was trained again, and after its latents were encoded again, too."""
    config = configure(folder, 1)

    def said(phase: str, action: Any) -> str:
        with open_run(config, phase, world) as run, pytest.raises(UnusableError) as error:
            action(run)
        return str(error.value)

    steps = {"export": export, "evaluate": evaluate, "denoiser": lambda run: denoiser_phase(run.config, world)}
    found = {name: said(name, action) for name, action in steps.items()}
    stats = RunFolder(config).latents / "train" / "stats.json"
    saved = json.loads(stats.read_text())
    stats.write_text(json.dumps({**saved, "fingerprint": folder_fingerprint(RunFolder(config).model("vae"))}))
    RunFolder(config).outcome_file("rollout").unlink()
    config.data.validation = None
    return {**found, "rollout": said("rollout", lambda run: rollout_phase(run.config, world))}


@pytest.mark.distributed
def test_nothing_goes_on_with_the_denoiser_of_another_vae(one_process: ProcessGroup, folder: Path) -> None:
    run = RunFolder(configure(folder, 1))
    if not run.export.is_dir():
        one_process.run(chain, folder, 1, timeout=280)
    trained_on = load_settings(run.export, "denoiser")["trained_on"]
    decoder = load_settings(run.export / "vae", "thought_decoder")
    assert trained_on["vae"] == decoder["vae"] == folder_fingerprint(run.model("vae"))
    assert trained_on["longest_question"] == 6 and trained_on["tokenizer"]
    heads = run.model("vae") / "heads.safetensors"
    whole = heads.read_bytes()
    heads.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = one_process.run(refusals, folder)[0]
    assert "rollout was trained on the latents of another VAE" in said["export"]
    assert "export was made before" in said["evaluate"] and "run training/export.py" in said["evaluate"]
    assert "these latents were made by the VAE" in said["denoiser"]
    assert "denoiser was trained on the latents of another VAE" in said["rollout"]
