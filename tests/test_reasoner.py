"""The reasoner: cached sampling against sampling that computes the whole sequence anew at every step, and its controls."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ladir.config import BackboneSettings, LoraSettings, SampleSettings, VaeSettings
from ladir.errors import UnusableError
from ladir.inference import generation, memory
from ladir.inference.ar import complete
from ladir.inference.asking import Ask
from ladir.inference.cache import SHORTEST_SHARED, Prefix
from ladir.inference.decode import TokenHeadReading, choose_tokens, thought_ids
from ladir.inference.generation import BlockReader
from ladir.inference.guidance import diversity_force, reward_gradient
from ladir.inference.sampler import NOISE, BlockSampler, TrajectoryNoise, passes_per_span, step_times
from ladir.layout import Mark
from ladir.models import flow
from ladir.models.assembling import assemble_export
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser, TokenHead
from ladir.models.exports import load_export
from ladir.models.folders import new_vae, save_denoiser, save_vae
from ladir.models.loading import build_backbone
from ladir.models.vae import ThoughtDecoder, Vae, encode_sentences
from ladir.reasoner import Reasoner, Trajectory
from ladir.reference import clean_group, plain_forward, question_groups, sentence_groups, span_hidden
from ladir.report.traces import trace_questions
from ladir.spans import num_spans, staggered
from ladir.tokens import build_word_tokenizer, decode_text, encode_text
from tests.tiny import EOS, SHAPES, randomise_adapters, teacher_forced, tiny_denoiser, tiny_lm, tiny_vae

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = ["a b c", "d", "e f g h i"]
SETTINGS = SampleSettings(num_steps=3, max_blocks=3, max_answer_tokens=5, max_thought_tokens=5)
LORA = LoraSettings(rank=2, alpha=4.0)
CPU = torch.device("cpu")


def tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter: 29 with <pad>, <eos>, <unk>."""
    return build_word_tokenizer(LETTERS)


def undecided(denoiser: Denoiser) -> Denoiser:
    """The stop head leans on the block's content, so that trajectories differ in length."""
    with torch.no_grad():
        denoiser.stop_head.weight.mul_(3.0)
        denoiser.stop_head.bias.fill_(-0.5)
    return denoiser


def tiny_reasoner(
    kind: str = "llama",
    attention: str = "eager",
    objective: str = "velocity",
    span: int = 1,
    bidirectional_question: bool = False,
    carry: str = "none",
    time_token: bool = False,
    context: str = "latents",
    dtype: torch.dtype = torch.float64,
    sliding_window: int | None = None,
    **controls: Any,
) -> Reasoner:
    settings = {"objective": objective, "span": span, "bidirectional_question": bidirectional_question, "carry": carry}
    settings |= {"time_token": time_token, "context": context}
    settings |= {"token_weight": 0.5, "lm_weight": 0.5 if context == "text" else 0.0}
    window = {"sliding_window": sliding_window} if sliding_window else {}
    denoiser = undecided(tiny_denoiser(tiny_lm(kind, dtype=dtype, attention=attention, **window), **settings))
    vae = tiny_vae(kind, dtype=dtype)
    return Reasoner(denoiser, vae.thought_decoder, tokenizer(), replace(SETTINGS, **controls), vae)


# --- the obvious version -----------------------------------------------------------------------------------------------


@dataclass
class PlainTrajectory:
    path: list[list[Tensor]]  # per block: the estimate of the clean latents after every step
    blocks: list[Tensor]
    sentences: list[list[int]]  # what the blocks were read as, where they were
    stopped: bool
    answer: list[int]

    def groups(self, d: Denoiser) -> list[Tensor]:
        """The finished blocks as they stand before what follows."""
        if d.settings.context == "text":
            return [group for ids in self.sentences for group in sentence_groups(d, ids)]
        return [clean_group(d, block) for block in self.blocks]


