"""The token store: records as token ids in an Arrow file that is memory-mapped, so that they are read and tokenized once.

A store's folder holds ``tokens.arrow``, ``index.json`` (how many there are) and ``bad.jsonl`` (what was left out, and why).  It
is named by what it depends on (:func:`store_key`): files' contents, settings, tokenizer.  :mod:`ladir.data.tokenizing` writes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ladir.config import DataSettings
from ladir.data.columns import Chunks, RecordStore, StoredLists, TokenChunk, TokenRecord, mapped_batches
from ladir.data.records import BadRecord, Record
from ladir.data.token_lists import MadeWhenRead, TokenPairs
from ladir.errors import UnusableError
from ladir.files import replace_folder, sync_file

_ARROW, _INDEX, _BAD = "tokens.arrow", "index.json", "bad.jsonl"
_VERSION = 1
#: settings of the data on which no record depends
_ASIDE = ("train", "validation", "test", "sentences", "on_bad_record", "store", "processes", "chat_template", "stream_hub")


def store_key(kind: str, sources: Sequence[str], settings: DataSettings, *others: str) -> str:
    """What a store depends on, in 16 hex digits.

    ``sources``: digests of the files, in order (of Hub sets: their names with their commits); ``others``: whatever else, such as
    the tokenizer's fingerprint (:func:`ladir.tokens.tokenization_fingerprint`).
    """
    read = {name: value for name, value in asdict(settings).items() if name not in _ASIDE}
    facts = json.dumps([_VERSION, kind, list(sources), read, *others], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Bad:
    """A record that is left out: number of its file, place there (``:12``), reason, remedy; ``unread``: it has no text."""

    file: int
    place: str
    reason: str
    remedy: str
    unread: bool

    @staticmethod
    def of(file: int, record: BadRecord, unread: bool) -> Bad:
        """What is kept of ``record``."""
        return Bad(file, place_of(record.source), record.reason, record.remedy, unread)


def place_of(source: str) -> str:
    """What stands behind the file's name in a record's source."""
    return source[source.rindex(":") :]


@dataclass(frozen=True)
class _Index:
    """What ``index.json`` holds; ``arrow_bytes`` tells a torn store from a whole one."""

    kind: str
    total: int
    bad: int
    arrow_bytes: int


class StoreWriter:
    """A store being written: batches one after another."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.bad: list[Bad] = []
        self.rows = 0
        self._sink = pa.OSFile(str(folder / _ARROW), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)

    def add(self, batch: pa.RecordBatch, bad: Sequence[Bad]) -> None:
        """Write usable ones and note the others."""
        self.bad += bad
        self.rows += batch.num_rows
        if batch.num_rows:
            self._writer.write_batch(batch)

    def close(self) -> None:
        """Finish the Arrow file."""
        self._writer.close()
        self._sink.close()


