"""The files of a checkpoint: whatever is written can be read again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from training.runtime.checkpoint import MANIFEST, STATE, Shards, _write_shard
from training.runtime.files import write_json


def test_a_model_without_buffers_leaves_no_file_for_them(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    kinds = [("buffer", {}, {}), ("master", {"weight": weight}, {"weight": "0/6"})]
    engine: Any = SimpleNamespace(world=SimpleNamespace(rank=0), state=lambda: iter(kinds))
    entries = _write_shard(tmp_path, engine)
    assert list(entries) == ["rank-00000-master.safetensors"]
    write_json(tmp_path / MANIFEST, {**entries, STATE: {}})
    (tmp_path / "rank-00001-master.safetensors").write_text("not in the manifest")
    shards = Shards(tmp_path)
    shards.check({"weight": 6})
    shards.read("master", "weight", 2, out := torch.zeros(3))
    assert torch.equal(out, weight[2:5])
