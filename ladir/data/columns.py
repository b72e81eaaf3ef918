"""Columns of lists in mapped Arrow files, as numpy sees them: what token store and latent store have in common."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from ladir.data.token_lists import MadeWhenRead, Measured

IDS = pa.list_(pa.int32())
#: the columns that hold a record's token ids, in every store
TOKENS = [("question", IDS), ("blocks", pa.list_(IDS)), ("answer", IDS)]


def mapped_batches(file: Path) -> list[pa.RecordBatch]:
    """The batches of an Arrow file, whose pages all processes of a machine share.

    Raises pyarrow.ArrowInvalid or OSError where it cannot be read.
    """
    from datasets.table import MemoryMappedTable  # slow to import

    return MemoryMappedTable.from_file(str(file)).table.to_batches()


def list_column(values: Sequence[Sequence[int] | np.ndarray[Any, Any]], dtype: type[np.generic]) -> pa.ListArray:
    """A column of lists of numbers, made without a Python object for every number."""
    flat = np.concatenate([np.zeros(0, dtype), *(np.asarray(value, dtype=dtype) for value in values)])
    return pa.ListArray.from_arrays(_offsets(values), pa.array(flat))


def nested_column(values: Sequence[Sequence[Any]], inner: pa.Array) -> pa.ListArray:
    """A column of lists whose items, one behind the other, are ``inner``."""
    return pa.ListArray.from_arrays(_offsets(values), inner)


def token_columns(
    questions: Sequence[Sequence[int]], blocks: Sequence[Sequence[Sequence[int]]], answers: Sequence[Sequence[int]]
) -> dict[str, pa.Array]:
    """The columns :data:`TOKENS` of some records."""
    every_block = [block for of_one in blocks for block in of_one]
    return {
        "question": list_column(questions, np.int32),
        "blocks": nested_column(blocks, list_column(every_block, np.int32)),
        "answer": list_column(answers, np.int32),
    }


def _offsets(values: Sequence[Sequence[Any] | np.ndarray[Any, Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, values)]), pa.int32())


class Lists:
    """A list column as numpy: ``self[i]`` is the i-th list, a view."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()
        self.values = column.values.to_numpy(zero_copy_only=True)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self) -> np.ndarray[Any, Any]:
        """Items of every list [n]."""
        return np.diff(self.offsets)

    def length(self, i: int) -> int:
        """Items of the i-th list."""
        return int(self.offsets[i + 1] - self.offsets[i])


class _Sized(Protocol):
    def __len__(self) -> int: ...


ChunkT = TypeVar("ChunkT", bound=_Sized)


class Chunks(Generic[ChunkT]):
    """Some chunks end to end: which of them an item lies in."""

    def __init__(self, chunks: Iterable[ChunkT]) -> None:
        self.all = list(chunks)
        self.starts = list(accumulate(map(len, self.all), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, place: int) -> tuple[ChunkT, int]:
        """The chunk of item ``place``, and its place there."""
        number = bisect_right(self.starts, place) - 1
        return self.all[number], place - self.starts[number]


class StoredLists(MadeWhenRead[list[int]], Measured):
    """Lists of token ids that lie in a mapped file."""

    def __init__(self, columns: Iterable[pa.ListArray]) -> None:
        self._chunks = Chunks(map(Lists, columns))

    def __len__(self) -> int:
        return len(self._chunks)

    def _at(self, place: int) -> list[int]:
        column, i = self._chunks.find(place)
        return column[i].tolist()

    def length(self, place: int) -> int:
        """Ids of the list at ``place``."""
        column, i = self._chunks.find(place)
        return column.length(i)

    def lengths(self) -> np.ndarray[Any, Any]:
        """Ids of every list [n]."""
        return np.concatenate([np.zeros(0, np.int64), *(column.lengths() for column in self._chunks.all)])


@dataclass(frozen=True)
class TokenRecord:
    """A record as token ids; no begin or end token is added."""

    question: list[int]
    blocks: list[list[int]]
    answer: list[int]

    def __len__(self) -> int:
        """Its tokens."""
        return len(self.question) + sum(map(len, self.blocks)) + len(self.answer)


class TokenChunk:
    """The columns :data:`TOKENS` of one Arrow batch as numpy views of the mapped file: a record is then a few slices."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.questions, self.answers = Lists(batch.column("question")), Lists(batch.column("answer"))
        self.blocks_of = batch.column("blocks").offsets.to_numpy()
        self.blocks = Lists(batch.column("blocks").values)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def most_blocks(self) -> int:
        """Blocks of the record that has most."""
        return int(np.diff(self.blocks_of).max(initial=0))

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question."""
        return int(self.questions.lengths().max(initial=0))

    def sizes(self, span: int) -> np.ndarray[Any, Any]:
        """As :meth:`RecordStore.sizes`, of its own records [n, 5]."""
        first, end = self.blocks_of[:-1], self.blocks_of[1:]
        last = first + (np.maximum(end - first, 1) - 1) // span * span
        begins, begins_last, ends = (self.blocks.offsets[at] for at in (first, last, end))
        texts = (self.questions.lengths(), self.answers.lengths())
        return np.stack([*texts, end - first, ends - begins, ends - begins_last], axis=1)

    def num_blocks(self, i: int) -> int:
        """Blocks of the i-th record."""
        return int(self.blocks_of[i + 1] - self.blocks_of[i])

    def block_tokens(self, i: int) -> int:
        """Tokens of the i-th record's blocks, all together."""
        first, end = self.blocks_of[i], self.blocks_of[i + 1]
        return int(self.blocks.offsets[end] - self.blocks.offsets[first])

    def question_digests(self) -> Iterator[bytes]:
        """:func:`digest_of_ids` of each record's question."""
        return (digest_of_ids(self.questions[i]) for i in range(len(self)))

    def tokens(self, i: int) -> TokenRecord:
        """The i-th record."""
        return TokenRecord(
            self.questions[i].tolist(),
            [self.blocks[b].tolist() for b in range(self.blocks_of[i], self.blocks_of[i + 1])],
            self.answers[i].tolist(),
        )


def digest_of_ids(ids: np.ndarray[Any, Any]) -> bytes:
    """16 bytes, none of them last and zero, that stand for a text's token ids [n] (int32)."""
    return hashlib.blake2b(ids.tobytes(), digest_size=15).digest() + b"."


class RecordStore(Measured):
    """Records in mapped files, whose sizes are known without any being read: what token store and latent store are."""

    @abstractmethod
    def __getitem__(self, index: int) -> TokenRecord:
        """A record."""

    @property
    @abstractmethod
    def chunks(self) -> Sequence[TokenChunk]:
        """Its batches, in order."""

    def sizes(self, span: int) -> np.ndarray[Any, Any]:
        """Tokens of question and of answer, number of blocks, tokens of these, and of those of the last span, of every record
        [N, 5]."""
        return np.concatenate([np.zeros((0, 5), np.int64), *(chunk.sizes(span) for chunk in self.chunks)])

    def question_digests(self) -> np.ndarray[Any, Any]:
        """:func:`digest_of_ids` of every record's question [n]."""
        return np.array([digest for chunk in self.chunks for digest in chunk.question_digests()], dtype="S16")

    @property
    def most_blocks(self) -> int:
        """Blocks of the record that has most."""
        return max((chunk.most_blocks for chunk in self.chunks), default=0)

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question."""
        return max((chunk.longest_question for chunk in self.chunks), default=0)
