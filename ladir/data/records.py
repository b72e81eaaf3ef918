"""From rows to records: question, blocks, answer.  Every row is either read or reported."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ladir.config import DataSettings
from ladir.data.answers import bare, goes_on, other_answer, without_repeats
from ladir.data.blocks import calculations, group_sentences, split_answer, split_sentences, strip_calculator
from ladir.data.formats import FormatError, Published, chain_elsewhere, fields_hint, read_published
from ladir.data.puzzles import published_puzzle
from ladir.data.rows import AmbiguousAnswer, Refused, Row, file_rows
from ladir.errors import UnusableError

logger = logging.getLogger(__name__)

_LISTED = 20  # bad records named one by one in an error message
_ALIKE = 3  # of those that share a fault with more than are listed


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
            f"{len(records)}{of_total} records cannot be used:\n{list_bad_records(records, total)}\n"
            "Correct them, or set data.on_bad_record=skip to leave them out (counted and listed)."
        )


def list_bad_records(bad: list[BadRecord], total: int | None = None) -> str:
    """The first bad records, one a line, and how many more there are.

    A fault that all ``total`` records share, or more than are listed, is said once.
    """
    alike: dict[str, list[BadRecord]] = {}
    for record in bad:
        alike.setdefault(_fault(record), []).append(record)
    if len(alike) == 1 and len(bad) == total and len(bad) > 1:
        return f"  {bad[0]} (all {total} records alike)"
    often = {fault: found for fault, found in alike.items() if len(found) > _LISTED}
    lines = []
    for found in often.values():
        lines += [f"  {record}" for record in found[:_ALIKE]]
        lines.append(f"  ... and {len(found) - _ALIKE} more like these, to {found[-1].source}")
    others = [record for record in bad if _fault(record) not in often]
    lines += [f"  {record}" for record in others[:_LISTED]]
    if len(others) > _LISTED:
        lines.append(f"  ... and {len(others) - _LISTED} more")
    return "\n".join(lines)


def _fault(record: BadRecord) -> str:
    """The kind of a record's fault: its words, whatever the numbers and quoted texts in them."""
    return re.sub(r"0x[0-9a-f]+|\d+|'[^']*' is no answer", "#", f"{record.reason}; {record.remedy}")


@dataclass
class RecordSet:
    """What a file holds: ``len(records) + len(bad) == total``."""

    records: list[Record]
    bad: list[BadRecord]
    total: int


def read_records(path: str, settings: DataSettings) -> RecordSet:
    """All records of a file (``.jsonl``, ``.json``, either with ``.gz``, ``.parquet``) or a Hub set
    (``name[@commit][:config][:split]``).

    A row without ``data.input_field`` is read by its own field names where it is one of a known public set
    (:mod:`ladir.data.formats`).  Bad records are collected, never dropped and never raised.  Raises FileNotFoundError for
    a missing file, ValueError for one that cannot be read as a whole (unknown kind, damaged compression, no records).
    """
    result = records_of(file_rows(path, settings.stream_hub), settings)
    refuse_empty(path, result.total)
    return result


def records_of(rows: Iterable[Row], settings: DataSettings) -> RecordSet:
    """The records of some rows; none where there are no rows."""
    result = RecordSet([], [], 0)
    for source, load in rows:
        result.total += 1
        try:
            result.records.append(record_of(load(), source, settings))
        except Refused as refused:
            result.bad.append(BadRecord(source, refused.reason, refused.remedy))
    return result


@dataclass
class SentenceSet:
    """What a file of sentences holds: (source, text) of each that can be read, and the others."""

    sentences: list[tuple[str, str]]
    bad: list[BadRecord]


def read_sentences(path: str) -> SentenceSet:
    """The texts of a file of ``{"text": sentence}``."""
    result = sentences_of(file_rows(path))
    refuse_empty(path, len(result.sentences) + len(result.bad))
    return result


def sentences_of(rows: Iterable[Row]) -> SentenceSet:
    """The sentences of some rows."""
    result = SentenceSet([], [])
    for source, load in rows:
        try:
            result.sentences.append((source, text_of(mapping_of(load()), "text", "the sentence")))
        except Refused as refused:
            result.bad.append(BadRecord(source, refused.reason, refused.remedy))
    return result


def refuse_empty(path: str, total: int) -> None:
    """Raise UnusableError for a file without any record."""
    if total == 0:
        raise UnusableError(f"{path}: no records in it; write one JSON object per line")


