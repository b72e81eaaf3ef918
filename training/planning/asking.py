"""What answering questions takes: an evaluation's, the verifier's, and those of stage 3 between two updates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ladir.config import Config
from ladir.config.checks import reads_blocks
from ladir.inference.sampler import passes_per_span
from ladir.layout import block_length, longest_block
from training.planning.models import DataSize

#: a block's denoising steps are one CUDA graph, but for the first two
_NOT_REPLAYED = 2


@dataclass(frozen=True)
class Architecture:
    """Of the LM: its parameters, and the bytes of keys and values of one token."""

    parameters: int
    cache_bytes: int


@dataclass(frozen=True)
class Answering:
    """Batches of questions with their lines of thought.

    ``passes`` of a span; ``row_bytes``: keys and values of one line; ``cache``: of a batch, or of reading thoughts where that is
    more; ``row_tokens``: tokens that go through the LM for a line; ``flops`` of a question; ``real_passes``: passes of a batch
    whose operators the host launches, those that are replayed as a CUDA graph left out.
    """

    passes: int
    row_bytes: int
    cache: int
    row_tokens: int
    flops: float
    real_passes: int


def answering(
    config: Config,
    data: DataSize,
    lm: Architecture,
    questions: int,
    lines: int,
    answers: int = 1,
    replayed: bool = True,
    reads: bool = False,
) -> Answering:
    """``questions`` in a batch, ``lines`` of thought each, ``answers`` to each of these; an upper bound: nothing is shared.

    ``replayed``: denoising steps are CUDA graphs; ``reads``: finished thoughts are written as text, for a reward.
    """
    sample, mean = config.sample, data.mean
    branches = 2 if sample.guidance_scale != 1 else 1
    latents, span = config.vae.latents_per_block, config.denoiser.span
    as_text = config.denoiser.context == "text"
    finished = longest_block(latents, sample.max_thought_tokens, config.denoiser.context)
    longest = data.longest.question + sample.max_blocks * finished + sample.max_answer_tokens + 1
    passes, blocks = passes_per_span(sample, span), mean.blocks
    spans = -(-max(blocks, span) // span)
    thinking = max(blocks, span) * passes * (latents + 1) + blocks * block_length(mean.block if as_text else latents)
    row, alone = 2 * branches * longest, answers * (mean.answer + 1)  # twice: rows that go on are copied
    by_lm = int(sample.lm_weight > 0)  # a second LM then writes along, from a copy of the line's cache
    together = 1 if sample.lag or by_lm else span  # blocks of a line that are read at once
    rounds = 1 + sample.restarts if sample.reencode else 1  # in which blocks are read
    if reads_blocks(config):  # a block's text is written from a cache of its own, and perhaps read again
        times = 1 + int(sample.reencode)
        row += together * times * (latents + sample.max_thought_tokens) + by_lm * 2 * longest
        earlier = (span - 1) * block_length(mean.block) // 2  # sentences of a block's own span, which the LM reads again
        alone += blocks * rounds * (times * (mean.block + latents) + by_lm * (mean.block + 1 + earlier))
    rows = questions * lines
    launched = min(passes, _NOT_REPLAYED) if replayed else passes
    written = mean.block + 1  # passes that write a block as text, <eos> included
    real = 1 + spans * launched + blocks + mean.answer + 1
    if reads_blocks(config):
        real += spans * span // together * rounds * (written * (1 + by_lm) + int(sample.reencode))
        real += by_lm * spans * rounds * span * (span - 1) // 2
    unread = 0 if reads_blocks(config) else rows * blocks
    if reads and not reads_blocks(config):
        alone += blocks * (mean.block + latents)
        real += -(-unread // sample.thoughts_per_batch) * written
    read = min(sample.thoughts_per_batch, unread) * 2 * (latents + mean.block + 1)  # behind the answers, as text
    return Answering(
        passes=passes,
        row_bytes=row * lm.cache_bytes,
        cache=max(rows * answers * row, read) * lm.cache_bytes,
        row_tokens=thinking + alone,
        flops=2 * lm.parameters * (branches * mean.question + lines * (branches * thinking + alone)),
        real_passes=real,
    )


def completing(config: Config, data: DataSize, lm: Architecture, questions: int, lines: int) -> Answering:
    """``questions`` in a batch, ``lines`` completions of the AR baseline each, a pass for every token, up to the longest one."""
    most = config.evaluate.ar_max_tokens
    mean = data.mean.question + min(most, data.mean.completion)
    row = 2 * (data.longest.question + 1 + most) * lm.cache_bytes  # twice: rows that go on are copied
    flops = 2.0 * lm.parameters * lines * mean
    return Answering(1, row, questions * lines * row, mean, flops, 1 + min(most, data.longest.completion))


def greedy(found: Answering, rows: int) -> Answering:
    """With as many rows of one answer at a time as they may be."""
    return replace(found, cache=max(found.cache, rows * found.row_bytes))


def drifting(found: Answering, config: Config, data: DataSize, lm: Architecture, lines: int, replayed: bool = True) -> Answering:
    """With every line's thoughts noised and denoised again, behind which their blocks are read once more."""
    steps, span = config.sample.renoise_steps, config.denoiser.span
    again = data.mean.blocks * steps * (config.vae.latents_per_block + 1)
    launched = min(steps, _NOT_REPLAYED) if replayed else steps
    return replace(
        found,
        row_tokens=found.row_tokens + again,
        flops=found.flops + 2 * lm.parameters * lines * again,
        real_passes=found.real_passes + 1 + -(-data.mean.blocks // span) * launched + data.mean.blocks,
    )


def remedy(most: int, name: str, lines: int, lines_name: str) -> str:
    """The settings that leave ``most`` rows; ``name``: of the questions in a batch, ``lines_name``: of a question's rows."""
    if most >= lines:
        return f"{name}={most // lines}"
    if most > 0:
        return f"{name}=1 {lines_name}={most}"
    return "larger GPUs, or LoRA: one LM instead of two"
