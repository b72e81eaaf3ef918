"""The latent store: the training set as the encoder sees it, in Arrow files that are memory-mapped.

Per record it holds the token ids and the mean and log-variance of every latent; per store the statistics that standardise
the latents and the fingerprint of the VAE that made them.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ladir.errors import UnusableError
from ladir.files import replace_folder, sync_file

_ARROW = "latents.arrow"
_STATS = "stats.json"
_ROWS_PER_BATCH = 1000
_SMALLEST_STD = 1e-6  # below it a dimension is constant and is left as it is

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("question", _IDS),
        ("blocks", pa.list_(_IDS)),
        ("answer", _IDS),
        ("mu", pa.list_(pa.float32())),
        ("logvar", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class LatentRecord:
    """One record: token ids, and mean and log-variance [B, L, d] (float32) of its B blocks' latents."""

    question: list[int]
    blocks: list[list[int]]
    answer: list[int]
    mu: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class _Stats:
    """What ``stats.json`` holds; ``arrow_bytes`` tells a torn store from a whole one."""

    fingerprint: str
    latent_dim: int
    latents_per_block: int
    num_records: int
    num_latents: int
    arrow_bytes: int
    mean: list[float]
    std: list[float]


class _Moments:
    """Running mean and variance per dimension in float64 (pairwise update of Chan, Golub and LeVeque)."""

    def __init__(self, latent_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(latent_dim)
        self.squares = np.zeros(latent_dim)  # sum of squared differences from the mean

    def add(self, latents: np.ndarray[Any, Any]) -> None:
        """Take in latents [n, d]."""
        values = latents.astype(np.float64)
        count = self.count + len(values)
        mean = values.mean(axis=0)
        difference = mean - self.mean
        self.squares += ((values - mean) ** 2).sum(axis=0) + difference**2 * (self.count * len(values) / count)
        self.mean += difference * (len(values) / count)
        self.count = count

    def std(self) -> np.ndarray[Any, Any]:
        """Standard deviation per dimension; 1 where a dimension is constant."""
        std = np.sqrt(self.squares / max(self.count, 1))
        return np.where(std < _SMALLEST_STD, 1.0, std)


class LatentStore:
    """A folder of latents, opened with :meth:`open`, made by :meth:`write` or :meth:`merge`.

    ``mean`` and ``std`` [d] (float32) standardise the latents; they are taken over all ``mu``.
    """

    def __init__(self, folder: Path, stats: _Stats, table: pa.Table) -> None:
        self.folder = folder
        self.fingerprint = stats.fingerprint
        self.latent_dim = stats.latent_dim
        self.latents_per_block = stats.latents_per_block
        self.num_latents = stats.num_latents
        self.mean = torch.tensor(stats.mean, dtype=torch.float32)
        self.std = torch.tensor(stats.std, dtype=torch.float32)
        self._chunks = [_Chunk(batch) for batch in table.to_batches()]
        self._starts = list(accumulate((len(chunk) for chunk in self._chunks), initial=0))

    @staticmethod
    def write(
        folder: str | os.PathLike[str],
        rows: Iterable[Mapping[str, Any]],
        fingerprint: str,
        latent_dim: int,
        latents_per_block: int,
    ) -> LatentStore:
        """Write rows to ``folder`` (replacing a store there) and open it; the folder appears whole or not at all.

        A row has ``question`` [int], ``blocks`` [[int]], ``answer`` [int], ``mu`` and ``logvar`` (float32, B * L * d values
        each, any shape) and optionally ``index``, its place among all records (default: its place among ``rows``).
        Raises ValueError on a row whose sizes do not fit or whose values are not finite.
        """
        target = Path(folder).resolve()  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            moments, num_records = _write_arrow(aside / _ARROW, rows, latent_dim, latents_per_block)
            stats = _Stats(
                fingerprint=fingerprint,
                latent_dim=latent_dim,
                latents_per_block=latents_per_block,
                num_records=num_records,
                num_latents=moments.count,
                arrow_bytes=(aside / _ARROW).stat().st_size,
                mean=moments.mean.tolist(),
                std=moments.std().tolist(),
            )
            (aside / _STATS).write_text(json.dumps(asdict(stats), indent=1), encoding="utf-8")
            sync_file(aside / _STATS)
            aside.chmod(0o755)  # a temporary folder is closed to others
            replace_folder(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return LatentStore.open(target)

    @staticmethod
    def merge(parts: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> LatentStore:
        """Join the parts that ranks wrote, in the order of their ``index``; the parts are left as they are.

        The result does not depend on the number of parts.  Raises ValueError where the parts come from different VAEs, or
        where a record is missing or there twice.
        """
        stores = [LatentStore.open(part) for part in parts]
        if not stores:
            raise UnusableError(f"{folder}: no parts to merge; encode the training set first")
        first = stores[0]
        for store in stores[1:]:
            store.check_fingerprint(first.fingerprint)
        rows = heapq.merge(*(store._indexed_rows() for store in stores), key=lambda row: row["index"])
        return LatentStore.write(
            folder, _without_gaps(rows, first.folder), first.fingerprint, first.latent_dim, first.latents_per_block
        )

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> LatentStore:
        """Open a store.  Raises FileNotFoundError where there is none, UnusableError where it is torn."""
        path = Path(folder)
        remedy = "run training/encode_latents.py (again) to make it"
        if not (path / _STATS).is_file() or not (path / _ARROW).is_file():
            raise FileNotFoundError(f"{path}: no latent store there ({_STATS} and {_ARROW} are needed); {remedy}")
        try:
            stats = _Stats(**json.loads((path / _STATS).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UnusableError(f"{path / _STATS}: damaged ({error}); {remedy}") from error
        size = (path / _ARROW).stat().st_size
        if size != stats.arrow_bytes:
            raise UnusableError(f"{path / _ARROW}: damaged: {size} bytes instead of {stats.arrow_bytes}; {remedy}")
        try:
            import datasets  # slow to import

            table = datasets.Dataset.from_file(str(path / _ARROW)).data.table
        except (pa.ArrowInvalid, OSError) as error:
            raise UnusableError(f"{path / _ARROW}: damaged ({error}); {remedy}") from error
        if table.num_rows != stats.num_records:
            raise UnusableError(f"{path}: {table.num_rows} records instead of {stats.num_records}; {remedy}")
        return LatentStore(path, stats, table)

    def check_fingerprint(self, expected: str) -> None:
        """Raise UnusableError unless the latents were made by the VAE with this fingerprint."""
        if self.fingerprint != expected:
            raise UnusableError(
                f"{self.folder}: these latents were made by the VAE {self.fingerprint}, not by {expected}; run "
                "training/encode_latents.py again with the VAE in use, or point to the VAE that made them"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> LatentRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: record {index} of {len(self)}")
        chunk = bisect_right(self._starts, index) - 1
        return self._chunks[chunk].record(index - self._starts[chunk], self.latents_per_block, self.latent_dim)

    @property
    def most_blocks(self) -> int:
        """Blocks of the record that has most."""
        return max((chunk.most_blocks for chunk in self._chunks), default=0)

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question."""
        return max((chunk.longest_question for chunk in self._chunks), default=0)

    def same_question(self) -> list[list[int]]:
        """Which records have the same question: the places of each group of several."""
        groups: dict[bytes, list[int]] = {}
        for start, chunk in zip(self._starts, self._chunks, strict=False):
            for i in range(len(chunk)):
                groups.setdefault(chunk.question(i), []).append(start + i)
        return [group for group in groups.values() if len(group) > 1]

    def _indexed_rows(self) -> Iterator[dict[str, Any]]:
        """Rows as :meth:`write` takes them, by ascending index."""
        indices = np.concatenate([chunk.index for chunk in self._chunks] or [np.zeros(0, np.int64)])
        for place in np.argsort(indices, kind="stable"):
            record = self[int(place)]
            yield {
                "index": int(indices[place]),
                "question": record.question,
                "blocks": record.blocks,
                "answer": record.answer,
                "mu": record.mu.numpy(),
                "logvar": record.logvar.numpy(),
            }


class _Chunk:
    """One Arrow batch as numpy views of the mapped file: a record is then a few slices."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.index = batch.column("index").to_numpy(zero_copy_only=True)
        self._question = _Lists(batch.column("question"))
        self._answer = _Lists(batch.column("answer"))
        self._blocks_of = batch.column("blocks").offsets.to_numpy()
        self._blocks = _Lists(batch.column("blocks").values)
        self._mu = _Lists(batch.column("mu"))
        self._logvar = _Lists(batch.column("logvar"))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def most_blocks(self) -> int:
        """Blocks of the record that has most."""
        return int(np.diff(self._blocks_of).max(initial=0))

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question."""
        return int(np.diff(self._question.offsets).max(initial=0))

    def question(self, i: int) -> bytes:
        """The i-th record's question, to be compared."""
        return self._question[i].tobytes()

    def record(self, i: int, latents_per_block: int, latent_dim: int) -> LatentRecord:
        """The i-th record; its tensors are copies."""
        shape = (-1, latents_per_block, latent_dim)
        return LatentRecord(
            question=self._question[i].tolist(),
            blocks=[self._blocks[b].tolist() for b in range(self._blocks_of[i], self._blocks_of[i + 1])],
            answer=self._answer[i].tolist(),
            mu=torch.from_numpy(self._mu[i].reshape(shape).copy()),
            logvar=torch.from_numpy(self._logvar[i].reshape(shape).copy()),
        )


class _Lists:
    """A list column as numpy: ``self[i]`` is the i-th list, a view."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()
        self.values = column.values.to_numpy(zero_copy_only=True)

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def _write_arrow(file: Path, rows: Iterable[Mapping[str, Any]], latent_dim: int, latents_per_block: int) -> tuple[_Moments, int]:
    """Stream rows to an Arrow file; returns the moments of ``mu`` and the number of rows."""
    moments = _Moments(latent_dim)
    num_records = 0
    pending: list[dict[str, Any]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for place, row in enumerate(rows):
            checked = _checked(row, place, latent_dim, latents_per_block)
            moments.add(checked["mu"].reshape(-1, latent_dim))
            pending.append(checked)
            num_records += 1
            if len(pending) == _ROWS_PER_BATCH:
                writer.write_batch(_record_batch(pending))
                pending = []
        if pending:
            writer.write_batch(_record_batch(pending))
    sync_file(file)
    return moments, num_records


def _record_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Checked rows as columns, without a Python object for every number."""
    blocks = [block for row in rows for block in row["blocks"]]
    columns = {
        "index": pa.array([row["index"] for row in rows], pa.int64()),
        "question": _lists([row["question"] for row in rows], np.int32),
        "blocks": pa.ListArray.from_arrays(_offsets([row["blocks"] for row in rows]), _lists(blocks, np.int32)),
        "answer": _lists([row["answer"] for row in rows], np.int32),
        **{name: _lists([row[name] for row in rows], np.float32) for name in ("mu", "logvar")},
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _lists(values: Sequence[Sequence[int] | np.ndarray[Any, Any]], dtype: type[np.generic]) -> pa.ListArray:
    """A list column."""
    flat = np.concatenate([np.asarray(value, dtype=dtype) for value in values])
    return pa.ListArray.from_arrays(_offsets(values), pa.array(flat))


def _offsets(values: Sequence[Sequence[Any] | np.ndarray[Any, Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, values)]), pa.int32())


def _checked(row: Mapping[str, Any], place: int, latent_dim: int, latents_per_block: int) -> dict[str, Any]:
    """The row with flat float32 latents.  Raises ValueError where its sizes do not fit or values are not finite."""
    index = int(row.get("index", place))
    checked = {"index": index, "question": row["question"], "blocks": row["blocks"], "answer": row["answer"]}
    expected = len(row["blocks"]) * latents_per_block * latent_dim
    for name in ("mu", "logvar"):
        values = np.asarray(row[name], dtype=np.float32).reshape(-1)
        if values.size != expected or expected == 0:
            raise UnusableError(
                f"record {index}: {name} has {values.size} values; {len(row['blocks'])} blocks of {latents_per_block} "
                f"latents of size {latent_dim} need {expected} (and at least one block)"
            )
        if not math.isfinite(float(np.abs(values).max())):
            raise UnusableError(f"record {index}: {name} is not finite; the VAE's training has diverged, train it again")
        checked[name] = values
    return checked


def _without_gaps(rows: Iterable[dict[str, Any]], where: Path) -> Iterator[dict[str, Any]]:
    """Pass rows on whose indices are 0, 1, 2, ...; raises ValueError at the first that is not."""
    for expected, row in enumerate(rows):
        if row["index"] != expected:
            problem = f"record {expected} is missing" if row["index"] > expected else f"record {row['index']} is there twice"
            raise UnusableError(f"{where.parent}: {problem} among the parts; run training/encode_latents.py again")
        yield row
