"""The verifier: a small head that foretells from a trajectory's thoughts whether its answer will be right.

It reads what the denoiser's LM makes of question and thoughts anyway: the hidden states at every <EOT> (the blocks so far) and at
<SOA> (all of them); and how far finished thoughts move when they are noised and denoised again, which takes passes of its own.
The LM is not trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladir.data.judged import JudgedBatch
from ladir.errors import UnusableError
from ladir.models.metrics import accuracy
from ladir.models.store import State, heads_fingerprint, load_heads, load_settings, own_state, save_model

#: below it a drift is rounding
_LEAST_DRIFT = 1e-6


@dataclass(frozen=True)
class Renoise:
    """How drifts are measured: the time back to which thoughts are noised, and the steps in which they are denoised."""

    renoise_time: float
    renoise_steps: int


def drift_features(drifts: Sequence[float]) -> Tensor:
    """What a verifier reads of a chain's drifts: the logarithms of their mean and of the largest, [2]."""
    found = torch.tensor(drifts, dtype=torch.float64)
    return (torch.stack([found.mean(), found.max()]) + _LEAST_DRIFT).log().float()


class Verifier(nn.Module):
    """``forward`` gives the training losses, ``logit`` and ``drift_logit`` serve asking."""

    def __init__(self, hidden_size: int, width: int, renoise: Renoise | None = None) -> None:
        """``hidden_size``: of the LM; ``width``: of the layers between; ``renoise``: scores go by drifts measured so, too."""
        super().__init__()
        self.hidden_size, self.width, self.renoise = hidden_size, width, renoise
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, 1)
        self.drift = None if renoise is None else nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1))

    def logit(self, states: Tensor) -> Tensor:
        """Logit [...] that the answer will be right, fp32, from hidden states [..., H] at <EOT> or <SOA>."""
        inputs = self.norm(states.to(self.down.weight.dtype))
        return self.up(F.silu(self.down(inputs)))[..., 0].float()

    def drift_logit(self, features: Tensor) -> Tensor:
        """What a finished chain's drifts add to it [...], fp32, from their :func:`drift_features` [..., 2]."""
        assert self.drift is not None
        return self.drift(features.to(self.down.weight.dtype))[..., 0].float()

    def forward(self, batch: JudgedBatch) -> dict[str, Tensor]:
        """Summed cross-entropies: ``verifier`` over trajectories (at <SOA>), ``value`` over their blocks (at <EOT>)."""
        logits = self.logit(batch.states)
        final, right = logits[batch.at_end], batch.right[batch.at_end]
        if self.drift is not None:
            final = final + self.drift_logit(batch.drifts)
        blocks = F.binary_cross_entropy_with_logits(logits[~batch.at_end], batch.right[~batch.at_end], reduction="sum")
        return {
            "verifier": F.binary_cross_entropy_with_logits(final, right, reduction="sum"),
            "value": blocks,
            **accuracy("verifier", (final > 0) == (right > 0.5)),
        }


def save_verifier(verifier: Verifier, folder: str | Path, denoiser: str, state: State | None = None) -> None:
    """Write a verifier; ``denoiser``: the fingerprint of the heads of the denoiser whose states it reads."""
    renoise = None if verifier.renoise is None else asdict(verifier.renoise)
    sizes = {"hidden_size": verifier.hidden_size, "width": verifier.width}
    settings = {"kind": "verifier", **sizes, "renoise": renoise, "denoiser": denoiser}
    save_model(verifier, state or own_state(verifier), folder, {}, settings)


def load_verifier(folder: str | Path, device: torch.device) -> Verifier:
    """A verifier on ``device``.  UnusableError for a folder that is not whole."""
    saved = load_settings(folder, "verifier")
    verifier = Verifier(saved["hidden_size"], saved["width"], Renoise(**saved["renoise"]) if saved["renoise"] else None)
    load_heads(verifier, folder)
    return verifier.to(device).eval().requires_grad_(False)


def belongs_to(verifier: str | Path, denoiser: str | Path) -> bool:
    """Whether the verifier in one folder was trained on the states of the denoiser in the other."""
    return bool(load_settings(verifier, "verifier")["denoiser"] == heads_fingerprint(denoiser))


def check_verifier(verifier: Path, denoiser: Path) -> None:
    """UnusableError where the verifier reads another denoiser's states."""
    if not belongs_to(verifier, denoiser):
        raise UnusableError(
            f"{verifier} was trained on what another denoiser makes of thoughts than {denoiser}: its scores would say nothing; "
            "run training/train_verifier.py, then export again"
        )
