"""The benchmark's results: tables, JSON, and a picture of how time grows."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.table import Table

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
    tables = []
    if results.rows:
        tables.append(_ratios(results.rows, where))
    if results.utilisation:
        tables.append(_utilisation(results.utilisation, where))
    if results.scaling:
        tables.append(_scaling(results.scaling, bench))
    console.print(Group(*tables))


def _ratios(rows: Sequence[Row], where: str) -> Table:
    table = Table(title=f"Ours against the obvious way ({where})", title_justify="left")
    table.add_column("")
    table.add_column("the obvious way")
    for name in ("ours", "obvious", "ratio", "computed less"):
        table.add_column(name, justify="right")
    for row in rows:
        computed = "" if row.at_most is None else f"{row.at_most:.1f} x"
        table.add_row(
            row.title, row.against, _amount(row.ours, row.unit), _amount(row.obvious, row.unit), f"{row.ratio:.2f} x", computed
        )
    return table


def _amount(value: float, unit: str) -> str:
    return f"{1e3 * value:,.1f} ms" if unit == "s" and value < 1 else f"{value:,.2f} {unit}"


def _utilisation(steps: Sequence[Utilisation], where: str) -> Table:
    table = Table(title=f"Achieved FLOP/s ({where})", title_justify="left")
    table.add_column("")
    for name in ("time", "GFLOP", "GFLOP/s", "matmul peak", "MFU", "of its own products' rate"):
        table.add_column(name, justify="right")
    for step in steps:
        rates = (step.flops / 1e9, step.rate / 1e9, step.peak / 1e9)
        shares = (step.mfu, step.of_own_shapes)
        table.add_row(step.name, _amount(step.seconds, "s"), *(f"{r:,.4g}" for r in rates), *(f"{s:.1%}" for s in shares))
    return table


def _scaling(rows: Sequence[Scaling], bench: Bench) -> Table:
    table = Table(title=f"How time grows ({bench.size.scaling_layers} layers)", title_justify="left")
    for name in ("quantity", "values", "milliseconds", "exponent"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    for row in rows:
        values = (", ".join(map(str, row.values)), ", ".join(f"{1e3 * s:,.0f}" for s in row.seconds))
        table.add_row(row.quantity, *values, f"{row.exponent:.2f}")
    return table


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
