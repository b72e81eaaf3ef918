"""Questions in a store: every line of some files as the question on it, or as why it is not asked.

They are read, tokenized and looked through by the task once, by many processes (:func:`write_questions`); all ranks map them.
What is looked at of all of them at every start is in columns of numbers: none is read before it is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ladir.config import DataSettings
from ladir.data.columns import Chunks, digest_of_ids
from ladir.data.encode import length_problem, refuse_or_list
from ladir.data.questions import question_of
from ladir.data.records import BadRecord, Record
from ladir.data.token_lists import MadeWhenRead
from ladir.data.token_store import Store, place_of
from ladir.data.tokenizing import Made, Rows, write_parts
from ladir.errors import UnusableError
from ladir.tokens import encode_stream

_DIGEST_BYTES = 16

#: a line as JSON, its file's number, its place there, its :class:`Kind`, digests of its question and of all that it says
#: (0: it has none), whether it has an answer of its own (1, else 0), :func:`~ladir.data.columns.digest_of_ids` of its question
#: (zeros: it has none)
QUESTIONS = pa.schema(
    [
        ("line", pa.large_string()),
        ("file", pa.int32()),
        ("place", pa.string()),
        ("kind", pa.int8()),
        ("digest", pa.int64()),
        ("content", pa.uint64()),
        ("answered", pa.int8()),
        ("ids", pa.binary(_DIGEST_BYTES)),
    ]
)


class Kind(IntEnum):
    """What becomes of a line."""

    ASKED = 0
    UNREAD = 1
    """It has no question, or says two answers."""
    UNJUDGEABLE = 2
    """The task finds nothing to judge answers by."""
    UNFIT = 3
    """Its question has no token, or more than ``data.max_question_tokens``."""


def write_questions(
    folder: Path,
    files: Sequence[str],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
    give_way: Callable[[], None] | None = None,
    *,
    check: Callable[[Record], None],
) -> None:
    """The lines of ``files`` as a store of :class:`QuestionStore`; otherwise as :func:`ladir.data.tokenizing.write_records`.

    ``check`` raises UnusableError where a record lacks what answers are judged by.
    """

    def made(part: Rows) -> Made:
        read = [question_of(source, load, settings) for source, load in part.rows]
        texts = [_written(entry) for entry in read]
        entries = list(map(_as_kept, read, texts))
        encoded = encode_stream(tokenizer, (entry.question for entry in entries if isinstance(entry, Record)))
        ids = [next(encoded) if isinstance(entry, Record) else [] for entry in entries]
        lines = [_line(*one, settings, check) for one in zip(entries, texts, map(len, ids), strict=True)]
        columns = {
            "line": [line for line, _ in lines],
            "file": [part.file] * len(lines),
            "place": [place_of(entry.source) for entry in entries],
            "kind": [kind for _, kind in lines],
            "digest": [_digest(entry.question) if isinstance(entry, Record) else 0 for entry in entries],
            "content": [content_of(entry) if isinstance(entry, Record) else 0 for entry in entries],
            "answered": [int(isinstance(entry, Record) and bool(entry.answer)) for entry in entries],
            "ids": [digest_of_ids(np.array(one, np.int32)) if one else bytes(_DIGEST_BYTES) for one in ids],
        }
        return Made(pa.RecordBatch.from_pydict(columns, schema=QUESTIONS), [])

    write_parts(folder, "questions", QUESTIONS, made, files, settings.stream_hub, processes, give_way)


def _written(entry: Record | BadRecord) -> str:
    """The line of the store; what is no JSON (dates of a Parquet file, pictures) as its text."""
    if isinstance(entry, BadRecord):
        return json.dumps([entry.reason, entry.remedy])
    return json.dumps([entry.question, entry.answer, entry.reference], default=str)


def _as_kept(entry: Record | BadRecord, line: str) -> Record | BadRecord:
    """The entry as it is read out of its ``line`` again: the task looks at nothing else."""
    if isinstance(entry, BadRecord):
        return entry
    question, answer, reference = json.loads(line)
    return Record(question, (), answer, entry.source, reference)


def _line(
    entry: Record | BadRecord,
    line: str,
    tokens: int,
    settings: DataSettings,
    check: Callable[[Record], None],
) -> tuple[str, Kind]:
    """What becomes of an entry, whose question has so many ``tokens``: its ``line``, or why it is not asked."""
    if isinstance(entry, BadRecord):
        return line, Kind.UNREAD
    try:
        check(entry)
    except UnusableError as error:
        reason, _, remedy = str(error).removeprefix(f"{entry.source}: ").partition("; ")
        return json.dumps([reason, remedy or "correct it"]), Kind.UNJUDGEABLE
    problem = length_problem("question", tokens, "data.max_question_tokens", settings.max_question_tokens)
    return (line, Kind.ASKED) if problem is None else (json.dumps(problem), Kind.UNFIT)


def _digest(question: str) -> int:
    """64 bits, by which questions are told apart: two of ten million have the same by a chance of one in 400,000."""
    return int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "little", signed=True)


def content_of(record: Record) -> int:
    """64 bits that stand for all that a record says, wherever it stands."""
    facts = {name: value for name, value in vars(record).items() if name != "source"}
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big")


class QuestionStore(MadeWhenRead[Record | BadRecord]):
    """Every line of some files, in their order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._chunks = Chunks(store.batches)
        self.kinds = self.numbers("kind")
        """The :class:`Kind` of every line [n]."""

    def numbers(self, column: str) -> np.ndarray[Any, Any]:
        """A column of numbers of :data:`QUESTIONS` [n]."""
        dtype = QUESTIONS.field(column).type.to_pandas_dtype()
        return np.concatenate([np.zeros(0, dtype), *(batch.column(column).to_numpy() for batch in self.store.batches)])

    def ids(self) -> np.ndarray[Any, Any]:
        """The column of digests of the questions' token ids [n]."""
        columns = (batch.column("ids") for batch in self.store.batches)
        size, dtype = _DIGEST_BYTES, np.dtype(f"S{_DIGEST_BYTES}")
        read = (np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * size) for column in columns)
        return np.concatenate([np.zeros(0, dtype), *read])

    def __len__(self) -> int:
        return len(self._chunks)

    def _at(self, place: int) -> Record | BadRecord:
        batch, i = self._chunks.find(place)
        source = self.store.source(batch.column("file")[i].as_py(), batch.column("place")[i].as_py())
        line = json.loads(batch.column("line")[i].as_py())
        if self.kinds[place] != Kind.ASKED:
            return BadRecord(source, *line)
        question, answer, reference = line
        return Record(question, (), answer, source, reference)

    def left_out(self, end: int | None = None) -> list[BadRecord]:
        """The lines before ``end`` (all, if not given) that are not asked."""
        return [line for place in np.flatnonzero(self.kinds[:end]) if isinstance(line := self[int(place)], BadRecord)]

    def refuse(self, settings: DataSettings) -> None:
        """Raise or list in the log what cannot be asked.

        Where the task refuses every question, UnusableError with its first reason; BadRecords where a line cannot be asked and
        ``data.on_bad_record=error``, or where nothing is left to ask.
        """
        unjudgeable = np.flatnonzero(self.kinds == Kind.UNJUDGEABLE)
        if len(unjudgeable) and np.isin(self.kinds, (Kind.UNREAD, Kind.UNJUDGEABLE)).all():
            raise UnusableError(str(self[int(unjudgeable[0])]))
        refuse_or_list(self.left_out(), len(self), settings)


