"""Reading questions to be asked: question and answer only.  A record's reasoning is not needed and filters nothing.

What :mod:`ladir.data.records` reads for training is the same question with the same answer here.  What it refuses for its
reasoning is read as well: chains of any length, answers without a chain, questions with tests alone.
:mod:`ladir.data.question_store` keeps what was read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ladir.config import DataSettings
from ladir.data.blocks import last_boxed, split_answer, split_sentences
from ladir.data.formats import FormatError, Published, read_published
from ladir.data.records import (
    AmbiguousAnswer,
    BadRecord,
    Record,
    Refused,
    has_own_fields,
    mapping_of,
    number_text,
    record_of,
    text_of,
)

#: fields of the published forms that hold reasoning or a gold answer: a row without one is of the form all the same
_GOLD_FIELDS = ("answer", "solution", "code", "canonical_solution")
#: names under which question-answer sets publish their answers
_ANSWER_FIELDS = ("final_answer", "answer")
#: Python's bytes, written out
_BYTES = re.compile(r"b(['\"]).*\1")


def question_of(source: str, load: Callable[[], Any], settings: DataSettings) -> Record | BadRecord:
    """The question on one line, as a record without blocks."""
    try:
        row = _decoded(mapping_of(load()))
        try:
            return replace(record_of(row, source, settings), blocks=())
        except AmbiguousAnswer:
            raise
        except Refused:
            return _bare_question(row, source, settings)
    except Refused as refused:
        return BadRecord(source, refused.reason, refused.remedy)


def _decoded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of DeepMind's mathematics as the Hub has it, whose texts are Python's bytes written out; any other as it is."""
    texts = {name: row.get(name) for name in ("question", "answer")}
    if not all(isinstance(text, str) and _BYTES.fullmatch(text) for text in texts.values()):
        return row
    try:
        return {**row, **{name: ast.literal_eval(str(text)).decode().strip() for name, text in texts.items()}}
    except (ValueError, SyntaxError):
        return row


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
        except FormatError as error:
            raise Refused(str(error), error.remedy) from error
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
