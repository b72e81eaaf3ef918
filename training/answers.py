"""Answers of an evaluation under way: kept on disk question by question, so that a stopped one continues where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from ladir.evaluation.results import QuestionResult, question_from
from training.runtime.run import Run

#: sections of settings that change what is answered
SECTIONS = ("run", "backbone", "data", "sample", "evaluate")


@dataclass(frozen=True)
class Answered:
    """A judged question and the seconds it took."""

    result: QuestionResult
    seconds: float


class AnswerLog:
    """Folder ``evaluation/<digest>`` of a run: a JSONL file per method and rank, appended to after every batch.

    The digest stands for the settings and the models: answers of other ones are never mixed in.
    """

    def __init__(self, run: Run) -> None:
        """All ranks together; logs of other settings or models are removed."""
        self._run = run
        parent = run.folder.path / "evaluation"
        self._folder = parent / str(run.world.broadcast(_digest(run) if run.world.is_main else None))
        if run.world.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in parent.iterdir():
                if other != self._folder:
                    shutil.rmtree(other)
        run.world.barrier()

    def read(self, method: str) -> dict[int, Answered]:
        """What any rank has answered so far, by the question's index, the same on all ranks."""
        return dict(self._run.world.broadcast(self._read(method) if self._run.world.is_main else None))

    def _read(self, method: str) -> dict[int, Answered]:
        found: dict[int, Answered] = {}
        for file in sorted(self._folder.glob(f"{method}.*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the last line of a process that was killed
                found[int(row["index"])] = Answered(question_from(row), float(row["seconds"]))
        return found

    def add(self, method: str, answers: Mapping[int, Answered]) -> None:
        """Append this rank's answers."""
        lines = (
            json.dumps({"index": index, "seconds": answer.seconds, **dataclasses.asdict(answer.result)}, ensure_ascii=False)
            for index, answer in answers.items()
        )
        with (self._folder / f"{method}.{self._run.world.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
            # A torn line of an earlier start ends here.
            file.write("".join(f"\n{line}" for line in lines) + "\n")

    def remove(self) -> None:
        """The evaluation is finished (all ranks together)."""
        self._run.world.barrier()
        if self._run.world.is_main:
            shutil.rmtree(self._folder.parent)


def _digest(run: Run) -> str:
    """A hash of the settings and of the model files' names, sizes and times."""
    settings = dataclasses.asdict(run.config)
    digest = hashlib.sha256(json.dumps([settings[name] for name in SECTIONS]).encode())
    for folder in (run.folder.export, run.folder.model("ar")):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            facts = file.stat()
            digest.update(f"{file.name}:{facts.st_size}:{facts.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]
