"""``backbone.dtype=auto``: bfloat16 only where the device multiplies it in hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ladir.config import BackboneSettings
from ladir.models.backbone import choose_dtype
from ladir.models.exports import _dtype_here
from ladir.models.loading import new_lm
from ladir.models.store import HEADS_FILE

SCRATCH = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx2": True, "avx512_bf16": True}, "bfloat16"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_auto_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capabilities: dict[str, object], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", "cpu") == dtype
    assert choose_dtype("auto", "cuda") == "bfloat16"
    assert choose_dtype("float32", "cuda") == "float32" and choose_dtype("bfloat16", "cpu") == "bfloat16"
    lm = new_lm(BackboneSettings(scratch=SCRATCH), 20, {}, "cpu")
    assert str(lm.dtype) == f"torch.{dtype}"
    for saved, expected in ((torch.bfloat16, dtype), (torch.float32, "float32")):
        save_file({"marks.weight": torch.zeros(4, 2, dtype=saved)}, tmp_path / HEADS_FILE)
        assert _dtype_here(tmp_path, torch.device("cpu")) == expected
