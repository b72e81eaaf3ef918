"""TensorBoard's layout: which group a metric belongs to, and the charts of each phase.

TensorBoard sorts groups by name and unfolds the first ones: hence their numbers.  It draws runs that have a tag of the same name
into one chart: hence the phase in every tag, since the losses of a VAE and of a denoiser have no axis in common, and two
denoisers' do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LOSSES, QUALITY, LATENTS, OPTIMIZER, SPEED = "1 losses", "2 quality", "3 latents", "4 optimizer", "5 speed"

#: what attempts in reinforcement learning were like
_ATTEMPTS = (
    "reward", "reward_spread", "signal", "pass@1", "distinct_correct", "chain", "answer_tokens", "stopped", "start_distance",
    "nft_distance", "token_ratio", "token_clipped", "step_ratio", "step_clipped",
)  # fmt: skip

#: metrics that are no loss, by group; everything else a phase reports is one
_GROUPS = {
    QUALITY: (
        "exact",
        "noisy_exact",
        "probe_exact",
        "probe_flow_explained",
        "rollout_distance",
        "rollout_other_gold",
        *_ATTEMPTS,
    ),
    LATENTS: ("active_units", "posterior_std", "latent_std"),
    OPTIMIZER: ("lr", "heads_lr", "grad_norm", "skipped_steps", "epoch"),
    SPEED: (
        "tokens_per_second",
        "tokens_per_second_per_device",
        "mfu",
        "data_wait",
        "data_wait_worst",
        "memory_gib",
        "memory_rank",
        "rank_slowest",
        "rank_slowdown",
        "seconds",
        "sampling_seconds",
        "judging_seconds",
        "learning_seconds",
    ),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}

#: a chart: its title, the group of its metrics, and their names (a regular expression)
_Chart = tuple[str, str, str]

_TOTAL: _Chart = ("loss", LOSSES, "loss")
_COMMON: tuple[_Chart, ...] = (
    ("gradient norm", OPTIMIZER, "grad_norm"),
    ("learning rate", OPTIMIZER, "(heads_)?lr"),
    ("skipped steps", OPTIMIZER, "skipped_steps"),
    ("tokens per second and device", SPEED, "tokens_per_second_per_device"),
    ("model FLOPs utilisation", SPEED, "mfu"),
    ("share of time waiting for data (mean, worst rank)", SPEED, "data_wait(_worst)?"),
    ("time of the slowest rank by the median one's", SPEED, "rank_slowdown"),
    ("memory of the worst rank (GiB)", SPEED, "memory_gib"),
)
_VAE: tuple[_Chart, ...] = (
    _TOTAL,
    ("reconstruction (cross-entropy)", LOSSES, "reconstruction"),
    ("KL", LOSSES, "kl"),
    ("sentences that come back exactly", QUALITY, "exact"),
    ("right tokens", QUALITY, "token_accuracy"),
    ("active units", LATENTS, "active_units"),
    ("standard deviations", LATENTS, "(posterior|latent)_std"),
)
_LATENTS: tuple[_Chart, ...] = (
    ("sentences read exactly, from half noise by the probe", QUALITY, "(noisy_|probe_)?exact"),
    ("right tokens", QUALITY, "(noisy_)?token_accuracy"),
    ("flow that the probe explains", QUALITY, "probe_flow_explained"),
    ("cross-entropy per token", LOSSES, "(probe_)?token_cross_entropy"),
    ("active units", LATENTS, "active_units"),
)
_DENOISER: tuple[_Chart, ...] = (
    _TOTAL,
    ("flow", LOSSES, "flow"),
    ("flow by t", LOSSES, "flow_t.*"),
    ("cross-entropy of answers and thoughts' tokens", LOSSES, "(answer|token|rollout|lm)"),
    ("stop", LOSSES, "stop"),
    ("right tokens", QUALITY, "(answer|token|lm|rollout_token)_accuracy"),
    ("right stops", QUALITY, "stop_accuracy"),
)
_ROLLOUT: tuple[_Chart, ...] = (
    *_DENOISER,
    ("own blocks' distance from the nearest gold ones", QUALITY, "rollout_distance"),
    ("own blocks that are another gold solution's", QUALITY, "rollout_other_gold"),
)
_LEARNING: tuple[_Chart, ...] = (
    ("thoughts weighed by their rewards", LOSSES, "(nft|steps)"),
    ("answers weighed by their rewards", LOSSES, "answers"),
    ("random steps' divergence from the start's", LOSSES, "kl"),
    ("reward and its spread within a question", QUALITY, "reward(_spread)?"),
    ("questions whose attempts differ in reward", QUALITY, "signal"),
    ("right attempts: one, any of a question's, thoughts alone", QUALITY, "(pass@.*|chain)"),
    ("different right answers to a question", QUALITY, "distinct_correct"),
    ("attempts that ended by themselves", QUALITY, "stopped"),
    ("tokens of an answer", QUALITY, "answer_tokens"),
    ("distance from the old model and from the start", QUALITY, "(nft|start)_distance"),
    ("tokens and steps: ratio to the old model, share clipped", QUALITY, "(token|step)_(ratio|clipped)"),
    ("seconds of an iteration", SPEED, "(sampling|judging|learning)_seconds"),
)
_RL: tuple[_Chart, ...] = (*_DENOISER, *_LEARNING)
_VERIFIER: tuple[_Chart, ...] = (
    _TOTAL,
    ("cross-entropy of the verdict, at the end and behind every block", LOSSES, "(verifier|value)"),
    ("right verdicts", QUALITY, "verifier_accuracy"),
)
_AR: tuple[_Chart, ...] = (_TOTAL, ("right tokens", QUALITY, "token_accuracy"))
#: titles and charts by phase; a phase with another name (``ar.phase``) is a causal LM
_SECTIONS = {
    "vae": ("VAE", _VAE),
    "latents": ("latents", _LATENTS),
    "denoiser": ("denoiser", _DENOISER),
    "rollout": ("denoiser, stage 2", _ROLLOUT),
    "rl": ("denoiser, stage 3", _RL),
    "ar-rl": ("AR baseline, stage 3", (*_AR, *_LEARNING)),
    "verifier": ("verifier", _VERIFIER),
    "base": ("base LM", _AR),
    "ar": ("AR baseline", _AR),
}


def tag(phase: str, name: str) -> str:
    """TensorBoard's name of a metric: ``<group>/<phase>/<name>``."""
    known = re.sub(r"@\d+$", "@1", name.removeprefix("vae_"))  # of the VAE that a denoiser was trained with
    group = QUALITY if name.endswith("_accuracy") else _GROUP_OF.get(known, LOSSES)
    return f"{group}/{phase}/{name}"


def latents_tag(phase: str, name: str) -> str:
    """The name of a histogram of latents."""
    return f"{LATENTS}/{phase}/{name}"


def layout(phase: str) -> dict[str, dict[str, list[Any]]]:
    """A phase's section of charts for ``SummaryWriter.add_custom_scalars``."""
    title, charts = _SECTIONS.get(phase, (phase, _AR))
    return {
        title: {chart: ["Multiline", [rf"^{group}/{re.escape(phase)}/{names}$"]] for chart, group, names in (*charts, *_COMMON)}
    }


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Flattened settings as TensorBoard takes them: what is not a number, a truth value or a text becomes one."""
    return {name: value if isinstance(value, bool | int | float | str) else _text(value) for name, value in settings.items()}


def _text(value: Any) -> str:
    """As one would write it in an override."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else str(value)
