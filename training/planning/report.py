"""A plan as tables: memory by phase, data and time by phase, and what to change where something does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ladir.report.fitting import print_whole
from training.planning.prediction import Machine, Prediction
from training.runtime.topology import GIB

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


def memory_table(machine: Machine, predictions: Sequence[Prediction]) -> Table:
    """GiB per GPU by item and phase, host memory per node, sizes on disk, and the verdict."""
    table = Table(title=f"GiB per GPU ({machine.gpus} GPUs of {machine.gpu_bytes / GIB:g} GiB)", title_justify="left")
    table.add_column("")
    for p in predictions:
        table.add_column(p.phase, justify="right")
    table.add_row("", *("[dim]" + p.setup.replace(", ", ",\n") + "[/dim]" for p in predictions))
    for name, value in _ROWS:
        if any(value(p) for p in predictions):
            table.add_row(name, *(_gib(value(p)) for p in predictions))
    table.add_section()
    table.add_row(f"peak (reserve {machine.reserve / GIB:g} kept)", *(f"[bold]{_gib(p.peak)}[/bold]" for p in predictions))
    table.add_row("", *("[green]fits[/green]" if p.fits else "[red]DOES NOT FIT[/red]" for p in predictions))
    table.add_section()
    table.add_row("host memory per node", *(_gib(p.host_peak) for p in predictions))
    table.add_row("to load the weights", *(_gib(p.loading_per_node) for p in predictions))
    table.add_row("for checkpoints", *(_gib(p.saving_per_node) for p in predictions))
    table.add_row("a checkpoint on disk", *(_gib(p.checkpoint) for p in predictions))
    table.add_row("result on disk", *(_gib(p.model_folder) for p in predictions))
    return table


def time_table(machine: Machine, predictions: Sequence[Prediction]) -> Table:
    """Samples, tokens, steps and hours of an epoch by phase."""
    title = f"An epoch, at {machine.mfu:.0%} of {machine.flops / 1e12:g} TFLOP/s per GPU"
    table = Table(title=f"{title} and {machine.launch_seconds * 1e6:g} us per launch", title_justify="left")
    table.add_column("")
    for p in predictions:
        table.add_column(p.phase, justify="right")
    table.add_row("samples", *(f"{p.samples:,}" for p in predictions))
    table.add_row("tokens", *(f"{p.tokens / 1e6:,.1f} M" for p in predictions))
    table.add_row("steps", *("" if p.steps is None else f"{p.steps:,.0f}" for p in predictions))
    table.add_row("hours", *(f"{p.seconds / 3600:,.2f}" for p in predictions))
    if any(p.iteration for p in predictions):
        table.add_row(
            "seconds an iteration", *("" if p.iteration is None else f"{p.iteration.seconds:,.1f}" for p in predictions)
        )
        table.add_row(
            "of which sampling", *("" if p.iteration is None else f"{max(p.iteration.sampling):,.1f}" for p in predictions)
        )
    if any(p.bound for p in predictions):
        table.add_row("which is the time of", *(p.bound or "arithmetic" for p in predictions))
    table.add_row("read, MiB/s", *(_rate(p) for p in predictions))
    if any(p.balance for p in predictions):
        table.add_row("ranks busy", *("" if p.balance is None else f"{p.balance:.0%}" for p in predictions))
    table.add_row("epochs set", *("" if p.epochs is None else f"{p.epochs:g}" for p in predictions))
    table.add_row("hours in all", *(_hours(p) for p in predictions))
    return table


def _rate(p: Prediction) -> str:
    """What the whole job reads of its samples."""
    return f"{p.read_bytes / p.seconds / 2**20:,.1f}" if p.read_bytes and p.seconds else ""


def _hours(p: Prediction) -> str:
    """All epochs; stage 3 has none, only steps."""
    if p.iteration is not None:
        return f"{p.seconds / 3600:,.1f}"
    return "" if p.epochs is None else f"{p.epochs * p.seconds / 3600:,.1f}"


def remedies(predictions: Sequence[Prediction]) -> list[str]:
    """One line per phase that does not fit."""
    return [f"{p.phase} needs {_gib(p.peak)} GiB of {_gib(p.capacity)}: try {p.remedy}" for p in predictions if not p.fits]


def lighter(predictions: Sequence[Prediction]) -> Iterator[str]:
    """What splits less than the configured file and fits as well, a line for each such file."""
    for path in dict.fromkeys(p.lighter for p in predictions if p.lighter):
        settings = " ".join(f"{p.phase}.train.deepspeed={path}" for p in predictions if p.lighter == path)
        yield f"{settings} fits as well and is faster, since less is gathered and sent"


def print_report(
    console: Console,
    predictions: Sequence[Prediction],
    machine: Machine,
    measured: bool,
    left_out: Iterable[str] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Everything, as wide as it is where it goes to a file or a pipe.

    ``left_out``: what is not among the predictions; ``refused``: why phases cannot start.
    """
    print_whole(console, partial(memory_table, machine), predictions)
    print_whole(console, partial(time_table, machine), predictions)
    source = "lengths measured in data.train" if measured else "lengths from plan.* and data.max_* (data.train is not at hand)"
    busy = "; ranks busy: of the time, the rest of which they wait for the one with most to do"
    reinforced = any(p.iteration for p in predictions)
    notes = [
        f"Memory is that of a micro batch of the longest records, time that of mean ones: {source}.",
        f"Read: stored samples, by all ranks{busy if any(p.balance for p in predictions) else ''}.",
        "Time is the larger of a GPU's arithmetic and of its host's launching one operator after another (--launch-us).",
        "Decoding (evaluate) reads memory more than it computes: its MFU is lower, its keys and values are an upper bound.",
        "An evaluation's hours are of all data sets and ways of asking, questions and answers as long as the records'.",
        *(["Stage 3 (rl) has no epochs: its figures are those of all its steps, every group teaching."] if reinforced else []),
        *left_out,
        *lighter(predictions),
    ]
    faults = [*remedies(predictions), *(f"{phase} cannot start: {reason}" for phase, reason in refused.items())]
    verdict = [f"[red]{escape(line)}[/red]" for line in faults] or ["[green]every phase fits[/green]"]
    for line in [*notes, *verdict]:
        console.print(line, soft_wrap=True)


def _gib(size: float) -> str:
    return "-" if not size else f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
