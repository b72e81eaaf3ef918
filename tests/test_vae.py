"""The VAE and its folders: padding, teacher forcing, the shared decoder, the KL term, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ladir.config import BackboneSettings, DataSettings, DenoiserSettings, LoraSettings, SampleSettings, VaeSettings
from ladir.data.batches import VaeBatch, VaeCollator, flat_ids
from ladir.data.grounding import GroundedSentences
from ladir.data.prompts import Frame
from ladir.data.token_lists import GroundedSentence
from ladir.data.token_store import Store, TokenStore
from ladir.data.tokenizing import write_records
from ladir.errors import UnusableError
from ladir.inference.cache import Prefix
from ladir.inference.decode import decode, thought_ids
from ladir.models.assembling import assemble_export
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_readers, load_thought_decoder, load_vae, new_vae, save_denoiser, save_lm, save_vae
from ladir.models.store import ShardWriter, folder_fingerprint, load_settings, own_state
from ladir.models.vae import ThoughtDecoder, Vae, encode_sentences
from ladir.tokens import build_word_tokenizer, encode_text
from tests.tiny import (
    EOS,
    SHAPES,
    VOCAB,
    assert_same_gradients,
    gradients,
    randomise_adapters,
    teacher_forced,
    tiny_denoiser,
    tiny_lm,
    tiny_vae,
    tokens,
)

LORA = LoraSettings(rank=2, alpha=4.0)
CPU = torch.device("cpu")


def sentences(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [tokens(rng, 1, 7) for _ in range(count)]


def collate(vae: Vae, rows: list[list[int]], training: bool = True, first: int = 0) -> VaeBatch:
    collator = VaeCollator(vae.settings, range(VOCAB), EOS, seed=3, bos=vae.bos, separator=vae.separator)
    return collator(rows, list(range(first, first + len(rows))), training)


def losses(vae: Vae, batch: VaeBatch, beta: float = 0.1) -> Tensor:
    result = vae(batch)
    return result["reconstruction"].double() + beta * result["kl"].double()


# --- encoding and decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_sentence_is_encoded_the_same_in_any_company(kind: str, lora: LoraSettings | None) -> None:
    vae, rows = tiny_vae(kind, lora=lora), sentences(5)
    mean, logvar = encode_sentences(vae, rows)
    for i, row in enumerate(rows):
        alone_mean, alone_logvar = encode_sentences(vae, [row])
        assert torch.allclose(mean[i], alone_mean[0], atol=1e-6)
        assert torch.allclose(logvar[i], alone_logvar[0], atol=1e-6)
    assert not torch.allclose(mean[0], mean[1], atol=1e-2)


def test_the_encoder_is_the_lm_over_sentence_and_queries() -> None:
    vae, row = tiny_vae(), sentences(1)[0]
    inputs = torch.cat([vae.encoder.embed(torch.tensor(row)), vae.queries.weight])[None]
    hidden = vae.encoder.base.get_decoder()(inputs_embeds=inputs).last_hidden_state[:, -2:]
    mean, logvar = encode_sentences(vae, [row])
    assert torch.allclose(mean, vae.to_mean(hidden).float(), atol=1e-6)
    assert torch.allclose(logvar, vae.to_logvar(hidden).float(), atol=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("separator", [(), (5,), (6, 5)], ids=str)
@torch.no_grad()
def test_bos_is_read_first_and_a_separator_behind_the_latents(separator: tuple[int, ...], lora: LoraSettings | None) -> None:
    vae, rows = tiny_vae(bos=(4,), separator=separator, lora=lora, latent_noise=0.0, token_substitution=0.0), sentences(3)
    batch, decoder = collate(vae, rows, training=False), vae.thought_decoder
    mean, _ = vae.encode(batch.encoder_ids, batch.encoder)
    assert torch.equal(mean, encode_sentences(vae, rows)[0])
    total = 0.0
    for row, latents in zip(rows, mean, strict=True):
        inputs = torch.cat([vae.encoder.embed(torch.tensor([4, *row])), vae.queries.weight])[None]
        hidden = vae.encoder.base.get_decoder()(inputs_embeds=inputs).last_hidden_state[0, -2:]
        assert torch.allclose(latents, vae.to_mean(hidden).float(), atol=1e-6)
        with decoder.lm() as lm:
            before = [lm.embed(torch.tensor([4])), vae.from_latent(latents.double())]
            before += [lm.embed(torch.tensor(separator))] if separator else []
            inputs = torch.cat([*before, lm.embed(torch.tensor(row))])
            logits = lm.base(inputs_embeds=inputs[None]).logits[0, 2 + len(separator) :]
        labels = torch.tensor([*row, EOS])
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        written = thought_ids(decoder, EOS, latents[None], max_tokens=4)[0]
        assert written == _greedy(decoder, before, 4)
    assert float(vae(batch)["reconstruction"]) == pytest.approx(total, rel=1e-5)
    assert not torch.allclose(mean, encode_sentences(tiny_vae(lora=lora), rows)[0], atol=1e-3)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_what_follows_is_learned_from_question_and_latents_alone(lora: LoraSettings | None) -> None:
    vae = tiny_vae(bos=(4,), lora=lora, objective="grounded", grounded_tokens=3, latent_noise=0.5, token_substitution=0.0)
    items = [GroundedSentence([5, 6], [4, 7, 8], [9, 10]), GroundedSentence([6], [4, 9], [11, 12, 13, 14, 15])]
    collator = VaeCollator(vae.settings, range(VOCAB), EOS, seed=3, bos=vae.bos, separator=vae.separator)
    batch = collator([*items, [7, 8]], [0, 1, 2])  # the last one is a sentence alone
    assert batch.counts["grounded"] == 3 + 3  # with <eos>; cut at three
    mean, logvar = vae.encode(batch.encoder_ids, batch.encoder)
    z = mean + (0.5 * logvar).exp() * batch.posterior_noise + batch.extra_noise
    expected, lm = torch.zeros(()), vae.thought_decoder.backbone
    for item, latents in zip(items, z, strict=False):
        text, ids = item.follows[:3], torch.tensor([*item.prompt, *item.follows[:3]])
        labels = torch.tensor([*text, EOS] if len(item.follows) <= 3 else text)
        with vae.thought_decoder.lm():
            read = lm.embed(ids)
            vectors = [read[: len(item.prompt)], vae.from_latent(latents.double()), read[len(item.prompt) :]]
            logits = lm.base(inputs_embeds=torch.cat(vectors)[None]).logits[0, len(item.prompt) + 1 :]
        expected = expected + torch.nn.functional.cross_entropy(logits[: len(labels)], labels, reduction="sum")
    found = vae(batch)
    assert float(found["grounded"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(found["metric/grounded_accuracy"][1]) == 6
    vae.zero_grad()
    found["grounded"].backward()
    ours = gradients(vae)
    vae.zero_grad()
    expected.backward()
    assert_same_gradients(ours, gradients(vae), 1e-6)
    plain = VaeCollator(replace(vae.settings, objective="reconstruct"), range(VOCAB), EOS, seed=3, bos=vae.bos)
    same = vae(plain([item.sentence for item in items] + [[7, 8]], [0, 1, 2]))
    assert float(same["reconstruction"].detach()) == float(found["reconstruction"].detach()) and "grounded" not in same


def test_what_follows_a_sentence_is_the_rest_of_its_chain_and_the_answer(tmp_path: Path) -> None:
    words = build_word_tokenizer(["q", "a", "b", "c", "#", "7", "\n"])

    def stored(*records: Sequence[str]) -> TokenStore:
        lines = [{"input": "q", "output": "\n".join([*blocks, "#### 7"])} for blocks in records]
        file = tmp_path / f"{len(records)}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_records(file.with_suffix(".store"), [str(file)], DataSettings(), words, 1)
        return TokenStore(Store(file.with_suffix(".store"), [str(file)]))

    items = GroundedSentences(stored(["a", "b a", "c"], ["c"]), words, "#", Frame())
    texts = [[words.decode(ids) for ids in (item.sentence, item.prompt, item.follows)] for item in items]
    assert texts == [
        ["a", "q\n", "b a\nc\n# 7"],
        ["b a", "q\n", "c\n# 7"],
        ["c", "q\n", "# 7"],
        ["c", "q\n", "# 7"],
    ]
    assert items.length(0) == 2 * 1 + 2 + len(items[0].follows)
    assert [item.sentence for item in items.of(1)] == [encode_text(words, "c")] and len(items.of(0)) == 3
    chat = Frame((3,), (4,), is_chat=True)
    framed = GroundedSentences(stored(["a"]), words, "#", chat)
    assert framed[0].prompt == chat.around(encode_text(words, "q"))
    for some in (items, framed):
        assert some.sizes().tolist() == [[len(item.sentence), len(item.prompt), len(item.follows)] for item in some]


def _greedy(decoder: ThoughtDecoder, read: list[Tensor], count: int) -> list[int]:
    """Token by token, everything read anew."""
    text: list[int] = []
    with decoder.lm() as lm:
        while len(text) < count:
            inputs = torch.cat([*read, lm.embed(torch.tensor(text, dtype=torch.int64))])[None]
            token = int(lm.base(inputs_embeds=inputs).logits[0, -1].argmax())
            if token == EOS:
                break
            text.append(token)
    return text


@pytest.mark.parametrize("kind", SHAPES)
def test_training_losses_do_not_depend_on_padding(kind: str) -> None:
    vae, rows = tiny_vae(kind, latent_noise=0.5, token_substitution=0.3), sentences(4)
    whole = vae(collate(vae, rows))
    alone = [vae(collate(vae, rows[i : i + 1], first=i)) for i in range(4)]
    for name in ("reconstruction", "kl"):
        total = sum(float(one[name].detach()) for one in alone)
        assert float(whole[name].detach()) == pytest.approx(total, rel=1e-5)
    assert whole["metric/exact"].tolist() == [sum(float(one["metric/exact"][0]) for one in alone), 4.0]


def test_counts_are_the_labels_and_validation_is_without_noise() -> None:
    vae, rows = tiny_vae(latent_noise=2.0, token_substitution=0.9), sentences(6)
    batch = collate(vae, rows)
    assert batch.counts == {"reconstruction": len(batch.labels), "kl": 6 * 2}
    assert batch.extra_noise.std() > 1.5 and batch.posterior_noise.std() > 0.8
    assert not torch.equal(batch.encoder_ids, flat_ids(rows))
    assert batch.labels.tolist() == [token for row in rows for token in [*row, EOS]]
    quiet = collate(vae, rows, training=False)
    assert torch.equal(quiet.encoder_ids, flat_ids(rows))
    assert float(quiet.extra_noise.abs().sum() + quiet.posterior_noise.abs().sum()) == 0.0


def test_substitution_has_its_rate_and_noise_its_size() -> None:
    settings = VaeSettings(latent_dim=4, latents_per_block=2, latent_noise=3.0, token_substitution=0.3)
    rows = [[VOCAB + 5] * 50] * 200  # an id that substitution never draws
    batch = VaeCollator(settings, range(VOCAB), EOS, seed=0)(rows, list(range(200)))
    assert float((batch.encoder_ids != VOCAB + 5).float().mean()) == pytest.approx(0.3, abs=0.015)
    assert batch.encoder_ids[batch.encoder_ids != VOCAB + 5].unique().tolist() == list(range(VOCAB))
    assert float(batch.extra_noise.std()) == pytest.approx(3.0, rel=0.06)
    assert float(batch.posterior_noise.std()) == pytest.approx(1.0, rel=0.06)
    again = VaeCollator(settings, range(VOCAB), EOS, seed=0)(rows[:1], [7])
    assert torch.equal(again.encoder_ids[0], batch.encoder_ids[7]) and torch.equal(again.extra_noise[0], batch.extra_noise[7])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_greedy_decoding_is_the_teacher_forced_argmax(kind: str, lora: LoraSettings | None) -> None:
    vae = tiny_vae(kind, lora=lora)
    z = 2 * torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(1))
    with vae.thought_decoder.lm() as lm:
        prefix, hidden = Prefix.start(lm, vae.thought_decoder.prefix(z), torch.full((8,), 2))
        texts = decode(prefix, hidden, EOS, max_tokens=9)
    assert len(set(map(tuple, texts))) > 1
    for i, text in enumerate(texts):
        forced = teacher_forced(vae.thought_decoder, z[i : i + 1], [text]).argmax(-1).tolist()
        assert forced[: len(text)] == text
        assert len(text) == 9 or forced[len(text)] == EOS


# --- who is trained ----------------------------------------------------------------------------------------------------


def test_the_kl_term_is_torchs() -> None:
    vae = tiny_vae()
    batch = collate(vae, sentences(5))
    mean, logvar = vae.encode(batch.encoder_ids, batch.encoder)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    assert float(vae(batch)["kl"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_reconstruction_is_the_decoders_cross_entropy_given_z() -> None:
    vae = tiny_vae(latent_noise=0.5, token_substitution=0.0)
    row = sentences(1)[0]
    batch = collate(vae, [row])
    mean, logvar = vae.encode(batch.encoder_ids, batch.encoder)
    z = mean + (0.5 * logvar).exp() * batch.posterior_noise + batch.extra_noise
    lm = vae.thought_decoder.backbone.base
    inputs = torch.cat([vae.from_latent(z.double())[0], lm.get_input_embeddings()(torch.tensor(row))])[None]
    logits = lm(inputs_embeds=inputs).logits[0, 1:]
    expected = -logits.log_softmax(-1)[torch.arange(len(row) + 1), torch.tensor([*row, EOS])].sum()
    assert float(vae(batch)["reconstruction"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_frozen_decoder_gets_no_gradient_but_passes_it_on() -> None:
    vae = tiny_vae()
    losses(vae, collate(vae, sentences(3)), beta=0.0).backward()
    assert vae.own_decoder is not None
    assert all(p.grad is None and not p.requires_grad for p in vae.own_decoder.parameters())


def test_a_trained_decoder_gets_its_gradient() -> None:
    vae = tiny_vae(decoder="trained")
    losses(vae, collate(vae, sentences(3))).backward()
    assert vae.own_decoder is not None
    assert all(p.grad is not None for p in vae.own_decoder.parameters())


@torch.no_grad()
def test_the_lora_decoder_is_the_base_lm_whatever_the_adapters_hold() -> None:
    vae, base = tiny_vae(lora=LORA), tiny_lm(seed=7)
    z, row = torch.randn(3, 2, 3), sentences(1)[0]
    ids = torch.tensor(row).expand(3, -1)
    plain = base(inputs_embeds=torch.cat([vae.from_latent(z.double()), base.get_input_embeddings()(ids)], 1)).logits[:, 1:]
    before, mean = teacher_forced(vae.thought_decoder, z, [row] * 3), encode_sentences(vae, sentences(2))[0]
    randomise_adapters(vae, seed=99)
    assert torch.allclose(before, plain.flatten(0, 1), atol=1e-6)
    assert torch.equal(teacher_forced(vae.thought_decoder, z, [row] * 3), before)
    assert not torch.allclose(encode_sentences(vae, sentences(2))[0], mean, atol=1e-3)


def test_with_lora_only_adapters_and_heads_are_trained() -> None:
    vae = tiny_vae(lora=LORA)
    for _ in range(2):  # decoding switches the adapters off and must leave them trainable
        vae.zero_grad()
        losses(vae, collate(vae, sentences(3))).backward()
        trained = {name for name, p in vae.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained if name.startswith("encoder")) and any("lora_" in n for n in trained)
        assert all(float(g.abs().max()) > 0 for g in gradients(vae).values())
        frozen = [p for name, p in vae.named_parameters() if name not in trained]
        assert all(p.grad is None for p in frozen)


def checkpointed(vae: Vae) -> Vae:
    vae.encoder.enable_activation_checkpointing()
    if vae.own_decoder is not None:
        vae.own_decoder.enable_activation_checkpointing()
    return vae


def in_parts(vae: Vae) -> Vae:
    vae.thought_decoder.backbone.logits_parts = 3
    return vae


@pytest.mark.parametrize("lora", [None, LORA, replace(LORA, targets=["lm_head", "q_proj"])], ids=["full", "lora", "lora-head"])
def test_what_is_computed_again_gives_the_same_gradients(lora: LoraSettings | None) -> None:
    """With LoRA the recomputed decoder and its LM head must have their adapters off again, the recomputed encoder on."""
    results = []
    for change in (lambda vae: vae, checkpointed, in_parts):
        vae = change(tiny_vae(lora=lora)).train()
        losses(vae, collate(vae, sentences(4))).backward()
        results.append(gradients(vae))
    assert_same_gradients(results[1], results[0], 1e-6)
    assert_same_gradients(results[2], results[0], 1e-6)


# --- folders -----------------------------------------------------------------------------------------------------------


def base_folder(path: Path, kind: str = "llama") -> str:
    """A Hugging Face folder of a tiny fp32 LM."""
    tiny_lm(kind, seed=7, dtype=torch.float32).save_pretrained(str(path))
    return str(path)


def settings(base: str, lora: LoraSettings | None = None) -> BackboneSettings:
    return BackboneSettings(name_or_path=base, dtype="float32", attention="eager", lora=lora or LoraSettings())


@pytest.mark.parametrize("variant", ["full", "lora", "trained", "lora-trained"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_vae_comes_back_from_its_folder(tmp_path: Path, kind: str, variant: str) -> None:
    backbone = settings(base_folder(tmp_path / "base", kind), LORA if "lora" in variant else None)
    vae_settings = VaeSettings(latent_dim=3, latents_per_block=2, decoder="trained" if "trained" in variant else "frozen")
    vae = new_vae(vae_settings, backbone, "cpu")
    move(vae)
    save_vae(vae.eval(), tmp_path / "vae", base=backbone.name_or_path)
    back = load_vae(tmp_path / "vae", settings(base_folder(tmp_path / "base", kind)), CPU)
    rows, z = sentences(4), torch.randn(2, 2, 3)
    twice = [rows[0], rows[0]]
    assert torch.equal(encode_sentences(vae, rows)[0], encode_sentences(back, rows)[0])
    assert torch.equal(encode_sentences(vae, rows)[1], encode_sentences(back, rows)[1])
    assert torch.equal(teacher_forced(vae.thought_decoder, z, twice), teacher_forced(back.thought_decoder, z, twice))
    assert (back.own_decoder is None) == (variant == "lora")
    assert isinstance(back.encoder.lm, PeftModel) == ("lora" in variant)
    assert_same_weights(back, load_vae(tmp_path / "vae", backbone, CPU))
    reader, encoder = load_readers(tmp_path / "vae", backbone, CPU, encoder=True)
    assert encoder is not None and (reader.backbone is encoder.encoder) == (variant == "lora")  # one LM for both
    assert torch.equal(teacher_forced(reader, z, twice), teacher_forced(back.thought_decoder, z, twice))
    assert load_readers(tmp_path / "vae", backbone, CPU, encoder=False)[1] is None
    assert not back.training
    assert not list(tmp_path.glob("**/*.writing")) and not list(tmp_path.glob("**/*.bin"))


def test_bos_is_recorded_and_a_vae_of_before_reads_none(tmp_path: Path) -> None:
    backbone, small = settings(base_folder(tmp_path / "base")), VaeSettings(latent_dim=3, latents_per_block=2)
    both = new_vae(small, backbone, "cpu", bos=[4], separator=[5, 6])
    assert (both.bos, both.separator) == ((4,), (5, 6))
    vae = new_vae(replace(small, bos=False), backbone, "cpu", bos=[4])
    assert vae.bos == ()
    save_vae(vae, tmp_path / "vae", base=backbone.name_or_path)
    path = tmp_path / "vae" / "ladir.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "bos": [4], "separator": [5]}))
    for loaded in (load_vae(tmp_path / "vae", backbone, CPU), load_thought_decoder(tmp_path / "vae", backbone, CPU)):
        assert (loaded.bos, loaded.separator) == ((4,), (5,))
    del saved["bos"], saved["settings"]["bos"], saved["separator"], saved["settings"]["separator"]
    path.write_text(json.dumps(saved))
    old = load_vae(tmp_path / "vae", backbone, CPU)
    assert old.thought_decoder.marks == load_thought_decoder(tmp_path / "vae", backbone, CPU).marks == 0
    assert not old.settings.bos and not old.settings.separator
    assert torch.equal(encode_sentences(old, sentences(2))[0], encode_sentences(vae.eval(), sentences(2))[0])


def move(vae: Vae) -> None:
    """As if trained: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_a_saved_lora_vae_holds_no_copy_of_the_base(tmp_path: Path) -> None:
    vae = new_vae(VaeSettings(latent_dim=3, latents_per_block=2), settings(base_folder(tmp_path / "base"), LORA), "cpu")
    save_vae(vae, tmp_path / "vae", base=str(tmp_path / "base"))
    names = [name for file in (tmp_path / "vae").glob("**/*.safetensors") for name in load_file(file)]
    assert any("lora_A" in name for name in names)
    assert not [name for name in names if "embed" in name or "layernorm" in name or "base_layer" in name]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_fingerprints_of_folders_tell_weights_and_bases_apart(tmp_path: Path) -> None:
    vae = tiny_vae(dtype=torch.float32)

    def marked(name: str, base: str = "base") -> str:
        save_vae(vae, tmp_path / name, base=base)
        return folder_fingerprint(tmp_path / name)

    first = marked("first")
    assert marked("same") == first != marked("other base", base="another")
    with torch.no_grad():
        vae.to_mean.bias[0] += 1e-6
    assert marked("moved") != first


