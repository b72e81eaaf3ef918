"""The autoregressive LM as a policy: the whole completion is the answer, whose tokens are weighed by its reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ladir.config import RlSettings
from ladir.data.batches import ArBatch, ArCollator
from ladir.models.ar import ArModel
from ladir.rl.batches import Attempt, by_label
from ladir.rl.beside import BesideBatch
from ladir.rl.tokens import clipped_loss, ratios


@dataclass
class JudgedTextBatch(ArBatch):
    """Completions; ``advantages`` [n] of their labels (0: nothing is learned there), ``old_logprob`` [n]: the old model's."""

    advantages: Tensor
    old_logprob: Tensor | None = None

    @property
    def kind(self) -> str:
        """Apart from chains that are learned as they are."""
        return "attempts"


@dataclass(frozen=True)
class JudgedTextCollator:
    """Attempts, whose ``question`` is the prompt and whose ``answer`` the completion, to a :class:`JudgedTextBatch`."""

    collator: ArCollator
    eos_id: int

    def __call__(self, attempts: Sequence[Attempt], numbers: Sequence[int], counted: int | None = None) -> JudgedTextBatch:
        """Only the first ``counted`` attempts (not given: all) teach anything."""
        pairs = [(attempt.question, [*attempt.answer, self.eos_id]) for attempt in attempts]
        batch = self.collator(pairs, numbers)
        advantages = by_label(attempts, len(attempts) if counted is None else counted)
        known = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return JudgedTextBatch(**{**known, "counts": {"answers": float((advantages != 0).sum())}}, advantages=advantages)


class TextPolicy(nn.Module):
    """A causal LM in stage 3; ``forward`` gives summed losses: ``answers`` of attempts, ``text`` of chains."""

    layers_run_once = True

    def __init__(self, model: ArModel, settings: RlSettings, temperature: float) -> None:
        """``temperature``: of the completions' tokens when they were sampled."""
        super().__init__()
        self.model, self.settings, self.temperature = model, settings, temperature

    def forward(self, batch: ArBatch | BesideBatch) -> dict[str, Tensor]:
        """The clipped ratio to the old model over the attempts' labels; or what :class:`ArModel` gives; or both, of one pass."""
        if isinstance(batch, BesideBatch):
            judged, gold = batch.judged, batch.gold
            assert isinstance(judged, JudgedTextBatch) and isinstance(gold, ArBatch)
            hidden, of_gold = self.model.read_together([judged, gold])
            return {**self._judged(judged, hidden), **self.model.losses(gold, of_gold)}
        if isinstance(batch, JudgedTextBatch):
            return self._judged(batch, self.model.read(batch))
        losses: dict[str, Tensor] = self.model(batch)
        return losses

    def _judged(self, batch: JudgedTextBatch, hidden: Tensor) -> dict[str, Tensor]:
        """What is learned from the rewards, of the hidden states before the labels."""
        assert batch.old_logprob is not None
        new, clip = self._logprob(batch, hidden), self.settings.token_clip
        loss = clipped_loss(new, batch.old_logprob, batch.advantages, clip).sum()
        return {"answers": loss, **ratios("token", new, batch.old_logprob, batch.advantages, clip)}

    @torch.no_grad()
    def remembered(self, batch: JudgedTextBatch) -> JudgedTextBatch:
        """The batch with what this model says of it, which is then the old one."""
        return replace(batch, old_logprob=self._logprob(batch, self.model.read(batch)))

    def _logprob(self, batch: ArBatch, hidden: Tensor) -> Tensor:
        """Log-probabilities [n] of the labels."""
        return -self.model.backbone.label_losses(hidden, batch.labels, self.temperature)[0]
