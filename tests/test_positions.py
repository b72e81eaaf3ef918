"""Texts longer than an LM's positions: refused where these are a table, warned of where they are rotary; nothing is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from ladir.config import SampleSettings
from ladir.config.loader import load_config
from ladir.data.grounding import GroundedSentences
from ladir.data.prompts import Frame
from ladir.errors import UnusableError
from ladir.layout import template
from ladir.models.architectures import has_position_table
from ladir.models.backbone import Backbone
from ladir.models.folders import save_lm
from ladir.models.vae import ThoughtDecoder
from ladir.reasoner import Reasoner
from ladir.tokens import build_word_tokenizer, save_tokenizer
from tests.test_architectures import _COMMON, TESTED, lm_of
from tests.test_reasoner import tokenizer
from tests.tiny import tiny_denoiser
from training.phases import ar, vae
from training.phases.lengths import check_records, check_sentences
from training.runtime.distributed import World

ALONE = World(0, 1, 0, torch.device("cpu"))
FRAME = Frame((1,))
LONGEST = "are longer than the 20 positions of the LM (gpt2): the longest takes"


def lm_config(kind: str, positions: int) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **{**_COMMON, **TESTED[kind], "max_position_embeddings": positions})


@pytest.mark.parametrize("kind", TESTED)
def test_whether_positions_are_a_table_is_found_out(kind: str) -> None:
    assert has_position_table(lm_config(kind, 20)) == (kind == "gpt2")


@dataclass
class Stored:
    """Latents, as far as lengths go."""

    rows: list[tuple[int, ...]]
    longest_question: int = 5

    def sizes(self, span: int) -> np.ndarray:
        return np.array(self.rows)


class Grounded(GroundedSentences):
    """A sentence with its prompt and what follows, as far as lengths go."""

    def __init__(self) -> None:
        pass

    def sizes(self) -> np.ndarray:
        return np.array([[3, 16, 9]])


def check(phase: str, lm: PretrainedConfig, settings: Sequence[str] = ()) -> None:
    config = load_config(None, ["vae.latents_per_block=2", "sample.max_blocks=2", "sample.max_answer_tokens=3", *settings])
    if phase == "vae":
        check_sentences(config, lm, 1, [[1] * 17, [1] * 18], [[1] * 2])
    elif phase == "grounded":
        check_sentences(config, lm, 1, Grounded(), [[1] * 2])
    else:
        stores: Any = [Stored([(6, 4, 2, 9, 4), (6, 5, 2, 9, 4), (2, 1, 3, 12, 4)]), None]
        check_records(config, lm, stores, FRAME)


@pytest.mark.parametrize(
    ("phase", "settings", "told"),
    [
        ("vae", (), f"1 of 3 sentences with their latents {LONGEST} 21"),
        ("grounded", ("vae.objective=grounded", "vae.grounded_tokens=3"), f"1 of 2 sentences with their latents {LONGEST} 21"),
        ("denoiser", (), f"1 of 3 records with their blocks {LONGEST} 21"),
        ("denoiser", ("denoiser.span=3", "sample.lag=1"), f"2 of 3 records with their blocks {LONGEST} 25"),
    ],
)
def test_samples_that_are_too_long_are_counted_and_the_setting_is_named(
    phase: str, settings: Sequence[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnusableError) as error:
        check(phase, lm_config("gpt2", 20), settings)
    assert told in str(error.value) and "data.on_bad_record=skip with a lower data.max_" in str(error.value)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        check(phase, lm_config("llama", 20), settings)
    assert "Its rotary positions go on, but were not trained there; leave long ones out" in caplog.text
    caplog.clear()
    check(phase, lm_config("gpt2", 99), settings)
    assert not caplog.messages


@pytest.mark.parametrize("span", [1, 2])
def test_records_as_text_are_as_long_as_their_layout(span: int, caplog: pytest.LogCaptureFixture) -> None:
    """No longer: one that just fits is not refused."""
    settings = ["denoiser.context=text", f"denoiser.span={span}", "sample.lag=0", "rollout.enabled=false"]
    config = load_config(None, ["vae.latents_per_block=4", "sample.max_blocks=1", "sample.max_answer_tokens=1", *settings])
    config.sample.max_thought_tokens = 2
    for question, sentences, answer in ((5, (3, 2, 6), 4), (5, (3, 2, 1), 0), (1, (2,), 5), (4, (9, 1), 1)):
        layout = template(question + len(FRAME), len(sentences), 4, 1, answer, span, sentences=sentences)
        last = (len(sentences) - 1) // span * span
        stores: Any = [Stored([(question, answer, len(sentences), sum(sentences), sum(sentences[last:]))], longest_question=1)]
        longest = int(layout.position.max()) + 1
        check_records(config, lm_config("llama", longest), stores, FRAME)
        assert not caplog.messages
        check_records(config, lm_config("llama", longest - 1), stores, FRAME)
        assert f"the longest takes {longest}" in caplog.text
        caplog.clear()


def test_what_the_model_may_make_of_itself_has_positions_too() -> None:
    remedy = r"thoughts and answer may take 26 positions, .* a table of 25; set a lower sample.max_blocks"
    with pytest.raises(UnusableError, match=remedy):
        check("denoiser", lm_config("gpt2", 25), ["sample.max_blocks=4"])
    check("denoiser", lm_config("llama", 25), ["sample.max_blocks=4"])


def base(folder: Path, positions: int) -> list[str]:
    """A GPT-2 with its tokenizer and two records, the settings that name them."""
    words = build_word_tokenizer(["a", "b", "c", "d", "e", "f", "g", "h.", "i", "j.", "b."])
    lm = lm_of("gpt2", torch.float32, vocab_size=len(words), max_position_embeddings=positions)
    save_lm(Backbone(lm), folder / "lm")
    save_tokenizer(words, folder / "lm")
    records = [
        {"input": "a b c", "output": "d e f g i d e f g i d e f h. i j.", "answer": "b"},
        {"input": "a", "output": "b.", "answer": "c"},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"backbone.name_or_path={folder}/lm", f"data.train={folder}/train.jsonl", f"run.folder={folder}"]
    return [*files, "vae.latents_per_block=4"]


@pytest.mark.parametrize(("module", "loads"), [(vae, "new_vae"), (ar, "build_backbone")])
def test_a_phase_refuses_before_it_loads_anything(
    module: Any, loads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, loads, lambda *_: pytest.fail("loaded weights"))
    begin = vae.vae_phase if module is vae else ar.ar_phase
    with pytest.raises(UnusableError, match=r"1 of . .* are longer than the 16 positions of the LM \(gpt2\)"):
        begin(load_config(None, [*base(tmp_path, 16), "evaluate.ar_max_tokens=2"]), ALONE)


def test_a_reasoner_asks_nothing_that_may_come_to_the_end_of_the_table_and_reads_thoughts_as_far_as_it_goes() -> None:
    denoiser = tiny_denoiser(lm_of("gpt2", torch.float64, vocab_size=29))
    limits = SampleSettings(num_steps=2, max_blocks=3, max_answer_tokens=4, max_thought_tokens=500)
    reasoner = Reasoner(denoiser, ThoughtDecoder(denoiser.backbone, denoiser.latent_in), tokenizer(), limits)
    assert len(reasoner.generate(["a b c"])[0][0].thoughts) >= 1
    with pytest.raises(UnusableError, match=r"question 1 \(3 tokens\) .* table of 256; set a lower max_blocks \(80\)"):
        reasoner.generate(["a b c"], max_blocks=80)
    with pytest.raises(UnusableError, match=r"max_answer_tokens \(250\), or shorten it"):
        reasoner.check_question("a b c", reasoner.settings_with(max_answer_tokens=250))