def plain_velocity(
    reasoner: Reasoner, ids: list[int], clean: list[Tensor], z: Tensor, t: list[float], hidden: bool, carried: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The network's velocity for a noisy span [J, L, d], from the whole sequence; and its hidden states [J, L, H]."""
    d = reasoner.denoiser
    times = torch.tensor(t)
    states = span_hidden(d, [*question_groups(d, ids, hidden), *clean], z, times, carried)
    return flow.to_velocity(d.settings.objective, d.latent_out(states).float(), z, times[:, None, None]), states


def plain_step(settings: SampleSettings, z: Tensor, velocity: Tensor, t: float, s: float, fresh: Tensor) -> Tensor:
    """Euler, or a draw from z_s given z_t and x0 by Bayes' rule."""
    if settings.sampler == "ode":
        return z + (s - t) * velocity
    x0, a = z - t * velocity, (1 - t) / (1 - s)
    if s == 0:
        return x0
    likelihood = t**2 - a**2 * s**2
    variance = 1 / (1 / s**2 + a**2 / likelihood)
    mean = variance * ((1 - s) * x0 / s**2 + a * z / likelihood)
    return mean + variance**0.5 * fresh


def plain_time(settings: SampleSettings, step: int, steps: int) -> float:
    """The time after ``step`` of ``steps`` steps; the last one is exactly 0."""
    done = step / steps
    if step == steps:
        return 0.0
    return {"uniform": 1 - done, "cosine": math.cos(math.pi * done / 2), "power": (1 - done) ** settings.spacing_power}[
        settings.spacing
    ]


def plain_span(
    reasoner: Reasoner, ids: list[int], before: list[list[Tensor]], noise: TrajectoryNoise, rows: list[int]
) -> tuple[list[list[list[Tensor]]], list[list[list[int]]]]:
    """One span of every trajectory of a question, in lockstep (diversity needs the others): per block x0 per step, then z; and
    what every block reads as.  ``before``: groups of each trajectory's finished blocks."""
    s, d = reasoner.settings, reasoner.denoiser
    read: list[list[list[int]]] = [[[] for _ in range(d.settings.span)] for _ in rows]
    size = d.settings.span
    shape = (size, d.latents_per_block, d.latent_dim)
    zs = [s.initial_noise * noise.normal([row], shape)[0] for row in rows]
    paths: list[list[list[Tensor]]] = [[[] for _ in range(size)] for _ in rows]
    carried: list[Tensor | None] = [None] * len(rows)
    free_carried = [*carried]
    for attempt in range(1 + s.restarts):
        steps = s.restart_steps if attempt else s.num_steps
        times = [(s.restart_time if attempt else 1.0) * plain_time(s, step, steps) for step in range(steps + 1)]
        if attempt:
            again = [s.initial_noise * noise.normal([row], shape)[0] for row in rows]
            zs = [(1 - s.restart_time) * z + s.restart_time * eps for z, eps in zip(zs, again, strict=True)]
            if not s.restart_keeps_state:
                carried, free_carried = [None] * len(rows), [None] * len(rows)
        inner = (size, steps - 1 if s.sampler == "sde" else 0, *shape[1:])
        fresh = [
            torch.cat([s.initial_noise * noise.normal([row], inner)[0], torch.zeros(size, 1, *shape[1:])], dim=1) for row in rows
        ]
        lag = min(s.lag, steps)
        for number in range(steps + lag * (size - 1)):
            taken = [number - lag * block for block in range(size)]
            now = [times[min(max(step, 0), steps)] for step in taken]
            force = diversity_force(torch.stack(zs), [len(zs)])
            moved = [z.clone() for z in zs]
            for i in range(len(rows)):
                velocity, carried[i] = plain_velocity(reasoner, ids, before[i], zs[i], now, False, carried[i])
                if s.guidance_scale != 1.0:
                    free, free_carried[i] = plain_velocity(reasoner, ids, before[i], zs[i], now, True, free_carried[i])
                    velocity = plain_guided(s, velocity, free, zs[i], now)
                for block, step in enumerate(taken):
                    if 0 <= step < steps:
                        z, t, t_next = zs[i][block], times[step], times[step + 1]
                        bent = velocity[block] - s.diversity_scale * t * force[i][block]
                        paths[i][block].append(z - t * bent)
                        z = plain_step(s, z, bent, t, t_next, fresh[i][block, min(step, inner[1])])
                        if step == steps - 1:
                            spoken = [group for text in read[i][:block] for group in sentence_groups(d, text)]
                            groups = [*question_groups(d, ids, hidden=False), *before[i], *spoken]
                            state = carried[i]
                            own = None if state is None else state[block]
                            read[i][block] = plain_read(reasoner, z, own, groups, noise, rows[i])
                            z = plain_reencoded(reasoner, read[i][block]) if s.reencode else z
                        moved[i][block] = z
            zs = moved
    return [[[*path, z] for path, z in zip(paths[i], zs[i], strict=True)] for i in range(len(rows))], read


def plain_guided(settings: SampleSettings, velocity: Tensor, free: Tensor, z: Tensor, times: list[float]) -> Tensor:
    """Guidance of a span [J, L, d], block by block."""
    low, high = settings.guidance_interval
    guided = free + settings.guidance_scale * (velocity - free)
    for block, t in enumerate(times):
        if not low <= t <= high:
            guided[block] = velocity[block]
        elif settings.guidance_rescale and t > 0:
            x0, plain = z[block] - t * guided[block], z[block] - t * velocity[block]
            share = settings.guidance_rescale * float(plain.std() / x0.std()) + 1 - settings.guidance_rescale
            guided[block] = (z[block] - share * x0) / t
    return guided


def plain_read(
    reasoner: Reasoner, z: Tensor, state: Tensor | None, groups: list[Tensor], noise: TrajectoryNoise, row: int
) -> list[int]:
    """One block, read alone; ``state`` [L, H]: hidden states of its last step; ``groups``: what stands before it."""
    d, s = reasoner.denoiser, reasoner.settings
    latents = z * d.latent_std + d.latent_mean
    if s.token_head_weight or s.lm_weight or s.thought_temperature:
        draws = noise.uniform_of_thoughts([row], (s.max_thought_tokens,))[0] if s.thought_temperature else None
        return plain_fused_thought(reasoner, latents, state, groups, draws)
    return plain_thought(reasoner.thought_decoder, latents, s.max_thought_tokens)


def plain_reencoded(reasoner: Reasoner, ids: list[int]) -> Tensor:
    """What the VAE makes of one sentence."""
    d, encoder = reasoner.denoiser, reasoner.encoder
    assert encoder is not None
    mean, _ = encode_sentences(encoder, [ids])
    return (mean[0] - d.latent_mean) / d.latent_std


def plain_fused_thought(
    reasoner: Reasoner, z: Tensor, state: Tensor | None, groups: list[Tensor], draws: Tensor | None
) -> list[int]:
    """A token of several readers, one after another, the whole sequence each time; the head knows no end."""
    d, s, decoder, head = reasoner.denoiser, reasoner.settings, reasoner.thought_decoder, reasoner.denoiser.token_head
    if s.token_head_weight:
        assert head is not None and state is not None
        said = head(state[None, None], head.positions)[0, 0].softmax(-1)
    ids: list[int] = []
    while len(ids) < s.max_thought_tokens:
        own = teacher_forced(decoder, z[None], [ids])[-1].softmax(-1)
        if s.lm_weight:
            words = [d.backbone.embed(torch.tensor([token])) for token in ids]
            expected = plain_forward(d.backbone, [*groups, d.marks.weight[Mark.BOT][None], *words])[-1]
            own = own * d.backbone.logits(expected).softmax(-1) ** s.lm_weight
        if s.token_head_weight and len(ids) < len(said):
            if own.argmax() == EOS:
                break
            own = own * said[len(ids)] ** s.token_head_weight
            own[EOS] = 0.0
        draw = None if draws is None else draws[len(ids)][None]
        token = int(choose_tokens(own.log()[None], s.thought_temperature, draw))
        if token == EOS:
            break
        ids.append(token)
    return ids


def plain_answer(reasoner: Reasoner, groups: list[Tensor], uniform: Tensor) -> list[int]:
    """Token by token, the whole sequence each time."""
    d, s = reasoner.denoiser, reasoner.settings
    groups = [*groups, d.marks.weight[Mark.SOA][None]]
    answer: list[int] = []
    while len(answer) < s.max_answer_tokens:
        logits = d.backbone.logits(plain_forward(d.backbone, groups)[-1:])
        token = int(choose_tokens(logits, s.answer_temperature, uniform[None, len(answer)]))
        if token == EOS:
            break
        answer.append(token)
        groups.append(d.backbone.embed(torch.tensor([token])))
    return answer


@torch.no_grad()
def plain_generate(reasoner: Reasoner, question: str, count: int, seed: int) -> list[PlainTrajectory]:
    """All trajectories of one question without batch, padding or cache."""
    s, d = reasoner.settings, reasoner.denoiser
    ids = encode_text(reasoner.tokenizer, question)
    noise = TrajectoryNoise(seed, [(question, i) for i in range(count)])
    found = [PlainTrajectory([], [], [], False, []) for _ in range(count)]
    alive = list(range(count))
    for block in range(s.max_blocks):
        if not alive:
            break
        if block % d.settings.span == 0:
            paths, read = plain_span(reasoner, ids, [found[r].groups(d) for r in alive], noise, alive)
            spans = dict(zip(alive, zip(paths, read, strict=True), strict=True))
        for row in alive:
            path, sentence = (of_span[block % d.settings.span] for of_span in spans[row])
            found[row].path.append(path[:-1])
            found[row].blocks.append(path[-1])
            found[row].sentences.append(sentence)
            groups = [*question_groups(d, ids, hidden=False), *found[row].groups(d)]
            found[row].stopped = bool(d.stop_head(plain_forward(d.backbone, groups)[-1]) > 0)
        alive = [row for row in alive if not found[row].stopped]
    for row, trajectory in enumerate(found):
        groups = [*question_groups(d, ids, hidden=False), *trajectory.groups(d)]
        trajectory.answer = plain_answer(reasoner, groups, noise.uniform([row], s.max_answer_tokens)[0])
    return found


def standard(reasoner: Reasoner, trajectory: Trajectory) -> Tensor:
    d = reasoner.denoiser
    return (trajectory.latents - d.latent_mean) / d.latent_std


def assert_cached_is_plain(reasoner: Reasoner, questions: Sequence[str], count: int, seed: int = 4) -> list[Trajectory]:
    answers = reasoner.generate(questions, num_trajectories=count, seed=seed)
    estimates = steps_of(reasoner, questions, count, seed)
    for q, question in enumerate(questions):
        for i, plain in enumerate(plain_generate(reasoner, question, count, seed)):
            ours = answers[q][i]
            assert ours.stopped == plain.stopped
            controls, span = reasoner.settings, reasoner.denoiser.settings.span
            rounds = [controls.num_steps, *[controls.restart_steps] * controls.restarts]
            passes = sum(steps + min(controls.lag, steps) * (span - 1) for steps in rounds)
            assert ours.num_steps == passes * -(-len(plain.blocks) // span)
            path = torch.stack([torch.stack(block) for block in plain.path])
            seen = [torch.stack(steps) for _, steps in sorted(estimates[q * count + i].items())][: len(plain.blocks)]
            assert torch.allclose(torch.stack(seen), path, atol=1e-4)
            assert torch.allclose(standard(reasoner, ours), torch.stack(plain.blocks), atol=1e-4)
            assert ours.answer == decode_text(reasoner.tokenizer, plain.answer)
    return [trajectory for group in answers for trajectory in group]


def steps_of(reasoner: Reasoner, questions: Sequence[str], count: int, seed: int) -> list[dict[int, list[Tensor]]]:
    """The estimate of the clean latents after every step of every block, per trajectory, from the sampler's hook."""
    seen: list[dict[int, list[Tensor]]] = [{} for _ in range(len(questions) * count)]
    begun: list[set[int]] = [set() for _ in seen]

    def hook(rows: list[int], block: int, step: int, x0: Tensor) -> None:
        for row, estimate in zip(rows, x0, strict=True):
            steps = seen[row].setdefault(block, [])
            assert step == (len(steps) if block in begun[row] else NOISE)
            if step != NOISE:
                steps.append(estimate)
            begun[row].add(block)

    noise = TrajectoryNoise(seed, [(q, i) for q in questions for i in range(count)])
    owner = torch.arange(len(questions)).repeat_interleave(count)
    with torch.no_grad():
        prefix = reasoner._question_prefix(questions, owner, reasoner.settings.guidance_scale != 1.0)
        reads = reasoner.settings.reencode or reasoner.denoiser.settings.context == "text"
        reader = BlockReader(reasoner, reasoner.settings, noise) if reads else None
        list(BlockSampler(reasoner.denoiser, reasoner.settings, noise, reader=reader).sample(prefix, owner, hook))
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SHAPES)
def test_cached_sampling_equals_recomputing_everything(kind: str, attention: str) -> None:
    for span in (1, 2):
        assert_cached_is_plain(tiny_reasoner(kind, attention, span=span), QUESTIONS, 2)


@pytest.mark.parametrize(
    "controls",
    [
        {"sampler": "sde"},
        {"guidance_scale": 3.0},
        {"diversity_scale": 0.5},
        {"guidance_scale": 0.0, "diversity_scale": 0.8, "sampler": "sde", "initial_noise": 2.0},
        {"answer_temperature": 0.0},
        {"num_steps": 1, "max_blocks": 1},
        {"initial_noise": 0.0},
        {"spacing": "cosine"},
        {"reencode": True},
        {"restarts": 1},
        {"restarts": 2, "restart_time": 0.6, "restart_steps": 2, "reencode": True, "sampler": "sde", "spacing": "cosine"},
        {"restarts": 1, "reencode": True, "initial_noise": 0.7, "guidance_scale": 1.5, "diversity_scale": 0.5},
        {"spacing": "power", "spacing_power": 0.5, "sampler": "sde"},
        {"span": 2, "lag": 0, "diversity_scale": 0.5},
        {"span": 3, "lag": 1, "max_blocks": 4, "sampler": "sde", "guidance_scale": 2.0},
        {"span": 2, "lag": 9, "reencode": True, "restarts": 1, "restart_steps": 2},
        {"carry": "hidden"},
        {"time_token": True, "span": 2, "guidance_scale": 2.0},
        {"carry": "hidden", "span": 2, "lag": 1, "guidance_scale": 2.0, "sampler": "sde"},
        {"carry": "hidden", "restarts": 2, "restart_steps": 2, "guidance_scale": 2.0, "reencode": True},
        {"carry": "hidden", "reencode": True, "token_head_weight": 0.7},
        {"carry": "hidden", "reencode": True, "token_head_weight": 3.0, "guidance_scale": 2.0, "span": 2, "restarts": 1},
        {"carry": "hidden", "restarts": 1, "restart_keeps_state": True, "span": 2, "diversity_scale": 0.5},
        {"bidirectional_question": True, "guidance_scale": 2.0},
        {"bidirectional_question": True, "span": 2},
        {"context": "text"},
        {"context": "text", "max_thought_tokens": 1, "answer_temperature": 0.0},
        {"context": "text", "guidance_scale": 2.0, "carry": "hidden", "token_head_weight": 0.7, "restarts": 1},
        {"context": "text", "span": 2, "lag": 1, "sampler": "sde", "diversity_scale": 0.5, "max_blocks": 4},
        {"context": "text", "span": 2, "lag": 0, "carry": "hidden", "token_head_weight": 0.7, "num_steps": 2, "reencode": True},
        {"context": "text", "reencode": True, "bidirectional_question": True},
        {"context": "text", "lm_weight": 1.0, "guidance_scale": 2.0, "restarts": 1},
        {"context": "text", "lm_weight": 0.6, "carry": "hidden", "token_head_weight": 0.7, "span": 2, "lag": 0, "reencode": True},
        {"context": "text", "lm_weight": 3.0, "span": 3, "lag": 1, "max_blocks": 4, "bidirectional_question": True},
        {"context": "text", "thought_temperature": 1.0, "span": 2, "lag": 0, "max_blocks": 4},
        {"context": "text", "lm_weight": 0.6, "thought_temperature": 0.7, "span": 2, "lag": 0},
        {"carry": "hidden", "reencode": True, "token_head_weight": 0.7, "thought_temperature": 1.0, "restarts": 1},
        {"context": "text", "lm_weight": 1.0, "thought_temperature": 2.0, "carry": "hidden", "token_head_weight": 0.7},
        {"guidance_scale": 3.0, "guidance_interval": [0.3, 0.9], "guidance_rescale": 0.7, "carry": "hidden", "span": 2, "lag": 1},
    ],
    ids=lambda controls: "-".join(controls),
)
def test_every_control_equals_its_obvious_version(controls: dict[str, Any]) -> None:
    assert_cached_is_plain(tiny_reasoner(**controls), QUESTIONS[:2], 3)


@pytest.mark.parametrize(
    ("controls", "readings"),
    [
        ({}, [2, 2, 2]),
        ({"restarts": 2}, [2, 2, 2]),  # what a restart leaves no trace of is not read
        ({"restarts": 2, "reencode": True}, [2] * 9),
        ({"span": 3, "lag": 0, "restarts": 1}, [6]),  # what ends together is read together
        ({"span": 3, "lag": 0, "restarts": 1, "reencode": True}, [6, 6]),
        ({"span": 3, "lag": 1}, [2, 2, 2]),
    ],
    ids=str,
)
def test_blocks_are_read_no_more_often_than_they_count(
    controls: dict[str, Any], readings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoner, read = tiny_reasoner(context="text", max_answer_tokens=1, **controls), list[int]()
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)  # three blocks each

    def counted(decoder: ThoughtDecoder, eos: int, z: Tensor, *how: Any) -> list[list[int]]:
        read.append(len(z))
        return thought_ids(decoder, eos, z, *how)

    monkeypatch.setattr(generation, "thought_ids", counted)
    reasoner.generate(QUESTIONS[:1], 2)
    assert read == readings


def cut_unevenly(ids: list[int]) -> list[int]:
    """So much of a sentence that those of a batch have 0 to 5 tokens."""
    return ids[: (7 * ids[0] + ids[-1] + 1) % 6] if ids else ids


@pytest.mark.parametrize("shortest", [SHORTEST_SHARED, 1], ids=["copied", "shared"])
@pytest.mark.parametrize(
    "controls",
    [
        {"lm_weight": 0.7, "guidance_scale": 2.0, "span": 2, "lag": 0, "num_steps": 2},
        {"lm_weight": 2.0, "kind": "mistral", "attention": "sdpa", "sliding_window": 4, "num_steps": 2},
    ],
    ids=["guided-span", "sliding-window"],
)
def test_the_lm_writes_along_with_sentences_of_all_lengths(
    controls: dict[str, Any], shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows then end one after another, in two caches; the question in front of them is copied, or stays where it is."""
    monkeypatch.setattr("ladir.inference.cache.SHORTEST_SHARED", shortest)
    reasoner = tiny_reasoner(context="text", max_thought_tokens=9, **controls)
    with torch.no_grad():  # an end is now the likeliest token, now the least likely one
        reasoner.thought_decoder.backbone.base.get_output_embeddings().weight[EOS] *= 4
    found = assert_cached_is_plain(reasoner, QUESTIONS[:2], 3)
    assert len({len(ids) for trajectory in found for ids in trajectory.thought_ids or []}) > 3


@pytest.mark.parametrize("shortest", [SHORTEST_SHARED, 1], ids=["copied", "shared"])
@pytest.mark.parametrize(
    "controls",
    [
        {"guidance_scale": 2.0, "span": 2, "lag": 1, "num_steps": 2},
        {"kind": "mistral", "attention": "sdpa", "sliding_window": 4, "num_steps": 2},
    ],
    ids=["guided-span", "sliding-window"],
)
def test_sentences_of_all_lengths_stand_beside_one_another(
    controls: dict[str, Any], shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding then stands in the middle of the cache, where nobody may see it, and nobody may count it."""
    monkeypatch.setattr("ladir.inference.cache.SHORTEST_SHARED", shortest)
    plain, fast = plain_thought, thought_ids
    monkeypatch.setitem(globals(), "plain_thought", lambda *how: cut_unevenly(plain(*how)))
    monkeypatch.setattr(generation, "thought_ids", lambda *how: [cut_unevenly(ids) for ids in fast(*how)])
    found = assert_cached_is_plain(tiny_reasoner(context="text", **controls), QUESTIONS[:2], 3)
    lengths = [tuple(map(len, trajectory.thought_ids or [])) for trajectory in found]
    assert len({length for entry in lengths for length in entry}) > 3 and 0 in {n for entry in lengths for n in entry}


def test_sentences_that_reach_the_limit_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once, and again where they are more."""
    reasoner = tiny_reasoner(context="text", max_thought_tokens=2)
    found = list(itertools.chain(*reasoner.generate(QUESTIONS[:1], 2)))
    read = [ids for trajectory in found for ids in trajectory.thought_ids or []]
    long = sum(len(ids) == 2 for ids in read)
    assert long and [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{long} of {len(read)} blocks that were read as text reached the limit of 2 tokens" in caplog.text
    assert "set a higher sample.max_thought_tokens" in caplog.text
    reasoner.generate(QUESTIONS[:1], 2)
    assert len(caplog.records) == 1
    reasoner.generate(QUESTIONS, 2)
    assert len(caplog.records) == 2


def test_the_drift_of_thoughts_that_nobody_read_is_refused() -> None:
    reasoner = tiny_reasoner(context="text")
    found = reasoner.generate(QUESTIONS[:1])
    found[0][0].thought_ids = None
    with pytest.raises(UnusableError, match=r"a trajectory without thought_ids: .*denoiser.context=text"):
        reasoner.measure_drift([Ask(QUESTIONS[0])], found)


@pytest.mark.parametrize("objective", ["x0", "epsilon", "v"])
def test_every_objective_samples_alike_with_and_without_cache(objective: str) -> None:
    assert_cached_is_plain(tiny_reasoner(objective=objective, initial_noise=0.1), QUESTIONS, 1)


def test_trajectories_end_by_themselves_or_at_the_limit() -> None:
    trajectories = assert_cached_is_plain(tiny_reasoner(max_blocks=4), QUESTIONS, 4)
    lengths = {(len(t.latents), t.stopped) for t in trajectories}
    assert {True, False} == {stopped for _, stopped in lengths} and len({length for length, _ in lengths}) >= 3
    assert all(length == 4 for length, stopped in lengths if not stopped)
    assert all(len(t.thoughts) == len(t.latents) for t in trajectories)


def test_a_stop_head_that_never_or_always_stops() -> None:
    reasoner = tiny_reasoner()
    for bias, blocks in ((-1e4, 3), (1e4, 1)):
        with torch.no_grad():
            reasoner.denoiser.stop_head.bias.fill_(bias)
        trajectories = list(itertools.chain(*reasoner.generate(QUESTIONS, 2)))
        assert {(len(t.latents), t.stopped, t.num_steps) for t in trajectories} == {(blocks, bias > 0, 3 * blocks)}


# --- batches, seeds, controls ------------------------------------------------------------------------------------------


def assert_same(ours: Trajectory, theirs: Trajectory, atol: float = 1e-5) -> None:
    assert (ours.answer, ours.thoughts, ours.num_steps, ours.stopped) == (
        theirs.answer,
        theirs.thoughts,
        theirs.num_steps,
        theirs.stopped,
    )
    assert torch.allclose(ours.latents, theirs.latents, atol=atol)


IN_ANY_BATCH = pytest.mark.parametrize(
    "controls",
    [{}, {"guidance_scale": 2.0, "sampler": "sde", "spacing": "cosine"}, {"span": 2}, {"bidirectional_question": True}],
    ids=["plain", "guided-sde", "span", "bidirectional"],
)


def in_two_batches(reasoner: Reasoner) -> list[tuple[Trajectory, Trajectory]]:
    """Trajectories batched with all others, each with itself in a smaller batch or at another place."""
    together = reasoner.generate(QUESTIONS, 4, seed=6)
    pairs = []
    for question, group in zip(QUESTIONS, together, strict=True):
        [alone] = reasoner.generate([question], 1, seed=6)
        [two] = reasoner.generate([question], 2, seed=6)
        pairs += [(alone[0], group[0]), (two[1], group[1])]
    backwards = reasoner.generate(QUESTIONS[::-1], 4, seed=6)[::-1]
    return [*pairs, *zip(itertools.chain(*backwards), itertools.chain(*together), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "atol"),
    # Latents are below 16 here: in float32 a rounding is at most 1e-6, and some dozens of them follow one another.
    [(torch.float64, 1e-5), (torch.float32, 1e-4)],
    ids=["float64", "float32"],
)
@IN_ANY_BATCH
def test_a_trajectory_is_the_same_in_any_batch(controls: dict[str, Any], dtype: torch.dtype, atol: float) -> None:
    for one, other in in_two_batches(tiny_reasoner(dtype=dtype, **controls)):
        assert_same(one, other, atol)


@IN_ANY_BATCH
def test_in_bfloat16_a_trajectory_is_the_same_in_any_batch_up_to_ties(controls: dict[str, Any]) -> None:
    """Other batches round otherwise: where a token or the end is all but a tie, it may fall the other way."""
    pairs = in_two_batches(tiny_reasoner(dtype=torch.bfloat16, **controls))
    alike = [(a.answer, a.thoughts, a.num_steps, a.stopped) == (b.answer, b.thoughts, b.num_steps, b.stopped) for a, b in pairs]
    assert sum(alike) >= 0.75 * len(alike)
    for one, other in pairs:
        both = min(len(one.latents), len(other.latents))
        # Latents are below 16, where two neighbours in bfloat16 are 2^-4 apart: a handful of roundings.
        assert torch.allclose(one.latents[:both], other.latents[:both], atol=0.25)
    first = [trajectory.latents[0] for _, trajectory in pairs[: 2 * len(QUESTIONS)]]
    assert all((a - b).abs().max() > 0.5 for a, b in itertools.combinations(first, 2))  # what other numbers would give


@pytest.mark.parametrize("controls", [{}, {"guidance_scale": 2.0}, {"diversity_scale": 0.8}], ids=["plain", "guided", "diverse"])
def test_any_batch_size_gives_the_same_trajectories(controls: dict[str, Any]) -> None:
    """Also where a batch ends within a question's trajectories; those that repel one another stay together."""
    reasoner, told = tiny_reasoner(**controls), dict[Any, list[Any]]()

    def ask(size: Any) -> list[Trajectory]:
        seen = told.setdefault(size, [])
        groups = reasoner.generate(QUESTIONS, 4, seed=6, on_step=lambda *step: seen.append(step), batch_size=size)
        assert [len(group) for group in groups] == [4] * len(QUESTIONS)
        return list(itertools.chain(*groups))

    whole = ask(None)
    for size in (1, 3, 5, "auto", 10**9):
        for one, other in zip(ask(size), whole, strict=True):
            assert_same(one, other, 1e-5)
            assert one.trace == other.trace
        assert sorted(told[size]) == sorted(told[None])


def test_a_batch_that_memory_does_not_hold_is_halved(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reasoner, sizes = tiny_reasoner(), []
    whole, answer = reasoner.generate(QUESTIONS, 4), Reasoner._one_batch

    def short_of_memory(self: Reasoner, rows: Any, part: range, *how: Any) -> list[Trajectory]:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return answer(self, rows, part, *how)

    monkeypatch.setattr(Reasoner, "_one_batch", short_of_memory)
    halved = reasoner.generate(QUESTIONS, 4, batch_size="auto")
    for one, other in zip(itertools.chain(*halved), itertools.chain(*whole), strict=True):
        assert_same(one, other, 1e-5)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert "from here on 3 trajectories at a time" in caplog.text
    for size, controls in ((8, {}), ("auto", {"diversity_scale": 0.8})):  # a size that was given, and what has to stay together
        with pytest.raises(torch.OutOfMemoryError) as error:
            reasoner.generate(QUESTIONS, 4, batch_size=size, **controls)
        assert "batch_size" in error.value.__notes__[0]


def test_between_is_called_after_every_pass_and_what_it_raises_ends_all() -> None:
    """Of denoising, answers, thoughts that are read, and of noising the thoughts again, by which one is chosen."""
    reasoner, called = tiny_reasoner(), [0]

    def between() -> None:
        called[0] += 1
        if called[0] == last:
            raise InterruptedError

    last, counts, ways = -1, list[int](), list[dict[str, Any]]([{"thoughts": False}, {}, {"choose": "stable"}])
    for how in ways:
        called[0] = 0
        found = reasoner.generate(QUESTIONS, 2, between=between, **how)
        for one, other in zip(itertools.chain(*found), itertools.chain(*reasoner.generate(QUESTIONS, 2, **how)), strict=True):
            assert_same(one, other, atol=0.0)
        counts.append(called[0])
    assert 0 < counts[0] < counts[1] < counts[2]
    for last in (1, counts[0], counts[0] + 1, counts[1] + 1):
        called[0] = 0
        with pytest.raises(InterruptedError):
            reasoner.generate(QUESTIONS, 2, between=between, choose="stable")
        assert called[0] == last


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_a_batch_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a number of trajectories"):
        tiny_reasoner().generate(QUESTIONS, batch_size=size)


def test_as_many_trajectories_are_taken_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate covers keys and values of a trajectory of full length."""
    reasoner, found = tiny_reasoner(), []
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)  # the longest chain
    finish = Reasoner._finish

    def measure(self: Reasoner, group: Any, *rest: Any) -> Any:
        found.append(sum(t.nbytes for layer in group.prefix.cache.layers for t in (layer.keys, layer.values)) / len(group.rows))
        return finish(self, group, *rest)

    monkeypatch.setattr(Reasoner, "_finish", measure)
    reasoner.generate(QUESTIONS[-1:], 2)
    longest = len(encode_text(reasoner.tokenizer, QUESTIONS[-1]))
    size = memory.trajectory_bytes(reasoner.denoiser, reasoner.settings, longest)
    assert 2 * max(found) < size < 40 * max(found)
    guided = replace(reasoner.settings, guidance_scale=2.0)
    assert memory.trajectory_bytes(reasoner.denoiser, guided, longest) > 1.5 * size
    along = replace(reasoner.settings, lm_weight=1.0)  # a second copy is read along
    assert memory.trajectory_bytes(reasoner.denoiser, along, longest) > size + 2 * max(found)
    text = tiny_denoiser(tiny_lm(), context="text")  # a sentence goes through the LM at once
    sizes = [memory.trajectory_bytes(text, replace(guided, max_blocks=1, max_thought_tokens=n), longest) for n in (30, 60, 90)]
    assert sizes[2] - sizes[1] > sizes[1] - sizes[0] > 0
    read = replace(reasoner.settings, reencode=True)  # by a decoder with a cache of its own, behind the latents of each block
    caches: list[int] = []
    start = Prefix.start

    def of_reading(lm: Backbone, inputs: Tensor, lengths: Tensor, *how: bool) -> tuple[Prefix, Tensor]:
        prefix, hidden = start(lm, inputs, lengths, *how)
        if lm is reasoner.thought_decoder.backbone:
            caches.append(sum(t.nbytes for layer in prefix.cache.layers for t in (layer.keys, layer.values)) // len(inputs))
        return prefix, hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefix, "start", of_reading)
        patch.setattr(reasoner, "encoder", tiny_vae())
        reasoner.generate(QUESTIONS[-1:], 2, reencode=True)
    per_token = caches[0] // (reasoner.denoiser.latents_per_block + reasoner.thought_decoder.marks)
    bytes_read = memory.trajectory_bytes(reasoner.denoiser, read, longest, reasoner.thought_decoder) - size
    assert bytes_read == 2 * (caches[0] + per_token * read.max_thought_tokens) > 0
    for free, rows in ((2 * size, 1), (8 * size, 4), (0, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.trajectories_that_fit(reasoner.denoiser, reasoner.settings, longest, CPU) == rows
    monkeypatch.undo()
    assert memory.free_bytes(CPU) > 2**20


def test_seeds_reproduce_and_differ() -> None:
    reasoner = tiny_reasoner(sampler="sde")
    first, again, other = (reasoner.generate(QUESTIONS, 3, seed=seed) for seed in (1, 1, 2))
    for one, same, different in zip(*(itertools.chain(*g) for g in (first, again, other)), strict=True):
        assert_same(one, same, atol=0.0)
        assert not torch.allclose(one.latents[0], different.latents[0], atol=1e-3)
    latents = [t.latents[0] for t in first[0]]
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)


def test_any_whole_number_is_a_seed_of_its_own() -> None:
    reasoner, found = tiny_reasoner(), []
    for seed in (0, 2**63 - 1, 2**64, -1):
        [[one]], [[same]] = (reasoner.generate(["a b"], seed=seed) for _ in range(2))
        assert_same(one, same, atol=0.0)
        found.append(one.latents[0])
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(found, 2))


def test_guidance_of_one_is_no_guidance() -> None:
    plain, guided = tiny_reasoner(), tiny_reasoner(guidance_scale=1.0 + 1e-7)  # the second runs both branches
    for one, other in zip(
        itertools.chain(*plain.generate(QUESTIONS, 2)), itertools.chain(*guided.generate(QUESTIONS, 2)), strict=True
    ):
        assert_same(one, other, atol=1e-4)
    strong = plain.generate(QUESTIONS, 2, guidance_scale=3.0)[0][0]
    assert not torch.allclose(strong.latents[0], plain.generate(QUESTIONS, 2)[0][0].latents[0], atol=1e-3)


def test_blocks_are_read_together_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many passes of the LM as the longest text has tokens, not as many for every block; and within the bound on rows."""
    reasoner, rows = tiny_reasoner(), list[int]()
    reasoner.thought_decoder.backbone.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    read = list(itertools.chain(*reasoner.generate(QUESTIONS, 3)))
    blocks = [z for trajectory in read for z in trajectory.latents]
    together = len(rows)
    assert rows[0] == len(blocks) > len(read) and together <= SETTINGS.max_thought_tokens
    alone = [reasoner.decode_latents(torch.stack([trajectory.latents[b] for trajectory in read if b < len(trajectory.latents)]))
             for b in range(3)]  # fmt: skip
    assert len(rows) - together > 2 * together  # of three blocks
    for b, texts in enumerate(alone):
        assert texts == [trajectory.thoughts[b] for trajectory in read if b < len(trajectory.latents)]
    reasoner.settings = replace(reasoner.settings, thoughts_per_batch=2)
    rows.clear()
    bounded = list(itertools.chain(*reasoner.generate(QUESTIONS, 3)))
    assert max(rows) == 2 and [one.thoughts for one in bounded] == [one.thoughts for one in read]


@pytest.mark.parametrize("span", [1, 2])
def test_both_branches_of_the_guidance_are_one_batch(span: int) -> None:
    reasoner = tiny_reasoner(span=span, max_blocks=2, max_answer_tokens=1)
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)  # two blocks each
    rows: list[int] = []  # of every forward pass of the LM
    decoder = reasoner.denoiser.backbone.base.get_decoder()
    decoder.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True)

    def passes(scale: float) -> list[int]:
        rows.clear()
        reasoner.generate(QUESTIONS, 2, guidance_scale=scale, thoughts=False)
        return list(rows)

    plain, guided = passes(1.0), passes(2.0)
    steps = passes_per_span(reasoner.settings, span) * (2 // span)
    assert len(plain) == 1 + steps + 2 + 1  # the questions, the steps, the finished blocks, <SOA>
    assert guided == [*(2 * count for count in plain[:-1]), plain[-1]]  # the answer is not guided


def test_diversity_needs_company_and_stays_within_a_question() -> None:
    reasoner = tiny_reasoner()
    for [lone], [same] in zip(reasoner.generate(QUESTIONS), reasoner.generate(QUESTIONS, diversity_scale=0.8), strict=True):
        assert_same(lone, same, atol=0.0)
    together = reasoner.generate(QUESTIONS[:2], 3, diversity_scale=0.8)
    for question, group in zip(QUESTIONS[:2], together, strict=True):
        for one, other in zip(group, reasoner.generate([question], 3, diversity_scale=0.8)[0], strict=True):
            assert_same(one, other)
    spread = reasoner.generate(QUESTIONS[:1], 3)[0]
    assert not torch.allclose(spread[0].latents[0], together[0][0].latents[0], atol=1e-3)


def attraction(target: Tensor) -> Any:
    """A reward for latents near ``target``; its gradient is twice the way there."""
    return lambda latents, t: -(latents - target).square().sum((1, 2))


def test_a_reward_draws_every_trajectory_to_what_it_wants() -> None:
    reasoner = tiny_reasoner(num_steps=12)
    target = torch.tensor([1.0, -2.0, 3.0])

    def distance(scale: float) -> Tensor:
        groups = reasoner.generate(QUESTIONS, 2, seed=3, reward_fn=attraction(target), reward_scale=scale)
        return torch.stack([(t.latents[0] - target).square().sum() for group in groups for t in group])

    free = torch.stack([(t.latents[0] - target).square().sum() for g in reasoner.generate(QUESTIONS, 2, seed=3) for t in g])
    assert torch.equal(distance(0.0), free)
    assert (distance(1.0) < free).all() and (distance(5.0) < distance(1.0)).all() and (distance(-0.1) > free).all()


def test_a_rewards_step_equals_its_formula_and_sees_the_clean_estimate_and_the_time() -> None:
    reasoner = tiny_reasoner(num_steps=1, max_blocks=1)
    d, seen = reasoner.denoiser, []

    def reward(latents: Tensor, t: float) -> Tensor:
        seen.append((latents.detach().clone(), t))
        return (latents**3).sum((1, 2))

    free = torch.stack([t.latents[0] for g in reasoner.generate(QUESTIONS, 2) for t in g])
    drawn = torch.stack([t.latents[0] for g in reasoner.generate(QUESTIONS, 2, reward_fn=reward, reward_scale=0.01) for t in g])
    [(latents, t)] = seen
    assert t == 1.0 and torch.allclose(latents, free, atol=1e-5)  # one step ends at the estimate
    assert torch.allclose(drawn, free + 0.01 * d.latent_std**2 * 3 * free**2, atol=1e-4)


def test_a_rewarded_trajectory_is_the_same_in_any_batch() -> None:
    reasoner, reward = tiny_reasoner(sampler="sde"), attraction(torch.zeros(3))
    together = reasoner.generate(QUESTIONS, 3, seed=6, reward_fn=reward)
    for question, group in zip(QUESTIONS, together, strict=True):
        [[alone]] = reasoner.generate([question], 1, seed=6, reward_fn=reward)
        assert_same(alone, group[0])


def test_rewards_that_cannot_guide_are_refused() -> None:
    latents = torch.ones(3, 2, 4)
    for function, message in (
        (lambda z, t: z.sum(), "one number per trajectory"),
        (lambda z, t: 1.0, "not float"),
        (lambda z, t: torch.zeros(len(z)), "does not depend on the latents"),
    ):
        with pytest.raises(ValueError, match=message):
            reward_gradient(function, latents, 0.5)
    with torch.inference_mode():
        gradient = reward_gradient(lambda z, t: t * z.square().sum((1, 2)), torch.ones(3, 2, 4), 0.5)
    assert torch.equal(gradient, torch.ones(3, 2, 4))
    with pytest.raises(UnusableError, match="did not stay finite"):
        tiny_reasoner().generate(QUESTIONS, reward_fn=lambda z, t: (z * float("nan")).sum((1, 2)))


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_step_times_fall_from_one_to_zero(steps: int) -> None:
    for spacing, power in (("uniform", 1.0), ("cosine", 1.0), ("power", 0.1), ("power", 3.0), ("power", 10.0)):
        times = step_times(SampleSettings(num_steps=steps, spacing=spacing, spacing_power=power))
        assert len(times) == steps + 1 and times[0] == 1.0 and times[-1] == 0.0
        assert all(later < earlier for earlier, later in itertools.pairwise(times))
    first_step = {
        spacing: 1 - step_times(SampleSettings(num_steps=10, spacing=spacing))[1] for spacing in ("uniform", "cosine", "power")
    }
    assert first_step["cosine"] < first_step["uniform"] < first_step["power"]
    assert step_times(SampleSettings(num_steps=steps, spacing="power", spacing_power=1.0)) == step_times(
        SampleSettings(num_steps=steps)
    )


def test_zero_noise_and_temperature_leave_nothing_to_chance() -> None:
    reasoner = tiny_reasoner()
    [group] = reasoner.generate(QUESTIONS[:1], 3, initial_noise=0.0, answer_temperature=0.0)
    for other in group[1:]:
        assert_same(group[0], other)


def assert_well_formed(reasoner: Reasoner, count: int = 3, **controls: Any) -> None:
    """Finite latents and as many blocks, passes and words as the controls allow."""
    trajectories = list(itertools.chain(*reasoner.generate(QUESTIONS[:2], count, **controls)))
    settings = reasoner.settings_with(**{name: controls[name] for name in controls if hasattr(reasoner.settings, name)})
    span = reasoner.denoiser.settings.span
    assert len(trajectories) == 2 * count
    for t in trajectories:
        assert t.latents.isfinite().all() and 1 <= len(t.latents) == len(t.thoughts) <= settings.max_blocks
        assert t.num_steps == passes_per_span(settings, span) * num_spans(len(t.latents), span)
        assert t.stopped or len(t.latents) == settings.max_blocks
        assert len(t.answer.split()) <= settings.max_answer_tokens
        assert all(len(thought.split()) <= settings.max_thought_tokens for thought in t.thoughts)


def test_extreme_controls_work() -> None:
    reasoner = tiny_reasoner()
    extreme = {"num_steps": 1, "initial_noise": 0.0, "answer_temperature": 0.0, "max_blocks": 1, "guidance_scale": 0.0}
    largest = {
        "initial_noise": 100.0,
        "answer_temperature": 100.0,
        "guidance_scale": 100.0,
        "diversity_scale": 100.0,
        "max_blocks": 8,
        "max_answer_tokens": 1,
        "num_steps": 25,
        "restarts": 5,
        "reencode": True,
    }
    spacings = [{"spacing": "power", "spacing_power": power, "sampler": "sde", "num_steps": 10} for power in (0.1, 10.0)]
    for controls in (extreme, *({name: value} for name, value in (*extreme.items(), *largest.items())), *spacings):
        assert_well_formed(reasoner, **controls)  # type: ignore[arg-type]
    assert reasoner.generate([]) == []
    one_letter = reasoner.generate(["a"], thoughts=False)[0][0]
    assert one_letter.thoughts == [""] * len(one_letter.latents)


@pytest.mark.parametrize(
    "controls",
    [
        {"lag": 0},
        {"lag": 100},
        {"restarts": 1, "restart_time": 0.01},
        {"restarts": 1, "restart_time": 1.0},
        {"restarts": 5, "restart_steps": 1},
        {"restarts": 100, "restart_steps": 1, "max_blocks": 1},
        {"sampler": "sde", "num_steps": 1},
        {"sampler": "sde", "num_steps": 1, "restarts": 1, "restart_steps": 1, "lag": 100},
    ],
    ids=lambda controls: "-".join(f"{name}={value}" for name, value in controls.items()),
)
def test_extreme_controls_work_for_blocks_that_form_together(controls: dict[str, Any]) -> None:
    assert_well_formed(tiny_reasoner(span=2), **controls)


@pytest.mark.parametrize("reencode", [False, True])
def test_thoughts_of_one_token(reencode: bool) -> None:
    assert_well_formed(tiny_reasoner(max_thought_tokens=1), reencode=reencode)


@pytest.mark.parametrize("controls", [{"sampler": "ode", "restarts": 100}, {"sampler": "sde", "restarts": 5, "reencode": True}])
def test_all_controls_at_their_largest_together(controls: dict[str, Any]) -> None:
    largest = dict.fromkeys(("initial_noise", "guidance_scale", "diversity_scale", "answer_temperature"), 100.0)
    spacing = {"spacing": "power", "spacing_power": 10.0}
    restarts = {"restart_time": 1.0, "restart_steps": 1, "lag": 100}
    reward = {"reward_fn": attraction(torch.zeros(3)), "reward_scale": 100.0}
    assert_well_formed(tiny_reasoner(span=2, max_blocks=2), **largest, **spacing, **restarts, **reward, **controls)


def test_extreme_rewards_guide_or_are_refused() -> None:
    reasoner, reward = tiny_reasoner(), attraction(torch.zeros(3))
    for scale in (0.0, 1e-30, 100.0, -100.0):
        assert_well_formed(reasoner, reward_fn=reward, reward_scale=scale)
    for scale, reencode in itertools.product((1e30, -math.inf, math.nan), (False, True)):
        with pytest.raises(UnusableError, match=r"did not stay finite under these controls; lower .* the reward"):
            reasoner.generate(QUESTIONS, reward_fn=reward, reward_scale=scale, reencode=reencode)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"num_steps": 0}, "num_steps=0: must be at least 1"),
        ({"num_steps": 2.5}, "num_steps=2.5: must be a whole number"),
        ({"max_blocks": 0}, "max_blocks=0: must be at least 1"),
        ({"max_answer_tokens": 0}, "max_answer_tokens=0: must be at least 1"),
        ({"num_trajectories": 0}, "num_trajectories must be at least 1"),
        ({"sampler": "euler"}, "sampler=euler: must be one of ode, sde"),
        ({"spacing": "karras"}, "spacing=karras: must be one of uniform, cosine, power"),
        ({"spacing_power": 0.0}, "spacing_power=0.0: must be at least 0.1 and at most 10"),
        ({"initial_noise": -1.0}, "initial_noise=-1.0: must be at least 0"),
        ({"initial_noise": 1e30}, "initial_noise=1e\\+30: must be at least 0 and at most 100"),
        ({"initial_noise": float("nan")}, "initial_noise=nan: must be a finite number"),
        ({"initial_noise": "much"}, "initial_noise='much': must be a number"),
        ({"restarts": -1}, "restarts=-1: must be at least 0"),
        ({"restart_time": 0.0}, "restart_time=0.0: must be at least 0.01 and at most 1"),
        ({"restart_time": 1.1}, "restart_time=1.1: must be at least 0.01 and at most 1"),
        ({"restart_steps": 0}, "restart_steps=0: must be at least 1"),
        ({"restarts": 101}, "restarts=101: must be at least 0 and at most 100"),
        ({"lag": -1}, "lag=-1: must be at least 0 and at most 100"),
        ({"lag": 101}, "lag=101: must be at least 0 and at most 100"),
        ({"answer_temperature": -0.1}, "answer_temperature=-0.1: must be at least 0"),
        ({"thought_temperature": -0.1}, "thought_temperature=-0.1: must be at least 0"),
        ({"diversity_scale": -0.1}, "diversity_scale=-0.1: must be at least 0"),
        ({"guidance_interval": [0.9, 0.1]}, r"guidance_interval=\[0.9, 0.1\]: must be two times, \[low, high\]"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5: must be two times"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5: must be at least 0 and at most 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf: must be a finite number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_controls_are_refused(controls: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_reasoner().generate(QUESTIONS, **controls)


def test_controls_that_the_models_reading_does_not_allow_are_refused() -> None:
    with pytest.raises(UnusableError, match=r"verifier_scale=1\.0: this model reads thoughts as text .*use 0"):
        tiny_reasoner(context="text").generate(QUESTIONS, verifier_scale=1.0)
    with pytest.raises(UnusableError, match=r"token_head_weight: the head has a say where .* reencode=True"):
        tiny_reasoner(carry="hidden").generate(QUESTIONS, token_head_weight=1.0)
    tiny_reasoner(carry="hidden", context="text").generate(QUESTIONS, token_head_weight=1.0, lm_weight=1.0)
    with pytest.raises(UnusableError, match="thought_temperature: finished blocks are read as text with reencode=True"):
        tiny_reasoner().generate(QUESTIONS, thought_temperature=1.0)
    with pytest.raises(UnusableError, match=r"lm_weight=1.0: the LM of this model was not trained on sentences"):
        tiny_reasoner().generate(QUESTIONS, lm_weight=1.0)


def test_several_bad_controls_are_named_at_once_and_questions_must_not_be_empty() -> None:
    reasoner = tiny_reasoner()
    with pytest.raises(ValueError, match=r"num_steps.*initial_noise.*max_blocks.*sampler"):
        reasoner.generate(QUESTIONS, num_steps=0, max_blocks=-1, sampler="x", initial_noise=-1)
    reasoner.denoiser.settings = replace(reasoner.denoiser.settings, condition_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0: this model never saw a hidden question"):
        reasoner.generate(QUESTIONS, guidance_scale=2.0)
    with pytest.raises(ValueError, match="question 2 is empty"):
        reasoner.generate(["a", " \n"])


# --- thoughts, trace, answers ------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_thought(decoder: ThoughtDecoder, z: Tensor, limit: int) -> list[int]:
    """Greedy text of one block's latents [L, d], the whole sequence each time."""
    ids: list[int] = []
    while len(ids) < limit:
        token = int(teacher_forced(decoder, z[None], [ids])[-1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids


def test_thoughts_are_the_vae_decoders_greedy_text() -> None:
    reasoner = tiny_reasoner()
    for trajectory in itertools.chain(*reasoner.generate(QUESTIONS, 2)):
        texts = [decode_text(reasoner.tokenizer, plain_thought(reasoner.thought_decoder, z, 5)) for z in trajectory.latents]
        assert trajectory.thoughts == texts


def test_reencoded_thoughts_are_what_the_vae_makes_of_their_text() -> None:
    reasoner = tiny_reasoner()
    assert reasoner.encoder is not None
    free = list(itertools.chain(*reasoner.generate(QUESTIONS, 3)))
    read = list(itertools.chain(*reasoner.generate(QUESTIONS, 3, reencode=True)))
    assert any(
        len(one.latents) != len(other.latents) or one.answer != other.answer for one, other in zip(free, read, strict=True)
    )
    for one, other in zip(free, read, strict=True):
        first = plain_thought(reasoner.thought_decoder, one.latents[0], SETTINGS.max_thought_tokens)
        mean, _ = encode_sentences(reasoner.encoder, [first])
        assert torch.allclose(other.latents[0], mean[0], atol=1e-5)


def test_thoughts_are_the_sentences_that_were_encoded_again() -> None:
    reasoner = tiny_reasoner(carry="hidden", reencode=True, token_head_weight=2.0)
    assert reasoner.encoder is not None
    asked, later = (list(itertools.chain(*reasoner.generate(QUESTIONS, 3, thoughts=read))) for read in (True, False))
    reasoner.read_thoughts(later)
    differ = 0
    for trajectory, other in zip(asked, later, strict=True):
        assert trajectory.thought_ids is not None and trajectory.thoughts == other.thoughts
        assert trajectory.thoughts == [decode_text(reasoner.tokenizer, ids) for ids in trajectory.thought_ids]
        means, _ = encode_sentences(reasoner.encoder, trajectory.thought_ids)
        assert torch.allclose(trajectory.latents, means, atol=1e-5)
        differ += trajectory.thoughts != reasoner.decode_latents(trajectory.latents)
    assert differ  # the decoder alone reads other sentences, which the chain did not go on from


def test_a_trace_ends_with_the_sentence_that_was_encoded_again() -> None:
    reasoner = tiny_reasoner(carry="hidden", reencode=True, token_head_weight=2.0)
    asked = list(itertools.chain(*reasoner.generate(QUESTIONS, 3)))
    traced = list(itertools.chain(*trace_questions(reasoner, QUESTIONS, 3, seed=0)))
    assert [trace.thoughts for trace in traced] == [trajectory.thoughts for trajectory in asked]


def test_the_decoder_alone_ends_a_sentence() -> None:
    """However sure the head is of a token, and however little both agree on one."""
    head = TokenHead(4, 1, positions=2, rank=2, vocab_size=3)
    with torch.no_grad():
        head.up.weight.zero_()
        head.up.bias.copy_(torch.tensor([0.1, 0.9, 1e-9]).log())
    steer = TokenHeadReading(head, torch.zeros(3, 2, 2), 1.0).steer(2)
    own = torch.tensor([[0.5, 0.1, 0.4], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]).log()
    assert steer(own, torch.arange(3), 0, None).argmax(-1).tolist() == [1, 2, 2]
    left = steer(own, torch.arange(3), 1, None).isfinite()  # the end alone, or all but that: at any temperature
    assert left.tolist() == [[True, True, False], [False, False, True], [False, False, True]]
    assert torch.equal(steer(own, torch.arange(3), 2, None), own)  # beyond the head's positions


def test_an_export_without_a_token_head_is_not_asked_for_one() -> None:
    for reasoner in (tiny_reasoner(), tiny_reasoner(carry="hidden")):
        reasoner.denoiser.token_head = None if reasoner.denoiser.carry_in is not None else reasoner.denoiser.token_head
        with pytest.raises(UnusableError, match=r"token_head_weight=1.0: this model was trained without a token head"):
            reasoner.generate(QUESTIONS, reencode=True, token_head_weight=1.0)


def test_reencoding_needs_the_encoder_and_finite_latents() -> None:
    reasoner = tiny_reasoner()
    prefix = reasoner._question_prefix(QUESTIONS[:1], torch.zeros(1, dtype=torch.int64), guided=False)
    reader = BlockReader(reasoner, reasoner.settings, TrajectoryNoise(0, [("a", 0)]))
    endless = torch.full((1, 1, 2, 3), torch.inf)
    with pytest.raises(UnusableError, match="did not stay finite"):
        reader([0], [0], endless, torch.zeros(1, 1, 2, 0), prefix)
    reasoner.encoder = None
    with pytest.raises(ValueError, match=r"reencode: this model came without.*sample\.reencode=true"):
        reasoner.generate(QUESTIONS, reencode=True)


def test_thoughts_can_be_read_afterwards() -> None:
    reasoner = tiny_reasoner()
    at_once = list(itertools.chain(*reasoner.generate(QUESTIONS, 3)))
    later = list(itertools.chain(*reasoner.generate(QUESTIONS, 3, thoughts=False)))
    assert all(set(trajectory.thoughts) == {""} for trajectory in later)
    reasoner.read_thoughts(later)
    assert len({len(trajectory.thoughts) for trajectory in later}) > 1
    for one, other in zip(at_once, later, strict=True):
        assert_same(one, other)
    reasoner.read_thoughts([])


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_trace_shows_every_step_of_every_block(sampler: str, span: int) -> None:
    """Of blocks behind a trajectory's last one, which its last span has, nothing is left in the trace."""
    reasoner = tiny_reasoner(sampler=sampler, span=span)
    calls: list[tuple[int, int, int, str]] = []
    answers = reasoner.generate(QUESTIONS, 2, on_step=lambda *call: calls.append(call))
    flat = list(itertools.chain(*answers))
    for row, trajectory in enumerate(flat):
        called = [call for call in calls if call[0] == row]
        assert max(block for _, block, *_ in called) < -(-len(trajectory.thoughts) // span) * span
        own = sorted(call for call in called if call[1] < len(trajectory.thoughts))
        assert [(block, step) for _, block, step, _ in own] == [(b, s) for b in range(len(trajectory.thoughts)) for s in range(3)]
        assert [text for *_, text in own] == list(itertools.chain(*trajectory.trace))
        assert [texts[-1] for texts in trajectory.trace] == trajectory.thoughts
    for one, other in zip(flat, itertools.chain(*reasoner.generate(QUESTIONS, 2)), strict=True):
        assert_same(one, other, atol=0.0)  # watching changes nothing


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 8))
def test_every_block_of_a_span_takes_all_steps_in_its_turn(steps: int, span: int, lag: int) -> None:
    times = step_times(SampleSettings(num_steps=steps))
    schedule = staggered(times, span, lag)
    for block, column in enumerate(zip(*schedule, strict=True)):
        start = min(lag, steps) * block
        assert list(column[start : start + steps + 1]) == times
        assert set(column[:start]) <= {1.0} and set(column[start + steps :]) == {0.0}
    assert [row for row in schedule if row[-1] == 0.0] == [[0.0] * span]  # no pass in which nothing moves


@pytest.mark.parametrize("lag", [0, 1, 9])
def test_blocks_that_form_together_share_their_passes(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner(span=2, lag=lag, restarts=1, restart_steps=2, max_blocks=3)
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)
    calls: list[int] = []
    step = Denoiser.denoise_step
    monkeypatch.setattr(Denoiser, "denoise_step", lambda *args: calls.append(1) or step(*args))
    [[trajectory]] = reasoner.generate(["a b"], 1)
    passes = {0: 3 + 2, 1: 4 + 3, 9: 6 + 4}[lag]
    assert trajectory.num_steps == len(calls) == 2 * passes
    assert len(trajectory.latents) == 3


def test_a_begin_token_is_put_before_the_question_where_there_is_one() -> None:
    reasoner, plain = tiny_reasoner(), tiny_reasoner()
    reasoner.tokenizer.bos_token = "z"
    noise = {question: TrajectoryNoise(0, [(question, 0)]) for question in ("a b", "z a b")}
    with torch.no_grad():
        ours = reasoner._question_prefix(["a b"], torch.tensor([0]), False)
        theirs = plain._question_prefix(["z a b"], torch.tensor([0]), False)
        latents = [
            next(
                BlockSampler(r.denoiser, SETTINGS, noise["a b"] if r is reasoner else TrajectoryNoise(0, [("a b", 0)])).sample(
                    prefix, torch.tensor([0])
                )
            ).latents
            for r, prefix in ((reasoner, ours), (plain, theirs))
        ]
    assert torch.equal(latents[0], latents[1])


def test_a_hidden_question_keeps_its_begin_token() -> None:
    reasoner = tiny_reasoner(guidance_scale=2.0)
    reasoner.tokenizer.bos_token = "z"
    with torch.no_grad():
        prefix = reasoner._question_prefix(QUESTIONS[:2], torch.tensor([0, 1]), True)
        latent = torch.zeros(1, 2, 3)
        for row, question in enumerate(QUESTIONS[:2]):
            ids = encode_text(reasoner.tokenizer, f"z {question}")
            groups = question_groups(reasoner.denoiser, ids[1:], True, prefix=ids[:1])
            expected = plain_forward(reasoner.denoiser.backbone, [*groups, clean_group(reasoner.denoiser, latent[0])])[-1]
            d, alone = reasoner.denoiser, prefix.select(torch.tensor([row + 2]))
            marks = [d.mark(mark).expand(1, 1, -1) for mark in (Mark.BOT, Mark.EOT)]
            found = alone.append(torch.cat([marks[0], d.clean_inputs(latent), marks[1]], dim=1))[0, -1]
            assert torch.allclose(found, expected, atol=1e-5)


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20000, -1)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 3.0):
        drawn = choose_tokens(logits, temperature, uniform)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        assert torch.allclose(shares, (logits[0] / temperature).softmax(-1), atol=0.012)
    assert choose_tokens(logits[:3], 0.0, uniform[:3]).tolist() == [3, 3, 3]
    for tiny in (1e-30, 1e-39, 1e-300):
        assert choose_tokens(logits[:3], tiny, uniform[:3]).tolist() == [3, 3, 3]
    edges = torch.tensor([0.0, 1.0 - 2**-24])
    assert choose_tokens(torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1), 1.0, edges).tolist() == [1, 1]


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_the_baselines_greedy_text_is_transformers_generate(kind: str) -> None:
    lm = tiny_lm(kind)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    texts = complete(Backbone(lm), prompts, ["a", "b", "c"], 2, EOS, max_tokens=8, temperature=0.0, seed=0)
    for prompt, group in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        generated = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        expected = generated[0, len(prompt) :].tolist()
        expected = expected[: expected.index(EOS)] if EOS in expected else expected
        assert group == [expected, expected]


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_the_baselines_greedy_text_behind_a_bidirectional_question_is_that_of_plain_forwards(kind: str) -> None:
    backbone, prompts = Backbone(tiny_lm(kind)), [[5, 6, 7], [8], [9, 10, 11, 12]]
    texts = complete(backbone, prompts, ["a", "b", "c"], 2, EOS, 8, 0.0, seed=0, bidirectional_question=True)
    for prompt, group in zip(prompts, texts, strict=True):
        groups, expected = [backbone.embed(torch.tensor(prompt))], list[int]()
        while len(expected) < 8:
            token = int(backbone.logits(plain_forward(backbone, groups)[-1]).argmax())
            if token == EOS:
                break
            expected.append(token)
            groups.append(backbone.embed(torch.tensor([token])))
        assert group == [expected, expected]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_baselines_samples_do_not_depend_on_the_batch(bidirectional: bool) -> None:
    backbone, prompts = Backbone(tiny_lm()), [[5, 6, 7], [8], [9, 10, 11, 12]]

    def ask(which: list[int], samples: int) -> list[list[list[int]]]:
        keys = [str(i) for i in which]
        return complete(backbone, [prompts[i] for i in which], keys, samples, EOS, 8, 1.0, 2, bidirectional)

    together = ask([0, 1, 2], 3)
    assert len({tuple(text) for group in together for text in group}) > 3
    for i in range(3):
        assert ask([i], 1)[0][0] == together[i][0]


