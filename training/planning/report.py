"""A plan as tables: memory by phase, data and time by phase, and what to change where something does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from training.planning.predict import GIB, Machine, Prediction

_ROWS = (
    ("weights, trained", lambda p: p.holdings.weights),
    ("weights, frozen", lambda p: p.holdings.frozen),
    ("gradients", lambda p: p.holdings.gradients),
    ("optimizer", lambda p: p.holdings.optimizer),
    ("moving average", lambda p: p.holdings.average),
    ("communication buffers", lambda p: p.holdings.buckets),
    ("gathered weights", lambda p: p.holdings.gathered),
    ("activations, gradients", lambda p: p.activations),
    ("for a moment in the step", lambda p: p.holdings.step),
)


def memory_table(predictions: Sequence[Prediction], machine: Machine) -> Table:
    """GiB per GPU by item and phase, host memory per node, sizes on disk, and the verdict."""
    table = Table(title=f"GiB per GPU ({machine.gpus} GPUs of {machine.gpu_bytes / GIB:g} GiB)", title_justify="left")
    table.add_column("")
    for p in predictions:
        table.add_column(p.phase, justify="right")
    table.add_row("", *(f"[dim]{p.setup}[/dim]" for p in predictions))
    for name, value in _ROWS:
        if any(value(p) for p in predictions):
            table.add_row(name, *(_gib(value(p)) for p in predictions))
    table.add_section()
    table.add_row(f"peak (reserve {machine.reserve / GIB:g} kept)", *(f"[bold]{_gib(p.peak)}[/bold]" for p in predictions))
    table.add_row("", *("[green]fits[/green]" if p.fits else "[red]DOES NOT FIT[/red]" for p in predictions))
    table.add_section()
    table.add_row("host memory per node", *(_gib(p.host_per_node) for p in predictions))
    table.add_row("a checkpoint on disk", *(_gib(p.checkpoint) for p in predictions))
    table.add_row("result on disk", *(_gib(p.model_folder) for p in predictions))
    return table


def time_table(predictions: Sequence[Prediction], machine: Machine) -> Table:
    """Samples, tokens, steps and hours of an epoch by phase."""
    table = Table(title=f"An epoch, at {machine.mfu:.0%} of {machine.flops / 1e12:g} TFLOP/s per GPU", title_justify="left")
    table.add_column("")
    for p in predictions:
        table.add_column(p.phase, justify="right")
    table.add_row("samples", *(f"{p.samples:,}" for p in predictions))
    table.add_row("tokens", *(f"{p.tokens / 1e6:,.1f} M" for p in predictions))
    table.add_row("steps", *("" if p.steps is None else f"{p.steps:,.0f}" for p in predictions))
    table.add_row("hours", *(f"{p.seconds / 3600:,.2f}" for p in predictions))
    table.add_row("epochs set", *("" if p.epochs is None else f"{p.epochs:g}" for p in predictions))
    table.add_row("hours in all", *("" if p.epochs is None else f"{p.epochs * p.seconds / 3600:,.1f}" for p in predictions))
    return table


def remedies(predictions: Sequence[Prediction]) -> list[str]:
    """One line per phase that does not fit."""
    return [f"{p.phase} needs {_gib(p.peak)} GiB of {_gib(p.capacity)}: try {p.remedy}" for p in predictions if not p.fits]


def report(predictions: Sequence[Prediction], machine: Machine, measured: bool) -> Group:
    """Everything to print."""
    source = "lengths measured in data.train" if measured else "lengths from plan.* and data.max_* (data.train is not at hand)"
    verdict = [f"[red]{line}[/red]" for line in remedies(predictions)] or ["[green]every phase fits[/green]"]
    notes = [
        f"Memory is that of a micro batch of the longest records, time that of mean ones: {source}.",
        "Decoding (evaluate) reads memory more than it computes: its MFU is lower, its keys and values are an upper bound.",
    ]
    return Group(memory_table(predictions, machine), time_table(predictions, machine), *notes, *verdict)


def _gib(size: float) -> str:
    return "-" if not size else f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
