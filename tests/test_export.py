"""Exports: what is joined and what is refused, adapters merged, bases moved, exports of an older version."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ladir.config import ExportSettings, SampleSettings
from ladir.errors import UnusableError
from ladir.models import assembling, merging, store
from ladir.models.assembling import assemble_export
from ladir.models.folders import save_denoiser, save_vae
from ladir.models.pairing import TrainedOn
from ladir.models.store import folder_fingerprint
from ladir.reasoner import Reasoner
from ladir.tokens import PROBE_FILE, build_word_tokenizer, tokenizer_fingerprint
from tests.test_reasoner import LETTERS, SETTINGS, VARIANTS, assert_same_answers, tokenizer, trained
from tests.tiny import tiny_lm

MERGED, COPIED = ExportSettings(merge_lora=True), ExportSettings(copy_base=True)


class Models:
    """A denoiser's and a VAE's folder as trainings leave them, and the parts they were made of."""

    def __init__(self, folder: Path, variant: str = "lora", asked: SampleSettings = SETTINGS, **reads: Any) -> None:
        self.folder, self.asked, self.parts = folder, asked, trained(folder, *VARIANTS[variant], **reads)
        self.denoiser, self.vae, self.base = folder / "denoiser", folder / "vae", self.parts.base
        save_vae(self.parts.vae, self.vae, base=str(self.base))
        known = TrainedOn(folder_fingerprint(self.vae), tokenizer_fingerprint(tokenizer()), longest_question=4)
        save_denoiser(self.parts.denoiser, self.denoiser, trained_on=known)

    def reasoner(self, reencode: bool = False) -> Reasoner:
        """What an export of them must answer as."""
        settings = replace(self.asked, reencode=reencode)
        vae = self.parts.vae if reencode else None
        return Reasoner(self.parts.denoiser, self.parts.vae.thought_decoder, tokenizer(), settings, vae)

    def export(self, how: ExportSettings | None = None, name: str = "export", reencode: bool = False) -> Path:
        """Export them."""
        target = self.folder / name
        assemble_export(self.denoiser, self.vae, tokenizer(), target, replace(self.asked, reencode=reencode), how)
        return target


def load(folder: Path, **options: Any) -> Reasoner:
    return Reasoner.from_pretrained(folder, device="cpu", attention="eager", **options)


def settings_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "ladir.json").read_text()))


def write_settings(folder: Path, **changes: Any) -> None:
    (folder / "ladir.json").write_text(json.dumps({**settings_of(folder), **changes}))


#: settings that came with the carried state and after it
NEWS = {
    "settings": ["carry", "carry_probability", "carry_own_rollout", "context", "time_token", "lm_weight", "token_focus"],
    "sample": [
        *("guidance_interval", "guidance_rescale", "verifier_scale", "renoise_time", "renoise_steps", "restart_keeps_state"),
        *("token_head_weight", "lm_weight", "thought_temperature", "thoughts_per_batch"),
    ],
}


def as_an_older_version_wrote(export: Path, models: Models) -> None:
    """Take away what this version adds: who was trained on what, where the LM under adapters lies, and newer settings."""
    for folder, news in ((export, ("trained_on", "base_place", "stage")), (export / "vae", ("vae",))):
        kept = {name: value for name, value in settings_of(folder).items() if name not in news}
        for section, names in NEWS.items() if folder == export else ():
            kept[section] = {name: value for name, value in kept[section].items() if name not in names}
            assert len(kept[section]) == len(settings_of(folder)[section]) - len(names)
        (folder / "ladir.json").write_text(json.dumps(kept))
    for path in export.rglob("adapter_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(models.base)}))


# --- what belongs together ---------------------------------------------------------------------------------------------


def test_a_vae_trained_again_is_not_joined_with_the_denoiser_before_it(tmp_path: Path) -> None:
    models = Models(tmp_path, "full")
    export = models.export()
    heads = models.vae / "heads.safetensors"
    save_file({name: value + 1 for name, value in load_file(heads).items()}, heads)
    with pytest.raises(UnusableError, match=r"denoiser was trained on the latents of another VAE \(.*encode_latents.py"):
        models.export()
    assert_same_answers(load(export), models.reasoner())  # the export before is as it was
    for file in ("ladir.json", "heads.safetensors"):  # another export's decoder, put in by hand
        shutil.copy(models.vae / file, export / "vae")
    write_settings(export / "vae", kind="thought_decoder", shared=False, vae=folder_fingerprint(models.vae))
    with pytest.raises(UnusableError, match="was trained on the latents of another VAE"):
        load(export)


def test_a_denoiser_of_another_vae_does_not_take_an_exports_place(tmp_path: Path) -> None:
    models = Models(tmp_path, "full")
    export = models.export()
    save_denoiser(models.parts.denoiser, tmp_path / "own", trained_on=TrainedOn(folder_fingerprint(models.vae)))
    load(export, denoiser=tmp_path / "own")
    save_denoiser(models.parts.denoiser, tmp_path / "other", trained_on=TrainedOn("0123456789abcdef"))
    with pytest.raises(UnusableError, match=r"other was trained on the latents of another VAE \(0123456789abcdef\)"):
        load(export, denoiser=tmp_path / "other")


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_what_an_older_version_wrote_loads_with_one_warning_and_answers_as_before(
    tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(tmp_path, variant)
    export = models.export()
    load(export)
    assert not caplog.messages
    as_an_older_version_wrote(export, models)
    older = load(export)
    assert older.denoiser.settings == models.parts.denoiser.settings and older.denoiser.carry_in is None
    assert_same_answers(older, models.reasoner())
    assert [message.endswith("is not checked") for message in caplog.messages] == [True]
    caplog.clear()
    write_settings(models.denoiser, trained_on=None)
    models.export(name="again")
    assert [f"{models.denoiser} does not say" in message for message in caplog.messages] == [True]
    assert_same_answers(load(tmp_path / "again"), models.reasoner())
    assert len(caplog.messages) == 1  # it was told when they were joined


@pytest.mark.parametrize(("variant", "how"), [("full", None), ("lora", None), ("lora", MERGED)], ids=["full", "lora", "merged"])
def test_a_carried_state_comes_through_an_export(tmp_path: Path, variant: str, how: ExportSettings | None) -> None:
    asked = replace(SETTINGS, restarts=1, restart_steps=2, restart_keeps_state=True, token_head_weight=0.7)
    models = Models(tmp_path, variant, asked, carry="hidden", token_weight=0.5)
    ours, exported = models.reasoner(reencode=True), load(models.export(how, reencode=True))
    assert exported.denoiser.settings == models.parts.denoiser.settings
    assert_same_answers(exported, ours)
    exported.save_pretrained(tmp_path / "again")
    assert_same_answers(load(tmp_path / "again"), ours)
    assert exported.denoiser.carry_in is not None
    assert float(exported.denoiser.carry_in.weight.detach().abs().max()) > 0.1


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    models = Models(tmp_path, "full")
    export = models.export()
    other = build_word_tokenizer(LETTERS[::-1])
    with pytest.raises(UnusableError, match="was trained with another tokenizer than this"):
        assemble_export(models.denoiser, models.vae, other, tmp_path / "wrong", SETTINGS)
    assert not (tmp_path / "wrong").exists()
    other.save_pretrained(str(export))
    with pytest.raises(UnusableError, match="does not give the ids that it was saved with"):
        load(export)
    (export / PROBE_FILE).unlink()
    with pytest.raises(UnusableError, match="was trained with another tokenizer than this"):
        load(export)
    as_an_older_version_wrote(export, models)
    build_word_tokenizer([*LETTERS, "more", "words"]).save_pretrained(str(export))
    with pytest.raises(UnusableError, match=r"whose ids end at 28: 'more' \(29\), 'words' \(30\)"):
        load(export)


# --- adapters ----------------------------------------------------------------------------------------------------------

ADAPTED = ["lora", "full-denoiser-lora-vae", "lora-denoiser-full-vae", "lora-trained-decoder"]


@pytest.mark.parametrize(("variant", "reencode"), [*((variant, True) for variant in VARIANTS), ("lora", False)])
def test_merged_adapters_answer_as_before_and_thoughts_read_the_same(tmp_path: Path, variant: str, reencode: bool) -> None:
    models = Models(tmp_path, variant)
    if variant != "full":  # several shards, read one by one
        tiny_lm(seed=7, dtype=torch.float32).save_pretrained(str(models.base), max_shard_size="8KB")
        (models.base / "model.safetensors").unlink()
    export = models.export(MERGED, reencode=reencode)
    for gone in (models.base, models.denoiser, models.vae):
        shutil.rmtree(gone)
    assert not list(export.rglob("adapter*"))
    assert_same_answers(load(export), models.reasoner(reencode))
    load(export).save_pretrained(tmp_path / "again")
    assert_same_answers(load(tmp_path / "again"), models.reasoner(reencode))
    lm = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(lm(ids).logits, models.parts.denoiser.backbone.lm(ids).logits)


def test_merging_holds_one_shard_and_equals_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(tmp_path)
    tiny_lm(seed=7, dtype=torch.float32).save_pretrained(str(models.base), max_shard_size="8KB")
    (models.base / "model.safetensors").unlink()
    held: list[int] = []

    class Watched(store.ShardWriter):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            super().add(name, tensor)
            held.append(self.current_bytes)

    monkeypatch.setattr(merging, "ShardWriter", lambda folder: Watched(folder, 9000))
    merging.merge_adapter(models.denoiser, models.base, tmp_path / "merged", torch.float32)
    assert max(held) <= 9000 and len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    base = AutoModelForCausalLM.from_pretrained(models.base)
    theirs = PeftModel.from_pretrained(base, str(models.denoiser)).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)


def test_merged_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    models = Models(tmp_path)
    merging.merge_adapter(models.denoiser, models.base, tmp_path / "exact", torch.float32)
    merging.merge_adapter(models.denoiser, models.base, tmp_path / "merged", torch.bfloat16)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "merged"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    base = load_file(models.base / "model.safetensors")
    for name, value in exact.items():
        change = value - base[name]
        torch.testing.assert_close(rounded[name], (base[name].bfloat16().float() + change).bfloat16(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "adapters with use_dora=True cannot be merged"),
        ({"alpha_pattern": {"q_proj": 3}}, "adapters with alpha_pattern"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_not_merged(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    models = Models(tmp_path)
    file = models.denoiser / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UnusableError, match=message):
        models.export(MERGED)
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob("*.writing"))


def test_rank_stabilised_lora_is_merged_by_its_own_scale(tmp_path: Path) -> None:
    models = Models(tmp_path)
    file = models.denoiser / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": True}))
    merging.merge_adapter(models.denoiser, models.base, tmp_path / "merged", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(models.base)
    theirs = PeftModel.from_pretrained(base, str(models.denoiser)).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)


def test_an_export_whose_adapters_were_merged_away_is_refused(tmp_path: Path) -> None:
    models = Models(tmp_path)
    export = models.export()
    base = AutoModelForCausalLM.from_pretrained(models.base)
    merged = PeftModel.from_pretrained(base, str(export)).merge_and_unload()
    for file in export.glob("adapter_*"):
        file.unlink()
    merged.save_pretrained(str(export))
    with pytest.raises(UnusableError, match=r"without the denoiser's adapters, and there are none.*export.merge_lora=true"):
        load(export)
    reasoner = load(models.export(name="another"))
    reasoner.denoiser.backbone.lm = reasoner.denoiser.backbone.lm.merge_and_unload()
    with pytest.raises(UnusableError, match="it has none any more"):
        reasoner.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- the LM under the adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "reencode"), [*((variant, True) for variant in ADAPTED), ("lora", False)])
def test_an_export_and_its_base_move_together(
    tmp_path: Path, variant: str, reencode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base named as a command in some folder named it, the whole then moved, and asked from elsewhere."""
    (tmp_path / "there").mkdir()
    models = Models(tmp_path / "there", variant)
    monkeypatch.chdir(tmp_path / "there")
    for folder in (models.denoiser, models.vae / "encoder"):
        if (folder / "adapter_config.json").is_file():
            text = (folder / "adapter_config.json").read_text()
            (folder / "adapter_config.json").write_text(text.replace(str(models.base), "base"))
    write_settings(models.vae, base="base")
    saved = settings_of(models.denoiser)
    write_settings(models.denoiser, trained_on={**saved["trained_on"], "vae": folder_fingerprint(models.vae)})
    models.export(reencode=reencode)
    monkeypatch.chdir("/")
    expected = models.reasoner(reencode)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    assert_same_answers(load(tmp_path / "elsewhere" / "export"), expected)
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere" / "export")
    assert_same_answers(load(tmp_path / "linked"), expected)


