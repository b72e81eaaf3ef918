"""Real data through every part: GSM8K's train file from the reader to one training step of VAE and denoiser."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ladir.config import Config, DenoiserSettings, VaeSettings
from ladir.config.loader import load_config
from ladir.data.batches import ArCollator, DenoiserCollator, TensorBatch, VaeCollator
from ladir.data.encode import EncodedRecord, encode_records
from ladir.data.latent_parts import write_latents
from ladir.data.latents import LatentForm, LatentRecord, LatentStore
from ladir.data.prompts import chain_pairs, completion_text, parse_completion
from ladir.data.records import RecordSet, read_records
from ladir.layout import Layout
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae, encode_sentences
from ladir.tasks import get_task
from ladir.tasks.verdict import Verdict
from ladir.tokens import decode_text
from tests.tiny import tiny_lm

ROOT = Path(__file__).parents[1]
FILE = Path(os.environ.get("LADIR_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"))
RECORDS = 7473

pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason=f"NOT TESTED on real data: {FILE} is not there; name GSM8K's train file in LADIR_GSM8K"
)


@pytest.fixture(scope="module")
def raw() -> list[dict[str, str]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(str(ROOT / "configs" / "gsm8k.yaml"), [f"data.train={FILE}"])


@pytest.fixture(scope="module")
def record_set(config: Config) -> RecordSet:
    return read_records(str(FILE), config.data)


@pytest.fixture(scope="module")
def tokenizer(raw: list[dict[str, str]]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 1,500 tokens with a begin token, as the pretrained ones have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in raw[:2000] for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def encoded(record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, config: Config) -> Sequence[EncodedRecord]:
    usable, bad = encode_records(record_set, tokenizer, config.data)
    assert not bad
    return usable


def test_no_record_is_lost_and_none_is_bad(
    record_set: RecordSet, encoded: Sequence[EncodedRecord], raw: list[dict[str, str]]
) -> None:
    assert record_set.total == len(record_set.records) == len(encoded) == len(raw) == RECORDS
    assert not record_set.bad
    for row, item in zip(raw, encoded, strict=True):
        assert item.record.question == row["question"].strip()
    assert [item.record.source.rpartition(":")[2] for item in encoded] == [str(i + 1) for i in range(RECORDS)]


def test_blocks_hold_the_whole_reasoning_and_the_answer_is_split_off(record_set: RecordSet, raw: list[dict[str, str]]) -> None:
    task = get_task("maths")
    for row, record in zip(raw, record_set.records, strict=True):
        reasoning, _, answer = row["answer"].rpartition("####")
        assert record.answer == answer.strip()
        assert "".join("".join(record.blocks).split()) == "".join(without_calculator(reasoning).split())
        assert not any("<<" in block or "####" in block for block in record.blocks)
        assert task.verdict(record.answer, record).right
    for one, other in itertools.pairwise(record_set.records):
        numbers = [float(record.answer.replace(",", "")) for record in (one, other)]
        assert task.verdict(other.answer, one) == (Verdict(True) if numbers[0] == numbers[1] else Verdict(False, "not equal"))


def without_calculator(text: str) -> str:
    """The text without its ``<<...>>`` annotations."""
    before, mark, rest = text.partition("<<")
    return before + without_calculator(rest.partition(">>")[2]) if mark else before


def test_tokens_decode_to_the_text_they_came_from(encoded: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase) -> None:
    for item in encoded[::10]:
        assert decode_text(tokenizer, item.question) == item.record.question
        assert [decode_text(tokenizer, block) for block in item.blocks] == list(item.record.blocks)
        assert decode_text(tokenizer, item.answer) == item.record.answer


def test_chains_read_back_as_they_were_written(record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    records = record_set.records[::20]
    pairs = chain_pairs(tokenizer, records, "####")
    for record, (prompt, completion) in zip(records, pairs, strict=True):
        assert prompt[0] == tokenizer.bos_token_id and completion[-1] == tokenizer.eos_token_id
        chain = parse_completion(decode_text(tokenizer, completion), config.data.answer_prefixes)
        assert chain.answer == record.answer
        assert "".join(chain.thoughts) == "".join(line.strip() for block in record.blocks for line in block.splitlines())


@pytest.mark.parametrize("mark", ["####", "The answer is"])
@pytest.mark.parametrize("between", ["\n", "\n\n", "\nQuestion: ", " Question: "])
def test_chains_that_run_on_to_another_question_read_back_as_the_first(record_set: RecordSet, mark: str, between: str) -> None:
    for record, following in itertools.pairwise(record_set.records[::20]):
        text = f"{completion_text(record, mark)}.{between}{following.question}\n{completion_text(following, mark)}."
        assert parse_completion(text, [mark, "The answer is"]).answer.rstrip(".") == record.answer


def vae_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Vae, VaeCollator]:
    settings = VaeSettings(latent_dim=8, latents_per_block=2)
    encoder, decoder = (Backbone(tiny_lm("qwen2", vocab=len(tokenizer), dtype=torch.float32)) for _ in range(2))
    eos = int(tokenizer.eos_token_id)
    return Vae(encoder, decoder, settings), VaeCollator(settings, range(len(tokenizer)), eos, seed=0)


def test_every_block_reaches_a_vae_batch(encoded: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase) -> None:
    _, collate = vae_of(tokenizer)
    blocks = [block for item in encoded for block in item.blocks]
    labels = 0
    for start in range(0, len(blocks), 512):
        rows = blocks[start : start + 512]
        batch = collate(rows, list(range(start, start + len(rows))))
        assert len(batch.decoder.index) == len(rows) and len(batch.decoder_ids) == sum(map(len, rows))
        labels += int((batch.labels != -100).sum())
    assert labels == sum(len(block) + 1 for block in blocks)


def in_parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [items[start : start + count] for start in range(0, len(items), count)]


def real_share(batches: Sequence[TensorBatch], layouts: Callable[[Any], Sequence[Layout]]) -> float:
    """Real tokens among all that run through a model."""
    return sum(batch.num_tokens for batch in batches) / sum(x.copy.numel() for batch in batches for x in layouts(batch))


def test_packed_batches_are_nearly_all_real_tokens(
    encoded: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase, config: Config
) -> None:
    """The micro batches of configs/gsm8k.yaml, as they would be and in rows of 1,024 tokens."""
    sample, budget = encoded[::10], 1024
    blocks = [block for item in sample for block in item.blocks]
    latents = [torch.zeros(len(item.blocks), config.vae.latents_per_block, 1) for item in sample]
    records = [LatentRecord(item.question, item.blocks, item.answer, z, z) for item, z in zip(sample, latents, strict=True)]
    denoising = DenoiserCollator(config.denoiser, np.zeros(1), np.ones(1), eos_id=1, seed=0, samples_per_step=64, prefix=(2,))
    _, encoding = vae_of(tokenizer)
    for pack_tokens, enough in ((0, False), (budget, True)):
        denoiser, vae = (replace(collate, pack_tokens=pack_tokens) for collate in (denoising, encoding))
        made = [denoiser(part, list(range(len(part)))) for part in in_parts(records, 8)]
        assert (real_share(made, lambda batch: [batch.layout]) > 0.95) == enough
        assert not enough or max(batch.layout.copy.shape[1] for batch in made) <= budget
        sentences = [vae(part, list(range(len(part)))) for part in in_parts(blocks, 32)]
        assert (real_share(sentences, lambda batch: [batch.encoder.layout, batch.decoder.layout]) > 0.95) == enough


def step(model: nn.Module, loss: torch.Tensor) -> None:
    """One optimizer step; every trainable parameter with a gradient moves."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss.backward()
    assert math.isfinite(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_one_training_step_of_every_model(
    tmp_path: Path, encoded: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase, config: Config
) -> None:
    sample = encoded[:12]
    blocks = [block for item in sample for block in item.blocks]
    vae, collate = vae_of(tokenizer)
    losses = vae(collate(blocks, list(range(len(blocks)))))
    step(vae, losses["reconstruction"] / len(blocks) + 1e-5 * losses["kl"])
    store = latent_store(tmp_path, vae, sample)
    settings = DenoiserSettings(draws=2, timestep_features=8)
    backbone = Backbone(tiny_lm("qwen2", vocab=len(tokenizer), dtype=torch.float32))
    denoiser = Denoiser(backbone, settings, 2, store.mean, store.std)
    denoiser.init_from_vae(vae)
    records: list[LatentRecord] = [store[i] for i in range(len(store))]
    eos, bos = int(tokenizer.eos_token_id), int(tokenizer.bos_token_id)
    mean, std = (np.asarray(value, dtype=np.float32) for value in (store.mean, store.std))
    batch = DenoiserCollator(settings, mean, std, eos, seed=0, samples_per_step=12, prefix=(bos,))(records, list(range(12)))
    assert batch.counts["stop"] == len(blocks)
    assert batch.counts["answer"] == sum(len(item.answer) + 1 for item in sample)
    assert torch.allclose(batch.z0.mean((0, 1)), torch.zeros(8), atol=1e-4)  # standardised over these very blocks
    terms = denoiser(batch)
    step(denoiser, sum((terms[name] / batch.counts[name] for name in ("flow", "answer", "stop")), torch.tensor(0.0)))
    ar = ArModel(Backbone(tiny_lm("qwen2", vocab=len(tokenizer), dtype=torch.float32)))
    pairs = list(chain_pairs(tokenizer, [item.record for item in sample], "####"))
    ar_batch = ArCollator()(pairs, list(range(12)))
    step(ar, ar(ar_batch)["text"] / ar_batch.counts["text"])


def latent_store(folder: Path, vae: Vae, sample: Sequence[EncodedRecord]) -> LatentStore:
    """The sample's latents as the encoding phase stores them."""
    rows = []
    for item in sample:
        mu, logvar = (value.numpy() for value in encode_sentences(vae, item.blocks))
        ids = {"question": item.question, "blocks": item.blocks, "answer": item.answer}
        rows.append({**ids, "mu": mu, "logvar": logvar})
    return write_latents(folder / "latents", rows, "test", LatentForm(8, 2))