# --- folders -----------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A denoiser and a VAE on one base LM, as their phases leave them."""

    denoiser: Denoiser
    vae: Vae
    base: Path


def trained(folder: Path, denoiser_lora: bool, vae_lora: bool, decoder: str, kind: str = "llama", **reads: Any) -> Trained:
    base = folder / "base"
    tiny_lm(kind, seed=7, dtype=torch.float32).save_pretrained(str(base))
    plain = BackboneSettings(name_or_path=str(base), dtype="float32", attention="eager")
    adapted = replace(plain, lora=LORA)
    vae_settings = VaeSettings(latent_dim=3, latents_per_block=2, decoder=decoder)
    vae = new_vae(vae_settings, adapted if vae_lora else plain, "cpu", bos=[3])
    model = tiny_denoiser(tiny_lm(kind, dtype=torch.float32), **reads)
    denoiser = Denoiser(
        build_backbone(adapted if denoiser_lora else plain, "cpu"), model.settings, 2, model.latent_mean, model.latent_std
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*vae.parameters(), *denoiser.parameters()]:
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for module, adapts in ((denoiser, denoiser_lora), (vae, vae_lora)):
        if adapts:
            randomise_adapters(module, seed=8)
    return Trained(undecided(denoiser).eval(), vae.eval(), base)


