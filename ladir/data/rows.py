"""The rows of a file (JSONL, a JSON array, Parquet) or of a Hub data set, each with where it stands; files of another kind are
refused once, with what they are."""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ladir.errors import UnusableError

JSON_EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
EXTENSIONS = (*JSON_EXTENSIONS, ".parquet")
_OTHER_FILES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".xz", ".bz2", ".ndjson", ".yaml", ".yml", ".arrow", ".xlsx")

_HEAD = 512
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b\x08"
_PARQUET = b"PAR1"
#: how a file of another kind begins, what it then is, and what to do
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (_GZIP, "gzip data", "name it .jsonl.gz (or unpack it)"),
    (_PARQUET, "a Parquet table", "name it .parquet"),
    (b"PK\x03\x04", "a zip archive", "unpack it and name the file in it"),
    (b"BZh", "bzip2 data", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "xz data", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it with unzstd"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and name the file in it"),
    (b"ARROW1", "an Arrow file", "write it as JSONL or Parquet"),
    (b"SQLite format 3", "an SQLite data base", "write it as JSONL"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "fetch them with git lfs pull"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)
_UNICODE = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))

#: a row's place and a function that gives its object or raises Refused; another process can be handed both
Row = tuple[str, Callable[[], Any]]


class Refused(Exception):
    """A record that cannot be used; whoever reads on makes it part of the report."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class AmbiguousAnswer(Refused):
    """A record that gives more than one answer: it can be neither trained on nor judged by."""


def file_rows(path: str, stream: bool = False) -> Iterator[Row]:
    """Where each record is and how to load it; the format follows from the name.  ``stream``: a Hub set is read as it comes, and
    no copy of it is kept.

    Raises FileNotFoundError for a missing file, UnusableError for one that cannot be read as a whole.
    """
    check_path(path)
    file, name = Path(path), path.lower()
    try:
        if name.endswith(JSON_EXTENSIONS):
            yield from _json_rows(file)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(file)
        else:
            yield from _hub_rows(path, stream)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableError(f"{path}: cannot be read ({error.strerror or error}); correct its permissions, or copy it") from error


def data_files(named: str | Sequence[str] | None) -> list[str]:
    """The files and Hub ids that a setting of the data names: one, or a list; a pattern (``data/*.jsonl``, ``**`` for folders in
    folders) stands for what it matches, by name.

    Raises FileNotFoundError for a pattern that matches nothing.
    """
    if named is None:
        return []
    return [file for entry in ([named] if isinstance(named, str) else named) for file in _matched(entry)]


def _matched(entry: str) -> list[str]:
    if not glob.has_magic(entry) or Path(entry).exists():
        return [entry]
    found = sorted(glob.glob(entry, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise FileNotFoundError(f"{entry}: no file matches (looked in {Path.cwd()}); correct the pattern in data.*")
    return found


def check_path(path: str) -> None:
    """The same for a path that leads nowhere or to another kind of file, before anything is read; the Hub is not asked."""
    file, name = Path(path), path.lower()
    if file.is_dir():
        raise UnusableError(f"{path}: is a folder; name a file in it{_files_in(file)}")
    if name.endswith(EXTENSIONS):
        _require(file)
    elif file.exists() or name.endswith(_OTHER_FILES):
        raise UnusableError(f"{path}: unknown kind of file; known: {', '.join(EXTENSIONS)}, Hub ids (name:config:split)")


def _require(file: Path) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file (looked in {Path.cwd()}); correct the path")
    if not file.is_file():
        raise UnusableError(f"{file}: is not a file; correct the path")


def _files_in(folder: Path) -> str:
    found = sorted(str(file) for file in folder.iterdir() if file.name.lower().endswith(EXTENSIONS))
    return f", e.g. {found[0]}" if found else f" ({', '.join(EXTENSIONS)})"


def _json_rows(file: Path) -> Iterator[Row]:
    packed = file.name.lower().endswith(".gz")
    with file.open("rb") as raw:
        head = raw.read(_HEAD)
    if packed and head and not head.startswith(_GZIP):
        _refuse_other_kinds(file, head)
        raise UnusableError(f"{file}: is not gzip data, although its name ends so; name it {file.name[:-3]}")
    if not packed:
        _refuse_other_kinds(file, head)
    number = 0
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            if packed:
                _refuse_other_kinds(file, stream.read(_HEAD), "holds ")
                stream.seek(0)
            first, lines = _first_line(stream)
            number = lines
            if _is_spread(first):
                spread = _spread_rows(file, b"\n" * (lines - 1) + first + stream.read())
                if spread is not None:
                    yield from spread
                    return
                stream.seek(0)
                number = 0
            elif first:
                yield f"{file}:{number}", partial(_parse_line, first)
            for line in stream:
                number += 1
                if line.strip() and not (number == 1 and line.strip() == _BOM):
                    yield f"{file}:{number}", partial(_parse_line, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnusableError(
            f"{file}:{number + 1}: the compressed data are damaged from here on ({error}); copy the file again"
        ) from error


def _refuse_other_kinds(file: Path, head: bytes, what: str = "is ") -> None:
    """Raise UnusableError for a file that begins as no text in UTF-8 does."""
    for start, kind, remedy in _KINDS:
        if head.lstrip().startswith(start):
            raise UnusableError(f"{file}: {what}{kind}; {remedy}")
    if head and not head.strip(b"\0"):
        raise UnusableError(f"{file}: {what}nothing but zero bytes; copy it again")
    encoding = next((name for mark, name in _UNICODE if head.startswith(mark)), None)
    if encoding is None and len(head) >= 8 and head[1::2].count(0) + head[::2].count(0) >= len(head) // 2 - 1:
        encoding = "UTF-16"
    if encoding is not None:
        raise UnusableError(f"{file}: {what}text in {encoding}; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")
    if head[257:262] == b"ustar":
        raise UnusableError(f"{file}: {what}a tar archive; unpack it and name the file in it")


def _first_line(stream: Any) -> tuple[bytes, int]:
    """The first line that is not blank (empty where there is none), and its number."""
    number = 0
    for number, line in enumerate(stream, start=1):
        if line.removeprefix(_BOM).strip():
            return line.removeprefix(_BOM) if number == 1 else line, number
    return b"", number


def _is_spread(line: bytes) -> bool:
    """Whether JSON begins on this line that is not one object a line: an array, or an object that goes on."""
    text = line.strip()
    if text[:1] not in (b"[", b"{"):
        return False
    try:
        return not isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        if text.endswith(b",") and _is_object(text[:-1]):
            return False
        return text[:1] == b"[" or text == b"{" or text.endswith((b",", b"[", b"{", b":")) or b"\r" in text


def _spread_rows(file: Path, data: bytes) -> list[Row] | None:
    """The objects of a JSON array, or objects over several lines; None where the file is read line by line after all.

    Raises UnusableError where it is clear that it was to be such a file, and where it breaks off.
    """
    try:
        return _spread_values(file, data.decode("utf-8"))
    except (UnicodeDecodeError, RecursionError):
        return None
    except _Broken as broken:
        lines = [line for line in data.splitlines() if line.strip()]
        if sum(map(_is_object, lines)) > len(lines) / 2:
            return None
        raise UnusableError(f"{file}:{broken}; mend it, or write one JSON object per line") from broken


class _Broken(Exception):
    """JSON over several lines that cannot be read on: line, what is wrong, and where in the line."""


def _spread_values(file: Path, text: str) -> list[Row]:
    found: list[tuple[str, Any, _Decoder]] = []
    position, line, counted = _blank(text, 0), 1, 0
    array = text[position : position + 1] == "["
    if array:
        position = _blank(text, position + 1)
    while position < len(text) and not (array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        value, decoder, end = _decoded(text, position)
        if array and not isinstance(value, dict):
            raise _Broken(f"{line}: in a JSON array stands something else than an object")
        found.append((f"{file}:{line}", value, decoder))
        position = _next_item(text, end) if array else _blank(text, end)
    return [(place, partial(_checked, value, decoder.repeated)) for place, value, decoder in found]


def _next_item(text: str, end: int) -> int:
    """The position behind an array's comma, or of its closing bracket."""
    position = _blank(text, end)
    if text[position : position + 1] == "]":
        return position
    if text[position : position + 1] != ",":
        raise _Broken(f"{_place(text, position)}: in a JSON array a comma or ] is missing")
    behind = _blank(text, position + 1)
    if text[behind : behind + 1] in ("]", ""):
        raise _Broken(f"{_place(text, position)}: a JSON array ends in a comma")
    return behind


def _decoded(text: str, position: int) -> tuple[Any, _Decoder, int]:
    decoder = _Decoder()
    try:
        value, end = decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _Broken(
            f"{error.lineno}: invalid JSON: {error.msg} at column {error.colno}{_comma_hint(text, error.pos)}"
        ) from error
    except ValueError as error:
        raise _Broken(f"{_place(text, position)}: unreadable JSON: {error}") from error
    return value, decoder, end


def _blank(text: str, position: int) -> int:
    """The position of what follows white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _place(text: str, position: int) -> str:
    return str(text.count("\n", 0, position) + 1)


def _comma_hint(text: str, position: int) -> str:
    return " (behind a comma stands nothing)" if re.search(r",\s*$", text[max(0, position - 40) : position]) else ""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Decoder(json.JSONDecoder):
    """Notes the first field that stands twice in one object: Python would keep the last one in silence."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and self.repeated is None:
            names = [name for name, _ in pairs]
            self.repeated = next(name for name in names if names.count(name) > 1)
        return found


def _checked(value: Any, repeated: str | None) -> Any:
    """``value``, or Refused where a field of it stands twice."""
    if repeated is not None:
        raise Refused(f"field {repeated!r} stands in it twice", "remove one of the two, or give it another name")
    return value


def _parse_line(line: bytes) -> Any:
    try:
        text = line.rstrip(b"\r\n").removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})", "convert the file to UTF-8"
        ) from error
    decoder = _Decoder()
    try:
        return _checked(decoder.decode(text), decoder.repeated)
    except json.JSONDecodeError as error:
        raise Refused(f"invalid JSON: {error.msg} at column {error.colno}", _remedy(text)) from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"unreadable JSON: {error}", "write one flat JSON object per line") from error


def _remedy(text: str) -> str:
    """What to do about a line that is not JSON, by what it looks like."""
    bare = text.strip()
    if bare.endswith(",") and _is_object(bare[:-1].encode()):
        return "remove the comma at its end: one JSON object per line, nothing between them"
    if re.search(r",\s*[}\]]", bare) and _is_object(re.sub(r",\s*([}\]])", r"\1", bare).encode()):
        return "remove the comma before the closing bracket"
    if bare.startswith("{'"):
        return 'it looks like a Python dict: write it with json.dumps, which puts names and texts into "double quotes"'
    if re.search(r"\}\s*\{", bare):
        return "put every JSON object on a line of its own"
    return "write one JSON object per line"


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head.startswith(_PARQUET):
        _refuse_other_kinds(file, head)
        if head.lstrip()[:1] in (b"{", b"["):
            raise UnusableError(f"{file}: not a readable Parquet file: it is JSON; name it .jsonl")
    number = 0
    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=1024)
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                yield f"{file}:row {number}", partial(_parquet_row, batch, i)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableError(f"{file}: not a readable Parquet file after row {number}: {error}; write it again") from error


def _parquet_row(batch: Any, i: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Refused("a text in it is not UTF-8", "convert the column to UTF-8") from error
    return row


@dataclass(frozen=True)
class HubName:
    """A Hub set as settings name it, ``id[@commit][:config][:split]``."""

    hub_id: str
    commit: str | None
    config: str | None
    split: str

    @classmethod
    def of(cls, name: str) -> HubName:
        """The parts of a name."""
        first, *rest = name.split(":")
        hub_id, _, commit = first.partition("@")
        config, split = (rest[0], rest[1]) if len(rest) > 1 else (None, rest[0] if rest else "train")
        return cls(hub_id, commit or None, config, split)


def is_hub_name(name: str) -> bool:
    """Whether a name is that of no file, there or not."""
    return not Path(name).exists() and not name.lower().endswith((*EXTENSIONS, *_OTHER_FILES))


def with_commit(name: str, commit: str) -> str:
    """The name of a Hub set with the commit that is to be read."""
    first, colon, rest = name.partition(":")
    return f"{first}@{commit}{colon}{rest}"


def hub_commit(name: str) -> str | None:
    """The commit of a Hub set that would be read now, without network that of datasets' copy; None where nobody knows."""
    import datasets

    asked = HubName.of(name)
    if asked.commit is not None:
        return asked.commit
    try:
        found = str(datasets.load_dataset_builder(asked.hub_id, asked.config).hash)
    except Exception:  # whoever reads the set says what is wrong with it
        return None
    return found if re.fullmatch("[0-9a-f]{40}", found) else None


def _hub_rows(name: str, stream: bool) -> Iterator[Row]:
    import datasets

    asked = HubName.of(name)
    commit = {} if asked.commit is None else {"revision": asked.commit}
    try:
        found = datasets.load_dataset(asked.hub_id, asked.config, split=asked.split, streaming=stream, **commit)
    except Exception as error:  # the Hub client raises many unrelated types
        raise UnusableError(
            f"{name}: neither a file ({', '.join(EXTENSIONS)}) nor a data set that can be loaded "
            f"(name:split or name:config:split): {type(error).__name__}: {error}"
        ) from error
    rows, number = iter(found), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # a stream's are those of many libraries as well
            raise UnusableError(
                f"{name}: breaks off behind row {number} ({type(error).__name__}: {error}); start again"
            ) from error
        if row is None:
            return
        number += 1
        yield f"{name}:row {number}", partial(dict, row)
