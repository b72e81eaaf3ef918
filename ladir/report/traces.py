"""Blocks forming out of noise: latents and texts at every denoising step of a few questions' trajectories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import SampleSettings
from ladir.data.prompts import Frame
from ladir.inference.asking import TraceHook
from ladir.inference.cache import Prefix
from ladir.inference.decode import Between, decode_thoughts
from ladir.inference.sampler import NOISE, Reader, StepHook, TrajectoryNoise
from ladir.inference.trajectory import Trajectory
from ladir.models.denoiser import Denoiser
from ladir.models.pairing import TrainedOn
from ladir.models.vae import ThoughtDecoder
from ladir.reasoner import Reasoner
from ladir.tokens import decode_text

#: blocks decoded at a time: an 8B LM's keys and values of so many short texts are about half a GiB in bfloat16
_ROWS = 64


@dataclass(frozen=True)
class BlockTrace:
    """One block: ``latents`` [steps, elements], each step's estimate of the clean latents, standardised; ``texts`` of each;
    ``noise`` [elements], which it started from, and the text that reads as, where that was asked."""

    latents: np.ndarray
    texts: list[str]
    noise: np.ndarray
    noise_text: str = ""

    @property
    def changes(self) -> bool:
        """Whether its text came about in the steps, not with the first one."""
        return self.texts[0] != self.texts[-1]

    def picture(self, numbers: Sequence[int] | None = None) -> tuple[np.ndarray, list[str], list[str]]:
        """Latents, texts and names of the rows of :func:`~ladir.report.figures.denoising_figure`, the noise first; ``numbers`` of
        the steps (not given: all of them)."""
        names = ["noise", *map(str, numbers or range(1, len(self.latents) + 1))]
        return np.vstack([self.noise[None], self.latents]), [self.noise_text, *self.texts], names


@dataclass(frozen=True)
class TrajectoryTrace:
    """One line of thought; ``stopped``: it ended by itself, not at the limit on blocks."""

    blocks: list[BlockTrace]
    answer: str
    stopped: bool

    @property
    def thoughts(self) -> list[str]:
        """Text per finished block."""
        return [block.texts[-1] for block in self.blocks]


class GivenSentences:
    """In place of a reader the sentences of records, a row each: what follows a block is generated as behind the record's own."""

    encodes, own = False, False

    def __init__(self, sentences: Sequence[Sequence[list[int]]]) -> None:
        known = {(row, block): ids for row, blocks in enumerate(sentences) for block, ids in enumerate(blocks)}
        self.read: dict[tuple[int, int], list[int]] = defaultdict(list, known)  # nothing behind a record's last block

    def __call__(self, rows: list[int], blocks: list[int], z: Tensor, state: Tensor, prefix: Prefix) -> Tensor:
        """The latents as they are."""
        return z


