"""Models that are asked, not trained: read straight onto their device, in the dtype they were saved in, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ladir.__main__ import main
from ladir.config import BackboneSettings, LoraSettings
from ladir.errors import UnusableError
from ladir.models import backbone
from ladir.models.backbone import Backbone, load_lm, with_lora
from ladir.models.folders import load_backbone, save_lm
from ladir.reasoner import Reasoner, usable_device
from tests.test_reasoner import tiny_reasoner
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


@pytest.fixture
def export(tmp_path: Path) -> Path:
    tiny_reasoner().save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("ladir.json", "export/ladir.json cannot be read"),
        ("heads.safetensors", "export/heads.safetensors cannot be read"),
        ("model.safetensors", "export/model.safetensors is cut short"),
        ("vae/ladir.json", "export/vae/ladir.json cannot be read"),
        ("vae/heads.safetensors", "export/vae/heads.safetensors cannot be read"),
        ("vae/model.safetensors", "export/vae/model.safetensors is cut short"),
        ("vae_encoder/heads.safetensors", "export/vae_encoder/heads.safetensors cannot be read"),
    ],
)
def test_a_file_that_is_cut_short_is_named(export: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut(export / file)
    with pytest.raises(UnusableError, match=message):
        Reasoner.from_pretrained(export, device="cpu")
    assert main(["a question", "--model", str(export), "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_that_are_cut_short_are_named(tmp_path: Path, file: str, asked: list[dict[str, Any]]) -> None:
    adapted = Backbone(with_lora(tiny_lm(dtype=torch.bfloat16), LoraSettings(rank=2)))
    adapted.lm.peft_config["default"].base_model_name_or_path = "base"
    save_lm(adapted, tmp_path / "adapter")
    cut(tmp_path / "adapter" / file)
    with pytest.raises(UnusableError, match=f"adapter/{file} cannot be read .*copy it again"):
        load_backbone(tmp_path / "adapter", SETTINGS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "group"), [("ladir.json", "sample"), ("ladir.json", "settings"), ("vae_encoder/ladir.json", "settings")]
)
def test_settings_of_another_version_are_named(export: Path, file: str, group: str) -> None:
    saved = json.loads((export / file).read_text())
    saved[group]["tempo"] = 3
    (export / file).write_text(json.dumps(saved))
    with pytest.raises(UnusableError, match=rf"{file}: unknown settings tempo: another version"):
        Reasoner.from_pretrained(export, device="cpu")


def test_heads_of_another_model_are_named(export: Path) -> None:
    saved = json.loads((export / "ladir.json").read_text())
    saved["latent_dim"] += 1
    (export / "ladir.json").write_text(json.dumps(saved))
    with pytest.raises(UnusableError, match=r"heads.safetensors does not fit (.|\n)*latent_mean(.|\n)*copy the folder again"):
        Reasoner.from_pretrained(export, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "bfloat16", torch.bfloat16])
def test_a_dtype_is_asked_for_by_name_or_as_torch_has_it(export: Path, dtype: str | torch.dtype) -> None:
    loaded = Reasoner.from_pretrained(export, device="cpu", dtype=dtype)
    assert str(loaded.denoiser.dtype).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "half"])
def test_a_dtype_that_models_do_not_run_in_is_refused(tmp_path: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(UnusableError, match="is not supported; valid: auto, bfloat16, float32"):
        Reasoner.from_pretrained(tmp_path, device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = f"device '{device}' cannot be used; valid: cpu"
    with pytest.raises(UnusableError, match=message):
        Reasoner.from_pretrained(tmp_path, device=device)
    for command in (["a question", "--model", str(tmp_path)], ["report", str(tmp_path)]):
        assert main([*command, "--device", device]) == 1
        assert message in capsys.readouterr().err
    assert usable_device("cpu") == torch.device("cpu")
