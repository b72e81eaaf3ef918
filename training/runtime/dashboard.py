"""TensorBoard's one layout for all phases: which group a metric belongs to, the charts, and the table of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: metrics that are no loss, by group; everything else a phase reports is one
_GROUPS = {
    "quality": (
        "exact",
        "token_accuracy",
        "answer_accuracy",
        "stop_accuracy",
        "rollout_token_accuracy",
        "rollout_distance",
        "rollout_other_gold",
    ),
    "latents": ("active_units", "posterior_std", "latent_std"),
    "optimizer": ("lr", "grad_norm", "skipped_steps", "epoch"),
    "speed": ("tokens_per_second", "tokens_per_second_per_device", "mfu", "data_wait", "memory_gib", "seconds"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}

#: charts by category: title and the metrics drawn together (regular expressions of names), in training and validation
_CHARTS = {
    "losses": {
        "total": "loss",
        "cross-entropy": "(reconstruction|text|answer|token|rollout)",
        "KL": "kl",
        "flow": "flow",
        "flow by t": "flow_t.*",
        "stop": "stop",
    },
    "quality": {
        "exactly reconstructed sentences": "exact",
        "tokens": "(token|answer|rollout_token)_accuracy",
        "own blocks: distance from the nearest gold ones, share of other gold solutions": "rollout_(distance|other_gold)",
        "stop": "stop_accuracy",
    },
    "latents": {"active units": "active_units", "standard deviations": "(posterior|latent)_std"},
    "optimizer": {"gradient norm": "grad_norm", "learning rate": "lr", "skipped steps": "skipped_steps"},
    "speed": {
        "tokens per second and device": "tokens_per_second_per_device",
        "model FLOPs utilisation": "mfu",
        "share of time waiting for data": "data_wait",
        "memory (GiB)": "memory_gib",
    },
}

#: the figures shown beside the settings in TensorBoard's HPARAMS
RESULT_METRICS = ("losses/loss", "validation/loss")


def tag(kind: str, name: str) -> str:
    """TensorBoard's name of a metric: ``<group>/<name>`` in training, ``<kind>/<name>`` elsewhere."""
    return f"{_GROUP_OF.get(name, 'losses') if kind == 'train' else kind}/{name}"


def layout() -> dict[str, dict[str, list[Any]]]:
    """The charts for ``SummaryWriter.add_custom_scalars``: training and validation of a metric in one chart."""
    return {
        category: {title: ["Multiline", [rf"^({category}|validation)/{names}$"]] for title, names in charts.items()}
        for category, charts in _CHARTS.items()
    }


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Flattened settings as TensorBoard takes them: what is not a number, a truth value or a text becomes one."""
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()}
