"""The pictures of a report and of TensorBoard: as narrow as a telephone, so that their text stays readable on one."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ladir.report.text import one_line

#: one curve: x and y, and the standard errors of y where they are known
Curve = tuple[Sequence[float], Sequence[float], Sequence[float] | None]

_SIZE = (4.0, 3.2)  # inches
_DPI = 240
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in somebody's text is no formula
}
#: told apart by people who see colours differently, too (Okabe and Ito)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d31", "#999999", "#7b3294")
_MARKERS = "osD^vPX*"
_FEW = 12  # a curve of fewer points shows them
_TICKS = 6  # values of an axis that are all named
_APART = 1.25  # two values nearer to one another on a logarithmic axis are not both named
_DECADE = 12  # an axis that spans less names minor ticks, too
_TICK_DISTANCE = 0.12  # of the axis, between two of them
_TITLE_CHARACTERS = 44
_LABEL_CHARACTERS = 40
_TEXT_CHARACTERS = 26  # of a step's text beside its row
_FEW_LABELS, _SHORT_LABEL = 4, 20
_LABEL_HEIGHT = 0.18  # inches
#: inches: a row, the bar of colours, and all beside the rows (title, axis, bar)
_ROW_HEIGHT, _BAR_HEIGHT, _DENOISING_HEIGHT = 0.24, 0.09, 1.35
#: ends the label of a metric that was measured on held-out samples
_HELD_OUT = " (validation)"


@contextmanager
def _axes(title: str, x: str, y: str) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        axes.set_title(one_line(title, _TITLE_CHARACTERS))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield figure, axes


def line_figure(
    title: str, x: str, y: str, curves: Mapping[str, Curve], logarithmic: str = "", rates: bool = False, below: bool = False
) -> Figure:
    """Curves by label; "NAME (validation)" is drawn as NAME is, dashed and hollow.

    ``logarithmic``: "x", "y", "xy" or ""; ``rates``: y lies between 0 and 1 and is shown in percent; ``below``: the labels stand
    below the axes, since the curves fill them.
    """
    scale = 100.0 if rates else 1.0
    with _axes(title, x, y) as (figure, axes):
        names = list(dict.fromkeys(label.removesuffix(_HELD_OUT) for label in curves))
        for label, (xs, ys, errors) in curves.items():
            style = _style(names.index(label.removesuffix(_HELD_OUT)), label, len(xs))
            spread = [scale * error for error in errors] if errors else None
            axes.errorbar(xs, [scale * value for value in ys], yerr=spread, capsize=2, linewidth=1.4, markersize=4.5, **style)
        if "x" in logarithmic:
            _logarithmic(axes, "x", sorted({x for xs, _, _ in curves.values() for x in xs}))
        if "y" in logarithmic:
            _logarithmic(axes, "y", [])
        if rates:
            axes.set_ylim(_lowest([scale * value for _, ys, _ in curves.values() for value in ys]), 103)
        if curves:
            _legend(figure, axes, [one_line(name, _LABEL_CHARACTERS) for name in names], below)
    return figure


def _legend(figure: Figure, axes: Axes, labels: Sequence[str], below: bool) -> None:
    """A few short labels stand where the curves leave room; others, below the axes, for which the figure grows."""
    short = max(map(len, labels)) <= _SHORT_LABEL
    if not below and short and len(labels) <= _FEW_LABELS:
        axes.legend(loc="best")
        return
    columns = 2 if short else 1
    figure.set_figheight(_SIZE[1] + _LABEL_HEIGHT * -(-len(labels) // columns))
    figure.legend(loc="outside lower center", ncols=columns)


def _lowest(percents: Sequence[float]) -> float:
    """Where the axis of rates begins: at 0, or, where all of them lie in the upper half, at a ten below them."""
    least = min(percents, default=0.0)
    return 10.0 * (least // 10 - 1) if least >= 50 else 0.0


def _style(number: int, label: str, points: int) -> dict[str, Any]:
    """Colour, marker and line of the curve ``number``."""
    held_out = label.endswith(_HELD_OUT)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)] if held_out or points < _FEW else None,
        "markerfacecolor": "white" if held_out else None,
        "linestyle": "--" if held_out else "-",
        "label": None if held_out else one_line(label, _LABEL_CHARACTERS),
    }


def _logarithmic(axes: Axes, name: str, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, at the ``values`` themselves where these are a few whole numbers, well apart."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    whole = 0 < len(values) <= _TICKS and all(float(value).is_integer() for value in values)
    named = whole and all(after >= _APART * before for before, after in pairwise(values))
    if named:
        axis.set_ticks(values)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    shown = () if named else _minor_ticks(*axis.get_view_interval())
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _mantissa(value) in shown else ""))


def _minor_ticks(low: float, high: float) -> Sequence[int]:
    """Which multiples of powers of ten are named between these ends: as many as keep their distance, none on a long axis."""
    if high / max(low, 1e-300) >= _DECADE:
        return ()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in (range(2, 10), (2, 4, 6, 8), (2, 5)):
        ticks = [10.0**decade * multiple for decade in decades for multiple in (1, *multiples)]
        seen = [math.log(tick) for tick in ticks if low <= tick <= high]
        if all(after - before >= _TICK_DISTANCE * math.log(high / low) for before, after in pairwise(seen)):
            break
    return multiples


def _mantissa(value: float) -> int:
    return round(value / 10.0 ** math.floor(math.log10(value) + 1e-9))


def denoising_figure(latents: np.ndarray, texts: Sequence[str], names: Sequence[str], title: str) -> Figure:
    """A block forming: ``latents`` [rows, elements] as colours, each row with its name on the left and its text on the right.

    Rows are the noise and the steps' estimates of the clean latents (:meth:`~ladir.report.traces.BlockTrace.picture`).
    """
    rows = len(latents)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(_SIZE[0], _DENOISING_HEIGHT + _ROW_HEIGHT * rows), dpi=_DPI, layout="constrained")
        axes, colours = figure.subplots(2, 1, height_ratios=(_ROW_HEIGHT * rows, _BAR_HEIGHT))
        finite = latents[np.isfinite(latents)]
        limit = max(2.0, float(np.percentile(np.abs(finite), 99))) if finite.size else 2.0
        image = axes.imshow(latents, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        figure.suptitle(one_line(title, _TITLE_CHARACTERS), x=0.02, horizontalalignment="left", fontsize="medium")
        axes.set_xlabel("element of the block's latents")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_ylabel("step")
        axes.set_yticks(range(rows), names)
        beside = axes.twinx()
        beside.set_ylim(axes.get_ylim())
        beside.set_yticks(range(rows), [one_line(text, _TEXT_CHARACTERS) or "(nothing)" for text in texts], family="monospace")
        beside.tick_params(length=0)
        beside.spines.right.set_visible(False)
        figure.colorbar(image, cax=colours, orientation="horizontal", extend="both", label="value (standardised)")
        colours.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
