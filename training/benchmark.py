"""Measure what the method saves and costs on this machine: ours and the obvious way in turn, on the same weights and inputs.

    python training/benchmark.py --size tiny --json runs/benchmark.json

Every row first checks that both ways give the same numbers.  Prints tables, writes them as JSON and, beside it, how time grows as
PNG.  Sizes: tiny (two CPU cores, under five minutes), 100m, 1b and 8b (a GPU), smoke (only to see that everything runs).
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ladir.arguments import LineParser
from training.benchmarks import reasoning_rows, scaling, steps, training_rows, zero
from training.benchmarks.report import Measured, Results, as_json, plot, show
from training.benchmarks.setup import Bench, released
from training.benchmarks.sizes import SIZES
from training.runtime.distributed import run_as_program
from training.runtime.files import write_json

logger = logging.getLogger(__name__)

#: what is measured together: a name for the log, and how
Part = tuple[str, Callable[[Bench], Measured | Iterable[Measured]]]


def _train(bench: Bench) -> Iterator[Part]:
    yield "one pass, 1 draw", partial(training_rows.one_pass, draws=1)
    yield "one pass, 4 draws", partial(training_rows.one_pass, draws=4)
    yield "labelled logits", training_rows.labelled_logits
    yield "logits in parts", training_rows.logits_in_parts
    yield "packing", training_rows.packing
    if bench.device.type == "cuda":
        yield "attention", training_rows.attention
    yield "training steps", steps.training_steps
    yield "growth of a training pass", scaling.training_scaling
    yield "ZeRO-3", zero.zero3_rows


def _reason(bench: Bench) -> Iterator[Part]:
    yield "cached reasoning", reasoning_rows.cached_reasoning
    yield "a denoising step", steps.denoising_step
    yield "growth of reasoning", scaling.reasoning_scaling


def _encode(bench: Bench) -> Iterator[Part]:
    yield "encoding", steps.encoding


def _compiled(bench: Bench) -> Iterator[Part]:
    yield "training steps", steps.training_steps
    yield "compiled steps", steps.compiled_steps


SUITES = {"train": _train, "reason": _reason, "encode": _encode, "compiled": _compiled}
#: what ``all`` stands for: compiling takes a minute by itself on a CPU, and a C++ compiler
_ALL = ("train", "reason", "encode")


def measure(bench: Bench, suites: Sequence[str]) -> Iterator[Results]:
    """Everything the suites hold; what is measured so far, after each part."""
    results = Results()
    for suite in suites:
        for name, part in SUITES[suite](bench):
            start = time.perf_counter()
            with released():
                results.add(part(bench))
            logger.info("%s: %.1f s", name, time.perf_counter() - start)
            yield results


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = "what to measure (all); compiled: training steps without and with backbone.compile, which all leaves out"
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=suites)
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="model and problem (tiny)")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark.json"), metavar="FILE", help="where the results go")
    parser.add_argument("--device", help="cpu, cuda, ...; not set: CUDA where there is one")
    parser.add_argument("--rank-job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = _parser().parse_args(argv)
    size = SIZES[arguments.size]
    if arguments.rank_job:
        scaling.rank_job(size, arguments.rank_job)
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training").setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks, of this process or others, take what they see
    bench = Bench(size, torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    start = time.perf_counter()
    for results in measure(bench, _ALL if arguments.suite == "all" else [arguments.suite]):
        write_json(arguments.json, as_json(results, bench, time.perf_counter() - start))
    show(Console(), results, bench)
    if results.scaling:
        plot(arguments.json.with_suffix(".png"), results.scaling)


if __name__ == "__main__":
    run_as_program(main)
