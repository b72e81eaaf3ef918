"""A phase's work is not continued on data or models that are not those it was begun on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ladir.config import Config
from ladir.config.loader import load_config
from training.runtime.distributed import World
from training.runtime.run import Outcome, Run, RunConflict, RunFolder

ALONE = World(0, 1, 0, torch.device("cpu"))


def configure(folder: Path, *overrides: str) -> Config:
    own = f"backbone.name_or_path={folder}/a/models/base"
    data = [f"data.train={folder}/train.jsonl", f"data.sentences={folder}/more.jsonl"]
    return load_config(None, [f"run.folder={folder}", "run.name=a", own, *data, *overrides])


def write_everything(folder: Path, run: RunFolder) -> None:
    (folder / "train.jsonl").write_text("1\n")
    (folder / "more.jsonl").write_text("2\n")
    for name in ("base", "denoiser"):
        run.model(name).mkdir(parents=True, exist_ok=True)
        weights(run, name, 1.0)
    latents(run, "vae one", "records one")


def weights(run: RunFolder, name: str, value: float) -> None:
    save_file({"weight": torch.full((2,), value)}, run.model(name) / "model.safetensors")


def latents(run: RunFolder, vae: str, records: str) -> None:
    (run.latents / "train").mkdir(parents=True, exist_ok=True)
    (run.latents / "train" / "stats.json").write_text(json.dumps({"fingerprint": vae, "mean": [0.1]}))
    run.sources.write_text(json.dumps({"train": records, "validation": "whatever"}))


CHANGES: dict[str, Callable[[Path, RunFolder], object]] = {
    "data.train": lambda folder, run: (folder / "train.jsonl").write_text("3\n"),
    "data.sentences": lambda folder, run: (folder / "more.jsonl").write_text("3\n"),
    "models/base": lambda folder, run: weights(run, "base", 2.0),
    "models/denoiser": lambda folder, run: weights(run, "denoiser", 2.0),
    "latents/train": lambda folder, run: latents(run, "vae two", "records one"),
    "latents/train, records": lambda folder, run: latents(run, "vae one", "records two"),
}
READ = {
    "vae": {"data.train", "data.sentences", "models/base"},
    "denoiser": {"models/base", "latents/train"},
    "rollout": {"models/denoiser", "latents/train"},
    "ar": {"data.train", "models/base"},
    "base": {"data.train"},
    "evaluate": set(),
}


def start(config: Config, phase: str) -> str:
    """Prepare the phase's folder; the refusal, where there is one."""
    run = Run(config, phase, ALONE)
    try:
        run.occupy()
        run.prepare()
    except RunConflict as conflict:
        return str(conflict)
    finally:
        run.release()
    return ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("phase", READ)
def test_what_a_phase_was_begun_on_must_not_change_while_it_has_work_there(phase: str, change: str, tmp_path: Path) -> None:
    config = configure(tmp_path, *(["ar.phase=base"] if phase == "base" else []))
    folder, name = RunFolder(config), change.split(",")[0]
    write_everything(tmp_path, folder)
    assert start(config, phase) == ""
    CHANGES[change](tmp_path, folder)
    assert start(config, phase) == ""  # nothing was done yet
    folder.checkpoints(phase).mkdir(parents=True)
    assert start(config, phase) == ""
    write_everything(tmp_path, folder)
    message = start(config, phase)
    assert (f"{name}: is not what it was" in message) == (name in READ[phase])
    assert not message or "run.name" in message
    CHANGES[change](tmp_path, folder)
    assert start(config, phase) == ""  # given back


def test_a_phase_begun_before_a_setting_existed_continues_at_its_default_alone(tmp_path: Path) -> None:
    config = configure(tmp_path)
    folder = RunFolder(config)
    write_everything(tmp_path, folder)
    assert start(config, "denoiser") == ""
    folder.checkpoints("denoiser").mkdir(parents=True)
    lines = folder.config("denoiser").read_text().splitlines(keepends=True)
    older = [line for line in lines if "bidirectional_question" not in line]
    assert len(older) < len(lines)
    folder.config("denoiser").write_text("".join(older))
    other = configure(tmp_path, "denoiser.bidirectional_question=true")
    assert "denoiser.bidirectional_question: False -> True" in start(other, "denoiser")
    assert start(config, "denoiser") == ""


def test_what_a_finished_phase_was_trained_on_may_be_gone(tmp_path: Path) -> None:
    config = configure(tmp_path)
    folder = RunFolder(config)
    write_everything(tmp_path, folder)
    run = Run(config, "vae", ALONE)
    run.occupy()
    run.prepare()
    run.finish(Outcome("finished", 1, 1, 1.0, {}))
    run.release()
    (tmp_path / "train.jsonl").unlink()
    assert start(config, "vae") == ""


def test_latents_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    config = configure(tmp_path)
    write_everything(tmp_path, RunFolder(config))
    RunFolder(config).sources.write_text('{"train')
    assert "what phase 'denoiser' is begun on cannot be read: Unterminated string" in start(config, "denoiser")


def test_the_same_latents_encoded_in_other_batches_are_the_same(tmp_path: Path) -> None:
    config = configure(tmp_path)
    write_everything(tmp_path, RunFolder(config))
    assert start(config, "denoiser") == ""
    RunFolder(config).checkpoints("denoiser").mkdir(parents=True)
    stats = RunFolder(config).latents / "train" / "stats.json"
    stats.write_text(json.dumps({"fingerprint": "vae one", "mean": [0.1000001]}))
    assert start(configure(tmp_path, "latents.batch_size=7", "latents.records_per_part=99"), "denoiser") == ""
