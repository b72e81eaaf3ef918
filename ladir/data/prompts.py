"""How a record reads: what stands around its question; for the autoregressive baseline reasoning line by line, and answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ladir.data.completions import first_answer
from ladir.data.records import Record
from ladir.data.token_lists import MadeWhenRead, Measured, length_of
from ladir.errors import UnusableError
from ladir.tokens import encode_stream, encode_text

if TYPE_CHECKING:
    from ladir.data.columns import TokenRecord

logger = logging.getLogger(__name__)

#: stands for a question while a chat template is taken apart; nothing that a template would trim, escape or write itself
_QUESTION = "LaDiRsQuestion"


@dataclass(frozen=True)
class ChainText:
    """A completion taken apart: reasoning lines, and the answer where one was marked."""

    thoughts: list[str]
    answer: str


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that start a text under this tokenizer: its <bos>, where it has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


@dataclass(frozen=True)
class Frame:
    """The ids ``before`` and ``behind`` every question; they stay where a question is hidden.

    ``is_chat``: they are those of a chat template, else the tokenizer's <bos>, where it has one, and nothing.
    """

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    is_chat: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Frame:
        """As ``data.chat_template`` says.  UnusableError where there is no template, or one without a question's place."""
        return _chat_frame(tokenizer) if chat else cls(tuple(bos_ids(tokenizer)))

    @classmethod
    def saved(cls, values: Mapping[str, Any]) -> Frame:
        """Out of what :meth:`to_save` gave."""
        return cls(tuple(values["before"]), tuple(values["behind"]), bool(values["is_chat"]))

    def to_save(self) -> dict[str, Any]:
        """As JSON takes it: a template may write the day, and a model is asked as it was trained."""
        return {"before": list(self.before), "behind": list(self.behind), "is_chat": self.is_chat}

    def around(self, question: Sequence[int]) -> list[int]:
        """A question's token ids with what stands around them."""
        return [*self.before, *question, *self.behind]

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What a chat template writes around a user's turn, the assistant's begun behind it.

    Special tokens are read in the template alone: a question that holds their text does not change its turn.
    """
    if not tokenizer.chat_template:
        raise UnusableError(
            f"data.chat_template=true: the tokenizer {tokenizer.name_or_path!r} has no chat template; take that of an instruct "
            "model, or set data.chat_template=false"
        )
    turn = [{"role": "user", "content": _QUESTION}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, *behind = text.split(_QUESTION)
    if len(behind) != 1:
        raise UnusableError(
            f"data.chat_template=true: the chat template of the tokenizer {tokenizer.name_or_path!r} writes a question "
            f"{len(behind)} times, not once; set data.chat_template=false"
        )
    frame = Frame(tuple(_with_special(tokenizer, before)), tuple(_with_special(tokenizer, behind[0])), is_chat=True)
    whole = _with_special(tokenizer, f"{before}{_QUESTION}{behind[0]}")
    if frame.around(encode_text(tokenizer, _QUESTION)) != whole:
        logger.warning(
            "data.chat_template=true: this tokenizer joins a question with the template around it into other tokens than here, "
            "where each is read by itself; its makers trained the model on the joined ones"
        )
    return frame


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text whose special tokens are read as such; none is added."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, frame: Frame | None = None) -> list[int]:
    """Token ids of the prompt: the question and a newline, behind <bos>; or the question in its chat template."""
    if frame is not None and frame.is_chat:
        return frame.around(encode_text(tokenizer, question))
    return bos_ids(tokenizer) + encode_text(tokenizer, f"{question}\n")


def completion_text(record: Record, answer_prefix: str) -> str:
    """The chain of thought, one block a line, and the answer behind ``answer_prefix``.

    A line of the chain that starts with the mark (a heading) is set off by a space: the answer's is the first that does not.
    """
    heading = _at_line_start(answer_prefix)
    blocks = [heading.sub(r" \g<0>", block) for block in record.blocks]
    return "\n".join([*blocks, f"{answer_prefix} {record.answer}"])


def _at_line_start(mark: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape(mark)}", re.MULTILINE)


def chain_pairs(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], answer_prefix: str
) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids with <eos>) of every record."""
    prompts = encode_stream(tokenizer, (f"{record.question}\n" for record in records))
    completions = encode_stream(tokenizer, (completion_text(record, answer_prefix) for record in records))
    start, eos = bos_ids(tokenizer), int(tokenizer.eos_token_id)
    for prompt, completion in zip(prompts, completions, strict=True):
        yield start + prompt, [*completion, eos]


class FramedPairs(MadeWhenRead[tuple[list[int], list[int]]], Measured):
    """Other pairs with the questions of ``records`` in a chat template for prompts."""

    def __init__(self, records: Sequence[TokenRecord], pairs: Sequence[tuple[list[int], list[int]]], frame: Frame) -> None:
        self._records, self._pairs, self._frame = records, pairs, frame

    def __len__(self) -> int:
        return len(self._pairs)

    def _at(self, place: int) -> tuple[list[int], list[int]]:
        return self._frame.around(self._records[place].question), self._pairs[place][1]

    def length(self, place: int) -> int:
        """Ids of the pair without the template, which is the same for all."""
        return length_of(self._pairs, place)


class CopyPairs(MadeWhenRead[tuple[list[int], list[int]]], Measured):
    """(prompt ids, completion ids) that ask to repeat a sentence: what a frozen decoder must be able to do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[list[int]], chosen: np.ndarray[Any, Any]) -> None:
        """``sentences``: as token ids; ``chosen``: which of them, one after another."""
        self._sentences, self._chosen = sentences, chosen
        self._start, self._newline = bos_ids(tokenizer), encode_text(tokenizer, "\n")
        self._eos = int(tokenizer.eos_token_id)

    def __len__(self) -> int:
        return len(self._chosen)

    def length(self, place: int) -> int:
        """Ids of both."""
        return 2 * length_of(self._sentences, int(self._chosen[place]))

    def _at(self, place: int) -> tuple[list[int], list[int]]:
        ids = self._sentences[int(self._chosen[place])]
        return self._start + ids + self._newline, [*ids, self._eos]


def parse_completion(text: str, answer_prefixes: Sequence[str], programs: bool = False) -> ChainText:
    """Reasoning lines and first answer of a completion; the answer is empty where none was marked.

    ``programs``: answers are programs, of many lines, which may hold a mark, too (:mod:`ladir.data.completions`).
    """
    reasoning, answer = first_answer(text, answer_prefixes, programs)
    return ChainText([line.strip() for line in reasoning.splitlines() if line.strip()], answer or "")
