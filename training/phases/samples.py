"""What a phase shows when it is validated: samples as text, distributions of latents, a block forming out of noise.

Held-out samples, where there are any; else the first of those that are trained on, and the column's title says so.
All ranks run the models, on the same samples, since sharded weights need every rank; rank 0 alone decodes latents and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ladir.config import BackboneSettings, Config, SampleSettings
from ladir.data.latents import LatentStore
from ladir.data.prompts import Frame, prompt_ids
from ladir.data.records import Record
from ladir.inference.ar import complete
from ladir.inference.decode import between_tokens, decode_thoughts
from ladir.inference.memory import free_bytes
from ladir.models.ar import ArModel
from ladir.models.backbone import is_split
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_thought_decoder
from ladir.models.vae import ThoughtDecoder, Vae, encode_sentences
from ladir.reasoner import Trajectory
from ladir.report.traces import LatentRecorder, TrajectoryTrace, at_steps, first_and_last, spread
from ladir.tokens import decode_text
from training.runtime.alone import GiveWay
from training.runtime.telemetry import Telemetry

logger = logging.getLogger(__name__)

SamplesT = TypeVar("SamplesT", bound=Sized)

#: shows samples of a model under training: (model, telemetry, step)
Show = Callable[[object, Telemetry, int], None]

#: held-out sentences whose latents are drawn as histograms
_HISTOGRAM_SENTENCES = 256

#: what reading samples takes of a GPU's memory beside the decoder's weights, and more
_READING_BYTES = 2 << 30

#: blocks of one question, and steps of each, that are drawn
_DRAWN_BLOCKS, _DRAWN_STEPS = 4, 10

#: the most Euler steps of a block, blocks, and tokens of a text, where every pass gathers the whole model from other ranks: the
#: 8B configurations' own 30, 40 and 64 were 1,305 gathers at a time, these are 153; a glance needs no more
_GATHERED_STEPS, _GATHERED_BLOCKS, _GATHERED_TOKENS = 10, 8, 64


def vae_samples(
    config: Config, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[list[int]], trained: Sequence[list[int]]
) -> Show | None:
    """Sentences beside what comes back of them; distributions of the posterior."""
    sentences, title = _chosen("sentence", held_out, trained)
    shown = sentences[:_HISTOGRAM_SENTENCES]
    count = _wanted(config, len(shown))
    if not count:
        return None

    def show(model: object, telemetry: Telemetry, step: int) -> None:
        assert isinstance(model, Vae)
        mean, logvar = encode_sentences(model, shown)
        limit, cut = _token_limit(config.data.max_block_tokens + 1, model, telemetry)
        with telemetry.passes(_gathers(model, telemetry)) as give_way:
            texts = decode_thoughts(model.thought_decoder, tokenizer, mean[:count], limit, give_way)
        telemetry.histogram("mean", mean, step)
        telemetry.histogram("posterior_standard_deviation", (0.5 * logvar).exp(), step)
        if len(mean) > 1:
            telemetry.histogram("variance_of_means_by_element", mean.var(0), step)
        pairs = [(decode_text(tokenizer, ids), text) for ids, text in zip(shown, texts, strict=False)]
        telemetry.text("samples", markdown_table((title, f"reconstructed{cut}"), pairs), step)

    return show


def ar_samples(
    config: Config, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Record], trained: Sequence[Record], frame: Frame
) -> Show | None:
    """Questions, in their ``frame``, with the AR model's greedy completions."""
    records, title = _chosen("question", held_out, trained)
    shown = records[: _wanted(config, len(records))]
    if not shown:
        return None

    def show(model: object, telemetry: Telemetry, step: int) -> None:
        assert isinstance(model, ArModel)
        prompts = [prompt_ids(tokenizer, record.question, frame) for record in shown]
        eos = int(tokenizer.eos_token_id)
        questions = [record.question for record in shown]
        limit, cut = _token_limit(config.evaluate.ar_max_tokens, model, telemetry)
        both_ways, seed = config.ar.bidirectional_question, config.run.seed
        with telemetry.passes(_gathers(model, telemetry)) as give_way:
            completions = complete(
                model.backbone,
                prompts,
                questions,
                1,
                eos,
                limit,
                temperature=0.0,
                seed=seed,
                bidirectional_question=both_ways,
                on_tokens=between_tokens(give_way),
            )
        rows = [
            (record.question, "\n".join((*record.blocks, record.answer)), decode_text(tokenizer, ids[0]))
            for record, ids in zip(shown, completions, strict=True)
        ]
        telemetry.text("samples", markdown_table((title, "reference", f"completion{cut}"), rows), step)

    return show


