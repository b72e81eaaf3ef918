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
from training.evaluation.rows import TABLE, lane_of
from training.runtime.chain import LANES
from training.runtime.files import read_json, write_json
from training.runtime.run import Run, evaluation_label
from training.runtime.stages import STAGES

#: sections of settings that change what is answered
SECTIONS = ("run", "backbone", "data", "sample", "evaluate")
#: settings in them that do not: which answers are shown, and how, how many are judged at a time, what else is counted
_SHOWN = ("methods", "voters", "examples", "name", "judges", "left_out", "on_bad_gold", "suite", "suite_folder", "lane")
#: and that other jobs may work in the folder
ABOUT_ROWS = (*(f"evaluate.{name}" for name in _SHOWN), "run.exclusive")
_BUSY = "busy.json"
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
    """Folders ``evaluation/answers<label>/<lane>-<digest>`` of a run: a JSONL file per method and rank, appended to after every
    batch.

    The digest stands for the settings, the questions and the lane's models: answers of other ones are never mixed in.  Two jobs
    may add answers at the same time, each those of its lane.
    """

    def __init__(self, run: Run, records: Sequence[Record]) -> None:
        """All ranks together; logs of other settings, questions or models of the same lanes under the same label are removed."""
        self._run, self._count, lane = run, len(records), run.config.evaluate.lane
        self._parent = run.folder.path / "evaluation" / f"answers{evaluation_label(run.config.evaluate)}"
        self._lanes = [lane] if lane in LANES else list(LANES)
        names = {lane: self._name(lane, records) for lane in self._lanes} if run.world.is_main else None
        self._folders = {lane: self._parent / name for lane, name in run.world.broadcast(names).items()}
        if run.world.is_main and lane != TABLE:
            self._make()
        run.world.barrier()

    def _name(self, lane: str, records: Sequence[Record]) -> str:
        """The table's job may be where another dtype would be chosen: it takes the answers that are there."""
        digest, dtype = _digest(self._run, records, lane), self._run.config.backbone.dtype
        there = sorted(path.name for path in self._parent.glob(f"{lane}-{digest}-*"))
        return there[0] if there and self._run.config.evaluate.lane == TABLE else f"{lane}-{digest}-{dtype}"

    def _make(self) -> None:
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        for other in self._parent.iterdir():
            lane = other.name.partition("-")[0]
            if other not in self._folders.values() and (lane in self._lanes or lane not in LANES):
                shutil.rmtree(other)

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
                f"{self._folders[lane_of(method)]}: {len(found)} of {self._count} answers of {method} can be read; where other "
                f"nodes wrote them the file system may show them late: start the same command again{self._remedy(method)}"
            )
        return dict(sorted(found.items()))

    def _remedy(self, method: str) -> str:
        lane = lane_of(method)
        return f", or ask them first: evaluate.lane={lane}" if self._run.config.evaluate.lane == TABLE else ""

    def _rows(self, method: str) -> Iterator[dict[str, Any]]:
        for file in self._files(method):
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue  # empty, or the last line of a process that was killed

    def _files(self, method: str) -> list[Path]:
        return sorted(self._folders[lane_of(method)].glob(f"{method}.*.jsonl"))

    def add(self, method: str, answers: Mapping[int, Answered]) -> None:
        """Append this rank's answers."""
        lines = [_line(index, answer) for index, answer in answers.items()]
        file_of_rank = self._folders[lane_of(method)] / f"{method}.{self._run.world.rank:05d}.jsonl"
        with file_of_rank.open("a", encoding="utf-8") as file:
            # A torn line of an earlier start ends here.
            file.write("".join(f"\n{line}" for line in lines) + "\n")

    def folder(self, lane: str) -> Path:
        """Where a lane's answers are."""
        return self._folders[lane]

    def keep_busy(self, busy: Mapping[str, Any]) -> None:
        """How long the job of a lane asked, for the table (rank 0)."""
        for folder in self._folders.values():
            write_json(folder / _BUSY, busy)

    def busy(self) -> list[Mapping[str, Any]]:
        """What the jobs of the lanes have left of that."""
        return [found for lane in self._lanes if (found := read_json(self._folders[lane] / _BUSY))]

    def is_removed(self) -> bool:
        """Whether nothing of any lane is there (rank 0)."""
        return not self._parent.is_dir()

    def remove(self) -> None:
        """The evaluation is finished (rank 0; no other adds answers any more)."""
        if not self.is_removed():
            shutil.rmtree(self._parent)
        with suppress(OSError):  # another evaluation's answers are in it
            self._parent.parent.rmdir()


def _digest(run: Run, records: Sequence[Record], lane: str) -> str:
    """A hash of the settings but for the dtype, of the questions, and of the names, sizes and times of a lane's model files."""
    settings = dataclasses.asdict(run.config)
    for name in (*ABOUT_ROWS, "backbone.dtype"):
        section, key = name.split(".")
        del settings[section][key]
    digest = hashlib.sha256(json.dumps([settings[name] for name in SECTIONS], default=str).encode())
    digest.update(contents_of(records).tobytes())
    if lane == "ladir":
        digest.update(json.dumps([method for method in run.config.evaluate.methods if method.endswith("-stable")]).encode())
    for folder in _models(run, lane):
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD_FILE):
            facts = file.stat()
            digest.update(f"{file.name}:{facts.st_size}:{facts.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def _models(run: Run, lane: str) -> list[Path]:
    """Folders of the models that a lane may ask."""
    folder, snapshot = run.folder, run.config.evaluate.snapshot
    stages = [folder.model(folder.snapshot(phase, snapshot)) for phase in (STAGES if lane == "ladir" else ("ar", "ar-rl"))]
    if lane == "ar":
        return stages
    parts = folder.export if folder.export.is_dir() else folder.model("vae")  # of snapshots, while there is no export
    return [parts, *stages, folder.model("verifier")]


def _line(index: int, answer: Answered) -> str:
    """One of the log's lines; whose it is stands at its end, where :data:`_END` looks."""
    said = dataclasses.asdict(answer)
    rank = said.pop("rank")
    return json.dumps({**said, "rank": rank, "index": index}, ensure_ascii=False)
