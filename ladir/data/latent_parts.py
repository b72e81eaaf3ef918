"""Writing a latent store: parts of consecutive records, by any number of processes, then one index over them.  Nothing is copied.

A part is an Arrow file and, beside it, what is known of it; the second appears last and says that the first is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ladir.data.columns import TOKENS, list_column, token_columns
from ladir.data.latents import STATS, LatentForm, LatentStore, Stats
from ladir.errors import UnusableError
from ladir.files import replace_folder, sync_file

_ROWS_PER_BATCH = 1000
_SMALLEST_STD = 1e-6  # below it a dimension is constant and is left as it is
#: how values of a dtype lie in Arrow, which has no bfloat16: as the numbers that its bits are
_STORED: dict[str, tuple[pa.DataType, type[np.generic]]] = {
    "float32": (pa.float32(), np.float32),
    "float16": (pa.float16(), np.float16),
    "bfloat16": (pa.uint16(), np.uint16),
}


@dataclass
class Moments:
    """Running mean and variance per dimension in float64 (pairwise update of Chan, Golub and LeVeque).

    ``squares``: sum of squared differences from the mean.
    """

    count: int
    mean: np.ndarray[Any, Any]
    squares: np.ndarray[Any, Any]

    @staticmethod
    def none(latent_dim: int) -> Moments:
        """Of no latents."""
        return Moments(0, np.zeros(latent_dim), np.zeros(latent_dim))

    def take_in(self, other: Moments) -> None:
        """Add those of other latents."""
        count = self.count + other.count
        if other.count:
            difference = other.mean - self.mean
            self.squares += other.squares + difference**2 * (self.count * other.count / count)
            self.mean += difference * (other.count / count)
        self.count = count

    def add(self, latents: np.ndarray[Any, Any]) -> None:
        """Take in latents [n, d]."""
        values = latents.astype(np.float64)
        mean = values.mean(axis=0)
        self.take_in(Moments(len(values), mean, ((values - mean) ** 2).sum(axis=0)))

    def std(self) -> np.ndarray[Any, Any]:
        """Standard deviation per dimension; 1 where a dimension is constant."""
        std = np.sqrt(self.squares / max(self.count, 1))
        return np.where(std < _SMALLEST_STD, 1.0, std)


@dataclass(frozen=True)
class _Part:
    """What stands beside a part: whose it is, which records it holds, and the moments of their latents."""

    fingerprint: str
    form: dict[str, Any]
    first: int
    records: int
    bytes: int
    count: int
    mean: list[float]
    squares: list[float]


def write_part(folder: Path, first: int, rows: Iterable[Mapping[str, Any]], fingerprint: str, form: LatentForm) -> None:
    """Write the records from number ``first`` on as a part of ``folder``; it is whole or not there.

    A row has ``question`` [int], ``blocks`` [[int]], ``answer`` [int], ``mu`` and, where the form has it, ``logvar`` (B * L * d
    values each, any shape).  Raises UnusableError on a row whose sizes do not fit or whose values are not finite in this dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, beside = _arrow(folder, first), _beside(folder, first)
    aside = file.with_name(f".{file.name}.tmp")
    moments, records = _write_arrow(aside, rows, first, form)
    aside.replace(file)
    part = _Part(
        fingerprint=fingerprint,
        form=asdict(form),
        first=first,
        records=records,
        bytes=file.stat().st_size,
        count=moments.count,
        mean=moments.mean.tolist(),
        squares=moments.squares.tolist(),
    )
    torn = beside.with_name(f".{beside.name}.tmp")
    torn.write_text(json.dumps(asdict(part)), encoding="utf-8")
    sync_file(torn)
    torn.replace(beside)


def is_whole(folder: Path, first: int) -> bool:
    """Whether the part from record ``first`` on is written, and was not cut short since (in a copy, say)."""
    try:
        return _read(folder, first).bytes == _arrow(folder, first).stat().st_size
    except (OSError, TypeError, ValueError):
        return False


def join_parts(folder: Path, firsts: Sequence[int], target: Path, give_way: Callable[[], None] = lambda: None) -> LatentStore:
    """Put an index over the parts in ``folder`` that begin with the records ``firsts``, and give the folder the name ``target``.

    ``give_way`` is called before every part that is looked at, and may raise: nothing has changed then.
    Raises UnusableError where parts come from different VAEs or have another form, or where a record is missing or there twice.
    """
    if not firsts:
        raise UnusableError(f"{target}: no parts to join; encode the training set first")
    parts = []
    for first in firsts:
        give_way()
        parts.append(_read(folder, first))
    moments, records = Moments.none(parts[0].form["latent_dim"]), 0
    for part in parts:
        _check_joins(part, parts[0], records, target)
        moments.take_in(Moments(part.count, np.array(part.mean), np.array(part.squares)))
        records += part.records
    stats = Stats(
        fingerprint=parts[0].fingerprint,
        **parts[0].form,
        num_records=records,
        num_latents=moments.count,
        mean=moments.mean.tolist(),
        std=moments.std().tolist(),
        files=[{"name": _arrow(folder, p.first).name, "records": p.records, "bytes": p.bytes} for p in parts],
    )
    (folder / STATS).write_text(json.dumps(asdict(stats), indent=1), encoding="utf-8")
    sync_file(folder / STATS)
    replace_folder(folder, target)
    return LatentStore.open(target)


