"""Answers of an evaluation under way: kept on disk batch by batch, so that a stopped one continues where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladir.data.question_store import contents_of
from ladir.data.records import Record
from ladir.errors import UnusableError
from ladir.evaluation.results import QuestionResult, question_from
from ladir.inference.cost import Cost
from ladir.models.card import CARD_FILE
from training.runtime.run import Run, evaluation_label
from training.runtime.stages import STAGES

#: sections of settings that change what is answered
SECTIONS = ("run", "backbone", "data", "sample", "evaluate")
#: settings in them that do not: which answers are shown, and how, how many are judged at a time, what else is counted
_SHOWN = ("methods", "voters", "examples", "name", "judges", "left_out", "on_bad_gold", "suite", "suite_folder")
ABOUT_ROWS = tuple(f"evaluate.{name}" for name in _SHOWN)
#: how a line of the log ends: no text within one can say so, its quotes are escaped
_END = re.compile(rb', "rank": \d+, "index": (\d+)\}\s*$')
_LONGEST_END = 100  # bytes


@dataclass(frozen=True)
class Answered:
    """A judged question and its share of what its batch cost."""

    result: QuestionResult
    cost: Cost
    """Generating."""
    reading: Cost
    """Decoding latent thoughts to text."""
    scoring: Cost
    """Of the verifier."""
    drifting: Cost
    """Noising and denoising thoughts again, to see how far they move."""
    elapsed: float
    """Seconds of everything, judging included."""
    rank: int
    """The process that asked."""


def cut(count: int, size: int, ranks: int) -> list[range]:
    """``count`` questions in batches of at most ``size``: as many for every rank, sizes differing by one at most.

    Batches depend on nothing else: what is answered again after a stop is answered in the same company.
    """
    number = min(count, math.ceil(count / (size * ranks)) * ranks)
    bounds = [count * batch // max(number, 1) for batch in range(number + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


class AnswerLog:
    """Folder ``evaluation/answers<label>/<digest>`` of a run: a JSONL file per method and rank, appended to after every batch.

    The digest stands for the settings, the questions and the models: answers of other ones are never mixed in.
    """

    def __init__(self, run: Run, records: Sequence[Record]) -> None:
        """All ranks together; logs of other settings, questions or models under the same label are removed."""
        self._run, self._count = run, len(records)
        parent = run.folder.path / "evaluation" / f"answers{evaluation_label(run.config.evaluate)}"
        self._folder = parent / str(run.world.broadcast(_digest(run, records) if run.world.is_main else None))
        if run.world.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in parent.iterdir():
                if other != self._folder:
                    shutil.rmtree(other)
        run.world.barrier()

    def done(self, method: str) -> set[int]:
        """Indices of the questions that any rank has answered so far, the same on all ranks (all together)."""
        done = list(self._whole(method)) if self._run.world.is_main else None
        return set(self._run.world.broadcast(done))

    def _whole(self, method: str) -> Iterator[int]:
        """The questions of the lines that are whole, by their ends: what answers say is not read."""
        for file in self._files(method):
            with file.open("rb") as lines:
                for line in lines:
                    end = _END.search(line, max(0, len(line) - _LONGEST_END))
                    if end is not None and b"\0" not in line:  # which a lost block of a disk is full of
                        yield int(end[1])

    def read(self, method: str) -> dict[int, Answered]:
        """All answers, by the question's index.  UnusableError where some are not there."""
        found: dict[int, Answered] = {}
        for row in self._rows(method):
            costs = {name: Cost(**row[name]) for name in ("cost", "reading", "scoring", "drifting")}
            found[int(row["index"])] = Answered(question_from(row["result"]), elapsed=row["elapsed"], rank=row["rank"], **costs)
        if len(found) != self._count:
            raise UnusableError(
                f"{self._folder}: {len(found)} of {self._count} answers of {method} can be read; where other nodes wrote them "
                "the file system may show them late: start the same command again"
            )
        return dict(sorted(found.items()))

    def _rows(self, method: str) -> Iterator[dict[str, Any]]:
        for file in self._files(method):
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue  # empty, or the last line of a process that was killed

    def _files(self, method: str) -> list[Path]:
        return sorted(self._folder.glob(f"{method}.*.jsonl"))

    def add(self, method: str, answers: Mapping[int, Answered]) -> None:
        """Append this rank's answers."""
        lines = [_line(index, answer) for index, answer in answers.items()]
        with (self._folder / f"{method}.{self._run.world.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
            # A torn line of an earlier start ends here.
            file.write("".join(f"\n{line}" for line in lines) + "\n")

    def remove(self) -> None:
        """The evaluation is finished (rank 0; no other adds answers any more)."""
        shutil.rmtree(self._folder.parent)
        with suppress(OSError):  # another evaluation's answers are in it
            self._folder.parent.parent.rmdir()


def _digest(run: Run, records: Sequence[Record]) -> str:
    """A hash of the settings, of the questions, and of the model files' names, sizes and times."""
    settings = dataclasses.asdict(run.config)
    for name in ABOUT_ROWS:
        section, key = name.split(".")
        del settings[section][key]
    digest = hashlib.sha256(json.dumps([settings[name] for name in SECTIONS], default=str).encode())
    digest.update(contents_of(records).tobytes())
    models = [run.folder.snapshot(phase, run.config.evaluate.snapshot) for phase in ("ar", "ar-rl", *STAGES)]
    digest.update(json.dumps([method for method in run.config.evaluate.methods if method.endswith("-stable")]).encode())
    for folder in (run.folder.export, *map(run.folder.model, [*models, "verifier"])):
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD_FILE):
            facts = file.stat()
            digest.update(f"{file.name}:{facts.st_size}:{facts.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def _line(index: int, answer: Answered) -> str:
    """One of the log's lines; whose it is stands at its end, where :data:`_END` looks."""
    said = dataclasses.asdict(answer)
    rank = said.pop("rank")
    return json.dumps({**said, "rank": rank, "index": index}, ensure_ascii=False)