def record_of(loaded: Any, source: str, settings: DataSettings) -> Record:
    """A loaded row as a record.  Raises Refused where it cannot be trained on."""
    row = mapping_of(loaded)
    published = _published(row, settings)
    question, reasoning, answer = _own_texts(row, settings) if published is None else _published_texts(published, settings)
    if not answer:
        raise Refused("its final answer is empty", "write the answer after the prefix")
    read = (settings.input_field, settings.output_field) if published is None else ()
    return Record(
        question=question,
        blocks=tuple(group_sentences(_sentences(reasoning, settings), settings.sentences_per_block)),
        answer=answer,
        source=source,
        reference={k: v for k, v in row.items() if k not in read} | ({} if published is None else published.extra),
    )


def _sentences(reasoning: str, settings: DataSettings) -> list[str]:
    """The sentences of a chain; one that is nothing but calculator annotations stays as what they say."""
    sentences = split_sentences(reasoning)
    if not sentences:
        raise Refused("it has no reasoning, only an answer", f"put the steps first in {settings.output_field!r}")
    if not settings.strip_calculator:
        return sentences
    alone = [calculations(sentence) for sentence in sentences]
    if all(step is not None for step in alone):
        raise Refused(
            "it has no reasoning beside calculator annotations (<<...>>), which are removed",
            "set data.strip_calculator=false to keep them as its steps",
        )
    stripped = (step or strip_calculator(sentence).strip() for step, sentence in zip(alone, sentences, strict=True))
    return [sentence for sentence in stripped if sentence]


def _own_texts(row: Mapping[str, Any], settings: DataSettings) -> tuple[str, str, str]:
    """Question, reasoning and answer by the names in the settings."""
    question = text_of(row, settings.input_field, "the question (data.input_field)")
    output = _chain(row, settings.output_field, "the reasoning (data.output_field)")
    # A data set may call its chain "answer" (GSM8K does): then there is no explicit answer beside it.
    has_explicit = settings.answer_field not in (settings.input_field, settings.output_field)
    explicit = None
    if has_explicit and row.get(settings.answer_field) is not None:
        explicit = answer_of(row, settings.answer_field, "the answer (data.answer_field)")
    prefixes = " or ".join(repr(prefix) for prefix in settings.answer_prefixes)
    remedy = f"give it a field {settings.answer_field!r}, end its text with {prefixes}, or set data.answer_prefixes"
    hint = _answer_hint(row, settings)
    return question, *_taken_apart(output, explicit, settings.answer_prefixes, f"{remedy}{hint}")


def _answer_hint(row: Mapping[str, Any], settings: DataSettings) -> str:
    own = {settings.input_field, settings.output_field}
    others = [repr(name)[:40] for name in row if name not in own]
    return f"; its other fields, one of which data.answer_field may name: {', '.join(others[:8])}" if others else ""


def _taken_apart(output: str, explicit: str | None, prefixes: list[str], remedy: str) -> tuple[str, str]:
    """(reasoning, answer) of a chain, whose answer is ``explicit`` or stands behind its last mark.

    Refused where it has none, or more than one.
    """
    reasoning, answer = split_answer(output, prefixes)
    if explicit is not None:
        if answer is not None and not _closes(answer, explicit):
            return output.strip(), explicit
        answer = answer or explicit
    elif answer is None:
        raise Refused("no final answer in it", remedy)
    elif not bare(answer):
        raise Refused("its final answer is empty", "write the answer after the prefix")
    elif (more := goes_on(output, answer, prefixes)) is not None:
        raise AmbiguousAnswer(
            f"behind its answer it goes on: {_shortened(more)}",
            "end its text with the answer, or give the answer a field of its own",
        )
    reasoning = without_repeats(reasoning, answer, prefixes)
    if (other := other_answer(reasoning, answer, prefixes)) is not None:
        raise AmbiguousAnswer(
            f"two marked answers, {_shortened(other)} and {_shortened(bare(answer))}",
            "keep one record per question and one answer per record, or take its mark out of data.answer_prefixes",
        )
    return reasoning, answer if explicit is None else explicit


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _closes(text: str, answer: str) -> bool:
    """Whether what follows the last mark of an answer is no more than one: a single sentence, or the record's own ``answer``.

    Else the mark is part of the reasoning (a heading, a formulation), and to cut there would lose steps.
    """
    return len(split_sentences(text)) <= 1 or _bare(text) == _bare(answer)


def _bare(text: str) -> str:
    return " ".join(text.split()).rstrip(".!")


def _published(row: Mapping[str, Any], settings: DataSettings) -> Published | None:
    """The row as one of a public set; None where it has the fields of the settings."""
    if has_own_fields(row, settings):
        return None
    try:
        published = read_published(row)
    except FormatError as error:
        raise Refused(str(error), error.remedy) from error
    if published is None or (published.mark is not None and chain_elsewhere(row)):
        raise _no_field(row, settings.input_field, "the question (data.input_field)")
    return published