def test_an_export_that_moved_alone_finds_its_base_where_it_was_or_says_how_to_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Models(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    export = models.export().rename(tmp_path / "far" / "away" / "export")
    assert_same_answers(load(export), models.reasoner())
    moved = models.base.rename(tmp_path / "moved")
    with pytest.raises(UnusableError, match=r"stands on another LM, which is not where it was .*--base DIR \(base=DIR"):
        load(export)
    assert_same_answers(load(export, base=moved), models.reasoner())
    with pytest.raises(UnusableError, match=r"base .*nowhere: no such folder"):
        load(export, base=tmp_path / "nowhere")
    load(export, base=moved).save_pretrained(tmp_path / "saved")
    assert_same_answers(load(tmp_path / "saved"), models.reasoner())


def test_another_lm_in_the_bases_place_is_refused(tmp_path: Path) -> None:
    models = Models(tmp_path)
    export = models.export()
    tiny_lm(seed=8, dtype=torch.float32).save_pretrained(str(models.base))
    for action in (lambda: load(export), lambda: models.export(name="again")):
        with pytest.raises(UnusableError, match=r"the LM in .*base is not the one that it was trained on"):
            action()
    as_an_older_version_wrote(export, models)
    load(export)  # nobody knows


@pytest.mark.parametrize(("variant", "reencode"), [*((variant, True) for variant in ADAPTED), ("full-denoiser-lora-vae", False)])
def test_a_copied_base_goes_with_the_export(tmp_path: Path, variant: str, reencode: bool) -> None:
    models = Models(tmp_path, variant)
    export = models.export(COPIED, reencode=reencode)
    needs_base = VARIANTS[variant][0] or (reencode and VARIANTS[variant][1])
    assert (export / "base").is_dir() == needs_base
    for gone in (models.base, models.denoiser, models.vae):
        shutil.rmtree(gone)
    assert_same_answers(load(export.rename(tmp_path / "moved")), models.reasoner(reencode))


def test_a_vae_on_another_lm_than_the_adapters_is_not_joined_with_them(tmp_path: Path) -> None:
    models = Models(tmp_path)
    tiny_lm(seed=8, dtype=torch.float32).save_pretrained(str(tmp_path / "other"))
    file = models.denoiser / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "other")}))
    write_settings(models.denoiser, trained_on=None)
    with pytest.raises(UnusableError, match=r"is adapters on .*other, .*vae was trained on .*base: another LM would read"):
        models.export()


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [ExportSettings(), MERGED, COPIED], ids=["plain", "merged", "copied"])
def test_all_files_of_an_export_have_the_permissions_of_new_ones(tmp_path: Path, how: ExportSettings) -> None:
    models = Models(tmp_path)
    for file in [path for folder in (models.denoiser, models.vae, models.base) for path in folder.rglob("*") if path.is_file()]:
        file.chmod(0o400)
    (tmp_path / "new").write_text("")
    expected = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in models.export(how, reencode=True).rglob("*") if path.is_file()} == {expected}
    models.reasoner(reencode=True).save_pretrained(tmp_path / "saved")
    assert {path.stat().st_mode for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {expected}


@pytest.mark.parametrize(
    "file",
    [
        "denoiser/adapter_model.safetensors",
        "denoiser/heads.safetensors",
        "vae/heads.safetensors",
        "vae/encoder/adapter_model.safetensors",
        "base/model.safetensors",
    ],
)
def test_what_a_training_left_is_not_exported_where_it_is_cut_short(tmp_path: Path, file: str) -> None:
    models = Models(tmp_path, "lora")
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableError, match=f"{file} is cut short"):
        models.export()
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("how", [ExportSettings(), MERGED, COPIED], ids=["plain", "merged", "copied"])
def test_an_export_that_failed_leaves_the_one_before(
    tmp_path: Path, how: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(tmp_path)
    export = models.export()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembling, "name_base", full_disk)
    with pytest.raises(OSError, match="No space left"):
        models.export(how)
    assert_same_answers(load(export), models.reasoner())
    assert not list(tmp_path.glob("*.writing"))