def _check_joins(part: _Part, first: _Part, expected: int, target: Path) -> None:
    """UnusableError unless a part goes on with the record ``expected`` as the first part began."""
    again = "run training/encode_latents.py again"
    if (part.fingerprint, part.form) != (first.fingerprint, first.form):
        raise UnusableError(
            f"{target}: its parts were made by the VAE {first.fingerprint} as {first.form} and by {part.fingerprint} as "
            f"{part.form}; {again}"
        )
    if part.first != expected:
        problem = f"record {expected} is missing" if part.first > expected else f"record {part.first} is there twice"
        raise UnusableError(f"{target}: {problem} among the parts; {again}")


def write_latents(
    folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], fingerprint: str, form: LatentForm
) -> LatentStore:
    """All rows as a store of one part (replacing a store there), opened; the folder appears whole or not at all."""
    target = Path(folder).resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_part(aside, 0, rows, fingerprint, form)
        aside.chmod(0o755)  # a temporary folder is closed to others
        return join_parts(aside, [0], target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _arrow(folder: Path, first: int) -> Path:
    return folder / f"{first:09d}.arrow"


def _beside(folder: Path, first: int) -> Path:
    return folder / f"{first:09d}.json"


def _read(folder: Path, first: int) -> _Part:
    return _Part(**json.loads(_beside(folder, first).read_text(encoding="utf-8")))


def _write_arrow(file: Path, rows: Iterable[Mapping[str, Any]], first: int, form: LatentForm) -> tuple[Moments, int]:
    """Stream rows to an Arrow file; returns the moments of ``mu`` as it is stored, and the number of rows."""
    moments, count, schema = Moments.none(form.latent_dim), 0, _schema(form)
    pending: list[dict[str, Any]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for row in rows:
            checked, exact = _checked(row, first + count, form)
            moments.add(exact.reshape(-1, form.latent_dim))
            pending.append(checked)
            count += 1
            if len(pending) == _ROWS_PER_BATCH:
                writer.write_batch(_record_batch(pending, schema, form))
                pending = []
        if pending:
            writer.write_batch(_record_batch(pending, schema, form))
    sync_file(file)
    return moments, count


def _schema(form: LatentForm) -> pa.Schema:
    kept = pa.list_(_STORED[form.dtype][0])
    return pa.schema([*TOKENS, *((name, kept) for name in _kept(form))])


def _kept(form: LatentForm) -> tuple[str, ...]:
    return ("mu", "logvar") if form.logvar else ("mu",)


def _record_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, form: LatentForm) -> pa.RecordBatch:
    """Checked rows as columns, without a Python object for every number."""
    questions, blocks, answers = ([row[name] for row in rows] for name in ("question", "blocks", "answer"))
    columns = token_columns(questions, blocks, answers)
    columns |= {name: list_column([row[name] for row in rows], _STORED[form.dtype][1]) for name in _kept(form)}
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _checked(row: Mapping[str, Any], index: int, form: LatentForm) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """The row with flat latents as they are stored, and what of ``mu`` will be read (float32)."""
    checked = {"question": row["question"], "blocks": row["blocks"], "answer": row["answer"]}
    expected = len(row["blocks"]) * form.latents_per_block * form.latent_dim
    read = {}
    for name in _kept(form):
        values = np.asarray(row[name], dtype=np.float32).reshape(-1)
        if values.size != expected or expected == 0:
            raise UnusableError(
                f"record {index}: {name} has {values.size} values; {len(row['blocks'])} blocks of {form.latents_per_block} "
                f"latents of size {form.latent_dim} need {expected} (and at least one block)"
            )
        checked[name], read[name] = _rounded(values, form.dtype)
        _check_finite(values, read[name], f"record {index}: {name}", form.dtype)
    return checked, read["mu"]


def _rounded(values: np.ndarray[Any, Any], dtype: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """float32 values as they are stored, and as they are read again."""
    if dtype == "float32":
        return values, values
    kept = torch.from_numpy(values).to(getattr(torch, dtype))
    stored = kept.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else kept.numpy()
    return stored, kept.float().numpy()


def _check_finite(values: np.ndarray[Any, Any], read: np.ndarray[Any, Any], what: str, dtype: str) -> None:
    if not math.isfinite(float(np.abs(values).max())):
        raise UnusableError(f"{what} is not finite; the VAE's training has diverged, train it again")
    if not math.isfinite(float(np.abs(read).max())):
        raise UnusableError(f"{what} reaches {np.abs(values).max():.3g}, too much for latents.dtype={dtype}; take bfloat16")
