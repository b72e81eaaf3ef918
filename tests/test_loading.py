"""Models that are asked, not trained: read straight onto their device, in the dtype they were saved in, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ladir.__main__ import main
from ladir.config import BackboneSettings, Config, LoraSettings
from ladir.errors import UnusableError
from ladir.models import loading
from ladir.models.adapters import with_lora
from ladir.models.backbone import Backbone
from ladir.models.card import CARD_FILE
from ladir.models.folders import load_backbone, save_lm
from ladir.models.loading import load_lm
from ladir.reasoner import Reasoner, usable_device
from ladir.tokens import PROBE_FILE, build_word_tokenizer, check_vocabulary, encode_text, load_tokenizer, save_tokenizer
from tests.test_reasoner import tiny_reasoner, tokenizer
from tests.tiny import VOCAB, randomise_adapters, tiny_denoiser, tiny_lm, tiny_vae
from training.phases.ar import ar_phase
from training.phases.denoiser import denoiser_phase
from training.phases.vae import vae_phase
from training.runtime.distributed import World

GPU = torch.device("cuda", 1)
SETTINGS = BackboneSettings(dtype="bfloat16", attention="eager")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How transformers is asked for LMs; it gives tiny ones."""
    calls: list[dict[str, Any]] = []

    def from_pretrained(name: str, **arguments: Any) -> Any:
        calls.append({"name": name, **arguments})
        return tiny_lm(dtype=arguments["dtype"]), {"missing_keys": []}

    monkeypatch.setattr(loading, "check_lm", lambda *_, **__: None)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
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
        ("heads.safetensors", "export/heads.safetensors is cut short"),
        ("model.safetensors", "export/model.safetensors is cut short"),
        ("vae/ladir.json", "export/vae/ladir.json cannot be read"),
        ("vae/heads.safetensors", "export/vae/heads.safetensors is cut short"),
        ("vae/model.safetensors", "export/vae/model.safetensors is cut short"),
        ("vae_encoder/heads.safetensors", "export/vae_encoder/heads.safetensors is cut short"),
    ],
)
def test_a_file_that_is_cut_short_is_named(export: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut(export / file)
    with pytest.raises(UnusableError, match=message):
        Reasoner.from_pretrained(export, device="cpu")
    assert main(["a question", "--model", str(export), "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [("adapter_config.json", "cannot be read .*copy it again"), ("adapter_model.safetensors", "is cut short")],
)
def test_adapters_that_are_cut_short_are_named_before_the_lm_is_read(
    tmp_path: Path, file: str, message: str, asked: list[dict[str, Any]]
) -> None:
    adapted = Backbone(with_lora(tiny_lm(dtype=torch.bfloat16), LoraSettings(rank=2)))
    adapted.lm.peft_config["default"].base_model_name_or_path = "base"
    save_lm(adapted, tmp_path / "adapter")
    cut(tmp_path / "adapter" / file)
    with pytest.raises(UnusableError, match=f"adapter/{file} {message}"):
        load_backbone(tmp_path / "adapter", SETTINGS, torch.device("cpu"))
    assert not asked


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


# --- LMs that cannot be trained: refused before weights and data are read -----------------------------------------------


@pytest.fixture
def lm_folder(tmp_path: Path) -> Path:
    """A whole LM with its tokenizer."""
    tokenizer = build_word_tokenizer(str(number) for number in range(VOCAB - 3))
    save_lm(Backbone(tiny_lm(dtype=torch.float32)), tmp_path / "lm")
    save_tokenizer(tokenizer, tmp_path / "lm")
    return tmp_path / "lm"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace weights (__ for a dot), or leave them out."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."))
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, file, metadata={"format": "pt"})


def refusal(folder: Path, **settings: Any) -> str:
    """What every phase that starts from an LM says of it, although there are no data either."""
    config = Config()
    config.backbone = BackboneSettings(name_or_path=str(folder), dtype="float32", **settings)
    config.data.train = str(folder / "there are no data")
    messages = set()
    for phase in (vae_phase, ar_phase, denoiser_phase):
        with pytest.raises(UnusableError) as refused:
            phase(config, World(0, 1, 0, torch.device("cpu")))
        messages.add(str(refused.value))
    [message] = messages
    assert "\n" not in message
    return message


def test_missing_weights_are_named(lm_folder: Path) -> None:
    change(lm_folder, lm_head__weight=None)
    assert "lacks weights, which would start from random ones: lm_head.weight; copy it again" in refusal(lm_folder)
    change(lm_folder, **{f"model__layers__{i}__mlp__{part}_proj__weight": None for i in (0, 1) for part in ("up", "gate")})
    layer = "model.layers.0.mlp"
    assert f"lm_head.weight, {layer}.gate_proj.weight, {layer}.up_proj.weight and 2 more; copy" in refusal(lm_folder)
    with pytest.raises(UnusableError, match="lacks weights"):
        load_lm(SETTINGS, "cpu", str(lm_folder))