def test_weights_that_would_be_unpickled_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(UnusableError, match="Weights must be safetensors"):
        new_vae(VaeSettings(latent_dim=3, latents_per_block=2), settings(base), "cpu")


@pytest.mark.parametrize("shard_bytes", [3000, 2**30])
def test_an_export_has_all_files_of_the_decoding_lm_or_is_refused(tmp_path: Path, shard_bytes: int) -> None:
    """The base may have other weight files beside those that its index names, and may have lost one since."""
    base = tmp_path / "base"
    lm = tiny_lm(seed=7, dtype=torch.float32)
    lm.save_pretrained(str(base), max_shard_size=shard_bytes)
    files = sorted(path.name for path in base.glob("model*.safetensors*"))
    (base / "consolidated.safetensors").write_bytes(b"")
    vae = new_vae(VaeSettings(latent_dim=3, latents_per_block=2), settings(str(base)), "cpu")
    save_vae(vae, tmp_path / "vae", base=str(base))
    save_denoiser(tiny_denoiser(tiny_lm(dtype=torch.float32)), tmp_path / "denoiser")
    tokenizer, parts = build_word_tokenizer(["a"]), (tmp_path / "denoiser", tmp_path / "vae")
    assemble_export(*parts, tokenizer, tmp_path / "export", SampleSettings())
    assert sorted(path.name for path in (tmp_path / "export" / "vae").glob("*model*")) == files
    (base / files[0]).unlink()
    with pytest.raises(UnusableError, match=files[0]):
        assemble_export(*parts, tokenizer, tmp_path / "again", SampleSettings())
    assert not (tmp_path / "again").exists()