@contextmanager
def new_store(folder: Path, kind: str, schema: pa.Schema) -> Iterator[StoreWriter]:
    """Inside, a store is written; ``folder`` appears whole at the end, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        writer = StoreWriter(aside, schema)
        try:
            yield writer
        finally:
            writer.close()
        index = _Index(kind, writer.rows + len(writer.bad), len(writer.bad), (aside / _ARROW).stat().st_size)
        (aside / _INDEX).write_text(json.dumps(asdict(index), indent=1), encoding="utf-8")
        (aside / _BAD).write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in writer.bad), encoding="utf-8")
        for name in (_ARROW, _INDEX, _BAD):
            sync_file(aside / name)
        aside.chmod(0o755)  # a temporary folder is closed to others
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Store:
    """An opened store, whatever is in it; ``files``: what it was made of, as they are called now."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        """Raises FileNotFoundError where there is none, UnusableError where it is torn."""
        self.folder, self._files = folder, list(files)
        if not (folder / _INDEX).is_file() or not (folder / _ARROW).is_file():
            raise FileNotFoundError(f"{folder}: no token store there")
        try:
            index = _Index(**json.loads((folder / _INDEX).read_text(encoding="utf-8")))
            self.batches = mapped_batches(folder / _ARROW)
        except (pa.ArrowInvalid, OSError, TypeError, ValueError) as error:
            raise UnusableError(f"{folder}: damaged ({error}); delete it, and it is made again") from error
        if (size := (folder / _ARROW).stat().st_size) != index.arrow_bytes:
            raise UnusableError(f"{folder}: damaged ({size} of {index.arrow_bytes} bytes); delete it, and it is made again")
        self.total, self.num_bad = index.total, index.bad

    def source(self, file: int, place: str) -> str:
        """Where a record stands."""
        return f"{Path(self._files[file])}{place}"

    def bad(self) -> list[BadRecord]:
        """What is left out, in the order of one who reads the files himself: what cannot be read, then what is too long."""
        lines = (self.folder / _BAD).read_text(encoding="utf-8").splitlines()
        found = [Bad(**json.loads(line)) for line in lines]
        ordered = [*(bad for bad in found if bad.unread), *(bad for bad in found if not bad.unread)]
        return [BadRecord(self.source(bad.file, bad.place), bad.reason, bad.remedy) for bad in ordered]


class TokenStore(MadeWhenRead[TokenRecord], RecordStore):
    """The usable records of some files as token ids; :meth:`text` gives one as text."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._chunks = Chunks(map(_RecordChunk, store.batches))
        #: all blocks of all records, in order
        self.blocks = StoredLists(batch.column("blocks").values for batch in store.batches)

    def __len__(self) -> int:
        return len(self._chunks)

    def _at(self, place: int) -> TokenRecord:
        chunk, i = self._chunks.find(place)
        return chunk.tokens(i)

    @property
    def chunks(self) -> Sequence[TokenChunk]:
        """Its batches, in order."""
        return self._chunks.all

    def length(self, place: int) -> int:
        """Tokens of a record: question, blocks, answer."""
        chunk, i = self._chunks.find(place)
        return chunk.questions.length(i) + chunk.block_tokens(i) + chunk.answers.length(i)

    @property
    def texts(self) -> Sequence[Record]:
        """All records as text, each read when it is asked for."""
        return _Texts(self)

    def text(self, place: int) -> Record:
        """Record ``place`` as text, without the other fields that it had in its file."""
        chunk, i = self._chunks.find(place)
        question, *blocks, answer = chunk.texts(i)
        return Record(question, tuple(blocks), answer, self.store.source(*chunk.origin(i)))


@dataclass(frozen=True)
class _Texts(MadeWhenRead[Record]):
    store: TokenStore

    def __len__(self) -> int:
        return len(self.store)

    def _at(self, place: int) -> Record:
        return self.store.text(place)


class _RecordChunk(TokenChunk):
    """One batch with its texts."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        super().__init__(batch)
        self._batch = batch

    def texts(self, i: int) -> list[str]:
        """Question, blocks and answer of the i-th record."""
        found: list[str] = self._batch.column("texts")[i].as_py()
        return found

    def origin(self, i: int) -> tuple[int, str]:
        """Its file's number, and its place there."""
        return self._batch.column("file")[i].as_py(), self._batch.column("place")[i].as_py()


def stored_sentences(store: Store) -> StoredLists:
    """The token ids of a store of sentences."""
    return StoredLists(batch.column("ids") for batch in store.batches)


def stored_chains(store: Store) -> TokenPairs:
    """(prompt ids, completion ids) of a store of chains as text."""
    prompts, completions = (StoredLists(batch.column(name) for batch in store.batches) for name in ("prompt", "completion"))
    return TokenPairs(prompts, completions)


def open_or_make(folder: Path, files: Sequence[str], make: Callable[[Path], Any]) -> Store:
    """The store in ``folder``; where there is none, or a torn one, ``make`` writes it first."""
    try:
        return Store(folder, files)
    except (FileNotFoundError, UnusableError):
        make(folder)
        return Store(folder, files)
