"""Reading, checking, splitting and tokenizing records into a store, by many processes.

The rows of the files are handed out in chunks; what becomes of them is written in their order, whatever the number of processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ladir.config import DataSettings
from ladir.data.columns import IDS, TOKENS, list_column, nested_column, token_columns
from ladir.data.encode import check_records, check_sentences
from ladir.data.forks import forked
from ladir.data.prompts import chain_pairs
from ladir.data.records import BadRecord, records_of, refuse_empty, sentences_of
from ladir.data.rows import Row, file_rows
from ladir.data.token_store import Bad, StoreWriter, TokenStore, new_store, place_of

T = TypeVar("T")
R = TypeVar("R")

#: rows that a process takes at a time, and an Arrow batch holds
_ROWS = 2000

_TEXTS = pa.list_(pa.string())
RECORDS = pa.schema([*TOKENS, ("texts", _TEXTS), ("file", pa.int32()), ("place", pa.string())])
SENTENCES = pa.schema([("ids", IDS)])
CHAINS = pa.schema([("prompt", IDS), ("completion", IDS)])


@dataclass(frozen=True)
class Rows:
    """Some rows of one file."""

    file: int
    rows: list[Row]


@dataclass(frozen=True)
class Made:
    """What became of some rows."""

    batch: pa.RecordBatch
    bad: list[Bad]


def write_records(
    folder: Path,
    files: Sequence[str],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
    give_way: Callable[[], None] | None = None,
) -> None:
    """The records of ``files`` as a store of :class:`~ladir.data.token_store.TokenStore`.

    ``give_way`` is called every few thousand rows; where it raises, no store is left.  Raises FileNotFoundError or UnusableError
    for a file that cannot be read as a whole; bad records are listed in the store.
    """

    def made(part: Rows) -> Made:
        return _records(part, settings, tokenizer)

    write_parts(folder, "records", RECORDS, made, files, settings.stream_hub, processes, give_way)


def write_sentences(
    folder: Path,
    files: Sequence[str],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
    give_way: Callable[[], None] | None = None,
) -> None:
    """The same of files of ``{"text": sentence}``."""

    def made(part: Rows) -> Made:
        found = sentences_of(part.rows)
        usable, bad = check_sentences(found, tokenizer, settings)
        batch = pa.RecordBatch.from_arrays([list_column(usable, np.int32)], schema=SENTENCES)
        return Made(batch, _listed(part.file, bad, len(found.bad)))

    write_parts(folder, "sentences", SENTENCES, made, files, settings.stream_hub, processes, give_way)


def write_chains(
    folder: Path,
    records: TokenStore,
    answer_prefix: str,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
    give_way: Callable[[], None] | None = None,
) -> None:
    """Questions and chains as the plain text that an autoregressive LM reads (:mod:`ladir.data.prompts`), of stored records."""

    def made(places: range) -> Made:
        pairs = list(chain_pairs(tokenizer, [records.text(i) for i in places], answer_prefix))
        columns = [list_column([pair[side] for pair in pairs], np.int32) for side in (0, 1)]
        return Made(pa.RecordBatch.from_arrays(columns, schema=CHAINS), [])

    size = len(records)
    places = (range(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS))
    _write(folder, "chains", CHAINS, in_order(made, places, processes), give_way)


def write_parts(
    folder: Path,
    kind: str,
    schema: pa.Schema,
    make: Callable[[Rows], Made],
    files: Sequence[str],
    stream: bool,
    processes: int,
    give_way: Callable[[], None] | None,
) -> None:
    """A store of what ``make`` makes of the rows of ``files``, in their order."""
    _write(folder, kind, schema, in_order(make, _parts(files, stream), processes), give_way)


def _write(folder: Path, kind: str, schema: pa.Schema, parts: Iterator[Made], give_way: Callable[[], None] | None) -> None:
    with new_store(folder, kind, schema) as store:
        _fill(store, parts, give_way)


def _fill(store: StoreWriter, parts: Iterator[Made], give_way: Callable[[], None] | None) -> None:
    for part in parts:
        if give_way is not None:
            give_way()
        store.add(part.batch, part.bad)


def _parts(files: Sequence[str], stream: bool) -> Iterator[Rows]:
    """The rows of all files, some at a time."""
    for number, file in enumerate(files):
        rows, total = file_rows(file, stream), 0
        while some := list(itertools.islice(rows, _ROWS)):
            total += len(some)
            yield Rows(number, some)
        refuse_empty(file, total)


def _records(part: Rows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Made:
    read = records_of(part.rows, settings)
    usable, bad = check_records(read, tokenizer, settings)
    records = list(usable)
    texts = [(one.record.question, *one.record.blocks, one.record.answer) for one in records]
    columns = {
        **token_columns([r.question for r in records], [r.blocks for r in records], [r.answer for r in records]),
        "texts": nested_column(texts, pa.array(list(itertools.chain(*texts)), pa.string())),
        "file": pa.array([part.file] * len(records), pa.int32()),
        "place": pa.array([place_of(one.record.source) for one in records], pa.string()),
    }
    batch = pa.RecordBatch.from_arrays([columns[name] for name in RECORDS.names], schema=RECORDS)
    return Made(batch, _listed(part.file, bad, len(read.bad)))


def _listed(file: int, bad: Sequence[BadRecord], unread: int) -> list[Bad]:
    return [Bad.of(file, record, place < unread) for place, record in enumerate(bad)]


@dataclass(frozen=True)
class _Work(Dataset[Any]):
    """What a process does with a chunk."""

    do: Callable[[Any], Any]

    def __getitem__(self, chunk: Any) -> Any:
        return self.do(chunk)


def in_order(work: Callable[[T], R], chunks: Iterable[T], processes: int) -> Iterator[R]:
    """``map(work, chunks)``, by so many forks of this process where there is more than one chunk.

    ``work`` is inherited; chunks and results are handed over.
    """
    left = iter(chunks)
    first = list(itertools.islice(left, 2))
    everything = itertools.chain(first, left)
    if processes < 2 or len(first) < 2:
        yield from map(work, everything)
        return
    own = torch.Generator()  # PyTorch's own is the one that models are made with
    yield from forked(_Work(work), everything, processes, _alone, own)


def _alone(worker: int) -> None:
    """Every process has a core of its own, and threads of the tokenizer's would not outlive the fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
