"""Blocks forming out of noise: latents and texts at every denoising step of a few questions' trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import SampleSettings
from ladir.inference.decode import decode_thoughts
from ladir.models.denoiser import Denoiser
from ladir.models.vae import ThoughtDecoder
from ladir.reasoner import Reasoner, Trajectory

#: blocks decoded at a time: an 8B LM's keys and values of so many short texts are about half a GiB in bfloat16
_ROWS = 64


@dataclass(frozen=True)
class BlockTrace:
    """One block: ``latents`` [steps, elements], each step's estimate of the clean latents, standardised; ``texts`` of each."""

    latents: np.ndarray
    texts: list[str]


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


class LatentRecorder(Reasoner):
    """A reasoner that keeps latents instead of decoding them: in place of a text stands the number under which they are kept.

    So every rank can think while one alone holds the decoder, and what is decoded afterwards is a choice.
    """

    @classmethod
    def without_vae(cls, denoiser: Denoiser, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> LatentRecorder:
        """One whose blocks stay as they were denoised, whatever the settings say: nobody asks its decoder."""
        placeholder = ThoughtDecoder(denoiser.backbone, denoiser.latent_in)
        return cls(Reasoner(denoiser, placeholder, tokenizer, replace(settings, reencode=False)))

    def __init__(self, reasoner: Reasoner) -> None:
        super().__init__(reasoner.denoiser, reasoner.thought_decoder, reasoner.tokenizer, reasoner.settings, reasoner.encoder)
        self._kept: list[Tensor] = []

    def decode_latents(self, z: Tensor) -> list[str]:
        """Numbers of the blocks ``z`` [K, L, d]."""
        first = len(self._kept)
        self._kept.extend(z.float().cpu())
        return [str(first + i) for i in range(len(z))]

    def record(self, questions: Sequence[str], num_trajectories: int, seed: int) -> list[list[Trajectory]]:
        """Trajectories of each question, with numbers for texts; :meth:`read` makes them readable."""
        return self.generate(questions, num_trajectories=num_trajectories, seed=seed, on_step=_keep_all)

    def read(self, recorded: Sequence[Sequence[Trajectory]], decoder: ThoughtDecoder) -> list[list[TrajectoryTrace]]:
        """The steps in the traces of what :meth:`record` gave, decoded by ``decoder``, ``_ROWS`` at a time."""
        mean, std = self.denoiser.latent_mean.cpu(), self.denoiser.latent_std.cpu()
        numbers = [number for one in recorded for trajectory in one for block in trajectory.trace for number in block]
        texts: dict[str, str] = {}
        for start in range(0, len(numbers), _ROWS):
            part = numbers[start : start + _ROWS]
            z = self._latents(part).to(decoder.from_latent.weight.device)
            texts.update(zip(part, decode_thoughts(decoder, self.tokenizer, z, self.settings.max_thought_tokens), strict=True))

        def block(steps: Sequence[str]) -> BlockTrace:
            return BlockTrace(((self._latents(steps) - mean) / std).flatten(1).numpy(), [texts[number] for number in steps])

        return [[TrajectoryTrace([block(b) for b in t.trace], t.answer, t.stopped) for t in one] for one in recorded]

    def _latents(self, numbers: Sequence[str]) -> Tensor:
        """Kept latents [K, L, d] (not standardised), on the CPU."""
        return torch.stack([self._kept[int(number)] for number in numbers])


def finished_blocks(recorded: Sequence[Trajectory], drawn: int = 0, steps: int = 1) -> list[Trajectory]:
    """Recorded trajectories without most steps before the last one of every block, which need not be decoded then: of the first
    ``drawn`` blocks ``steps`` stay, evenly spread (see :func:`spread`), of the others the last one."""
    return [
        replace(t, trace=[[b[i - 1] for i in spread(len(b), steps if n < drawn else 1)] for n, b in enumerate(t.trace)])
        for t in recorded
    ]


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
    return recorder.read(recorder.record(questions, num_trajectories, seed), reasoner.thought_decoder)