def test_a_head_that_is_the_embedding_is_not_missed(lm_folder: Path) -> None:
    change(lm_folder, lm_head__weight=None)
    config = json.loads((lm_folder / "config.json").read_text())
    (lm_folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    lm = load_lm(SETTINGS, "cpu", str(lm_folder))
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_weights_of_other_sizes_are_named(lm_folder: Path) -> None:
    change(lm_folder, model__norm__weight=torch.ones(5), lm_head__weight=torch.ones(VOCAB + 2, 16))
    assert f"lm_head.weight is {VOCAB + 2}x16 instead of {VOCAB}x16, model.norm.weight is 5 instead of 16" in refusal(lm_folder)


def test_weights_that_nobody_asked_for_are_warned_of(lm_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(lm_folder / "model.safetensors")
    save_file({**weights, "model.layers.2.mlp.up_proj.weight": torch.ones(2)}, lm_folder / "model.safetensors")
    load_lm(SETTINGS, "cpu", str(lm_folder))
    assert "left out: model.layers.2.mlp.up_proj.weight" in caplog.text


def test_ids_behind_the_embedding_are_refused(lm_folder: Path) -> None:
    tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(lm_folder)))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save_tokenizer(tokenizer, lm_folder)
    message = refusal(lm_folder)
    assert f"whose ids end at {VOCAB - 1}: '[PAD]' ({VOCAB}); set pad_token to a token that it has" in message
    tokenizer.add_tokens([f"word{i}" for i in range(4)])
    save_tokenizer(tokenizer, lm_folder)
    assert f"'word1' ({VOCAB + 2}) and 2 more; take the LM's own tokenizer" in refusal(lm_folder)


def test_special_tokens_that_no_text_has_may_lie_behind_the_embedding(lm_folder: Path) -> None:
    tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(lm_folder)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, VOCAB, "lm")
    assert max(encode_text(tokenizer, "1 <image> 2")) < VOCAB


def test_other_faults_are_one_line_too(lm_folder: Path) -> None:
    lora = LoraSettings(rank=2, targets=["q_proj", "qkv_proj"])
    assert "backbone.lora.targets: qkv_proj: no such linear layer" in refusal(lm_folder, lora=lora)
    config = json.loads((lm_folder / "config.json").read_text())
    (lm_folder / "config.json").write_text(json.dumps({**config, "pad_token_id": VOCAB}))
    assert f"has pad_token_id={VOCAB} in its config.json" in refusal(lm_folder)
    (lm_folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "(mamba) cannot be used: its layers carry state" in refusal(lm_folder)
    (lm_folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing\nof the kind"}))
    assert "cannot be loaded: " in refusal(lm_folder)
    nowhere = refusal(lm_folder / "models" / "base")
    assert "no such folder (looked in" in nowhere and "correct backbone.name_or_path, or make it first" in nowhere


def test_a_padding_token_without_an_embedding_is_never_looked_up() -> None:
    reasoner = tiny_reasoner()
    questions = ["1 2 3", "1"]
    before = reasoner.generate(questions, seed=1)
    reasoner.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert reasoner.tokenizer.pad_token_id >= reasoner.denoiser.backbone.vocab_size
    after = reasoner.generate(questions, seed=1)
    assert all(torch.equal(a[0].latents, b[0].latents) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("scratch", "message"),
    [
        ({"model_type": "mamba"}, "'backbone.scratch' (mamba) cannot be used: its layers carry state"),
        ({"model_type": "lama"}, "backbone.scratch describes no LM: Unrecognized model identifier: lama"),
        ({"model_type": "llama", "hidden_size": "wide"}, "backbone.scratch describes no LM"),
        ({"hidden_size": 16}, "backbone.scratch needs model_type"),
    ],
)
def test_a_new_lm_is_looked_at_before_the_data(scratch: dict[str, Any], message: str, lm_folder: Path) -> None:
    config = Config()
    config.backbone, config.ar.from_scratch = BackboneSettings(tokenizer=str(lm_folder), scratch=scratch), True
    config.data.train = str(lm_folder / "there are no data")
    with pytest.raises(UnusableError) as refused:
        ar_phase(config, World(0, 1, 0, torch.device("cpu")))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("adapted", [False, True])
def test_every_file_that_is_missing_is_named_before_an_lm_is_loaded(
    tmp_path: Path, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of an export's files but what can be done without."""
    folder, lora = tmp_path / "export", LoraSettings(rank=2) if adapted else None
    lm = tiny_lm(dtype=torch.float32)
    lm.save_pretrained(str(tmp_path / "base"))
    lm.config._name_or_path = str(tmp_path / "base")
    denoiser, vae = tiny_denoiser(lm, lora=lora), tiny_vae(dtype=torch.float32)
    if adapted:
        denoiser.backbone.lm.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    Reasoner(denoiser, vae.thought_decoder, tokenizer(), encoder=vae).save_pretrained(folder)
    Reasoner.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded an LM"))
    spare = ("generation_config.json", PROBE_FILE, CARD_FILE)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in spare]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(UnusableError) as error:
            Reasoner.from_pretrained(folder, device="cpu")
        assert file.name in str(error.value) or file.name == "tokenizer.json", error.value
        file.write_bytes(whole)