def denoiser_samples(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    held_out: LatentStore | None,
    trained: LatentStore,
    vae: Path,
    frame: Frame,
) -> Show | None:
    """Questions with thoughts and answers; latents made and meant; blocks of one question, whose text changes, step by step."""
    records, title = _chosen("question", held_out, trained)
    shown = [records[i] for i in range(_wanted(config, len(records)))]
    if not shown:
        return None
    questions = [decode_text(tokenizer, record.question) for record in shown]
    references = ["\n".join(decode_text(tokenizer, ids) for ids in (*record.blocks, record.answer)) for record in shown]

    def show(model: object, telemetry: Telemetry, step: int) -> None:
        assert isinstance(model, Denoiser)
        gathers = _gathers(model, telemetry)
        settings = _shortened(config.sample) if gathers else config.sample
        recorder = LatentRecorder.without_vae(model, tokenizer, settings, frame, [record.blocks for record in shown])
        with telemetry.passes(gathers) as give_way:
            recorded = recorder.record(questions, 1, config.run.seed, give_way)
        mean, std = model.latent_mean.cpu(), model.latent_std.cpu()
        telemetry.histogram("meant", (torch.cat([r.mu.flatten(0, 1) for r in shown]) - mean) / std, step)
        latents = torch.cat([trajectory.latents.flatten(0, 1) for (trajectory,) in recorded])
        telemetry.histogram("generated", (latents - mean) / std, step)
        telemetry.alone(lambda give_way: read(recorder, recorded, telemetry, step, give_way))

    def read(
        recorder: LatentRecorder, recorded: list[list[Trajectory]], telemetry: Telemetry, step: int, give_way: GiveWay
    ) -> None:
        decoder = _decoder(config.backbone, vae, recorder.device)
        traces: list[TrajectoryTrace] = []
        for one in recorded:
            give_way()  # the training is saved first
            traces += [only for (only,) in recorder.read([at_steps(one, first_and_last)], decoder, between=give_way)]
        rows = [
            (question, reference, "\n".join([*trace.thoughts, trace.answer]))
            for question, reference, trace in zip(questions, references, traces, strict=True)
        ]
        own = config.denoiser.context == "latents"
        thoughts = "thoughts and answer" if own else "thoughts and answer, each behind the reference's thoughts"
        cut = _cut(config.sample, recorder.settings)
        telemetry.text("samples", markdown_table((title, "reference", f"{thoughts}{cut}"), rows), step)
        give_way()
        drawn = max(range(len(traces)), key=lambda i: (_changes(traces[i]), recorder.movement(recorded[i][0])))
        _draw(telemetry, step, questions[drawn], recorder, recorded[drawn][0], decoder, give_way)

    return show


def _gathers(model: nn.Module, telemetry: Telemetry) -> bool:
    """Whether every pass gathers weights from other ranks, as under ZeRO-3."""
    return telemetry.ranks > 1 and any(is_split(parameter) for parameter in model.parameters())


