"""The latent store: what goes in comes out, statistics are exact, torn or foreign stores are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ladir.data.latents import LatentStore

DIM, PER_BLOCK = 3, 2


def make_rows(count: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
    """Rows ``rank, rank + world, ...`` of a training set in which record i depends on i only."""
    for i in range(rank, count, world):
        rng = np.random.default_rng(i)
        blocks = [list(range(b + 1)) for b in range(1 + i % 3)]
        shape = (len(blocks), PER_BLOCK, DIM)
        yield {
            "index": i,
            "question": [i, 2],
            "blocks": blocks,
            "answer": list(range(i % 4 + 1)),
            "mu": rng.normal(5.0, 2.0, shape).astype(np.float32),
            "logvar": rng.normal(size=shape).astype(np.float32),
        }


def write(folder: Path, count: int = 7, fingerprint: str = "vae-1") -> LatentStore:
    return LatentStore.write(folder, make_rows(count), fingerprint, DIM, PER_BLOCK)


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
        assert torch.equal(record.logvar, torch.from_numpy(row["logvar"]))
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
    store = LatentStore.write(tmp_path / "latents", rows, "f", DIM, PER_BLOCK)
    everything = np.concatenate([row["mu"].reshape(-1, DIM) for row in rows]).astype(np.float64)
    torch.testing.assert_close(store.std, torch.from_numpy(everything.std(0)).float(), rtol=1e-6, atol=0)


def test_constant_dimensions_are_not_blown_up(tmp_path: Path) -> None:
    rows = [{**row, "mu": np.full_like(row["mu"], 0.1)} for row in make_rows(5)]
    store = LatentStore.write(tmp_path / "latents", rows, "f", DIM, PER_BLOCK)
    assert torch.equal(store.std, torch.ones(DIM))
    torch.testing.assert_close(store.mean, torch.full((DIM,), 0.1))


def test_records_can_be_changed_without_changing_the_store(tmp_path: Path) -> None:
    store = write(tmp_path / "latents")
    before = store[0].mu.clone()
    store[0].mu.add_(1.0)
    assert torch.equal(store[0].mu, before)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_merging_does_not_depend_on_the_number_of_ranks(tmp_path: Path, world: int) -> None:
    whole = write(tmp_path / "whole", 10)
    parts = [
        LatentStore.write(tmp_path / f"part{rank}", make_rows(10, rank, world), "vae-1", DIM, PER_BLOCK).folder
        for rank in range(world)
    ]
    merged = LatentStore.merge(list(reversed(parts)), tmp_path / "merged")
    assert [merged[i].question for i in range(10)] == [whole[i].question for i in range(10)]
    assert torch.equal(merged.mean, whole.mean) and torch.equal(merged.std, whole.std)
    assert (merged.folder / "latents.arrow").read_bytes() == (whole.folder / "latents.arrow").read_bytes()


def test_a_rank_may_have_nothing_to_encode(tmp_path: Path) -> None:
    parts = [LatentStore.write(tmp_path / f"p{r}", make_rows(1, r, 2), "f", DIM, PER_BLOCK) for r in range(2)]
    assert len(parts[1]) == 0
    assert len(LatentStore.merge([p.folder for p in parts], tmp_path / "merged")) == 1


def test_merging_refuses_gaps_repeats_and_strangers(tmp_path: Path) -> None:
    one, other = (LatentStore.write(tmp_path / f"p{r}", make_rows(9, r, 3), "f", DIM, PER_BLOCK).folder for r in range(2))
    with pytest.raises(ValueError, match="record 2 is missing"):
        LatentStore.merge([one, other], tmp_path / "merged")
    with pytest.raises(ValueError, match="record 0 is there twice"):
        LatentStore.merge([one, one], tmp_path / "merged")
    with pytest.raises(ValueError, match="made by the VAE"):
        LatentStore.merge([one, write(tmp_path / "x", fingerprint="g").folder], tmp_path / "merged")
    with pytest.raises(ValueError, match="no parts to merge"):
        LatentStore.merge([], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "latents")
    store.check_fingerprint("vae-1")
    with pytest.raises(ValueError, match=r"VAE vae-1, not by vae-2; run training/encode_latents.py"):
        store.check_fingerprint("vae-2")


def test_missing_and_torn_stores_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no latent store there.*encode_latents"):
        LatentStore.open(tmp_path / "latents")
    write(tmp_path / "latents", 50)
    arrow, stats = tmp_path / "latents" / "latents.arrow", tmp_path / "latents" / "stats.json"
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
    rows = [row if row["index"] != 3 else {**row, **change} for row in make_rows(6)]
    with pytest.raises(ValueError, match=message):
        LatentStore.write(tmp_path / "latents", rows, "vae-2", DIM, PER_BLOCK)
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
    assert store.most_blocks == max(len(store[i].blocks) for i in range(7))