def assert_same_answers(ours: Reasoner, theirs: Reasoner) -> None:
    assert ours.settings == theirs.settings
    pairs = zip(*(itertools.chain(*r.generate(QUESTIONS, 2, seed=5)) for r in (ours, theirs)), strict=True)
    for one, other in pairs:
        assert_same(one, other)


VARIANTS = {
    "full": (False, False, "frozen"),
    "lora": (True, True, "frozen"),
    "full-denoiser-lora-vae": (False, True, "frozen"),
    "lora-denoiser-full-vae": (True, False, "frozen"),
    "trained-decoder": (False, False, "trained"),
    "lora-trained-decoder": (True, True, "trained"),
}


@pytest.mark.parametrize(("reencode", "lm_weight"), [(False, 0.0), (True, 0.0), (False, 2.0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_answers_as_the_models_it_was_made_of(tmp_path: Path, variant: str, reencode: bool, lm_weight: float) -> None:
    parts = trained(tmp_path, *VARIANTS[variant], **({"context": "text", "lm_weight": 1.0} if lm_weight else {}))
    save_denoiser(parts.denoiser, tmp_path / "denoiser")
    save_vae(parts.vae, tmp_path / "vae", base=str(parts.base))
    settings = replace(SETTINGS, reencode=reencode, lm_weight=lm_weight)
    reasoner = Reasoner(parts.denoiser, parts.vae.thought_decoder, tokenizer(), settings, parts.vae if reencode else None)
    assert len({t.answer for g in reasoner.generate(QUESTIONS, 2) for t in g}) > 1
    assert any(t.thoughts != [""] * len(t.thoughts) for g in reasoner.generate(QUESTIONS, 2) for t in g)
    assemble_export(tmp_path / "denoiser", tmp_path / "vae", reasoner.tokenizer, tmp_path / "export", settings)
    denoiser_lora, vae_lora, _ = VARIANTS[variant]
    if not (denoiser_lora or (reencode and vae_lora)):
        shutil.move(parts.base, tmp_path / "elsewhere")  # an export without adapters stands alone
    exported = Reasoner.from_pretrained(tmp_path / "export", device="cpu")
    assert_same_answers(exported, reasoner)
    exported.save_pretrained(tmp_path / "again")
    assert_same_answers(Reasoner.from_pretrained(tmp_path / "again", device="cpu"), reasoner)
    assert not list(tmp_path.glob("**/*.writing"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reasoner_made_of_parts_is_saved_and_loaded(tmp_path: Path, variant: str) -> None:
    parts = trained(tmp_path, *VARIANTS[variant], kind="qwen3")
    for settings, encoder in ((SETTINGS, None), (replace(SETTINGS, reencode=True), parts.vae)):
        reasoner = Reasoner(parts.denoiser, parts.vae.thought_decoder, tokenizer(), settings, encoder)
        reasoner.save_pretrained(tmp_path / "export")
        assert_same_answers(Reasoner.from_pretrained(tmp_path / "export", device="cpu"), reasoner)


def test_an_export_is_a_hugging_face_folder(tmp_path: Path) -> None:
    parts = trained(tmp_path, *VARIANTS["full"])
    Reasoner(parts.denoiser, parts.vae.thought_decoder, tokenizer(), SETTINGS).save_pretrained(tmp_path / "export")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(lm(ids).logits, parts.denoiser.backbone.base(ids).logits)
    assert Reasoner.from_pretrained(tmp_path / "export", device="cpu").settings == SETTINGS
    saved = load_export(tmp_path / "export", CPU, "eager", None).sample
    assert saved == asdict(SETTINGS)


def test_nothing_but_a_model_is_written_over(tmp_path: Path) -> None:
    parts = trained(tmp_path, *VARIANTS["lora"])
    save_denoiser(parts.denoiser, tmp_path / "denoiser")
    save_vae(parts.vae, tmp_path / "vae", base=str(parts.base))
    reasoner = Reasoner(parts.denoiser, parts.vae.thought_decoder, tokenizer(), SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(UnusableError, match=f"{place.name} is no model folder .* delete"):
            reasoner.save_pretrained(place)
        with pytest.raises(UnusableError, match=f"{place.name} is no model folder .* delete"):
            assemble_export(tmp_path / "denoiser", tmp_path / "vae", reasoner.tokenizer, place, SETTINGS)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    (tmp_path / "export").mkdir()
    for _ in range(2):  # an empty folder, then its own export
        reasoner.save_pretrained(tmp_path / "export")
        assemble_export(tmp_path / "denoiser", tmp_path / "vae", reasoner.tokenizer, tmp_path / "export", SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "denoiser", "export", "mine", "vae"]


def test_questions_that_are_none_are_named() -> None:
    reasoner = tiny_reasoner()
    with pytest.raises(ValueError, match="must be a list of texts, not one text"):
        reasoner.generate("a b c")
    with pytest.raises(UnusableError, match="question 2 holds half a surrogate pair at character 2"):
        reasoner.generate(["a", "b \udcff"])
    with pytest.raises(UnusableError, match="question 1 is empty"):
        reasoner.generate([" "])


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: no such folder"):
        Reasoner.from_pretrained(tmp_path / "nothing")
