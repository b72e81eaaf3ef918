"""Draw docs/mask.png, which token sees which in one training pass, from the layout itself: ``python docs/mask.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from ladir.layout import CLEAN, Layout, Mark, Source, Template, template

#: a small record: tokens of the question, blocks, latents of a block, noisy copies of each, tokens of the answer
QUESTION, BLOCKS, LATENTS, DRAWS, ANSWER = 3, 2, 2, 2, 2
INK, MUTED, LINE = "#1f2937", "#6b7280", "#d1d5db"
HIDDEN, TEXT, LATENT, OWN = range(4)
COLOURS = ("#ffffff", "#93c5fd", "#2563eb", "#f59e0b")
MEANINGS = {TEXT: "sees text or a mark", LATENT: "sees a finished latent", OWN: "sees its own noisy copy"}


def draw_mask() -> plt.Figure:
    """The mask of the small record: rows look, columns are looked at."""
    layout = template(QUESTION, BLOCKS, LATENTS, DRAWS, ANSWER)
    names = [_name(layout, token) for token in range(len(layout))]
    figure = plt.figure(figsize=(9.2, 9.6), facecolor="white")
    axes = figure.add_axes((0.14, 0.06, 0.83, 0.8))
    axes.imshow(_kinds(layout), cmap=ListedColormap(COLOURS), vmin=0, vmax=3, interpolation="nearest")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=12, color=INK)
    axes.set_yticks(range(len(names)), names, fontsize=12, color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _lines(axes, layout)
    patches = [Patch(facecolor=COLOURS[kind], label=meaning) for kind, meaning in MEANINGS.items()]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.44, -0.01), ncol=3, fontsize=13, frameon=False)
    return figure


def _kinds(layout: Template) -> np.ndarray:
    """Colour numbers [T, T]: what token i sees in token j."""
    rows = (torch.from_numpy(field)[None] for field in (layout.position, layout.limit, layout.copy))
    visible = Layout(*rows).visible()[0].numpy()
    seen = np.where(layout.source == Source.CLEAN_LATENT, LATENT, TEXT)
    return np.where(visible, np.where(layout.copy == CLEAN, seen, OWN)[None], HIDDEN)


def _name(layout: Template, token: int) -> str:
    """What a token is called at the axes; a noisy latent bears a tilde, and its copy's letter stands behind it."""
    source, index = layout.source[token], int(layout.index[token])
    letter = "" if layout.copy[token] == CLEAN else " " + "ab"[layout.copy[token] % DRAWS]
    if source == Source.TEXT:
        return f"q{index + 1}" if index < QUESTION else f"a{index - QUESTION + 1}"
    if source == Source.MARK:
        return f"<{Mark(index).name}>{letter}"
    if source == Source.CLEAN_LATENT:
        return f"z{index // LATENTS + 1},{index % LATENTS + 1}"
    block, place = index // LATENTS // DRAWS, index % LATENTS
    return f"z\u0303{block + 1},{place + 1}{letter}"


def _lines(axes: Axes, layout: Template) -> None:
    """A fine grid, and a stronger line where a part of the sequence begins."""
    size = len(layout)
    block = LATENTS + 2
    starts = [QUESTION + number * block for number in range(BLOCKS + 1)]
    clean = int((layout.copy == CLEAN).sum())
    starts += range(clean, size, LATENTS + 1)
    for line in range(size + 1):
        strong = line in starts
        for draw in (axes.axhline, axes.axvline):
            draw(line - 0.5, color=MUTED if strong else LINE, linewidth=1.6 if line == clean else 0.9 if strong else 0.5)


if __name__ == "__main__":
    figure = draw_mask()
    figure.savefig(Path(__file__).with_name("mask.png"), dpi=100)
    plt.close(figure)