@dataclass(frozen=True)
class Questions(MadeWhenRead[Record]):
    """Questions that are asked, as records without blocks: ``places`` in a store, each read when it is asked for."""

    store: QuestionStore
    places: np.ndarray[Any, Any]

    @classmethod
    def of(cls, store: QuestionStore) -> Questions:
        """All that can be asked."""
        return cls(store, np.flatnonzero(store.kinds == Kind.ASKED))

    def __len__(self) -> int:
        return len(self.places)

    def _at(self, place: int) -> Record:
        line = self.store[int(self.places[place])]
        assert isinstance(line, Record)
        return line

    def chosen(self, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Questions:
        """Those at some places of this sequence."""
        return Questions(self.store, self.places[numbers])

    def first(self, most: int | None) -> Questions:
        """The first ``most``; all, if not given."""
        return Questions(self.store, self.places[:most])

    def distinct(self) -> Questions:
        """Each question once, where it first stands, with what its last line says of it."""
        digests = self.store.numbers("digest")[self.places]
        _, first = np.unique(digests, return_index=True)
        _, last = np.unique(digests[::-1], return_index=True)
        return self.chosen((len(digests) - 1 - last)[np.argsort(first)])

    @property
    def contents(self) -> np.ndarray[Any, Any]:
        """:func:`content_of` every one, uint64 [n]."""
        return self.store.numbers("content")[self.places]

    @property
    def answered(self) -> np.ndarray[Any, Any]:
        """Places of those that have an answer of their own [m]."""
        return np.flatnonzero(self.store.numbers("answered")[self.places])

    @property
    def ids(self) -> np.ndarray[Any, Any]:
        """:func:`~ladir.data.columns.digest_of_ids` of every question [n]."""
        return self.store.ids()[self.places]

    @property
    def passed_over(self) -> list[BadRecord]:
        """The lines that are not asked, as far as the last of these; all of them where it is the last that could be asked."""
        last = self.store.kinds[self.places[-1] + 1 :] if len(self) else self.store.kinds
        return self.store.left_out(int(self.places[-1]) if (last == Kind.ASKED).any() else None)


def contents_of(records: Sequence[Record]) -> np.ndarray[Any, Any]:
    """:func:`content_of` every record, uint64 [n]; none is read where they are in a store."""
    if isinstance(records, Questions):
        return records.contents
    return np.fromiter(map(content_of, records), np.uint64, len(records))


def answered_of(records: Sequence[Record]) -> np.ndarray[Any, Any]:
    """Places of the records that have an answer of their own [m]; none is read where they are in a store."""
    if isinstance(records, Questions):
        return records.answered
    return np.flatnonzero([bool(record.answer) for record in records])
