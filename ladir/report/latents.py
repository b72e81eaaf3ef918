"""What the latents of a run's VAEs are good for, as a table."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ladir.report.runs import RunData
from ladir.report.sections import Section
from ladir.report.tables import Grid, figure

#: figures of a VAE's latents, what they are multiplied with, decimals, titles
_FIGURES = (
    ("exact", 100.0, 1, "exact (%)"),
    ("noisy_exact", 100.0, 1, "exact with noise (%)"),
    ("token_accuracy", 100.0, 1, "tokens (%)"),
    ("active_units", 1.0, 0, "active units"),
    ("probe_flow_explained", 100.0, 1, "probe: flow explained (%)"),
    ("probe_exact", 100.0, 1, "probe: exact from half noise (%)"),
    ("probe_token_cross_entropy", 1.0, 3, "probe: cross-entropy per token"),
)


def latents(runs: Sequence[RunData]) -> Section:
    """The section: a table for every run that has figures, a row for every VAE of it; "–": the figure was not asked for."""

    def row(trained: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
        return trained, *(figure(figures, name, scale, digits)[0] for name, scale, digits, _ in _FIGURES)

    head = ("trained", *(title for *_, title in _FIGURES))
    grids = [Grid(f"{run.name}, latents", head, [row(*found) for found in run.latents.items()]) for run in runs if run.latents]
    text = (
        "What a VAE's latents are good for, on held-out sentences: to be read, with and without the training's noise, and to be "
        "generated, by a small probe that is the same for every VAE."
    )
    command = shlex.join(["deepspeed", "training/encode_latents.py", "--config", str(runs[0].path / "config.yaml")])
    return Section("Latents", text, missing=None if grids else ("There are no latents yet.", command), tables=grids)
