"""One table of all benchmarks of a suite, from what is written of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from ladir.evaluation.results import read_results
from ladir.evaluation.suite import AVERAGE, set_lines, suite_columns, suite_markdown, suite_table, summarise_suite
from ladir.report.fitting import print_whole
from training.evaluation.asking import Busy
from training.evaluation.benchmarks import Benchmark
from training.evaluation.table import result_files
from training.runtime.cards import write_suite_card
from training.runtime.ending import tell_end
from training.runtime.files import write_json, write_text
from training.runtime.run import Run, evaluation_label


def suite_files(run: Run) -> tuple[Path, Path]:
    """The suite's table, for programs and for people."""
    label = evaluation_label(run.config.evaluate)
    return run.folder.path / f"suite{label}.json", run.folder.path / f"suite{label}.md"


def report_suite(run: Run, benchmarks: Sequence[Benchmark], busy: Busy) -> None:
    """Write the table, for the model card as well, show it, and say where everything is (rank 0)."""
    files = {benchmark.name: result_files(benchmark.run)[0] for benchmark in benchmarks}
    results = {name: read_results(path) for name, path in files.items()}
    suite = summarise_suite(results)
    content = {**suite, "results": {name: path.name for name, path in files.items()}, "seed": run.config.run.seed}
    content["busy"] = asdict(busy)
    file, text = suite_files(run)
    write_json(file, content)
    write_text(text, suite_markdown(suite))
    if not evaluation_label(run.config.evaluate):  # else of other controls or models than the export's
        write_suite_card(run.config, run.folder, content, results)
    console = Console()
    print_whole(console, partial(suite_table, suite), suite_columns(suite))
    for line in set_lines(suite):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    rates = {row["method"]: row["pass@1"][AVERAGE] for row in suite["rows"]}
    figures = ", ".join(f"{method} {'-' if rate is None else f'{100 * rate:.1f}%'}" for method, rate in rates.items())
    tell_end(run, f"{len(benchmarks)} benchmarks, average pass@1 {figures}", file, text)
