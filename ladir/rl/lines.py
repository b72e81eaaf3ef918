"""From the judged lines of thought of a question to what is learned from them, and to the figures that people look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladir.evaluation.metrics import pass_at_k
from ladir.evaluation.results import Trajectory
from ladir.rl.batches import Attempt
from ladir.rl.groups import advantages, has_signal, optimality


@dataclass(frozen=True)
class Answered:
    """An answer (token ids) with its verdict and its reward; ``ended``: it came to its end before the limit."""

    ids: list[int]
    verdict: Trajectory
    reward: float
    ended: bool


@dataclass(frozen=True)
class Line:
    """A line of thought: latents fp32 [B, L, d], not standardised, the answers that were written to it, its random steps, and
    the token ids that its blocks were read as."""

    latents: Tensor
    answers: tuple[Answered, ...]
    steps: Tensor | None = None
    sentences: list[list[int]] | None = None


@dataclass(frozen=True)
class Group:
    """A question (token ids, without <bos>) and the lines of thought that it got, each with as many answers.

    ``times``: of the lines' random steps, where there are any.
    """

    text: str
    question: list[int]
    lines: tuple[Line, ...]
    times: tuple[tuple[float, float], ...] = ()

    @property
    def rewards(self) -> Tensor:
        """Of every line and answer, float64 [G, M]."""
        return torch.tensor([[answer.reward for answer in line.answers] for line in self.lines], dtype=torch.float64)

    def attempts(self, clip: float) -> list[Attempt]:
        """Every answer with its line of thought, line by line.

        Thoughts are compared by the mean of their answers, answers with those to the same thoughts; single answers with those
        to the other thoughts.  ``clip``: ``rl.advantage_clip``.
        """
        rewards = self.rewards
        thoughts = rewards.mean(1)
        sure = optimality(thoughts, clip).tolist() if has_signal(thoughts) else [None] * len(self.lines)
        relative = advantages(rewards) if rewards.shape[1] > 1 else advantages(thoughts)[:, None]
        return [
            Attempt(
                self.question,
                answer.ids,
                line.latents,
                good,
                float(advantage),
                answer.ended,
                line.steps,
                self.times,
                line.sentences,
            )
            for line, good, own in zip(self.lines, sure, relative, strict=True)
            for answer, advantage in zip(line.answers, own, strict=True)
        ]


def figures(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """What an iteration's attempts were like, as (sum, count) by name.

    ``reward``; ``reward_spread``, its standard deviation within a group; ``signal``, the share of groups whose lines of thought
    differ in it; ``pass@1`` and ``pass@k`` of a group's answers; ``distinct_correct`` answers of a question; ``chain``, the share
    of thoughts that alone solve it (where that was looked at); ``answer_tokens``; ``stopped``, by themselves.
    """
    found: dict[str, tuple[float, float]] = {}

    def add(name: str, value: float) -> None:
        total, count = found.get(name, (0.0, 0.0))
        found[name] = total + value, count + 1

    for group in groups:
        rewards, answers = group.rewards, [answer for line in group.lines for answer in line.answers]
        right = sum(answer.verdict.correct for answer in answers)
        add("reward", float(rewards.mean()))
        add("reward_spread", float(rewards.std(correction=0)))
        add("signal", float(has_signal(rewards.mean(1))))
        add("pass@1", right / len(answers))
        add(f"pass@{len(answers)}", pass_at_k(len(answers), right, len(answers)))
        add("distinct_correct", len({answer.verdict.canonical for answer in answers if answer.verdict.correct}))
        for answer in answers:
            add("answer_tokens", len(answer.ids))
            add("stopped", answer.verdict.stopped)
            if answer.verdict.thoughts and answer.verdict.chain_correct is not None:
                add("chain", answer.verdict.chain_correct)
    return found


def best_and_worst(groups: Sequence[Group]) -> list[tuple[str, Answered]]:
    """The first question that says anything (the first one, where none does) with its best and with its worst answer."""
    group = next((group for group in groups if has_signal(group.rewards.flatten())), groups[0])
    answers = [answer for line in group.lines for answer in line.answers]
    return [(group.text, pick(answers, key=lambda answer: answer.reward)) for pick in (max, min)]
