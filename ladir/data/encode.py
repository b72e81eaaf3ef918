"""From records as text to records as token ids, with the length limits checked where the lengths are known."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ladir.config import DataSettings
from ladir.data.records import BadRecord, BadRecords, Record, RecordSet, SentenceSet, list_bad_records
from ladir.data.token_lists import MadeWhenRead, TokenLists
from ladir.tokens import encode_stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids; no begin or end token is added."""

    question: list[int]
    blocks: list[list[int]]
    answer: list[int]
    record: Record


class EncodedRecords(MadeWhenRead[EncodedRecord]):
    """Records with their token ids, which become Python lists only when a record is read."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._texts, self._first = TokenLists(), array("q")

    def append(self, encoded: EncodedRecord) -> None:
        """Add a record at the end."""
        self._first.append(len(self._texts))
        for ids in (encoded.question, *encoded.blocks, encoded.answer):
            self._texts.append(ids)
        self._records.append(encoded.record)

    def __len__(self) -> int:
        return len(self._records)

    def _at(self, place: int) -> EncodedRecord:
        record, first = self._records[place], self._first[place]
        question, *blocks, answer = self._texts[first : first + len(record.blocks) + 2]
        return EncodedRecord(question, blocks, answer, record)


def encode_records(
    record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[EncodedRecords, list[BadRecord]]:
    """Tokenize records and check them against ``data.max_*``; returns (usable records in order, all bad ones).

    The bad ones include those of the reader.  Raises BadRecords where there are any and ``data.on_bad_record=error``,
    or where nothing usable is left; with ``skip`` they are counted and listed in the log.
    """
    usable, bad = check_records(record_set, tokenizer, settings)
    refuse_or_list(bad, record_set.total, settings)
    return usable, bad


def check_sentences(
    sentence_set: SentenceSet, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[TokenLists, list[BadRecord]]:
    """Token ids of the sentences that would do as a record's block, and the others, those of the reader first."""
    usable, bad = TokenLists(), list(sentence_set.bad)
    encoded = encode_stream(tokenizer, (text for _, text in sentence_set.sentences))
    for (source, _), ids in zip(sentence_set.sentences, encoded, strict=True):
        if ids and len(ids) <= settings.max_block_tokens:
            usable.append(ids)
        else:
            reason = f"it has {len(ids)} tokens, of 1 to data.max_block_tokens={settings.max_block_tokens}"
            bad.append(BadRecord(source, reason, "correct or shorten it, or raise data.max_block_tokens"))
    return usable, bad


def refuse_or_list(bad: list[BadRecord], total: int, settings: DataSettings) -> None:
    """Raise BadRecords, or list in the log what is left out."""
    if bad and (settings.on_bad_record == "error" or len(bad) == total):
        raise BadRecords(bad, total)
    if bad:
        counted = f"{len(bad)} of {total} records are left out (data.on_bad_record=skip):"
        logger.warning("%s\n%s", counted, list_bad_records(bad, total))


def check_records(
    record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[EncodedRecords, list[BadRecord]]:
    """As :func:`encode_records`, but raises and logs nothing whatever ``data.on_bad_record`` says."""
    usable, bad = EncodedRecords(), list(record_set.bad)
    for encoded in _tokenize(record_set.records, tokenizer):
        problem = _problem(encoded, settings)
        if problem is None:
            usable.append(encoded)
        else:
            bad.append(BadRecord(encoded.record.source, *problem))
    return usable, bad


def check_blocks(record_set: RecordSet, settings: DataSettings) -> tuple[list[Record], list[BadRecord]]:
    """The same as far as it needs no tokenizer: usable records in order, and all that are bad whatever the tokenizer is."""
    problems = [(record, _too_many_blocks(len(record.blocks), settings)) for record in record_set.records]
    usable = [record for record, problem in problems if problem is None]
    return usable, [*record_set.bad, *(BadRecord(record.source, *problem) for record, problem in problems if problem)]


def _too_many_blocks(count: int, settings: DataSettings) -> tuple[str, str] | None:
    if count <= settings.max_blocks:
        return None
    return (
        f"it has {count} blocks, more than data.max_blocks={settings.max_blocks}",
        "raise data.max_blocks or data.sentences_per_block",
    )


def _tokenize(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedRecord]:
    ids = encode_stream(tokenizer, (text for record in records for text in (record.question, *record.blocks, record.answer)))
    for record in records:
        question, *blocks, answer = itertools.islice(ids, len(record.blocks) + 2)
        yield EncodedRecord(question, blocks, answer, record)


def length_problem(what: str, length: int, name: str, most: int) -> tuple[str, str] | None:
    """(reason, remedy) where ``what`` of a record has no tokens, or more than the setting ``name`` allows."""
    if length > most:
        return f"its {what} has {length} tokens, more than {name}={most}", f"shorten it or raise {name}"
    return (f"its {what} has no tokens", "check the text and the tokenizer") if length == 0 else None


def _problem(encoded: EncodedRecord, settings: DataSettings) -> tuple[str, str] | None:
    """(reason, remedy) of the first limit that the record breaks, or None."""
    longest = max(range(len(encoded.blocks)), key=lambda i: len(encoded.blocks[i]))
    checks = (
        ("question", len(encoded.question), "data.max_question_tokens", settings.max_question_tokens),
        (f"block {longest + 1}", len(encoded.blocks[longest]), "data.max_block_tokens", settings.max_block_tokens),
        ("answer", len(encoded.answer), "data.max_answer_tokens", settings.max_answer_tokens),
    )
    for check in checks:
        if problem := length_problem(*check):
            return problem
    if problem := _too_many_blocks(len(encoded.blocks), settings):
        return problem
    empty = next((i for i, block in enumerate(encoded.blocks) if not block), None)
    return None if empty is None else (f"its block {empty + 1} has no tokens", "check the text and the tokenizer")