def test_a_torn_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    with pytest.raises(ValueError, match=r"nowhere is not there; train or export it first \(training/train_vae\.py\)"):
        load_settings(tmp_path / "nowhere", "vae")
    with pytest.raises(ValueError, match=r"base is no vae folder: ladir\.json is missing"):
        load_vae(base, settings(base), CPU)
    vae = new_vae(VaeSettings(latent_dim=3, latents_per_block=2), settings(base), "cpu")
    save_vae(vae, tmp_path / "vae", base=base)
    with pytest.raises(ValueError, match="holds a 'vae', not a 'denoiser'"):
        load_settings(tmp_path / "vae", "denoiser")
    saved = json.loads((tmp_path / "vae" / "ladir.json").read_text())
    saved["settings"]["latents_per_block"] = 3
    (tmp_path / "vae" / "ladir.json").write_text(json.dumps(saved))
    with pytest.raises((ValueError, RuntimeError), match=r"queries\.weight"):
        load_vae(tmp_path / "vae", settings(base), CPU)


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    vae = new_vae(VaeSettings(latent_dim=3, latents_per_block=2), settings(base), "cpu")
    save_vae(vae, tmp_path / "vae", base=base)
    move(vae)
    save_vae(vae, tmp_path / "vae", base=base)
    assert_same_weights(load_vae(tmp_path / "vae", settings(base), CPU), vae)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shard_bytes", [1, 3000, 2**30])
