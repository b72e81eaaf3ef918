"""Draw docs/ladir.png, the README's picture (an illustration; no model runs): ``python docs/picture.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

QUESTION = "3 5 15 → 30"
INK, PALE, MUTED, SIGN = "#1f2937", "#f3f4f6", "#6b7280", "#9ca3af"
COLOURS = ("#2563eb", "#b45309", "#047857")
TOKENS, FEATURES = 4, 5  # thought tokens of a block, and how much of each is drawn
TILE, GAP = 0.92, 0.28  # width of one drawing of a block, and the space between two
BLOCK_STARTS = (3.05, 8.35)
LANES = (4.75, 2.8, 0.85)
ANSWER_X, END_X = 13.75, 16.0


@dataclass(frozen=True)
class Lane:
    """One trajectory: per block what it decodes to after each step, and the answer."""

    blocks: tuple[tuple[str, ...], ...]
    answer: str


TRAJECTORIES = (
    Lane((("8-1=9", "15-3=9", "15-5=9", "15-5=10"), ("6*9=2", "10*7=31", "10*3=35", "10*3=30")), "(15-5)*3"),
    Lane((("4+4=1", "5-2=2", "5-3=1", "5-3=2"), ("15/8=7", "15*2=25", "15*2=30", "15*2=30")), "(5-3)*15"),
    Lane((("9*2=6", "5*4=15", "5*3=15", "5*3=15"), ("3+20=1", "15+5=20", "15+15=20", "15+15=30")), "15+5*3"),
)


def draw_picture() -> plt.Figure:
    """The whole picture, 16 inches wide."""
    figure = plt.figure(figsize=(END_X, 7.0), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, END_X), ylim=(-0.55, 6.45))
    axes.axis("off")
    _titles(axes)
    middle = LANES[1] + 0.45
    _box(axes, 0.25, middle - 0.42, 1.95, 0.84, "#e5e7eb")
    axes.text(1.225, middle, QUESTION, size=17, weight="bold", ha="center", va="center", color=INK)
    rng = np.random.default_rng(7)
    for lane, y, colour in zip(TRAJECTORIES, LANES, COLOURS, strict=True):
        _connect(axes, (2.2, middle), (BLOCK_STARTS[0] - 0.17, y + 0.45))
        _draw_lane(axes, lane, y, colour, rng)
    _captions(axes, middle)
    return figure


def _titles(axes: Axes) -> None:
    axes.text(1.225, 6.05, "question", size=17, ha="center", color=INK)
    for number, start in enumerate(BLOCK_STARTS, start=1):
        width = 4 * TILE + 3 * GAP
        axes.text(start + width / 2, 6.05, f"block {number}: out of noise, step by step", size=17, ha="center", color=INK)
    axes.text(ANSWER_X + 0.98, 6.05, "answer", size=17, ha="center", color=INK)


def _captions(axes: Axes, middle: float) -> None:
    axes.text(1.225, middle - 0.55, "read once,\nshared by all\ntrajectories", size=14, ha="center", va="top", color=MUTED)
    axes.text(ANSWER_X + 0.98, 0.42, "trajectories run in\nparallel, may differ", size=14, ha="center", va="top", color=MUTED)
    note = "one column = one thought token; below, what the VAE's decoder reads in the block at that step"
    axes.text((BLOCK_STARTS[0] + ANSWER_X) / 2, -0.28, note, size=14, ha="center", color=MUTED)


def _draw_lane(axes: Axes, lane: Lane, y: float, colour: str, rng: np.random.Generator) -> None:
    """A trajectory from its first noise to its answer."""
    for start, texts in zip(BLOCK_STARTS, lane.blocks, strict=True):
        _box(axes, start - 0.17, y - 0.52, 4 * TILE + 3 * GAP + 0.34, 1.62, PALE)
        clean, noise = _smooth(rng), rng.uniform(0, 1, (FEATURES, TOKENS))
        for step, text in enumerate(texts):
            share = step / (len(texts) - 1)
            _tile(axes, start + step * (TILE + GAP), y, share * clean + (1 - share) * noise, share, colour)
            last = step == len(texts) - 1
            axes.text(
                start + step * (TILE + GAP) + TILE / 2, y - 0.27, text, size=13.5, family="monospace",
                weight="bold" if last else "normal", ha="center", va="center", color=colour if last else MUTED,
            )  # fmt: skip
            if not last:
                axes.text(
                    start + (step + 1) * (TILE + GAP) - GAP / 2, y + 0.45, "›", size=19, ha="center", va="center", color=SIGN
                )
    width = 4 * TILE + 3 * GAP + 0.17
    _connect(axes, (BLOCK_STARTS[0] + width, y + 0.45), (BLOCK_STARTS[1] - 0.17, y + 0.45))
    _connect(axes, (BLOCK_STARTS[1] + width, y + 0.45), (ANSWER_X, y + 0.45))
    _box(axes, ANSWER_X, y + 0.05, 1.96, 0.8, colour)
    axes.text(ANSWER_X + 0.98, y + 0.45, lane.answer, size=16, weight="bold", ha="center", va="center", color="white")


def _smooth(rng: np.random.Generator) -> np.ndarray:
    """A calm pattern [FEATURES, TOKENS] in 0..1: what a finished block looks like."""
    rows, columns = np.mgrid[0:FEATURES, 0:TOKENS]
    wave = np.sin(rng.uniform(0.5, 1.1) * rows + rng.uniform(0.6, 1.2) * columns + rng.uniform(0, 6))
    return 0.5 + 0.5 * wave


def _tile(axes: Axes, x: float, y: float, values: np.ndarray, share: float, colour: str) -> None:
    """One drawing of a block: grey where it is noise, in the trajectory's colour where it is formed."""
    target, grey = np.array(matplotlib.colors.to_rgb(colour)), np.full(3, 0.35)
    ink = share * target + (1 - share) * grey
    pixels = 1 - (0.12 + 0.82 * values[..., None]) * (1 - ink)
    axes.imshow(pixels, extent=(x, x + TILE, y, y + 0.92), aspect="auto", interpolation="nearest", zorder=2)
    for column in range(1, TOKENS):
        axes.plot([x + column * TILE / TOKENS] * 2, [y, y + 0.92], color="white", linewidth=2.5, zorder=3)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    shape = FancyBboxPatch(
        (x + 0.1, y + 0.1), width - 0.2, height - 0.2, boxstyle="round,pad=0.1", facecolor=colour, edgecolor="none"
    )
    axes.add_patch(shape)


def _connect(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": SIGN, "linewidth": 1.8, "mutation_scale": 16, "shrinkA": 2, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    figure = draw_picture()
    figure.savefig(Path(__file__).with_name("ladir.png"), dpi=110)
    plt.close(figure)
