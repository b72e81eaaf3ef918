"""An evaluation from its start to its end: what is looked at, asked, judged and written, in this order."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ladir.evaluation.results import read_results
from training.evaluation.answers import Answered
from training.evaluation.asking import Busy, ask
from training.evaluation.benchmarks import Benchmark, data_sets, open_benchmarks
from training.evaluation.board import draw_results
from training.evaluation.kinship import check_export
from training.evaluation.readiness import ready_methods
from training.evaluation.rows import sampling_of
from training.evaluation.suite import report_suite
from training.evaluation.table import report, result_files, show, tell_results
from training.runtime.alone import GiveWay
from training.runtime.cards import write_results_card
from training.runtime.run import Run, evaluation_label

logger = logging.getLogger(__name__)


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question of every data set; rank 0 writes and shows the results."""
    sets = data_sets(run)
    methods = ready_methods(run, {data_set.name: data_set.run.config for data_set in sets})
    check_export(run, methods)
    if (benchmarks := open_benchmarks(sets)) is None:
        _interrupt(run)
        return
    samplings = list(dict.fromkeys(sampling_of(method)[0] for method in methods))
    if (busy := ask(run, benchmarks, samplings)) is None:
        _interrupt(run)
        return
    run.status.say("judging answers and writing results", fraction=1.0, seconds_left=None)
    if run.alone(lambda give_way: _conclude(run, methods, benchmarks, samplings, busy, give_way)) is None:
        _interrupt(run)


def _conclude(
    run: Run, methods: Sequence[str], benchmarks: Sequence[Benchmark], samplings: Sequence[str], busy: Busy, give_way: GiveWay
) -> bool:
    """Write and show the results of all ranks' answers, which are removed then (rank 0)."""
    for benchmark in benchmarks:
        answers = {sampling: _read(benchmark, sampling, give_way) for sampling in samplings}
        report(benchmark.run, methods, answers, benchmark.asked, busy, benchmark.name)
        draw_results(benchmark.run)
        give_way()
    if run.config.evaluate.suite:
        report_suite(run, benchmarks, busy)
    else:
        show(run)
        if not evaluation_label(run.config.evaluate):  # else of other controls or models than the export's
            write_results_card(run.config, run.folder, read_results(result_files(run)[0]))
        tell_results(run)
    for benchmark in benchmarks:  # from here on nothing is left to be continued
        benchmark.log.remove()
    return True


def _read(benchmark: Benchmark, sampling: str, give_way: GiveWay) -> dict[int, Answered]:
    give_way()
    return benchmark.log.read(sampling)


def _interrupt(run: Run) -> None:
    run.interrupt()
    logger.info("evaluate interrupted, all answers so far are kept: the same command continues")
