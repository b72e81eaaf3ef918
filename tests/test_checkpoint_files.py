"""The files of a checkpoint: whatever is written can be read again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from training.runtime.checkpoint import Shards, _write_shard


def test_a_model_without_buffers_leaves_no_file_for_them(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    kinds = [("buffer", {}, {}), ("master", {"weight": weight}, {"weight": "0/6"})]
    engine: Any = SimpleNamespace(world=SimpleNamespace(rank=0), state=lambda: iter(kinds))
    assert list(_write_shard(tmp_path, engine)) == ["rank-00000-master.safetensors"]
    shards = Shards(tmp_path)
    shards.check({"weight": 6})
    shards.read("master", "weight", 2, out := torch.zeros(3))
    assert torch.equal(out, weight[2:5])
