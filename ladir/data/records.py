"""Reading records: JSONL, gzipped JSONL, Parquet or a Hub data set.  Every record is either read or reported."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ladir.config import DataSettings
from ladir.data.blocks import group_sentences, split_answer, split_sentences, strip_calculator
from ladir.data.formats import Published, read_published
from ladir.errors import UnusableError

logger = logging.getLogger(__name__)

_LISTED = 20  # bad records named one by one in an error message
_EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Record:
    """One question with its chain of thought, as text."""

    question: str
    blocks: tuple[str, ...]
    answer: str
    source: str  # "file.jsonl:12": where it was read
    reference: dict[str, Any] = field(default_factory=dict)  # the other fields of the JSON object


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: where it is, why, and what to do."""

    source: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}; {self.remedy}"


class BadRecords(ValueError):
    """Refused input.  The message lists the first bad records with file and line, and counts the others."""

    def __init__(self, records: list[BadRecord], total: int | None = None) -> None:
        self.records = records
        self.total = total
        of_total = "" if total is None else f" of {total}"
        super().__init__(
            f"{len(records)}{of_total} records cannot be used:\n{list_bad_records(records)}\n"
            "Correct them, or set data.on_bad_record=skip to leave them out (counted and listed)."
        )


def list_bad_records(bad: list[BadRecord]) -> str:
    """The first bad records, one a line, and how many more there are."""
    lines = [f"  {record}" for record in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    return "\n".join(lines)


@dataclass
class RecordSet:
    """What a file holds: ``len(records) + len(bad) == total``."""

    records: list[Record]
    bad: list[BadRecord]
    total: int


class Refused(Exception):
    """A record that cannot be used; turned into a BadRecord by the reader."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


# A source of a record and a function that gives its object or raises Refused.
_Row = tuple[str, Callable[[], Any]]


def read_records(path: str, settings: DataSettings) -> RecordSet:
    """All records of a file (``.jsonl``, ``.jsonl.gz``, ``.parquet``) or a Hub data set (``name[:config][:split]``).

    A row without ``data.input_field`` is read by its own field names where it is one of a known public set
    (:mod:`ladir.data.formats`).  Bad records are collected, never dropped and never raised.  Raises FileNotFoundError for
    a missing file, ValueError for one that cannot be read as a whole (unknown extension, damaged compression, no records).
    """
    result = RecordSet([], [], 0)
    for source, load in file_rows(path):
        result.total += 1
        try:
            result.records.append(record_of(load(), source, settings))
        except Refused as refused:
            result.bad.append(BadRecord(source, refused.reason, refused.remedy))
    if result.total == 0:
        raise UnusableError(f"{path}: no records in it; write one JSON object per line")
    return result


@dataclass
class SentenceSet:
    """What a file of sentences holds: (source, text) of each that can be read, and the others."""

    sentences: list[tuple[str, str]]
    bad: list[BadRecord]


def read_sentences(path: str) -> SentenceSet:
    """The texts of a file of ``{"text": sentence}``."""
    result = SentenceSet([], [])
    for source, load in file_rows(path):
        try:
            result.sentences.append((source, text_of(mapping_of(load()), "text", "the sentence")))
        except Refused as refused:
            result.bad.append(BadRecord(source, refused.reason, refused.remedy))
    return result


def record_of(loaded: Any, source: str, settings: DataSettings) -> Record:
    """A loaded row as a record.  Raises Refused where it cannot be trained on."""
    row = mapping_of(loaded)
    published = _published(row) if settings.input_field not in row else None
    question, reasoning, answer = _own_texts(row, settings) if published is None else _published_texts(published)
    if not answer:
        raise Refused("its final answer is empty", "write the answer after the prefix")
    if settings.strip_calculator:
        reasoning = strip_calculator(reasoning)
    sentences = split_sentences(reasoning)
    if not sentences:
        raise Refused("it has no reasoning, only an answer", f"put the steps first in {settings.output_field!r}")
    read = (settings.input_field, settings.output_field) if published is None else ()
    return Record(
        question=question,
        blocks=tuple(group_sentences(sentences, settings.sentences_per_block)),
        answer=answer,
        source=source,
        reference={k: v for k, v in row.items() if k not in read} | ({} if published is None else published.extra),
    )


def _own_texts(row: Mapping[str, Any], settings: DataSettings) -> tuple[str, str, str]:
    """Question, reasoning and answer by the names in the settings."""
    question = text_of(row, settings.input_field, "the question (data.input_field)")
    output = text_of(row, settings.output_field, "the reasoning (data.output_field)")
    reasoning, answer = split_answer(output, settings.answer_prefixes)
    # A data set may call its chain "answer" (GSM8K does): then there is no explicit answer beside it.
    has_explicit = settings.answer_field not in (settings.input_field, settings.output_field)
    if has_explicit and row.get(settings.answer_field) is not None:
        written, answer = answer, text_of(row, settings.answer_field, "the answer (data.answer_field)").strip()
        if written is not None and not _closes(written, answer):
            reasoning = output.strip()
    if answer is None:
        prefixes = " or ".join(repr(prefix) for prefix in settings.answer_prefixes)
        raise Refused(
            "no final answer in it",
            f"give it a field {settings.answer_field!r}, end its text with {prefixes}, or set data.answer_prefixes",
        )
    return question, reasoning, answer


def _closes(text: str, answer: str) -> bool:
    """Whether what follows the last mark of an answer is no more than one: a single sentence, or the record's own ``answer``.

    Else the mark is part of the reasoning (a heading, a formulation), and to cut there would lose steps.
    """
    return len(split_sentences(text)) <= 1 or _bare(text) == _bare(answer)


def _bare(text: str) -> str:
    return " ".join(text.split()).rstrip(".!")


def _published(row: Mapping[str, Any]) -> Published | None:
    try:
        return read_published(row)
    except ValueError as error:
        raise Refused(str(error), "write it as the published set does") from error


def _published_texts(row: Published) -> tuple[str, str, str]:
    """The same of a public set's row; its whole reasoning is kept, whatever ``data.answer_prefixes`` says."""
    texts = {"question": row.question, "reasoning": row.reasoning, "answer": row.answer}
    question = text_of(texts, "question", "the question")
    reasoning = text_of(texts, "reasoning", "the reasoning")
    if row.answer is None:
        raise Refused("no final answer in it", "end its text with '#### ANSWER' (GSM8K) or put it into \\boxed{} (MATH)")
    return question, reasoning, text_of(texts, "answer", "the answer").strip()


def mapping_of(loaded: Any) -> Mapping[str, Any]:
    """What was loaded, where it is an object; else Refused."""
    if not isinstance(loaded, Mapping):
        raise Refused(f"a JSON {_json_type(loaded)}, not an object", 'write {"input": ..., "output": ...} on the line')
    return loaded


def text_of(row: Mapping[str, Any], name: str, meaning: str) -> str:
    """The text of a field, or Refused: missing, of another type, empty, or not encodable."""
    if name not in row:
        present = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
        raise Refused(f"no field {name!r} for {meaning}; its fields: {present}", "add it, or name the right field")
    value = row[name]
    if not isinstance(value, str):
        raise Refused(f"field {name!r} is of type {_json_type(value)}, not a string", "write it in quotes")
    if not value.strip():
        raise Refused(f"field {name!r} is empty", f"write {meaning} into it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            f"field {name!r} holds half a surrogate pair at character {error.start}", "write the character as UTF-8"
        ) from error
    return value


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def file_rows(path: str) -> Iterator[_Row]:
    """Where each record is and how to load it; the format follows from the name."""
    file = Path(path)
    if path.endswith((".jsonl", ".jsonl.gz")):
        _require(file)
        yield from _jsonl_rows(file)
    elif path.endswith(".parquet"):
        _require(file)
        yield from _parquet_rows(file)
    elif file.exists() or file.suffix in (".json", ".csv", ".txt", ".gz", ".tsv"):
        raise UnusableError(f"{path}: unknown kind of file; known: {', '.join(_EXTENSIONS)}, Hub ids (name:config:split)")
    else:
        yield from _hub_rows(path)


def _require(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file (looked in {Path.cwd()}); correct the path in data.*")


def _jsonl_rows(file: Path) -> Iterator[_Row]:
    number = 0
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{file}:{number}", lambda line=line: _parse_json(line)  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UnusableError(
                f"{file}:{number + 1}: the compressed data are damaged from here on ({error}); copy the file again"
            ) from error


def _parse_json(line: bytes) -> Any:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})", "convert the file to UTF-8"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise Refused(f"invalid JSON: {where}", "write one JSON object per line") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"unreadable JSON: {error}", "write one flat JSON object per line") from error


def _parquet_rows(file: Path) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=1024)
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                yield f"{file}:row {number}", lambda batch=batch, i=i: _parquet_row(batch, i)  # type: ignore[misc]
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableError(f"{file}: not a readable Parquet file after row {number}: {error}; write it again") from error


def _parquet_row(batch: Any, i: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Refused("a text in it is not UTF-8", "convert the column to UTF-8") from error
    return row


def _hub_rows(name: str) -> Iterator[_Row]:
    import datasets

    hub_id, *rest = name.split(":")
    config, split = (rest[0], rest[1]) if len(rest) > 1 else (None, rest[0] if rest else "train")
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the Hub client raises many unrelated types
        raise UnusableError(
            f"{name}: neither a file ({', '.join(_EXTENSIONS)}) nor a data set that can be loaded "
            f"(name:split or name:config:split): {type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}:row {number + 1}", lambda row=row: row  # type: ignore[misc]
