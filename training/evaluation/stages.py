"""An evaluation from its start to its end: what is looked at, asked, judged and written, in this order."""

from __future__ import annotations

import logging

from ladir.tasks import get_task
from training.evaluation.answers import AnswerLog
from training.evaluation.asking import ask_model
from training.evaluation.questions import read_questions_asked
from training.evaluation.readiness import check_snapshot, is_trained
from training.evaluation.rows import model_of, sampling_of
from training.evaluation.table import report, result_row
from training.runtime.run import Run

logger = logging.getLogger(__name__)


def evaluate(run: Run) -> None:
    """Fill the table: every method on every question; rank 0 writes and shows the results."""
    config, task = run.config, get_task(run.config.evaluate.task, run.config.evaluate)
    check_snapshot(run)
    methods = [method for method in config.evaluate.methods if is_trained(run, method)]
    records = read_questions_asked(config)
    for record in records:
        task.check(record)
    if not methods:
        raise FileNotFoundError(f"no model of evaluate.methods={config.evaluate.methods} was trained; name others")
    log = AnswerLog(run, records)
    samplings = dict.fromkeys(sampling_of(method)[0] for method in methods)
    for model in dict.fromkeys(map(model_of, samplings)):
        if not ask_model(run, log, task, model, [name for name in samplings if model_of(name) == model], records):
            run.interrupt()
            logger.info("evaluation interrupted: the same command continues")
            return
    if run.world.is_main:
        answers = {sampling: log.read(sampling) for sampling in samplings}
        report(run, [result_row(run, method, answers) for method in methods], answers)
    log.remove()
