"""Weight files: who may read them, and what is said of files that are not whole, before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladir.errors import UnusableError
from ladir.models.weights import check_weights, sampled_fingerprint, save_tensors, weight_files
from tests.tiny import tiny_lm


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_lm(dtype=torch.float32).save_pretrained(str(tmp_path / "lm"), max_shard_size="8KB")
    return tmp_path / "lm"


def test_parts_without_their_index_are_told(sharded: Path) -> None:
    """transformers would ask for one whole file, which there never was."""
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UnusableError, match=r"index\.json is missing, without which the parts \(model-00001-of-\d+\.safeten.*copy"
    ):
        check_weights(sharded)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # a new file, and in place of another
            save_tensors({"x": torch.ones(3)}, tmp_path / "x.safetensors", {"format": "pt"})
            (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1, 1, 1]


def test_whole_weights_are_whole(sharded: Path, tmp_path: Path) -> None:
    assert len(weight_files(sharded)) > 2
    check_weights(sharded)
    tiny_lm().save_pretrained(str(tmp_path / "one"))
    check_weights(tmp_path / "one")
    check_weights(tmp_path)  # no safetensors: whoever loads it says so
    assert weight_files(tmp_path) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:30])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n")


def no_header(file: Path) -> None:
    file.write_bytes((4).to_bytes(8, "little") + b"[1] " + b"x" * 30)


def emptied(file: Path) -> None:
    save_file({"other": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"is cut short: \d+ of \d+ bytes; copy it again"),
        (cut_header, r"is cut short, or no safetensors file \(30 bytes\)"),
        (lambda file: file.write_bytes(b""), r"is cut short, or no safetensors file \(0 bytes\)"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"is too long: \d+ of \d+ bytes"),
        (pointer, "is a Git LFS pointer"),
        (no_header, "cannot be read"),
        (emptied, "has no tensor .* and model.safetensors.index.json says so"),
        (Path.unlink, "is missing, and model.safetensors.index.json names it"),
    ],
)
def test_the_file_that_is_not_whole_is_named(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    shard = weight_files(sharded)[1]
    damage(shard)
    with pytest.raises(UnusableError, match=f"{shard.name} {message}"):
        check_weights(sharded)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', "[]"])
def test_a_torn_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnusableError, match=r"model.safetensors.index.json cannot be read .*copy it again"):
        check_weights(sharded)


def test_a_sampled_fingerprint_tells_weights_apart_and_not_files(sharded: Path, tmp_path: Path) -> None:
    tiny_lm(dtype=torch.float32).save_pretrained(str(tmp_path / "whole"))
    assert sampled_fingerprint(sharded) == sampled_fingerprint(tmp_path / "whole")
    others = {"seed": tiny_lm(seed=1, dtype=torch.float32), "dtype": tiny_lm(dtype=torch.bfloat16)}
    for name, lm in others.items():
        lm.save_pretrained(str(tmp_path / name))
    prints = {sampled_fingerprint(tmp_path / name) for name in ("whole", *others)}
    assert len(prints) == 3
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
