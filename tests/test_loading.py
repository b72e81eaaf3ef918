"""Models that are asked, not trained, are read straight onto their device and in the dtype they were saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ladir.config import BackboneSettings, LoraSettings
from ladir.models import backbone
from ladir.models.backbone import Backbone, load_lm, with_lora
from ladir.models.folders import load_backbone, save_lm
from tests.tiny import randomise_adapters, tiny_lm

GPU = torch.device("cuda", 1)
SETTINGS = BackboneSettings(dtype="bfloat16", attention="eager")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How transformers is asked for LMs; it gives tiny ones."""
    calls: list[dict[str, Any]] = []

    def from_pretrained(name: str, **arguments: Any) -> Any:
        calls.append({"name": name, **arguments})
        return tiny_lm(dtype=arguments["dtype"])

    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return calls


def test_a_device_takes_every_tensor_as_it_is_read(asked: list[dict[str, Any]]) -> None:
    load_lm(SETTINGS, "cuda", "folder", GPU)
    load_lm(SETTINGS, "cuda", "folder")  # to be trained: an engine places it
    load_lm(SETTINGS, "cpu", "folder", torch.device("cpu"))
    assert [call["device_map"] for call in asked] == [{"": GPU}, None, None]
    assert all(call["dtype"] == torch.bfloat16 for call in asked)


def test_adapters_and_what_they_stand_on_go_to_one_device(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = Backbone(with_lora(tiny_lm(dtype=torch.bfloat16), LoraSettings(rank=2)))
    randomise_adapters(adapted, seed=1)
    adapted.base.config._name_or_path = adapted.lm.peft_config["default"].base_model_name_or_path = "base"
    save_lm(adapted, tmp_path / "adapter")
    places: list[str] = []
    read = PeftModel.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        places.append(options["torch_device"])
        return read(*arguments, **options)

    monkeypatch.setattr(PeftModel, "from_pretrained", from_pretrained)
    loaded = load_backbone(tmp_path / "adapter", SETTINGS, GPU)
    assert (asked[0]["name"], asked[0]["device_map"], places) == ("base", {"": GPU}, ["cpu"])  # the tiny one lies on the CPU
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
