"""What some LMs do to their logits behind the LM head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

#: settings of transformers' configs that multiply logits, and those that divide them (the same word means both)
_FACTORS = ("logit_scale", "output_multiplier")
_MULTIPLIED, _DIVIDED = frozenset({"hyperclovax"}), "logits_scaling"


@dataclass(frozen=True)
class LogitScale:
    """Logits times ``factor``, divided by ``divisor``, kept between -``cap`` and ``cap`` by a tanh; 0: left out."""

    factor: float = 0.0
    divisor: float = 0.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitScale:
        """That of an LM (Cohere's, Granite's, Gemma's), from its config."""
        text = config.get_text_config()
        found = {name: float(getattr(text, name, None) or 0.0) for name in (*_FACTORS, _DIVIDED, "final_logit_softcapping")}
        multiplied = text.model_type in _MULTIPLIED
        return cls(
            factor=next((found[name] for name in (*_FACTORS, *([_DIVIDED] if multiplied else [])) if found[name]), 0.0),
            divisor=0.0 if multiplied else found[_DIVIDED],
            cap=found["final_logit_softcapping"],
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of the LM from those of its head."""
        if self.factor:
            logits = logits * self.factor
        if self.divisor:
            logits = logits / self.divisor
        return (logits / self.cap).tanh() * self.cap if self.cap else logits
