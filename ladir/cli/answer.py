"""python -m ladir answer FILE --model DIR --out FILE: answer a file of questions, one line each; stopped, it continues.

Questions are read as an evaluation reads them (JSON lines, also .gz, Parquet, a Hub id); answers are not needed.  A line that
cannot be asked has the reason in the place of an answer.  Under torchrun, deepspeed or srun each process takes its share:
torchrun --nproc-per-node 4 -m ladir answer ...
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ladir.arguments import LineParser
from ladir.cli.answer_file import AnswerFile
from ladir.cli.controls import add_controls, canonical_of, controls_of
from ladir.cli.loading import add_model, be_quiet, load_reasoner
from ladir.cli.processes import this_process
from ladir.config import DataSettings
from ladir.data.questions import question_of
from ladir.data.records import BadRecord, Record
from ladir.data.rows import file_rows
from ladir.errors import UnusableError

if TYPE_CHECKING:
    from ladir.reasoner import Reasoner, Trajectory

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0
_LISTED = 20  # lines that cannot be asked, named one by one


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = LineParser(prog="python -m ladir answer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", metavar="FILE", help=".jsonl, .json (either with .gz), .parquet, or a Hub id")
    parser.add_argument("--out", required=True, metavar="FILE", help="the answers, as JSON lines")
    add_model(parser)
    parser.add_argument("--field", default="input", metavar="NAME", help="field of a line that holds the question (input)")
    parser.add_argument("--trajectories", type=int, default=1, metavar="N", help="lines of thought per question")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="questions answered together")
    add_controls(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Answer this process' share; returns 1 where lines of it could not be asked."""
    arguments = build_parser().parse_args(argv)
    for name in ("trajectories", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    process = this_process(os.environ)
    be_quiet(logging.INFO)
    entries = _entries(arguments)
    if not entries:
        raise UnusableError(f"{arguments.questions}: no questions in it; write one JSON object per line")
    reasoner = load_reasoner(arguments, process.local)
    reasoner.check_choice(arguments.choose)
    reasoner.settings = reasoner.settings_with(**controls_of(arguments))
    file = AnswerFile(Path(arguments.out), _facts(arguments, entries))
    done, mine = file.rows().keys(), process.share(len(entries))
    left = [place for place in mine if place not in done]
    for part in _shown([left[i : i + arguments.batch] for i in range(0, len(left), arguments.batch)], len(mine)):
        file.add(list(_answered(reasoner, arguments, {place: entries[place] for place in part})))
    return _end(file, entries, mine)


def _entries(arguments: argparse.Namespace) -> list[Record | BadRecord]:
    """What stands on the file's lines, blank ones left out."""
    settings = DataSettings(input_field=arguments.field)
    return [question_of(source, load, settings) for source, load in file_rows(arguments.questions)]


def _facts(arguments: argparse.Namespace, entries: Sequence[Record | BadRecord]) -> dict[str, Any]:
    """What the answers depend on, but for the size of batches and the number of processes."""
    from ladir.models.store import heads_fingerprint

    texts = [entry.question if isinstance(entry, Record) else str(entry) for entry in entries]
    questions = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    names = ("trajectories", "seed", "choose", "task")
    given = {name: getattr(arguments, name) for name in names} | controls_of(arguments)
    return {"questions": questions, "model": heads_fingerprint(arguments.model), **given}


def _answered(
    reasoner: Reasoner, arguments: argparse.Namespace, entries: Mapping[int, Record | BadRecord]
) -> Iterator[dict[str, Any]]:
    """A line for every entry, those that cannot be asked first."""
    asked: dict[int, str] = {}
    for place, entry in entries.items():
        problem = _problem(reasoner, entry)
        if problem is None and isinstance(entry, Record):
            asked[place] = entry.question
        else:
            yield {"place": place, "source": entry.source, "error": problem}
    if not asked:
        return
    found = _ask(reasoner, arguments, list(asked.values()))
    for place, question, trajectory in zip(asked, asked.values(), found, strict=True):
        yield {"place": place, "source": entries[place].source, "question": question, **_line(trajectory)}


def _problem(reasoner: Reasoner, entry: Record | BadRecord) -> str | None:
    """Why an entry cannot be asked; None where it can."""
    if isinstance(entry, BadRecord):
        return entry.reason.replace("data.input_field", "--field")
    try:
        reasoner.check_question(entry.question)
    except ValueError as error:
        return str(error)
    return None


def _ask(reasoner: Reasoner, arguments: argparse.Namespace, questions: Sequence[str]) -> list[Trajectory]:
    """The trajectory of each question that is chosen."""
    found = reasoner.generate(
        questions,
        num_trajectories=arguments.trajectories,
        seed=arguments.seed,
        choose=arguments.choose or "majority",
        canonical=canonical_of(arguments),
    )
    return [only for (only,) in found]


def _line(trajectory: Trajectory) -> dict[str, Any]:
    score = {} if trajectory.score is None else {"score": round(trajectory.score, 6)}
    return {"answer": trajectory.answer, "thoughts": trajectory.thoughts, "stopped": trajectory.stopped, **score}


def _shown(batches: Sequence[list[int]], total: int) -> Iterator[list[int]]:
    """The batches; how far this process has come is a bar on a terminal, and a line now and then elsewhere."""
    done = total - sum(map(len, batches))
    if done:
        logger.info("%d of %d questions are answered already", done, total)
    told = time.monotonic()
    with tqdm(total=total, initial=done, unit="question", disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
            done += len(batch)
            if bar.disable and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                logger.info("%d of %d questions answered", done, total)


def _end(file: AnswerFile, entries: Sequence[Record | BadRecord], mine: Sequence[int]) -> int:
    """The last lines: what cannot be asked, and what is where.  The process that answers the last question sorts the file."""
    rows = file.rows()
    bad = [rows[place] for place in mine if "error" in rows[place]]
    for row in bad[:_LISTED]:
        logger.warning("%s: %s", row["source"], row["error"])
    if len(bad) > _LISTED:
        logger.warning("... and %d more lines that cannot be asked", len(bad) - _LISTED)
    if len(rows) == len(entries):
        file.put_in_order()
    logger.info("%d questions answered, %d lines cannot be asked: %s", len(mine) - len(bad), len(bad), file.path)
    return 1 if bad else 0
