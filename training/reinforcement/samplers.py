"""Who is asked in stage 3: the old model, as LaDiR or as an autoregressive LM, each as an evaluation would ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.prompts import parse_completion, prompt_ids
from ladir.data.records import Record
from ladir.inference.ar import complete
from ladir.inference.decode import Between, between_tokens
from ladir.inference.sampler import step_times
from ladir.models.backbone import Backbone
from ladir.reasoner import Reasoner, Trajectory
from ladir.rl.rewards import reads_thoughts
from ladir.tokens import decode_text, encode_texts
from training.evaluation.answerers import Reading, Sampled


@dataclass(frozen=True)
class Tries:
    """A question (token ids) with what it got: per line of thought its latents, random steps (at ``times``) and what its blocks
    were read as, where they were; all their answers in turn, as token ids and as text."""

    record: Record
    question: list[int]
    latents: list[Tensor]
    steps: Sequence[Tensor | None]
    sentences: Sequence[list[list[int]] | None]
    answers: list[list[int]]
    texts: list[Sampled]
    times: tuple[tuple[float, float], ...] = ()


class Sampler(Protocol):
    """Answers questions; ``limit``: most tokens of an answer."""

    limit: int

    def __call__(self, records: Sequence[Record], seed: int, steps: Sequence[int], give_way: Between) -> list[Tries]:
        """``steps``: numbers of the denoising steps that are random, where there are any.

        ``give_way`` is called after every step and token, and may raise.
        """


class LatentSampler:
    """Lines of latent thought with answers to each."""

    def __init__(self, reasoner: Reasoner, config: Config) -> None:
        self.reasoner, self.settings = reasoner, config.rl
        self.limit, self._times = config.sample.max_answer_tokens, step_times(config.sample)
        reasoner.settings_with()  # refuses those that this model cannot follow

    def __call__(self, records: Sequence[Record], seed: int, steps: Sequence[int], give_way: Between) -> list[Tries]:
        """As :class:`Sampler`."""
        s, questions = self.settings, [record.question for record in records]
        random = (steps, s.step_randomness) if steps else None
        groups = self.reasoner.generate(
            questions, s.group, seed=seed, thoughts=False, num_answers=s.answers, random_steps=random, between=give_way
        )
        times = tuple((self._times[step], self._times[step + 1]) for step in steps)
        if reads_thoughts(s.reward):
            self.reasoner.read_thoughts([trajectory for group in groups for trajectory in group], give_way)
        return [
            Tries(
                record,
                question,
                [line.latents for line in group],
                [line.steps for line in group],
                [line.thought_ids for line in group],
                [ids for line in group for ids in line.answer_ids],
                [text for line in group for text in self._texts(line)],
                times,
            )
            for record, question, group in zip(records, encode_texts(self.reasoner.tokenizer, questions), groups, strict=True)
        ]

    def _texts(self, line: Trajectory) -> list[Sampled]:
        """A line of thought's answers as text."""
        thoughts = tuple(line.thoughts) if reads_thoughts(self.settings.reward) else ()
        texts = [line.answer, *(decode_text(self.reasoner.tokenizer, ids) for ids in line.answer_ids[1:])]
        return [Sampled(text, thoughts, line.stopped) for text in texts]


class TextSampler:
    """Completions of an autoregressive LM: a line of thought is its one answer, without latents."""

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, config: Config, reading: Reading) -> None:
        """``reading``: how the LM reads questions."""
        self.backbone, self.tokenizer, self.config, self.reading = backbone, tokenizer, config, reading
        self.limit = config.evaluate.ar_max_tokens

    def __call__(self, records: Sequence[Record], seed: int, steps: Sequence[int], give_way: Between) -> list[Tries]:
        """As :class:`Sampler`."""
        e, group, questions = self.config.evaluate, self.config.rl.group, [record.question for record in records]
        prompts = [prompt_ids(self.tokenizer, question, self.reading.frame) for question in questions]
        eos, limit = int(self.tokenizer.eos_token_id), self.limit
        found = complete(
            self.backbone,
            prompts,
            questions,
            group,
            eos,
            limit,
            e.ar_temperature,
            seed,
            bidirectional_question=self.reading.bidirectional,
            on_tokens=between_tokens(give_way),
        )
        none = [None] * group
        return [
            Tries(record, prompt, [torch.zeros(0)] * group, none, none, answers, [self._sampled(ids) for ids in answers])
            for record, prompt, answers in zip(records, prompts, found, strict=True)
        ]

    def _sampled(self, ids: list[int]) -> Sampled:
        text, programs = decode_text(self.tokenizer, ids), self.config.evaluate.task == "code"
        chain = parse_completion(text, self.config.data.answer_prefixes, programs=programs)
        return Sampled(chain.answer, tuple(chain.thoughts), stopped=len(ids) < self.limit)
