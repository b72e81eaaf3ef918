"""The latent store: what goes in comes out, statistics are exact, torn or foreign stores are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ladir.config import DataSettings, DenoiserSettings
from ladir.config.loader import load_config
from ladir.data.columns import TOKENS, RecordStore, list_column, token_columns
from ladir.data.latent_parts import is_whole, join_parts, write_latents, write_part
from ladir.data.latents import LatentForm, LatentStore
from ladir.data.token_store import Store, TokenStore
from ladir.data.tokenizing import write_records
from ladir.errors import UnusableError
from ladir.layout import template
from ladir.tokens import build_word_tokenizer
from tests.tiny import collator, random_records, tiny_denoiser, tiny_lm
from training.phases import denoiser as phase
from training.runtime.distributed import World
from training.runtime.run import RunFolder

DIM, PER_BLOCK = 3, 2
FORM = LatentForm(DIM, PER_BLOCK)


def make_rows(count: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """Rows ``first`` to ``count`` of a training set in which record i depends on i only."""
    for i in range(first, count):
        rng = np.random.default_rng(i)
        blocks = [list(range(b + 1)) for b in range(1 + i % 3)]
        shape = (len(blocks), PER_BLOCK, DIM)
        yield {
            "question": [i, 2],
            "blocks": blocks,
            "answer": list(range(i % 4 + 1)),
            "mu": rng.normal(5.0, 2.0, shape).astype(np.float32),
            "logvar": rng.normal(size=shape).astype(np.float32),
        }


def write(folder: Path, count: int = 7, fingerprint: str = "vae-1") -> LatentStore:
    return write_latents(folder, make_rows(count), fingerprint, FORM)


@pytest.mark.parametrize("count", [1, 7, 2500])
def test_records_come_back_exactly(tmp_path: Path, count: int) -> None:
    write(tmp_path / "latents", count)
    store = LatentStore.open(tmp_path / "latents")
    assert (len(store), store.fingerprint, store.latent_dim, store.latents_per_block) == (count, "vae-1", DIM, PER_BLOCK)
    for i, row in enumerate(make_rows(count)):
        record = store[i]
        assert (record.question, record.blocks, record.answer) == (row["question"], row["blocks"], row["answer"])
        assert record.mu.shape == (len(row["blocks"]), PER_BLOCK, DIM)
        assert torch.equal(record.mu, torch.from_numpy(row["mu"]))
        assert record.logvar is not None and torch.equal(record.logvar, torch.from_numpy(row["logvar"]))
    for index in (-1, count):
        with pytest.raises(IndexError, match=f"record {index} of {count}"):
            store[index]


def test_statistics_are_those_of_all_means(tmp_path: Path) -> None:
    store = write(tmp_path / "latents", 100)
    everything = np.concatenate([row["mu"].reshape(-1, DIM) for row in make_rows(100)]).astype(np.float64)
    torch.testing.assert_close(store.mean, torch.from_numpy(everything.mean(0)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(store.std, torch.from_numpy(everything.std(0)).float(), rtol=1e-6, atol=0)
    assert store.num_latents == len(everything)


def test_statistics_keep_their_precision_far_from_zero(tmp_path: Path) -> None:
    rows = [{**row, "mu": row["mu"] + np.float32(4096.0)} for row in make_rows(100)]
    store = write_latents(tmp_path / "latents", rows, "f", FORM)
    everything = np.concatenate([row["mu"].reshape(-1, DIM) for row in rows]).astype(np.float64)
    torch.testing.assert_close(store.std, torch.from_numpy(everything.std(0)).float(), rtol=1e-6, atol=0)


def test_constant_dimensions_are_not_blown_up(tmp_path: Path) -> None:
    rows = [{**row, "mu": np.full_like(row["mu"], 0.1)} for row in make_rows(5)]
    store = write_latents(tmp_path / "latents", rows, "f", FORM)
    assert torch.equal(store.std, torch.ones(DIM))
    torch.testing.assert_close(store.mean, torch.full((DIM,), 0.1))


def test_records_can_be_changed_without_changing_the_store(tmp_path: Path) -> None:
    store = write(tmp_path / "latents")
    before = store[0].mu.clone()
    store[0].mu.add_(1.0)
    assert torch.equal(store[0].mu, before)


def write_parts(folder: Path, count: int, size: int) -> list[int]:
    """Parts of ``size`` records; the numbers of their first ones."""
    firsts = list(range(0, count, size))
    for first in reversed(firsts):
        write_part(folder, first, make_rows(min(first + size, count), first), "vae-1", FORM)
    return firsts


@pytest.mark.parametrize("size", [1, 3, 10, 11])
def test_parts_behind_an_index_are_what_one_file_is(tmp_path: Path, size: int) -> None:
    whole = write(tmp_path / "whole", 10)
    parts = tmp_path / "latents.parts"
    joined = join_parts(parts, write_parts(parts, 10, size), tmp_path / "joined")
    assert len(joined) == 10 and joined.num_latents == whole.num_latents and not parts.exists()
    for one, two in zip(joined, whole, strict=True):
        assert (one.question, one.blocks, one.answer) == (two.question, two.blocks, two.answer)
        assert torch.equal(one.mu, two.mu) and one.logvar is not None and torch.equal(one.logvar, two.logvar)
    torch.testing.assert_close(joined.mean, whole.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(joined.std, whole.std, rtol=1e-6, atol=0)


def test_joining_refuses_gaps_repeats_and_strangers(tmp_path: Path) -> None:
    firsts = write_parts(tmp_path / "p", 9, 3)
    for wrong, problem in (([0, 6], "record 3 is missing"), ([0, 0, 3], "record 0 is there twice"), ([], "no parts to join")):
        with pytest.raises(UnusableError, match=problem):
            join_parts(tmp_path / "p", wrong, tmp_path / "joined")
    for stranger in ({"fingerprint": "g"}, {"form": LatentForm(DIM, PER_BLOCK, "float16")}):
        write_part(tmp_path / "p", 3, make_rows(6, 3), **{"fingerprint": "vae-1", "form": FORM, **stranger})
        with pytest.raises(UnusableError, match="made by the VAE vae-1 as"):
            join_parts(tmp_path / "p", firsts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_part_is_known_to_be_whole(tmp_path: Path) -> None:
    write_parts(tmp_path, 4, 2)
    assert is_whole(tmp_path, 0) and is_whole(tmp_path, 2) and not is_whole(tmp_path, 4)
    arrow = tmp_path / "000000002.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-1])
    (tmp_path / "000000000.json").write_text("{")
    assert not is_whole(tmp_path, 0) and not is_whole(tmp_path, 2)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_the_bytes_keep_latents_to_a_rounding(tmp_path: Path, dtype: str, bits: int) -> None:
    """What is read is the nearest number of the dtype, in float32; statistics are of that."""
    exact = write(tmp_path / "exact", 40)
    store = write_latents(tmp_path / "half", make_rows(40), "f", LatentForm(DIM, PER_BLOCK, dtype, logvar=False))
    means = []
    for one, two in zip(store, exact, strict=True):
        assert one.logvar is None and one.mu.dtype == torch.float32
        assert torch.equal(one.mu, two.mu.to(getattr(torch, dtype)).float())
        assert ((one.mu - two.mu).abs() <= two.mu.abs() * 2.0**-bits).all()
        means.append(one.mu.flatten(0, 1))
    torch.testing.assert_close(store.mean, torch.cat(means).double().mean(0).float(), rtol=1e-6, atol=0)
    with pytest.raises(UnusableError, match=r"record 0: mu reaches 1e\+05, too much for latents.dtype=float16; take bfloat16"):
        large = [{**row, "mu": np.full_like(row["mu"], 1e5)} for row in make_rows(1)]
        write_latents(tmp_path / "large", large, "f", LatentForm(DIM, PER_BLOCK, "float16"))


def write_as_before(folder: Path, count: int) -> None:
    """A store as it was before there were parts and dtypes."""
    rows = list(make_rows(count))
    floats = pa.list_(pa.float32())
    schema = pa.schema([("index", pa.int64()), *TOKENS, ("mu", floats), ("logvar", floats)])
    columns = token_columns(*([row[name] for row in rows] for name in ("question", "blocks", "answer")))
    columns |= {name: list_column([row[name].reshape(-1) for row in rows], np.float32) for name in ("mu", "logvar")}
    columns["index"] = pa.array(range(count), pa.int64())
    folder.mkdir()
    with pa.OSFile(str(folder / "latents.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema))
    stats = {
        "fingerprint": "vae-1", "latent_dim": DIM, "latents_per_block": PER_BLOCK, "num_records": count,
        "num_latents": PER_BLOCK * sum(len(row["blocks"]) for row in rows),
        "arrow_bytes": (folder / "latents.arrow").stat().st_size, "mean": [0.5] * DIM, "std": [2.0] * DIM,
    }  # fmt: skip
    (folder / "stats.json").write_text(json.dumps(stats))


def test_a_store_of_an_older_version_is_read(tmp_path: Path) -> None:
    write_as_before(tmp_path / "old", 5)
    old, new = LatentStore.open(tmp_path / "old"), write(tmp_path / "new", 5)
    assert (len(old), old.fingerprint, old.num_latents, old.mean.tolist()) == (5, "vae-1", new.num_latents, [0.5] * DIM)
    for one, two in zip(old, new, strict=True):
        assert (one.question, one.blocks, one.answer) == (two.question, two.blocks, two.answer)
        assert torch.equal(one.mu, two.mu) and one.logvar is not None and torch.equal(one.logvar, two.logvar)
    (tmp_path / "old" / "latents.arrow").write_bytes(b"")
    with pytest.raises(UnusableError, match="damaged: 0 bytes instead of"):
        LatentStore.open(tmp_path / "old")


def test_the_paper_s_latents_take_less_than_a_third_of_what_they_took(tmp_path: Path) -> None:
    """Eight blocks of four latents of 512 each, against means and log-variances in float32."""
    rng = np.random.default_rng(0)
    shape = (8, 4, 512)
    rows = [
        {"question": [1] * 60, "blocks": [[2] * 22] * 8, "answer": [3] * 5}
        | dict.fromkeys(("mu", "logvar"), rng.normal(size=shape))
        for _ in range(12)
    ]
    sizes = {}
    for name, form in {"before": LatentForm(512, 4), "now": LatentForm(512, 4, "bfloat16", logvar=False)}.items():
        store = write_latents(tmp_path / name, rows, "f", form)
        sizes[name] = sum(file.stat().st_size for file in store.folder.glob("*.arrow"))
    assert sizes["now"] < 0.3 * sizes["before"]


def test_groups_of_the_same_question_are_found(tmp_path: Path) -> None:
    questions = [[1], [2], [1], [], [2], [1], [3]]
    rows = [{**row, "question": question} for row, question in zip(make_rows(7), questions, strict=True)]
    assert write_latents(tmp_path / "latents", rows, "f", FORM).same_question() == [[0, 2, 5], [1, 4]]
    assert write_latents(tmp_path / "latents", rows[:2], "f", FORM).same_question() == []


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "latents")
    store.check_fingerprint("vae-1")
    with pytest.raises(ValueError, match=r"VAE vae-1, not by vae-2; run training/encode_latents.py"):
        store.check_fingerprint("vae-2")


def test_missing_and_torn_stores_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no latent store there.*encode_latents"):
        LatentStore.open(tmp_path / "latents")
    write(tmp_path / "latents", 50)
    arrow, stats = tmp_path / "latents" / "000000000.arrow", tmp_path / "latents" / "stats.json"
    data, text = arrow.read_bytes(), stats.read_text()
    arrow.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=rf"damaged: {len(data) - 100} bytes instead of {len(data)}; run"):
        LatentStore.open(tmp_path / "latents")
    arrow.write_bytes(b"\0" * len(data))
    with pytest.raises(ValueError, match="damaged"):
        LatentStore.open(tmp_path / "latents")
    arrow.write_bytes(data)
    for broken in (text[:-20], "{}", json.dumps({**json.loads(text), "num_records": 51})):
        stats.write_text(broken)
        with pytest.raises(ValueError, match=r"damaged|50 records instead of 51"):
            LatentStore.open(tmp_path / "latents")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(5, np.float32)}, "record 3: mu has 5 values; 1 blocks of 2 latents of size 3 need 6"),
        ({"logvar": np.zeros(7, np.float32)}, "record 3: logvar has 7 values"),
        ({"mu": np.full(6, np.nan, np.float32)}, "record 3: mu is not finite"),
        ({"logvar": np.full(6, -np.inf, np.float32)}, "record 3: logvar is not finite"),
        ({"blocks": [], "mu": np.zeros(0, np.float32)}, "at least one block"),
    ],
)
def test_a_bad_row_is_refused_and_the_old_store_stays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "latents", 4)
    rows = [row if place != 3 else {**row, **change} for place, row in enumerate(make_rows(6))]
    with pytest.raises(ValueError, match=message):
        write_latents(tmp_path / "latents", rows, "vae-2", FORM)
    assert LatentStore.open(tmp_path / "latents").fingerprint == "vae-1"
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]


def test_writing_again_replaces_and_an_open_store_stays_readable(tmp_path: Path) -> None:
    old = write(tmp_path / "latents", 6)
    write(tmp_path / "latents", 2, "vae-2")
    assert old[5].question == [5, 2]
    new = LatentStore.open(tmp_path / "latents")
    assert (len(new), new.fingerprint) == (2, "vae-2")
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]


def test_a_link_to_a_store_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "latents").symlink_to(tmp_path / "disk" / "latents")
    for count in (3, 2, 1):
        assert len(write(tmp_path / "latents", count)) == len(LatentStore.open(tmp_path / "disk" / "latents")) == count
    assert (tmp_path / "latents").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["latents"]


def test_the_longest_chain_is_known(tmp_path: Path) -> None:
    store = write(tmp_path / "latents", 7)
    assert [store.num_blocks(i) for i in range(7)] == [len(record.blocks) for record in store]
    assert store.most_blocks == max(len(store[i].blocks) for i in range(7))
    for span in (1, 2, 4):
        sizes = []
        for record in store:
            words, last = [len(block) for block in record.blocks], (len(record.blocks) - 1) // span * span
            sizes.append([len(record.question), len(record.answer), len(words), sum(words), sum(words[last:])])
        assert store.sizes(span).tolist() == sizes


@pytest.mark.parametrize("context", ["latents", "text"])
@pytest.mark.parametrize(("draws", "span"), [(1, 1), (3, 2)])
def test_a_record_is_as_long_as_the_pass_that_it_is_trained_in(draws: int, span: int, context: str, tmp_path: Path) -> None:
    write(tmp_path / "latents", 7)
    store = LatentStore.open(tmp_path / "latents", DenoiserSettings(draws=draws, span=span, context=context))
    for index, record in enumerate(store):
        words = list(map(len, record.blocks)) if context == "text" else None
        question, answer = len(record.question), len(record.answer)
        layout = template(question, len(record.blocks), PER_BLOCK, draws, answer, span, sentences=words)
        assert store.length(index) == len(layout)


def test_token_store_and_latent_store_say_their_sizes_alike(tmp_path: Path) -> None:
    """The same records in both: what a consumer sees through their common interface."""
    words, rows = [f"w{i}" for i in range(40)], list(make_rows(7))
    texts = [[" ".join(words[i] for i in ids) for ids in (row["question"], *row["blocks"], row["answer"])] for row in rows]
    file = tmp_path / "train.jsonl"
    lines = [{"input": q, "output": "\n".join([*blocks, f"#### {a}"])} for q, *blocks, a in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DataSettings(answer_prefixes=["####"])
    write_records(tmp_path / "tokens", [str(file)], settings, build_word_tokenizer([*words, "\n"]), 1)
    stores: list[RecordStore] = [
        TokenStore(Store(tmp_path / "tokens", [str(file)])),
        LatentStore.open(write(tmp_path / "latents", 7).folder),
    ]
    for store in stores:
        assert (len(store), store.most_blocks, store.longest_question) == (7, 3, 2)
        assert [len(store[i]) for i in range(7)] == [sum(map(len, [r["question"], *r["blocks"], r["answer"]])) for r in rows]
        assert store.lengths().tolist() == [store.length(i) for i in range(7)]
    tokens, latents = stores
    assert tokens.lengths().tolist() == [len(tokens[i]) for i in range(7)]
    for span in (1, 2):
        assert tokens.sizes(span).tolist() == latents.sizes(span).tolist()


@pytest.mark.parametrize("context", ["latents", "text"])
def test_ranks_share_records_by_what_the_denoiser_reads(context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"denoiser.context={context}", "rollout.enabled=false", "data.validation=held-out.jsonl"]
    config = load_config(None, [f"run.folder={tmp_path}", *settings])
    for name in ("train", "validation"):
        write(RunFolder(config).latents / name, 3)
    monkeypatch.setattr(phase, "fingerprint", lambda *of: "vae-1")
    found = phase.stored_latents(config, RunFolder(config), World(0, 1, 0, torch.device("cpu")))
    assert [store is not None and store.reader for store in found] == [config.denoiser] * 2 and config.denoiser.context == context


def test_the_denoiser_s_losses_on_half_the_bytes_are_the_same_to_a_fraction_of_the_noise(tmp_path: Path) -> None:
    """Against what other draws of noise and times change them by."""
    records = random_records(40, dim=DIM, latents=PER_BLOCK)
    rows = [{**vars(record), "mu": record.mu.numpy(), "logvar": None} for record in records]
    denoiser = tiny_denoiser(tiny_lm(dtype=torch.float32), dim=DIM, latents=PER_BLOCK)

    def losses(dtype: str, seed: int) -> torch.Tensor:
        store = write_latents(tmp_path / dtype, rows, "f", LatentForm(DIM, PER_BLOCK, dtype, logvar=False))
        batch = collator(denoiser, seed)(list(store), list(range(len(store))))
        with torch.no_grad():
            found = denoiser(batch)
        return torch.stack([found[term] / batch.counts[term] for term in ("flow", "answer", "stop")])

    exact, other = losses("float32", 11), losses("float32", 12)
    for dtype in ("bfloat16", "float16"):
        assert ((losses(dtype, 11) - exact).abs() < 0.05 * (other - exact).abs()).all()