@torch.no_grad()
def test_shards_of_any_size_are_a_hugging_face_folder(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    lm = tiny_lm(kind, dtype=torch.float32)
    writer = ShardWriter(tmp_path, shard_bytes)
    state = dict(own_state(lm))
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.close()
    lm.config.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: len(state), 2**30: 1}.get(shard_bytes, len(files)) and (shard_bytes == 2**30 or len(files) > 1)
    assert sorted(name for file in files for name in load_file(file)) == sorted(state)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    back, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([sentences(1)[0]])
    back.set_attn_implementation("eager")
    assert torch.equal(back(ids).logits, lm(ids).logits)


def test_a_streamed_lm_is_a_hugging_face_folder(tmp_path: Path) -> None:
    """The stream is what ZeRO-3 gathers: plain names and one full tensor after another."""
    backbone = Backbone(tiny_lm("qwen3", dtype=torch.bfloat16))
    save_lm(backbone, tmp_path / "lm", ((name, tensor.clone()) for name, tensor in own_state(backbone)))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert back.dtype == torch.bfloat16 and back.config.architectures == ["Qwen3ForCausalLM"]
    assert back.generation_config.eos_token_id == EOS
    weights = dict(back.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in backbone.base.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_what_enters_a_fresh_model_has_the_scale_of_the_embeddings(noise: float) -> None:
    lm = Backbone(tiny_lm(hidden_size=64, vocab=500))
    embedded = lm.embed(torch.arange(500)).std()
    vae = Vae(lm, Backbone(tiny_lm(hidden_size=64, vocab=500, seed=1)), VaeSettings(latent_dim=96, latent_noise=noise))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100, 4, 96, generator=generator) * (1 + noise**2) ** 0.5
    assert vae.thought_decoder.prefix(z).std() == pytest.approx(float(embedded), rel=0.1)
    denoiser = Denoiser(lm, DenoiserSettings(), 4, torch.zeros(96), torch.ones(96))
    standard = torch.randn(100, 4, 96, generator=generator)
    assert denoiser.clean_inputs(standard).std() == pytest.approx(float(embedded), rel=0.1)
    assert denoiser.marks.weight.std() == pytest.approx(float(embedded), rel=0.2)
