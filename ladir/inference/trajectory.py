"""A line of thought with its answer, and what a question must be to be asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ladir.errors import UnusableError


@dataclass
class Trajectory:
    """One line of thought and its answer.

    ``thoughts``: text per block; ``latents`` fp32 [B, L, d] (not standardised); ``num_steps``: forward passes that denoised them;
    ``stopped``: whether the stop head ended it (else the limit on blocks did); ``trace``: text per block and step, if asked.
    ``thought_ids``: token ids of the blocks as they were read for what follows, if they were (``reencode``, or where finished
    blocks stand as text).
    ``answer_ids``: token ids of its answers, the first of which is ``answer``; ``steps``: those that were kept, if asked
    (:meth:`KeptSteps.of`).
    ``score``: the probability that the answer is right, by the verifier, ``logit`` what it says of the hidden state at <SOA>;
    ``drifts``: how far each block moves when noised and denoised again, if measured; ``states`` [B + 1, H]: hidden states at
    every <EOT> and at <SOA>, if asked.
    """

    answer: str
    thoughts: list[str]
    latents: Tensor
    num_steps: int
    stopped: bool
    trace: list[list[str]] = field(default_factory=list)
    thought_ids: list[list[int]] | None = None
    answer_ids: list[list[int]] = field(default_factory=list)
    steps: Tensor | None = None
    score: float | None = None
    logit: float | None = None
    drifts: list[float] | None = None
    states: Tensor | None = None

    @property
    def drift(self) -> float | None:
        """The mean of its blocks' drifts."""
        return None if self.drifts is None else math.fsum(self.drifts) / len(self.drifts)


def plain_answer(answer: str) -> str:
    """The normal form of an answer where nothing is known of the task: its words."""
    return " ".join(answer.split())


def check_questions(questions: Sequence[str]) -> None:
    """ValueError for a single text in place of several; UnusableError for an empty question or one that is no Unicode text."""
    if isinstance(questions, str):
        raise ValueError("questions must be a list of texts, not one text, whose characters would be answered one by one")
    for number, question in enumerate(questions, start=1):
        if not question.strip():
            raise UnusableError(f"question {number} is empty")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableError(
                f"question {number} holds half a surrogate pair at character {error.start}, as text does that was not UTF-8; "
                "write it in UTF-8"
            ) from error