KILLED = """
import json, os, signal, sys
from pathlib import Path
from ladir.config import BackboneSettings, ExportSettings, SampleSettings
from ladir.models import assembling, store
from ladir.tokens import load_tokenizer

folder = Path(sys.argv[1])
tokenizer = load_tokenizer(BackboneSettings(tokenizer=str(folder / "tokenizer")))

def killed_at(calls):
    left = [calls]
    def counted(real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in ("_place_lm", "_place_thought_decoder", "save_tensors", "name_base", "update_settings"):
        setattr(assembling, name, counted(getattr(assembling, name)))
    store.replace_folder = counted(store.replace_folder)
    parts = (folder / "denoiser", folder / "vae", tokenizer, folder / "export", SampleSettings(**json.loads(sys.argv[2])))
    assembling.assemble_export(*parts, ExportSettings(merge_lora=True))

for calls in range(8):
    if (child := os.fork()) == 0:
        killed_at(calls)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, sorted(path.name for path in folder.glob("export*"))]))
"""


def test_killed_anywhere_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    models = Models(tmp_path)
    tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(asdict(SETTINGS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    *killed, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert killed == [[-9, ["export.writing"]]] * 7
    assert last == [0, ["export"]]
    assert_same_answers(load(tmp_path / "export"), models.reasoner())
