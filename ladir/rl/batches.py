"""Judged attempts to the tensors of one micro batch: stage 1's layout of the model's own thoughts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ladir.config import RlSettings
from ladir.data.batches import DenoiserBatch, DenoiserCollator, TensorBatch
from ladir.data.latents import LatentRecord
from ladir.spans import with_room


@dataclass(frozen=True)
class Attempt:
    """A line of thought with one answer to it, judged.

    ``question`` and ``answer``: token ids (without <bos> and <eos>); ``latents`` fp32 [B, L, d], not standardised;
    ``optimality``: r in [0, 1] of the thoughts, None where their group says nothing; ``advantage`` of the answer;
    ``ended``: whether the answer ended by itself; ``steps`` [B, S, 2, L, d]: random denoising steps of every block, standardised,
    from where to where, and ``times`` of each.  ``sentences``: token ids that the blocks were read as, where they were.
    """

    question: list[int]
    answer: list[int]
    latents: Tensor
    optimality: float | None
    advantage: float
    ended: bool = True
    steps: Tensor | None = None
    times: tuple[tuple[float, float], ...] = ()
    sentences: list[list[int]] | None = None

    @property
    def teaches(self) -> bool:
        """Whether anything is learned from it."""
        return self.optimality is not None or self.advantage != 0


@dataclass
class JudgedBatch(TensorBatch):
    """Attempts in the layout of stage 1 (``layout``: N attempts, K blocks, M draws), what they are worth, and the old model.

    ``optimality`` [K], and ``learned`` bool [K]: whether the block's thoughts have any; ``advantages`` [n]: of every label of the
    answers (0: nothing is learned there); ``old_prediction`` [K, M, L, d] and ``old_logprob`` [n] of the model that sampled;
    ``start_prediction``: of the one that this stage began with; ``after`` [K, M, L, d]: where the noisy latents' random steps led
    to, and their ``times`` [M].
    """

    attempts: DenoiserBatch
    optimality: Tensor
    learned: Tensor
    advantages: Tensor
    old_prediction: Tensor | None = None
    old_logprob: Tensor | None = None
    start_prediction: Tensor | None = None
    after: Tensor | None = None
    times: tuple[tuple[float, float], ...] = ()

    @property
    def kind(self) -> str:
        """Attempts, and whether there is a first pass."""
        return f"attempts, {self.attempts.kind}"

    def to(self, device: torch.device | str) -> JudgedBatch:
        """The batch with every tensor on ``device``."""
        return replace(super().to(device), attempts=self.attempts.to(device))


@dataclass(frozen=True)
class JudgedCollator:
    """Attempts to a :class:`JudgedBatch`; ``teacher`` collates records for stage 1's losses.

    Without answers in ``rl.policy`` they are left out of the pass, with the last clean blocks.
    """

    teacher: DenoiserCollator
    settings: RlSettings

    @classmethod
    def of(cls, teacher: DenoiserCollator, rl: RlSettings, seed: int) -> JudgedCollator:
        """Of stage 1's collator: no question is hidden, latents are what they are, and nobody says what a block reads."""
        settings = replace(teacher.settings, condition_dropout=0.0, sample_latents=False, token_weight=0.0, lm_weight=0.0)
        if rl.algorithm == "flow_grpo":  # a noisy copy for every step, at its own time
            settings = replace(settings, draws=rl.random_steps, timesteps="uniform")
        return cls(replace(teacher, settings=settings, seed=seed, samples_per_step=attempts_of(rl)), rl)

    def __call__(self, attempts: Sequence[Attempt], numbers: Sequence[int], counted: int | None = None) -> JudgedBatch:
        """``numbers``: what the noise is a function of; only the first ``counted`` attempts (not given: all) teach anything."""
        counted = len(attempts) if counted is None else counted
        policy = self.settings.policy
        with_answer = policy != "latents"
        batch = self.teacher([_record(attempt) for attempt in attempts], numbers, True, with_answer)
        sizes = torch.tensor([with_room(len(attempt.latents), self.teacher.settings.span) for attempt in attempts])
        sure = [attempt.optimality if place < counted and policy != "answer" else None for place, attempt in enumerate(attempts)]
        learned = torch.tensor([value is not None for value in sure]).repeat_interleave(sizes)
        optimality = torch.tensor([0.5 if value is None else value for value in sure]).repeat_interleave(sizes)
        advantages = by_label(attempts, counted) if with_answer else torch.zeros(0)
        after: Tensor | None = None
        times: tuple[tuple[float, float], ...] = ()
        if self.settings.algorithm == "flow_grpo":
            batch, after = _at_steps(batch, attempts)
            times = attempts[0].times
        copies = float(((batch.t > 0) & learned[:, None]).sum())
        counts = {"nft": copies * batch.z0[0].numel(), "steps": copies, "kl": copies, "answers": float((advantages != 0).sum())}
        return JudgedBatch(
            counts={name: counts[name] for name in terms(self.settings)},
            num_tokens=batch.num_tokens,
            sample_ids=list(numbers),
            attempts=batch,
            optimality=optimality,
            learned=learned,
            advantages=advantages,
            after=after,
            times=times,
        )


def attempts_of(settings: RlSettings) -> int:
    """Attempts of an iteration."""
    return settings.prompts * settings.group * settings.answers


def _at_steps(batch: DenoiserBatch, attempts: Sequence[Attempt]) -> tuple[DenoiserBatch, Tensor]:
    """The batch with noisy copies where the attempts' random steps began, and where these led to [K, M, L, d].

    The noise of a copy is what leads from the finished block to the noisy latents of that step.
    """
    steps = torch.cat([attempt.steps for attempt in attempts if attempt.steps is not None])
    t = torch.tensor([start for start, _ in attempts[0].times], dtype=torch.float32).expand(len(steps), -1)
    before, times = steps[:, :, 0], t[..., None, None]
    return replace(batch, t=t.contiguous(), eps=(before - (1 - times) * batch.z0[:, None]) / times), steps[:, :, 1]


def terms(settings: RlSettings) -> list[str]:
    """Loss terms of the attempts: of thoughts and of answers."""
    thoughts = ["nft"] if settings.algorithm == "nft" else ["steps", "kl"] if settings.kl_weight else ["steps"]
    return {"latents": thoughts, "answer": ["answers"], "both": [*thoughts, "answers"], "text": ["answers"]}[settings.policy]


def _record(attempt: Attempt) -> LatentRecord:
    """An attempt as a record of the latent store; what its blocks read is known where they stand as text."""
    blocks: list[list[int]] = [[] for _ in attempt.latents] if attempt.sentences is None else attempt.sentences
    return LatentRecord(attempt.question, blocks, attempt.answer, attempt.latents, torch.zeros_like(attempt.latents))


def by_label(attempts: Sequence[Attempt], counted: int) -> Tensor:
    """The advantage of every answer's labels, its tokens and <eos>; an <eos> that was not sampled has none.

    Only the first ``counted`` attempts have any.
    """
    parts = []
    for place, attempt in enumerate(attempts):
        values = np.full(len(attempt.answer) + 1, attempt.advantage if place < counted else 0.0, dtype=np.float32)
        if not attempt.ended:
            values[-1] = 0.0
        parts.append(values)
    return torch.from_numpy(np.concatenate(parts))
