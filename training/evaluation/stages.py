"""An evaluation from its start to its end: what is looked at, asked, judged and written, in this order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from ladir.evaluation.results import read_results
from training.evaluation.answers import Answered
from training.evaluation.asking import Busy, ask, together
from training.evaluation.benchmarks import Benchmark, data_sets, open_benchmarks
from training.evaluation.board import draw_results
from training.evaluation.kinship import check_export
from training.evaluation.readiness import ready_methods
from training.evaluation.rows import TABLE, sampling_of
from training.evaluation.suite import report_suite
from training.evaluation.table import report, result_files, show, tell_results
from training.runtime.alone import GiveWay
from training.runtime.cards import write_results_card
from training.runtime.chain import LANES
from training.runtime.ending import tell_end
from training.runtime.run import Run, evaluation_label

logger = logging.getLogger(__name__)


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question of every data set; rank 0 writes and shows the results.

    The job of a lane (``evaluate.lane``) asks its own rows and keeps the answers, that of the table asks none.
    """
    sets, lane = data_sets(run), run.config.evaluate.lane
    methods = ready_methods(run, {data_set.name: data_set.run.config for data_set in sets})
    if lane != TABLE:
        check_export(run, methods)
    if (benchmarks := open_benchmarks(sets)) is None:
        _interrupt(run)
        return
    samplings = list(dict.fromkeys(sampling_of(method)[0] for method in methods))
    if lane == TABLE:
        if _is_written(run, benchmarks):
            return
    elif (busy := ask(run, benchmarks, samplings)) is None:
        _interrupt(run)
        return
    elif lane in LANES:
        run.alone(lambda give_way: _keep(run, benchmarks, busy))
        return
    run.status.say("judging answers and writing results", fraction=1.0, seconds_left=None)
    asked = None if lane == TABLE else busy
    if run.alone(lambda give_way: _conclude(run, methods, benchmarks, samplings, asked, give_way)) is None:
        _interrupt(run)


def _is_written(run: Run, benchmarks: Sequence[Benchmark]) -> bool:
    """Whether an earlier start has written the table, and was ended while it removed the answers, or before it could say so."""
    files = [result_files(benchmark.run)[0] for benchmark in benchmarks]
    written = all(file.is_file() for file in files) and any(benchmark.log.is_removed() for benchmark in benchmarks)
    if run.world.broadcast(written):
        run.world.on_main(lambda: _remove(benchmarks))
        logger.info("the table is written already: %s", ", ".join(map(str, files)))
        return True
    return False


def _keep(run: Run, benchmarks: Sequence[Benchmark], busy: Busy) -> bool:
    """The answers of a lane wait for those of the other (rank 0)."""
    lane = run.config.evaluate.lane
    for benchmark in benchmarks:
        benchmark.log.keep_busy(asdict(busy))
    folders = [benchmark.log.folder(lane) for benchmark in benchmarks]
    tell_end(run, f"all rows of the lane {lane} are answered; evaluate.lane=table writes the table of both", *folders)
    return True


def _conclude(
    run: Run,
    methods: Sequence[str],
    benchmarks: Sequence[Benchmark],
    samplings: Sequence[str],
    asked: Busy | None,
    give_way: GiveWay,
) -> bool:
    """Write and show the results of all ranks' answers, which are removed then (rank 0); ``asked`` None: by the lanes' jobs."""
    busy = asked or together([Busy(**found) for found in benchmarks[0].log.busy()])
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
    _remove(benchmarks)  # from here on nothing is left to be continued
    return True


def _remove(benchmarks: Sequence[Benchmark]) -> None:
    for benchmark in benchmarks:
        benchmark.log.remove()


def _read(benchmark: Benchmark, sampling: str, give_way: GiveWay) -> dict[int, Answered]:
    give_way()
    return benchmark.log.read(sampling)


def _interrupt(run: Run) -> None:
    run.interrupt()
    logger.info("evaluate interrupted, all answers so far are kept: the same command continues")
