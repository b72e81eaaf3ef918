"""The file of answers: a line for every question, appended to by any number of processes, so that a stopped command continues."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ladir.errors import UnusableError
from ladir.files import sync_file


class AnswerFile:
    """JSON lines, each with the ``place`` of its question; ``<file>.settings.json`` says how they came about."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """``facts``: what the answers depend on.  UnusableError where the file holds answers of other ones."""
        self.path, self._facts = path, path.with_name(f"{path.name}.settings.json")
        if not path.parent.is_dir():
            raise UnusableError(f"{path.parent}: no such folder for the answers; make it, or name another (--out)")
        with self._locked():
            self._check(dict(facts))
            self._drop_torn_line()

    def _check(self, facts: dict[str, Any]) -> None:
        facts = json.loads(json.dumps(facts))
        if self._facts.is_file():
            before = json.loads(self._facts.read_text(encoding="utf-8"))
            changed = sorted(name for name in facts.keys() | before.keys() if facts.get(name) != before.get(name))
            if changed:
                lines = "; ".join(f"{name}: {before.get(name)!r} -> {facts.get(name)!r}" for name in changed)
                raise UnusableError(
                    f"{self.path} was begun with other questions, model or controls ({lines}): give them back, name another "
                    f"file (--out), or delete it and {self._facts}"
                )
        elif self.path.exists() and self.path.stat().st_size:
            raise UnusableError(f"{self.path} is there and was not begun by this command: name another file (--out)")
        else:
            _replace(self._facts, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def _drop_torn_line(self) -> None:
        """What a process that was killed has left behind the last line end."""
        if self.path.is_file() and not (data := self.path.read_bytes()).endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def rows(self) -> dict[int, dict[str, Any]]:
        """The lines so far, by the place of their question."""
        if not self.path.is_file():
            return {}
        with self._locked():
            lines = self.path.read_text(encoding="utf-8").splitlines()
        return {row["place"]: row for row in map(_row_of(self.path), lines)}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, all of them or, where this process is killed, whole ones."""
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        with self._locked(), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def put_in_order(self) -> None:
        """Sort the lines by their questions' places."""
        rows = self.rows()
        with self._locked():
            _replace(self.path, "".join(f"{json.dumps(rows[place], ensure_ascii=False)}\n" for place in sorted(rows)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Inside, other processes wait; where the file system knows no locks nobody does."""
        with self._facts.with_name(f".{self.path.name}.lock").open("a", encoding="utf-8") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _row_of(path: Path) -> Any:
    def row(line: str) -> dict[str, Any]:
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise UnusableError(f"{path}: a line is not JSON ({error}): delete that line, it will be answered again") from error

    return row


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync_file(aside)
    aside.replace(path)