class LatentRecorder(Reasoner):
    """A reasoner that keeps latents instead of decoding them: in place of a text stands the number under which they are kept.

    So every rank can think while one alone holds the decoder, and what is decoded afterwards is a choice.
    """

    @classmethod
    def without_vae(
        cls,
        denoiser: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings,
        frame: Frame,
        sentences: Sequence[Sequence[list[int]]],
    ) -> LatentRecorder:
        """One whose blocks stay as they were denoised, whatever the settings say: nobody asks its decoder.

        ``frame``: what stands around a question; ``sentences`` of each question's record, which take the place of what would be
        read where finished blocks stand as text.
        """
        placeholder = ThoughtDecoder(denoiser.backbone, denoiser.latent_in)
        asked = TrainedOn(frame=frame.to_save())
        plain = replace(settings, reencode=False, verifier_scale=0.0)
        as_text = denoiser.settings.context == "text"
        return cls(Reasoner(denoiser, placeholder, tokenizer, plain, trained_on=asked), sentences if as_text else None)

    def __init__(self, reasoner: Reasoner, sentences: Sequence[Sequence[list[int]]] | None = None) -> None:
        """``sentences``: given ones for every question of :meth:`record` (:class:`GivenSentences`); None: blocks are read."""
        parts = (reasoner.denoiser, reasoner.thought_decoder, reasoner.tokenizer, reasoner.settings, reasoner.encoder)
        super().__init__(*parts, TrainedOn(frame=reasoner.trained_on.frame), verifier=reasoner.verifier)
        self._kept: list[Tensor] = []
        self._noise_of: dict[str, str] = {}
        self._given = sentences

    def _reader(self, settings: SampleSettings, noise: TrajectoryNoise, between: Between | None) -> Reader | None:
        return super()._reader(settings, noise, between) if self._given is None else GivenSentences(self._given)

    def decode_latents(self, z: Tensor, between: Between | None = None) -> list[str]:
        """Numbers of the blocks ``z`` [K, L, d]."""
        first = len(self._kept)
        self._kept.extend(z.float().cpu())
        return [str(first + i) for i in range(len(z))]

    def _trace_hook(self, traces: dict[tuple[int, int], list[str]], on_step: TraceHook) -> StepHook:
        """Keeps the noise of every block, too, and which steps come from it."""
        step_hook, noise = super()._trace_hook(traces, on_step), dict[tuple[int, int], str]()

        def hook(rows: list[int], block: int, step: int, x0: Tensor) -> None:
            if step == NOISE:
                numbers = self.decode_latents(x0 * self.denoiser.latent_std + self.denoiser.latent_mean)
                noise.update({(row, block): number for row, number in zip(rows, numbers, strict=True)})
                return
            step_hook(rows, block, step, x0)
            self._noise_of.update({traces[row, block][-1]: noise[row, block] for row in rows})

        return hook

    def record(
        self, questions: Sequence[str], num_trajectories: int, seed: int, between: Between | None = None
    ) -> list[list[Trajectory]]:
        """Trajectories of each question, with numbers for texts; :meth:`read` makes them readable.

        ``between`` is called after every denoising step and token: what it raises ends them.
        ValueError where sentences were given, and not for just these trajectories.
        """
        if self._given is not None and (num_trajectories != 1 or len(questions) != len(self._given)):
            raise ValueError(
                f"the sentences of {len(self._given)} records were given, for a question with one trajectory each, not for "
                f"{len(questions)} questions with {num_trajectories} trajectories each"
            )
        return self.generate(questions, num_trajectories, seed=seed, on_step=_keep_all, between=between)

    def read(
        self,
        recorded: Sequence[Sequence[Trajectory]],
        decoder: ThoughtDecoder,
        noise: bool = False,
        between: Between | None = None,
    ) -> list[list[TrajectoryTrace]]:
        """The steps in the traces of what :meth:`record` gave, and the ``noise`` where it is wanted, decoded by ``decoder``,
        ``_ROWS`` at a time; ``between`` is called after every token, and may raise."""
        blocks = [block for one in recorded for trajectory in one for block in trajectory.trace]
        numbers = [number for block in blocks for number in ([self._noise_of[block[0]], *block] if noise else block)]
        texts: dict[str, str] = {}
        for start in range(0, len(numbers), _ROWS):
            part = numbers[start : start + _ROWS]
            z = self._latents(part).to(decoder.from_latent.weight.device)
            read = decode_thoughts(decoder, self.tokenizer, z, self.settings.max_thought_tokens, between)
            texts.update(zip(part, read, strict=True))

        def block_trace(trajectory: Trajectory, block: int) -> BlockTrace:
            steps = trajectory.trace[block]
            start, shown = self._noise_of[steps[0]], [texts[number] for number in steps]
            if trajectory.thought_ids is not None:  # as it was read for what follows, by token head and LM as well
                shown[-1] = decode_text(self.tokenizer, trajectory.thought_ids[block])
            latents = self._standardised([start, *steps])
            return BlockTrace(latents[1:], shown, latents[0], texts.get(start, ""))

        def trace(trajectory: Trajectory) -> TrajectoryTrace:
            blocks = [block_trace(trajectory, block) for block in range(len(trajectory.trace))]
            return TrajectoryTrace(blocks, trajectory.answer, trajectory.stopped)

        return [[trace(trajectory) for trajectory in one] for one in recorded]

    def movement(self, trajectory: Trajectory) -> float:
        """How far its blocks went from the first estimate to the last (root of the mean square, standardised)."""
        ends = [self._standardised([block[0], block[-1]]) for block in trajectory.trace]
        return float(np.sqrt(np.mean([(last - first) ** 2 for first, last in ends]))) if ends else 0.0

    def _standardised(self, numbers: Sequence[str]) -> np.ndarray:
        """Kept latents [K, elements] on the scale the denoiser works in."""
        mean, std = self.denoiser.latent_mean.cpu(), self.denoiser.latent_std.cpu()
        return ((self._latents(numbers) - mean) / std).flatten(1).numpy()

    def _latents(self, numbers: Sequence[str]) -> Tensor:
        """Kept latents [K, L, d] (not standardised), on the CPU."""
        return torch.stack([self._kept[int(number)] for number in numbers])


def at_steps(recorded: Sequence[Trajectory], steps: Callable[[int], Sequence[int]]) -> list[Trajectory]:
    """Recorded trajectories with some of every block's steps, so that no others are decoded.

    ``steps(count)`` are the numbers, from 1 on, of those that stay.
    """
    return [replace(t, trace=[[block[i - 1] for i in steps(len(block))] for block in t.trace]) for t in recorded]


def first_and_last(count: int) -> list[int]:
    """The numbers of the first and the last step."""
    return [1, count]


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 1 to ``count``, evenly spread; the last is ``count``."""
    kept = min(count, most)
    return [count - (count * left) // kept for left in reversed(range(kept))]


def _keep_all(trajectory: int, block: int, step: int, text: str) -> None:
    """Nothing is shown while steps are made; that they are asked for is what makes the reasoner decode them."""


def trace_questions(
    reasoner: Reasoner, questions: Sequence[str], num_trajectories: int, seed: int
) -> list[list[TrajectoryTrace]]:
    """Trajectories of each question; those of an evaluation with the same seed and controls."""
    recorder = LatentRecorder(reasoner)
    return recorder.read(recorder.record(questions, num_trajectories, seed), reasoner.thought_decoder, noise=True)
