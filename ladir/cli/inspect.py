"""python -m ladir inspect FILE: what training would see of a data file, and what it would refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ladir.arguments import LineParser
from ladir.config import BackboneSettings, DataSettings
from ladir.config.loader import load_config
from ladir.data.encode import EncodedRecord, check_blocks, check_records
from ladir.data.records import BadRecord, Record, RecordSet, list_bad_records, read_records
from ladir.report.fitting import print_whole
from ladir.tokens import load_tokenizer

#: a line of the table: its name, what is counted, and the setting that limits it
_Row = tuple[str, Iterable[int], int]
_Figure = Callable[[Sequence[int], int], str]


def run(argv: Sequence[str]) -> int:
    """Print the report; returns 1 where training would refuse the file."""
    parser = LineParser(prog="python -m ladir inspect", description=__doc__)
    parser.add_argument("file", help=".jsonl, .json (either with .gz), .parquet, or a Hub id (name:split or name:config:split)")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML (see configs/)")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder or Hub id; not set: backbone.tokenizer")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="records shown with their blocks")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.input_field=question")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    console = Console(soft_wrap=True)
    record_set = read_records(arguments.file, config.data)
    _show_records(console, record_set, arguments.show)
    tokenizer = _tokenizer(console, config.backbone, arguments.tokenizer)
    if tokenizer is None:
        texts, bad = check_blocks(record_set, config.data)
        row = _blocks_row((len(r.blocks) for r in texts), config.data)
        _show_rows(console, "blocks of usable records (limit: data.max_blocks)", [row])
    else:
        usable, bad = check_records(record_set, tokenizer, config.data)
        _show_lengths(console, usable, config.data)
        _show_unknown(console, usable, tokenizer)
    _show_repeated(console, record_set.records)
    return _verdict(console, record_set, bad, config.data, "" if tokenizer else " (token lengths not checked)")


def _tokenizer(console: Console, backbone: BackboneSettings, name: str | None) -> PreTrainedTokenizerBase | None:
    backbone = dataclasses.replace(backbone, tokenizer=name or backbone.tokenizer)
    if backbone.tokenizer is None and backbone.name_or_path is None:
        console.print("No tokenizer given: token lengths are not checked (--tokenizer DIR or backbone.tokenizer).")
        return None
    return load_tokenizer(backbone)


def _show_records(console: Console, record_set: RecordSet, count: int) -> None:
    """The first records as training sees them: question, blocks, answer."""
    for record in record_set.records[: max(count, 0)]:
        console.print(f"[bold]{escape(record.source)}[/bold]")
        console.print(f"  question: {escape(record.question)}", highlight=False)
        for number, block in enumerate(record.blocks, start=1):
            indented = block.replace("\n", "\n           ")
            console.print(f"  block {number:>2}: {escape(indented)}", highlight=False)
        console.print(f"  answer: {escape(record.answer)}", highlight=False)


def _show_lengths(console: Console, records: Sequence[EncodedRecord], settings: DataSettings) -> None:
    """Token lengths of the usable records beside the limits (data.max_*)."""
    rows: list[_Row] = [
        ("question", (len(r.question) for r in records), settings.max_question_tokens),
        ("block", (len(b) for r in records for b in r.blocks), settings.max_block_tokens),
        ("answer", (len(r.answer) for r in records), settings.max_answer_tokens),
        _blocks_row((len(r.blocks) for r in records), settings),
    ]
    _show_rows(console, "token lengths of usable records (limits: data.max_*)", rows)


def _blocks_row(counts: Iterable[int], settings: DataSettings) -> _Row:
    return "blocks per record", counts, settings.max_blocks


def _show_rows(console: Console, title: str, rows: Iterable[_Row]) -> None:
    """A table of how values are distributed; none where there are no values."""
    found = [(name, sorted(values), limit) for name, values, limit in rows]
    if found := [row for row in found if row[1]]:
        print_whole(console, partial(_table, title, found), list(_FIGURES))


def _table(title: str, rows: Sequence[tuple[str, list[int], int]], figures: Sequence[str]) -> Table:
    """A line for each row (its name, its sorted values, their limit), a column for each of ``figures``."""
    table = Table(title=title)
    table.add_column("")
    for figure in figures:
        table.add_column(figure, justify="right")
    for name, values, limit in rows:
        table.add_row(name, *(_FIGURES[figure](values, limit) for figure in figures))
    return table


def _quantile(share: float) -> _Figure:
    return lambda values, limit: str(values[min(int(share * len(values)), len(values) - 1)])


#: the table's columns, each from sorted values and their limit
_FIGURES: dict[str, _Figure] = {
    "mean": lambda values, limit: f"{sum(values) / len(values):.1f}",
    "50 %": _quantile(0.5),
    "95 %": _quantile(0.95),
    "99 %": _quantile(0.99),
    "longest": lambda values, limit: str(values[-1]),
    "total": lambda values, limit: str(sum(values)),
    "limit": lambda values, limit: str(limit),
}


def _show_unknown(console: Console, records: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of text that the tokenizer cannot represent: it would be lost in training."""
    unknown = tokenizer.unk_token_id
    affected = [r for r in records if unknown is not None and any(unknown in ids for ids in (r.question, *r.blocks, r.answer))]
    if affected:
        console.print(
            f"Warning: {len(affected)} records hold words that the tokenizer does not know, the first at "
            f"{escape(affected[0].record.source)}; choose a tokenizer that does.",
            highlight=False,
        )


def _show_repeated(console: Console, records: Sequence[Record]) -> None:
    """Warn of records that are there again, word for word: each is trained on as often as it stands there."""
    seen: dict[tuple[Any, ...], Record] = {}
    again = [(r, first) for r in records if (first := seen.setdefault((r.question, r.blocks, r.answer), r)) is not r]
    if again:
        record, first = again[0]
        count = f"{len(again)} {'record repeats' if len(again) == 1 else 'records repeat'}"
        console.print(
            f"Warning: {count} an earlier one word for word, the first at {escape(record.source)} ({escape(first.source)}).",
            highlight=False,
        )


def _verdict(
    console: Console, record_set: RecordSet, bad: Sequence[BadRecord], settings: DataSettings, unchecked: str = ""
) -> int:
    usable = record_set.total - len(bad)
    console.print(f"{record_set.total} records: {usable} usable, {len(bad)} bad{unchecked}", highlight=False)
    if bad:
        console.print(escape(list_bad_records(list(bad), record_set.total)), highlight=False)
    if not usable or (bad and settings.on_bad_record == "error"):
        console.print("Training would refuse this file. Correct the records, or set data.on_bad_record=skip.")
        return 1
    return 0