def _token_limit(wanted: int, model: nn.Module, telemetry: Telemetry) -> tuple[int, str]:
    """The most tokens of a shown text, and what its column's title says where that is less than ``wanted``."""
    if wanted <= _GATHERED_TOKENS or not _gathers(model, telemetry):
        return wanted, ""
    return _GATHERED_TOKENS, _told([f"{_GATHERED_TOKENS} tokens"])


def _shortened(settings: SampleSettings) -> SampleSettings:
    """Sampling in few passes, and in nothing more than was set."""
    return replace(
        settings,
        num_steps=min(settings.num_steps, _GATHERED_STEPS),
        restarts=0,
        max_blocks=min(settings.max_blocks, _GATHERED_BLOCKS),
        max_answer_tokens=min(settings.max_answer_tokens, _GATHERED_TOKENS),
    )


def _cut(asked: SampleSettings, taken: SampleSettings) -> str:
    """What a column's title says of the limits that were lowered."""
    names = {"num_steps": "steps", "restarts": "restarts", "max_blocks": "blocks", "max_answer_tokens": "tokens of an answer"}
    lower = [name for name in names if getattr(taken, name) < getattr(asked, name)]
    return _told([f"{getattr(taken, name)} {names[name]}" for name in lower]) if lower else ""


def _told(limits: Sequence[str]) -> str:
    return f" (shortened under ZeRO-3: at most {', '.join(limits)})"


def _decoder(settings: BackboneSettings, vae: Path, device: torch.device) -> ThoughtDecoder:
    """The VAE's decoder on ``device``; on the CPU, in the dtype that suits that, where the training leaves no room beside it."""
    if device.type == "cuda":
        with suppress(torch.OutOfMemoryError):
            decoder = load_thought_decoder(vae, settings, device)
            if free_bytes(device) >= _READING_BYTES:
                return decoder
            del decoder
        torch.cuda.empty_cache()
        logger.info("%s has no room for the decoder of %s: samples are read on the CPU, which takes longer", device, vae)
    return load_thought_decoder(vae, replace(settings, dtype="auto", attention="auto"), torch.device("cpu"))


def _changes(trace: TrajectoryTrace) -> int:
    """Of the blocks that would be drawn, those whose text changes."""
    return sum(block.changes for block in trace.blocks[:_DRAWN_BLOCKS])


def _draw(
    telemetry: Telemetry,
    step: int,
    question: str,
    recorder: LatentRecorder,
    recorded: Trajectory,
    decoder: ThoughtDecoder,
    give_way: GiveWay,
) -> None:
    """Pictures of a trajectory's first blocks, from noise on, at some of their steps."""
    from ladir.report.figures import denoising_figure, pixels  # matplotlib, for rank 0 alone

    first = replace(recorded, trace=recorded.trace[:_DRAWN_BLOCKS])
    ((trace,),) = recorder.read([at_steps([first], _drawn_steps)], decoder, noise=True, between=give_way)
    for number, (block, steps) in enumerate(zip(trace.blocks, first.trace, strict=True), start=1):
        figure = denoising_figure(*block.picture(_drawn_steps(len(steps))), f"block {number} of {question}")
        telemetry.image(f"denoising/block_{number}", pixels(figure), step)


def _drawn_steps(count: int) -> list[int]:
    return spread(count, _DRAWN_STEPS)


def _wanted(config: Config, available: int) -> int:
    return min(config.telemetry.samples, available) if config.telemetry.loggers else 0


def _chosen(what: str, held_out: SamplesT | None, trained: SamplesT) -> tuple[SamplesT, str]:
    """Which samples are shown, and the title of their column."""
    return (held_out, what) if held_out else (trained, f"{what} (trained on)")


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose cells show their text as it is, whatever it holds."""
    lines = [titles, ["---"] * len(titles), *([_cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Lines as code, for which Markdown has no other meaning; its own two signs are replaced by their likes."""
    plain = text.replace("`", "'").replace("|", "¦")
    return "<br>".join(f"`{line}`" for line in plain.splitlines() if line.strip()) or " "
