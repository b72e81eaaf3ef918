"""VAE and denoiser in one step: their losses, who gets whose gradient, and the folder that both come to lie in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ladir.config import BackboneSettings, SampleSettings, VaeSettings
from ladir.data.batches import VaeCollator
from ladir.data.columns import TokenRecord
from ladir.data.joint import JointBatch, JointCollator, JointRecord, JointRecords
from ladir.data.latents import LatentRecord
from ladir.errors import UnusableError
from ladir.models.assembling import assemble_export
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_vae, load_vae_to_train, new_vae, save_vae, vae_folder
from ladir.models.joint import Joint
from ladir.models.store import folder_fingerprint, load_settings, own_state
from ladir.models.vae import Vae, encode_sentences
from ladir.reasoner import Reasoner
from tests.test_reasoner import QUESTIONS, tokenizer
from tests.tiny import EOS, VOCAB, collator, gradients, tiny_denoiser, tiny_lm, tiny_vae, tokens
from training.phases.joint import write_joint

CPU = torch.device("cpu")


def records(count: int, blocks: int | None = None) -> list[TokenRecord]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        texts = [tokens(rng, 1, 5) for _ in range(blocks or int(rng.integers(1, 4)))]
        made.append(TokenRecord(tokens(rng, 1, 4), texts, tokens(rng, 1, 3)))
    return made


def joint_collator(vae: Vae, denoiser: Denoiser) -> JointCollator:
    sentences = VaeCollator(vae.settings, range(VOCAB), EOS, seed=3, bos=vae.bos, separator=vae.separator)
    return JointCollator(collator(denoiser, condition_dropout=0.0), sentences, max_blocks=4)


def collated(vae: Vae, denoiser: Denoiser, found: list[TokenRecord]) -> JointBatch:
    items = JointRecords(found, None)
    return joint_collator(vae, denoiser)(items[:], list(range(len(items))))


@pytest.mark.parametrize(("span", "context"), [(1, "latents"), (2, "latents"), (1, "text")])
def test_the_losses_are_the_vaes_and_the_denoisers_on_the_latents_of_now(span: int, context: str) -> None:
    vae, found = tiny_vae(bos=(4,), separator=(5,)), records(3)
    denoiser = tiny_denoiser(tiny_lm(), span=span, draws=2, context=context, lm_weight=float(context == "text"))
    losses = Joint(vae, denoiser)(collated(vae, denoiser, found))
    with torch.no_grad():
        latents = []
        for record in found:
            mu, logvar = encode_sentences(vae, record.blocks)
            latents.append(LatentRecord(record.question, record.blocks, record.answer, mu, logvar))
        staged = denoiser(collator(denoiser, condition_dropout=0.0)(latents, [0, 1, 2]))
        numbers = [4 * n + b for n, record in enumerate(found) for b in range(len(record.blocks))]
        sentences = joint_collator(vae, denoiser).vae([block for record in found for block in record.blocks], numbers)
        alone = vae(sentences)
    for name in ("flow", "answer", "stop", *(["lm"] if context == "text" else [])):
        assert float(losses[name].detach()) == pytest.approx(float(staged[name]), rel=1e-5)
    for name in ("reconstruction", "kl"):
        assert float(losses[name].detach()) == pytest.approx(float(alone[name]), rel=1e-5)


def encoder_gradient(blocks: int, *losses: str) -> float:
    vae, denoiser = tiny_vae(), tiny_denoiser(tiny_lm())
    model = Joint(vae, denoiser)
    found = model(collated(vae, denoiser, records(2, blocks)))
    torch.stack([found[name].float() for name in losses]).sum().backward()
    return max(float(g.abs().max()) for name, g in gradients(vae).items() if name.startswith("encoder"))


def test_the_flows_target_is_detached_and_what_reads_clean_blocks_is_not() -> None:
    assert encoder_gradient(1, "flow") == 0.0  # nothing but its target and its noisy copies holds the only block
    assert encoder_gradient(2, "flow") > 0.0  # behind the first block
    assert encoder_gradient(1, "answer") > 0.0
    assert encoder_gradient(1, "stop") > 0.0


def test_where_finished_blocks_are_text_no_gradient_is_made_ready_for_the_encoder() -> None:
    vae, denoiser = tiny_vae(), tiny_denoiser(tiny_lm(), context="text")
    found = Joint(vae, denoiser)(collated(vae, denoiser, records(2, 2)))
    (found["flow"] + found["answer"] + found["stop"]).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is not None] == []
    found["reconstruction"].backward()
    assert all(bool(g.any()) for name, g in gradients(vae).items() if name.startswith("encoder.lm.model.layers"))


def test_both_lie_in_one_folder_and_are_exported_together(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_lm(seed=7, dtype=torch.float32).save_pretrained(str(base))
    settings = VaeSettings(latent_dim=3, latents_per_block=2)
    backbone = BackboneSettings(name_or_path=str(base), dtype="float32", attention="eager")
    save_vae(new_vae(settings, backbone, "cpu", bos=[3], separator=[4]), tmp_path / "vae", base=str(base))
    vae = load_vae_to_train(tmp_path / "vae", backbone, settings, "cpu")
    assert (vae.bos, vae.separator) == ((3,), (4,)) and all(p.requires_grad for p in vae.encoder.parameters())
    assert vae.own_decoder is not None and not any(p.requires_grad for p in vae.own_decoder.parameters())
    with pytest.raises(UnusableError, match=r"vae\.beta: .* -> 0\.5"):
        load_vae_to_train(tmp_path / "vae", backbone, dataclasses.replace(settings, beta=0.5), "cpu")
    with torch.no_grad():
        vae.to_mean.bias.add_(0.5)  # trained on
    model = Joint(vae, tiny_denoiser(tiny_lm(dtype=torch.float32)))
    write_joint(model, tmp_path / "denoiser", iter(own_state(model)), str(base))
    own = vae_folder(tmp_path / "denoiser", tmp_path / "vae")
    assert own != tmp_path / "vae" and vae_folder(tmp_path / "nothing", tmp_path / "vae") == tmp_path / "vae"
    assert load_settings(tmp_path / "denoiser", "denoiser")["trained_on"]["vae"] == folder_fingerprint(own)
    assert torch.equal(load_vae(own, backbone, CPU).to_mean.bias, vae.to_mean.bias)
    with pytest.raises(UnusableError, match="latents of another VAE"):
        assemble_export(tmp_path / "denoiser", tmp_path / "vae", tokenizer(), tmp_path / "export", SampleSettings())
    assemble_export(tmp_path / "denoiser", own, tokenizer(), tmp_path / "export", SampleSettings(num_steps=2, max_blocks=1))
    asked = Reasoner.from_pretrained(tmp_path / "export", device="cpu")
    assert (asked.thought_decoder.bos, asked.thought_decoder.separator) == ((3,), (4,))
    assert len(asked.generate(QUESTIONS)) == len(QUESTIONS)
    assert list(tmp_path.glob("*.vae")) == []


def test_records_come_with_their_sentences() -> None:
    found = records(2)
    items = JointRecords(found, None)
    assert [items[n] for n in range(2)] == [JointRecord(record, record.blocks) for record in found]
    first = found[0]
    assert items.length(0) == len(first.question) + sum(map(len, first.blocks)) + len(first.answer)
