"""An evaluation from its start to its end: what is looked at, asked, judged and written, in this order."""

from __future__ import annotations

import logging

from ladir.evaluation.results import read_results
from ladir.tasks import get_task
from training.evaluation.answers import AnswerLog
from training.evaluation.asking import ask_model
from training.evaluation.board import draw_results
from training.evaluation.kinship import check_export
from training.evaluation.questions import choose_questions
from training.evaluation.readiness import ready_methods
from training.evaluation.rows import model_of, sampling_of
from training.evaluation.table import report, result_files, tell_results
from training.runtime.cards import write_results_card
from training.runtime.run import Run, evaluation_label

logger = logging.getLogger(__name__)


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question; rank 0 writes and shows the results."""
    methods = ready_methods(run)
    check_export(run, methods)
    task = get_task(run.config.evaluate.task, run.config.evaluate)
    asked = choose_questions(run, task)
    if asked is None:
        _interrupt(run)
        return
    log = AnswerLog(run, asked.records)
    samplings = dict.fromkeys(sampling_of(method)[0] for method in methods)
    for model in dict.fromkeys(map(model_of, samplings)):
        ways = [name for name in samplings if model_of(name) == model]
        if not ask_model(run, log, task, model, ways, asked.records):
            _interrupt(run)
            return
    if run.world.is_main:
        report(run, methods, {sampling: log.read(sampling) for sampling in samplings}, asked)
        draw_results(run)
        if not evaluation_label(run.config.evaluate):  # else of other controls or models than the export's
            write_results_card(run.config, run.folder, read_results(result_files(run)[0]))
        tell_results(run)
    log.remove()


def _interrupt(run: Run) -> None:
    run.interrupt()
    logger.info("evaluate interrupted, all answers so far are kept: the same command continues")
