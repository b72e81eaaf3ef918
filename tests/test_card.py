"""The model card of an export, and the Hub: uploaded to a stand-in by the real client, and fetched back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from ladir.config import Config
from ladir.errors import UnusableError
from ladir.evaluation.metrics import summarise
from ladir.evaluation.results import MethodResult, QuestionResult, Trajectory, read_results, write_results
from ladir.models.card import CARD_FILE, CardFacts, model_card
from ladir.models.folders import save_denoiser
from ladir.reasoner import Reasoner
from tests.hub import model_hub
from tests.test_reasoner import QUESTIONS, assert_same, tiny_reasoner
from tests.tiny import tiny_denoiser, tiny_lm
from training.runtime.cards import card_facts, write_results_card
from training.runtime.files import write_json
from training.runtime.run import Outcome, RunFolder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "mine" / "export"
    tiny_reasoner(dtype=torch.float32, num_steps=7).save_pretrained(folder)
    return folder


def test_a_card_says_what_is_known_and_has_the_hubs_fields(export: Path) -> None:
    config = Config()
    config.run.folder, config.run.name, config.run.seed = str(export.parents[1]), "mine", 3
    config.backbone.name_or_path, config.export.license = "owner/some-lm", "apache-2.0"
    config.data.train, config.data.test = "openai/gsm8k:main:train", "/home/somebody/secret/test.jsonl"
    folder = RunFolder(config)
    write_json(folder.outcome_file("denoiser"), dataclasses.asdict(Outcome("finished", 12, 48, 9.0, {})))
    before = model_card(export, card_facts(config, folder))
    assert "has not been evaluated yet" in before and "12 steps of 64 samples, 9 s" in before
    questions = [QuestionResult("1 2", (Trajectory("3", True, "3"),))]
    file = folder.path / "results.json"
    rows = [MethodResult("ladir", summarise(questions), 1.0, 1.0)]
    write_results(file, rows, task="maths", num_questions=1, num_trajectories=1, seed=3)
    write_results_card(config, folder, read_results(file))
    card = ModelCard.load(export / CARD_FILE)
    fields = card.data.to_dict()
    assert (fields["license"], fields["base_model"], fields["datasets"]) == ("apache-2.0", "owner/some-lm", ["openai/gsm8k"])
    assert fields["library_name"] == "ladir"
    wanted = ["| ladir | 100.0", "| sample.num_steps | 7 |", "| run.seed | 3 |", "Licence: `apache-2.0`", "without thoughts"]
    assert [told for told in wanted if told not in card.text] == []
    assert "test.jsonl" in card.text and "/home" not in card.text
    assert "adapters" not in card.text
    assert "no licence is stated" in model_card(export, CardFacts(base="/data/lm")).lower()


def test_the_card_says_what_stands_for_a_finished_block(tmp_path: Path) -> None:
    told = {"latents": "Every block can be read as text.", "text": "its words are what later blocks and the answer see"}
    for context, words in told.items():
        save_denoiser(tiny_denoiser(tiny_lm(), context=context), tmp_path / context)
        assert [entry for entry in told.values() if entry in model_card(tmp_path / context, CardFacts())] == [words]


def test_an_export_goes_to_the_hub_and_comes_back_with_its_card(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_hub() as (address, models):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        here = Reasoner.from_pretrained(export, "cpu")
        assert here.push_to_hub("me/letters", token="hf_x").startswith("http")
        files = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
        assert files == models["me/letters"].keys()
        assert models["me/letters"][CARD_FILE] == (export / CARD_FILE).read_bytes()
        there = Reasoner.from_pretrained("me/letters", "cpu")
        with pytest.raises(UnusableError, match="me/nothing: no such folder, and no model of the Hub that can be fetched"):
            Reasoner.from_pretrained("me/nothing", "cpu")
    for [one], [other] in zip(here.generate(QUESTIONS), there.generate(QUESTIONS), strict=True):
        assert_same(one, other, 0.0)
    assert there.card == here.card
