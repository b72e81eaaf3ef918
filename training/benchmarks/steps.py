"""The steps whose utilisation is measured: VAE, denoiser, rollout, encoding, one denoising step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ladir.config import SampleSettings
from ladir.inference.cache import Prefix
from ladir.inference.graphs import Graphs
from ladir.inference.rollout import Rollout
from ladir.inference.sampler import BlockSampler, TrajectoryNoise
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae, encode_sentences
from training.benchmarks.setup import Bench, released
from training.benchmarks.utilisation import PlainStep, Utilisation, utilisation
from training.phases.denoiser import denoiser_weights

M = TypeVar("M", bound=nn.Module)

#: blocks of a record in stage 2: each costs the same
_ROLLOUT_BLOCKS = 2


def training_steps(bench: Bench) -> Iterator[Utilisation]:
    """Optimizer steps of one micro batch."""
    with released():
        yield _vae_step(bench, "vae_step", bench.vae())
    with released():
        yield _denoiser_step(bench, "denoiser_step", bench.denoiser())
    with released():
        yield _rollout_step(bench)


def compiled_steps(bench: Bench, backend: str = "inductor") -> Iterator[Utilisation]:
    """The same of VAE and denoiser with compiled layers (``backbone.compile``)."""
    with released():
        yield _vae_step(bench, "compiled_vae_step", _compiled(bench.vae(), backend))
    with released():
        yield _denoiser_step(bench, "compiled_denoiser_step", _compiled(bench.denoiser(), backend))


def _vae_step(bench: Bench, name: str, model: Vae) -> Utilisation:
    batch = bench.vae_batch(bench.token_ids([bench.size.lengths.block] * bench.size.sentences))
    step = PlainStep(model, lambda: model(batch), {"reconstruction": 1.0, "kl": bench.config.vae.beta})
    return utilisation(bench, name, model, step, lambda: model(batch))


def _denoiser_step(bench: Bench, name: str, model: Denoiser) -> Utilisation:
    batch = bench.denoiser_batch(bench.records([bench.size.lengths] * bench.size.records), bench.config.denoiser.draws)
    step = PlainStep(model, lambda: model(batch), denoiser_weights(bench.config.denoiser))
    return utilisation(bench, name, model, step, lambda: model(batch))


def _compiled(model: M, backend: str) -> M:
    """The model, its LMs' layers compiled when they first run: for this batch, not for another model's shapes as well."""
    torch.compiler.reset()
    for backbone in model.modules():
        if isinstance(backbone, Backbone):
            backbone.compile_layers(backend)
    return model


def _rollout_step(bench: Bench) -> Utilisation:
    size, settings = bench.size, bench.config.rollout
    lengths = replace(size.lengths, blocks=min(size.lengths.blocks, _ROLLOUT_BLOCKS))
    model = Rollout(bench.denoiser(), settings, lengths.blocks, recompute=False)
    batch = bench.rollout_batch(bench.records([lengths] * size.rollouts))
    step = PlainStep(model, lambda: model(batch), {**denoiser_weights(bench.config.denoiser), "rollout": settings.answer_weight})
    return utilisation(bench, "rollout_step", model, step, lambda: model(batch))


def encoding(bench: Bench) -> Utilisation:
    """Sentences to latents, as the training set is encoded."""
    model = bench.vae().eval()
    sentences = bench.token_ids([bench.size.lengths.block] * bench.size.encoded)

    def encode() -> None:
        encode_sentences(model, sentences)

    return utilisation(bench, "encoding", model, encode, encode)


@torch.no_grad()
def denoising_step(bench: Bench) -> Utilisation:
    """Euler steps of all trajectories of one question behind its cache: one; on CUDA a block's, which are replayed."""
    model, size = bench.denoiser().eval(), bench.size
    [ids] = bench.token_ids([size.lengths.question])
    question = model.backbone.embed(torch.tensor([ids], device=bench.device))
    owner = torch.zeros(size.trajectories, dtype=torch.int64, device=bench.device)
    rows = list(range(size.trajectories))
    prefix = Prefix.start(model.backbone, question, torch.tensor([len(ids)], device=bench.device))[0].share(owner)
    settings = SampleSettings(num_steps=size.steps if bench.device.type == "cuda" else 1)
    noise = TrajectoryNoise(0, [("question", i) for i in rows])
    replayed, plain = (BlockSampler(model, settings, noise, graphs=graphs) for graphs in (Graphs(), None))

    def steps(sampler: BlockSampler) -> None:
        sampler.sample_span(prefix, rows, owner, 0, None)

    name = "denoising_step" if settings.num_steps == 1 else f"{settings.num_steps}_denoising_steps"
    return utilisation(bench, name, model, lambda: steps(replayed), lambda: steps(plain))
