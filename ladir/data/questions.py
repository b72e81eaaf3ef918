"""Reading the questions of an evaluation: question and answer only.  A record's reasoning is not needed and filters nothing.

What :mod:`ladir.data.records` reads for training is the same question with the same answer here.  What it refuses for its
reasoning is read as well: chains of any length, answers without a chain, questions with tests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ladir.config import DataSettings
from ladir.data.blocks import last_boxed, split_answer, split_sentences
from ladir.data.encode import length_problem, refuse_or_list
from ladir.data.formats import Published, read_published
from ladir.data.records import (
    AmbiguousAnswer,
    BadRecord,
    Record,
    Refused,
    file_rows,
    has_own_fields,
    mapping_of,
    number_text,
    record_of,
    text_of,
)
from ladir.data.rows import data_files
from ladir.errors import UnusableError
from ladir.tokens import encode_stream

#: fields of the published forms that hold reasoning or a gold answer: a row without one is of the form all the same
_GOLD_FIELDS = ("answer", "solution", "code", "canonical_solution")
#: names under which question-answer sets publish their answers
_ANSWER_FIELDS = ("final_answer", "answer")


@dataclass(frozen=True)
class QuestionSet:
    """The questions that are asked, and the lines of the file that are not, as far as the last question asked.

    ``in_file``: all its lines.
    """

    asked: list[Record]
    left_out: list[BadRecord]
    in_file: int


def read_questions(
    named: str | Sequence[str],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    check: Callable[[Record], None] = lambda record: None,
    most: int | None = None,
) -> QuestionSet:
    """The first ``most`` questions (all, if not given) of one file or several, ``named`` as in ``data.train``.

    They are records without blocks; their answer may be empty.

    Left out are lines without a question, questions longer than ``data.max_question_tokens``, and those that ``check`` refuses:
    it raises UnusableError where a record lacks what answers are judged by.  Where it refuses every one the first of these errors
    is raised; BadRecords where there are any and ``data.on_bad_record=error``, or where nothing is left to ask.
    """
    rows = (row for file in data_files(named) for row in file_rows(file, settings.stream_hub))
    entries = [question_of(source, load, settings) for source, load in rows]
    if not entries:
        raise UnusableError(f"{named}: no records in it; write one JSON object per line")
    entries = list(_judgeable(entries, check))
    entries = list(_of_fit_length(entries, tokenizer, settings))
    refuse_or_list([entry for entry in entries if isinstance(entry, BadRecord)], len(entries), settings)
    places = [place for place, entry in enumerate(entries) if isinstance(entry, Record)]
    shown = entries if most is None or most >= len(places) else entries[: places[most - 1] + 1]
    asked = [entry for entry in shown if isinstance(entry, Record)]
    return QuestionSet(asked, [entry for entry in shown if isinstance(entry, BadRecord)], len(entries))


def question_of(source: str, load: Callable[[], Any], settings: DataSettings) -> Record | BadRecord:
    """The question on one line, as a record without blocks."""
    try:
        row = mapping_of(load())
        try:
            return replace(record_of(row, source, settings), blocks=())
        except AmbiguousAnswer:
            raise
        except Refused:
            return _bare_question(row, source, settings)
    except Refused as refused:
        return BadRecord(source, refused.reason, refused.remedy)


def _bare_question(row: Mapping[str, Any], source: str, settings: DataSettings) -> Record:
    """A record that cannot be trained on, as far as it can be asked.  Raises Refused where there is no question in it."""
    published = None if has_own_fields(row, settings) else _published(row)
    if published is None:
        question = text_of(row, settings.input_field, "the question (data.input_field)")
        answer = next(_own_answers(row, settings), "")
        read: tuple[str, ...] = (settings.input_field, settings.output_field)
    else:
        question, read = text_of({"question": published.question}, "question", "the question"), ()
        answer = next(_published_answers(row, published, settings), "")
    reference = {name: value for name, value in row.items() if name not in read}
    return Record(question, (), answer, source, reference | ({} if published is None else published.extra))


def _published(row: Mapping[str, Any]) -> Published | None:
    """A row of a public set's form, which may lack what :data:`_GOLD_FIELDS` name; its answer is then None."""
    names = {name.lower(): value for name, value in row.items()} if "question" not in row else row
    for missing in _GOLD_FIELDS:
        filled = {**names, missing: names.get(missing) or ""}
        try:
            published = read_published(filled)
        except ValueError as error:
            raise Refused(str(error), "write it as the published set does") from error
        if published is not None:
            return published if names.get(missing) else replace(published, answer=None)
    return None