def has_own_fields(row: Mapping[str, Any], settings: DataSettings) -> bool:
    """Whether a row's question stands where the settings say; where ``input`` only goes with an ``instruction``, or holds the
    numbers of a published puzzle, it does not."""
    if settings.input_field not in row:
        return False
    by_default = (settings.input_field, settings.output_field) == ("input", "output")
    return not (by_default and ("instruction" in row or published_puzzle(row) is not None))


def _published_texts(row: Published, settings: DataSettings) -> tuple[str, str, str]:
    """The same of a public set's row.

    The whole reasoning is kept, whatever ``data.answer_prefixes`` says, unless the set itself marks answers in it.
    """
    texts = {"question": row.question, "reasoning": row.reasoning, "answer": row.answer}
    question = text_of(texts, "question", "the question")
    answer = None if row.answer is None else answer_of(texts, "answer", "the answer")
    if row.marked:
        return question, *_marked_texts(row, texts, answer, settings)
    if row.reasoning is None:
        raise Refused("it has no reasoning to learn from", "leave the record out, or take a set with solutions")
    reasoning = _chain(texts, "reasoning", "the reasoning")
    if answer is None:
        raise Refused("no final answer in it", "put it into \\boxed{} (MATH), or give it a field 'answer'")
    return question, reasoning, answer


def _marked_texts(row: Published, texts: Mapping[str, Any], answer: str | None, settings: DataSettings) -> tuple[str, str]:
    """Reasoning and answer of a set that marks answers in its reasoning."""
    prefixes = [row.mark] if row.mark else settings.answer_prefixes
    marks = " or ".join(repr(f"{prefix} ANSWER") for prefix in prefixes)
    names = "or name its fields: data.input_field, data.output_field, data.answer_field"
    try:
        reasoning, answer = _taken_apart(
            _chain(texts, "reasoning", "the reasoning"), answer, prefixes, f"end its text with {marks}"
        )
        return text_of({"reasoning": reasoning}, "reasoning", "the reasoning"), answer
    except Refused as refused:
        raise type(refused)(refused.reason, f"{refused.remedy}, {names}") from refused


def mapping_of(loaded: Any) -> Mapping[str, Any]:
    """What was loaded, where it is an object; else Refused."""
    if not isinstance(loaded, Mapping):
        raise Refused(f"a JSON {_json_type(loaded)}, not an object", 'write {"input": ..., "output": ...} on the line')
    return loaded


def _chain(row: Mapping[str, Any], name: str, meaning: str) -> str:
    """A text, or a list of steps as the lines of one."""
    steps = row.get(name)
    if not isinstance(steps, list):
        return text_of(row, name, meaning)
    if not steps or not all(isinstance(step, str) for step in steps):
        inside = "nothing" if not steps else _json_type(next(step for step in steps if not isinstance(step, str)))
        raise Refused(f"field {name!r} is of type array and holds {inside}", "write its steps as texts, or as one text")
    return text_of({name: "\n".join(steps)}, name, meaning)


def answer_of(row: Mapping[str, Any], name: str, meaning: str) -> str:
    """An answer's text; a number is one as it is written without an exponent."""
    return number_text(row[name]) or text_of(row, name, meaning).strip()


def number_text(value: Any) -> str:
    """A number as one writes it, without an exponent; empty for what is none (NaN, true, a text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value in (math.inf, -math.inf):
        return ""
    return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")


def _no_field(row: Mapping[str, Any], name: str, meaning: str) -> Refused:
    present = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
    return Refused(f"no field {name!r} for {meaning}; its fields: {present}", fields_hint(row))


#: what to do about a field that is no text, by its type
_NO_TEXT = {
    "null": "write the text, or leave the record out",
    "number": "write it in quotes",
    "boolean": "write it in quotes, as the word that is to be answered",
    "array": "write one text, or name the field that holds it",
    "object": "write one text, or name the field that holds it",
}


def text_of(row: Mapping[str, Any], name: str, meaning: str) -> str:
    """The text of a field, or Refused: missing, of another type, empty, or not encodable."""
    if name not in row:
        raise _no_field(row, name, meaning)
    value = row[name]
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"field {name!r} is {value}, a missing value", f"write {meaning} into it, or leave the field out")
    if not isinstance(value, str):
        kind = _json_type(value)
        raise Refused(f"field {name!r} is of type {kind}, not a string", _NO_TEXT.get(kind, "write it as text"))
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
