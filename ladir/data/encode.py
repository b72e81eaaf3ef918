"""From records as text to records as token ids, with the length limits checked where the lengths are known."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ladir.config import DataSettings
from ladir.data.records import BadRecord, BadRecords, Record, RecordSet, list_bad_records
from ladir.tokens import encode_texts

logger = logging.getLogger(__name__)

_CHUNK = 1000  # records tokenized in one call


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids; no begin or end token is added."""

    question: list[int]
    blocks: list[list[int]]
    answer: list[int]
    record: Record


def encode_records(
    record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[list[EncodedRecord], list[BadRecord]]:
    """Tokenize records and check them against ``data.max_*``; returns (usable records in order, all bad ones).

    The bad ones include those of the reader.  Raises BadRecords where there are any and ``data.on_bad_record=error``,
    or where nothing usable is left; with ``skip`` they are counted and listed in the log.
    """
    usable, bad = check_records(record_set, tokenizer, settings)
    if bad and (settings.on_bad_record == "error" or not usable):
        raise BadRecords(bad, record_set.total)
    if bad:
        counted = f"{len(bad)} of {record_set.total} records are left out (data.on_bad_record=skip):"
        logger.warning("%s\n%s", counted, list_bad_records(bad))
    return usable, bad


def check_records(
    record_set: RecordSet, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[list[EncodedRecord], list[BadRecord]]:
    """As :func:`encode_records`, but raises and logs nothing whatever ``data.on_bad_record`` says."""
    usable, bad = [], list(record_set.bad)
    for encoded in _tokenize(record_set.records, tokenizer):
        problem = _problem(encoded, settings)
        if problem is None:
            usable.append(encoded)
        else:
            bad.append(BadRecord(encoded.record.source, *problem))
    return usable, bad


def _tokenize(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedRecord]:
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        texts = [text for record in chunk for text in (record.question, *record.blocks, record.answer)]
        ids = iter(encode_texts(tokenizer, texts))
        for record in chunk:
            question, *blocks, answer = itertools.islice(ids, len(record.blocks) + 2)
            yield EncodedRecord(question, blocks, answer, record)


def _problem(encoded: EncodedRecord, settings: DataSettings) -> tuple[str, str] | None:
    """(reason, remedy) of the first limit that the record breaks, or None."""
    longest = max(range(len(encoded.blocks)), key=lambda i: len(encoded.blocks[i]))
    checks = (
        ("question", len(encoded.question), "data.max_question_tokens", settings.max_question_tokens),
        (f"block {longest + 1}", len(encoded.blocks[longest]), "data.max_block_tokens", settings.max_block_tokens),
        ("answer", len(encoded.answer), "data.max_answer_tokens", settings.max_answer_tokens),
    )
    for what, length, name, most in checks:
        if length > most:
            return f"its {what} has {length} tokens, more than {name}={most}", f"shorten it or raise {name}"
        if length == 0:
            return f"its {what} has no tokens", "check the text and the tokenizer"
    if len(encoded.blocks) > settings.max_blocks:
        return (
            f"it has {len(encoded.blocks)} blocks, more than data.max_blocks={settings.max_blocks}",
            "raise data.max_blocks or data.sentences_per_block",
        )
    empty = next((i for i, block in enumerate(encoded.blocks) if not block), None)
    return None if empty is None else (f"its block {empty + 1} has no tokens", "check the text and the tokenizer")
