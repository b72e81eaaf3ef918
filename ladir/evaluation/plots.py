"""Pictures of a run: training curves from ``metrics.jsonl`` and pass@k from ``results.json``, as PNG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_Curve = tuple[list[float], list[float]]
_PANEL = (4.6, 3.4)  # inches
_COLUMNS = 3
_FEW = 10  # a curve of fewer points shows them


def read_curves(path: str | Path, keys: Mapping[str, Sequence[str]]) -> dict[str, dict[str, _Curve]]:
    """Training curves from a ``metrics.jsonl``, by phase and label, each as (steps, values).

    ``keys``: what to read of each phase, in this order; a label is "key" in training and "key (validation)" there.
    Phases and keys without a value are left out, and so is a torn last line.
    """
    curves: dict[str, dict[str, _Curve]] = {phase: {} for phase in keys}
    for row in _rows(Path(path)):
        for key in keys.get(row["phase"], ()):
            value = row.get(key)
            if value is not None:
                label = key if row.get("kind") == "train" else f"{key} ({row.get('kind')})"
                steps, heights = curves[row["phase"]].setdefault(label, ([], []))
                steps.append(float(row["step"]))
                heights.append(float(value))
    return {phase: found for phase, found in curves.items() if found}


def plot_run(
    path: str | Path,
    curves: Mapping[str, Mapping[str, _Curve]],
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write one PNG: a panel of training curves per phase and, with ``results``, pass@k of every method."""
    panels = list(curves.items())
    count = len(panels) + (results is not None)
    if count == 0:
        raise ValueError(f"{path}: there are neither curves nor results to plot")
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (phase, phase_curves) in zip(grid, panels, strict=False):
        _plot_curves(axes, phase, phase_curves)
    if results is not None:
        _plot_pass(grid[len(panels)], results)
    for axes in grid[count:]:
        axes.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_curves(axes: Axes, phase: str, curves: Mapping[str, _Curve]) -> None:
    for key, (steps, values) in curves.items():
        axes.plot(steps, values, linewidth=1.2, marker="." if len(steps) < _FEW else None, label=key)
    axes.set_title(phase)
    axes.set_xlabel("optimizer step")
    if all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_pass(axes: Axes, results: Mapping[str, Any]) -> None:
    for row in results["rows"]:
        curve = row.get("pass_curve") or {}
        axes.plot([int(k) for k in curve], list(curve.values()), marker="o", markersize=3, label=row["method"])
    axes.set_title(f"{results['task']}: share of questions solved")
    axes.set_xlabel("samples per question (k)")
    axes.set_ylabel("pass@k")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run is being written, or was cut off there
                return
            raise ValueError(f"{path}:{number}: not JSON ({error}); delete the line") from error