def _own_answers(row: Mapping[str, Any], settings: DataSettings) -> Iterator[str]:
    """The answers a row by the settings' names may be read to give, the surest first."""
    output = row.get(settings.output_field)
    if settings.answer_field not in (settings.input_field, settings.output_field):
        yield from _written(row.get(settings.answer_field))
    if isinstance(output, str):
        yield from _written(split_answer(output, settings.answer_prefixes)[1])
    for name in _ANSWER_FIELDS:
        yield from _unmarked(row.get(name))
    if isinstance(output, str):
        yield from _written(last_boxed(output))


def _published_answers(row: Mapping[str, Any], published: Published, settings: DataSettings) -> Iterator[str]:
    names = {name.lower(): value for name, value in row.items()}
    yield from _written(published.answer)
    if published.marked and isinstance(published.reasoning, str):
        prefixes = [published.mark] if published.mark else settings.answer_prefixes
        yield from _written(split_answer(published.reasoning, prefixes)[1])
    for name in _ANSWER_FIELDS:
        yield from _unmarked(names.get(name))


def _written(value: Any) -> Iterator[str]:
    """The text of an answer, where it is one: of a number its digits, of a list its entries."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        value = ", ".join(text for entry in value for text in _written(entry))
    text = value if isinstance(value, str) else str(value) if isinstance(value, bool) else number_text(value)
    if text.strip() and _encodable(text):
        yield text.strip()


def _encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _unmarked(value: Any) -> Iterator[str]:
    """An answer in a field that other sets fill with a whole chain: what is boxed in it, or one sentence."""
    for text in _written(value):
        boxed = last_boxed(text)
        if boxed or len(split_sentences(text)) == 1:
            yield boxed or text


def _judgeable(entries: Sequence[Record | BadRecord], check: Callable[[Record], None]) -> Iterator[Record | BadRecord]:
    """The entries; bad ones in place of records that ``check`` refuses."""
    errors: dict[int, UnusableError] = {}
    for place, entry in enumerate(entries):
        try:
            if isinstance(entry, Record):
                check(entry)
        except UnusableError as error:
            errors[place] = error
    if errors and len(errors) == sum(isinstance(entry, Record) for entry in entries):
        raise next(iter(errors.values()))
    for place, entry in enumerate(entries):
        yield entry if place not in errors or isinstance(entry, BadRecord) else _unjudgeable(entry, errors[place])


def _unjudgeable(record: Record, error: UnusableError) -> BadRecord:
    reason, _, remedy = str(error).removeprefix(f"{record.source}: ").partition("; ")
    return BadRecord(record.source, reason, remedy or "correct it")


def _of_fit_length(
    entries: Sequence[Record | BadRecord], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> Iterator[Record | BadRecord]:
    """The entries; bad ones in place of questions without a token, or with too many."""
    encoded = encode_stream(tokenizer, (entry.question for entry in entries if isinstance(entry, Record)))
    for entry in entries:
        if isinstance(entry, Record):
            problem = length_problem("question", len(next(encoded)), "data.max_question_tokens", settings.max_question_tokens)
            yield entry if problem is None else BadRecord(entry.source, *problem)
        else:
            yield entry
