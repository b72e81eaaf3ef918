"""The benchmark's results: tables, JSON, and a picture of how time grows."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ladir.report.fitting import print_whole
from training.benchmarks.scaling import Scaling
from training.benchmarks.setup import Bench, Row
from training.benchmarks.utilisation import Utilisation

_PANEL = (3.6, 3.0)  # inches
_COLUMNS = 3


Measured = Row | Utilisation | Scaling


@dataclass
class Results:
    """What was measured so far."""

    rows: list[Row] = field(default_factory=list)
    utilisation: list[Utilisation] = field(default_factory=list)
    scaling: list[Scaling] = field(default_factory=list)

    def add(self, measured: Measured | Iterable[Measured]) -> None:
        """Sort one or several in."""
        for found in [measured] if isinstance(measured, Row | Utilisation | Scaling) else measured:
            if isinstance(found, Row):
                self.rows.append(found)
            elif isinstance(found, Utilisation):
                self.utilisation.append(found)
            else:
                self.scaling.append(found)


def device_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def as_json(results: Results, bench: Bench, seconds: float) -> dict[str, Any]:
    """Ratios by row at the top; ``mfu`` and ``of_own_shapes`` by step, ``scaling`` by quantity; ``rows`` has all of it."""
    steps = results.utilisation
    return {
        "size": bench.size.name,
        "device": device_name(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "seconds": seconds,
        **{row.key: row.ratio for row in results.rows},
        "mfu": {step.name: step.mfu for step in steps},
        "of_own_shapes": {step.name: step.of_own_shapes for step in steps},
        "matmul_peak": max((step.peak for step in steps), default=None),
        "scaling": {
            row.quantity: {"exponent": row.exponent, "values": row.values, "seconds": row.seconds} for row in results.scaling
        },
        "rows": {row.key: {**asdict(row), "ratio": row.ratio} for row in results.rows},
        "steps": {step.name: asdict(step) for step in steps},
    }


def show(console: Console, results: Results, bench: Bench) -> None:
    """Print the tables that have rows."""
    where = f"{bench.size.name} on {device_name(bench.device)}, {str(bench.dtype).removeprefix('torch.')}"
    if results.rows:
        title = f"Ours against the obvious way ({where})"
        print_whole(console, partial(_table, title, [(row.title, _ratio(row)) for row in results.rows]), list(_RATIOS))
    if results.utilisation:
        title = f"Achieved FLOP/s ({where})"
        print_whole(console, partial(_table, title, [(s.name, _rates(s)) for s in results.utilisation]), list(_RATES))
    if results.scaling:
        title = f"How time grows ({bench.size.scaling_layers} layers)"
        print_whole(console, partial(_table, title, [(row.quantity, _growth(row)) for row in results.scaling]), list(_GROWTH))


_RATIOS = ("the obvious way", "ours", "obvious", "ratio", "computed less")
_RATES = ("time", "GFLOP", "GFLOP/s", "matmul peak", "MFU", "of its own products' rate")
_GROWTH = ("values", "milliseconds", "exponent")


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str]) -> Table:
    """A line for each row, by its name, with some of its cells."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="left" if name == _RATIOS[0] else "right")
    for name, cells in rows:
        table.add_row(name, *(cells[column] for column in columns))
    return table


def _ratio(row: Row) -> dict[str, str]:
    computed = "" if row.at_most is None else f"{row.at_most:.1f} x"
    times = (_amount(row.ours, row.unit), _amount(row.obvious, row.unit))
    return dict(zip(_RATIOS, (row.against, *times, f"{row.ratio:.2f} x", computed), strict=True))


def _amount(value: float, unit: str) -> str:
    return f"{1e3 * value:,.1f} ms" if unit == "s" and value < 1 else f"{value:,.2f} {unit}"


def _rates(step: Utilisation) -> dict[str, str]:
    rates = (f"{rate:,.4g}" for rate in (step.flops / 1e9, step.rate / 1e9, step.peak / 1e9))
    shares = (f"{share:.1%}" for share in (step.mfu, step.of_own_shapes))
    return dict(zip(_RATES, (_amount(step.seconds, "s"), *rates, *shares), strict=True))


def _growth(row: Scaling) -> dict[str, str]:
    values = (", ".join(map(str, row.values)), ", ".join(f"{1e3 * s:,.0f}" for s in row.seconds))
    return dict(zip(_GROWTH, (*values, f"{row.exponent:.2f}"), strict=True))


def plot(path: Path, rows: Sequence[Scaling]) -> None:
    """One panel per quantity, both axes logarithmic, with the fitted exponent."""
    columns = min(len(rows), _COLUMNS)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines), dpi=130, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(grid, rows, strict=False):
        axes.loglog(row.values, row.seconds, marker="o")
        axes.set_xticks(row.values, labels=[str(value) for value in row.values])
        axes.minorticks_off()
        axes.set_title(f"{row.quantity}: exponent {row.exponent:.2f}", fontsize="medium")
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
    for axes in grid[len(rows) :]:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
