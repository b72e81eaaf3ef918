"""How a record reads as plain text, for the autoregressive baseline: question, reasoning line by line, answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ladir.data.completions import first_answer
from ladir.data.records import Record
from ladir.data.token_lists import MadeWhenRead, length_of
from ladir.tokens import encode_stream, encode_text


@dataclass(frozen=True)
class ChainText:
    """A completion taken apart: reasoning lines, and the answer where one was marked."""

    thoughts: list[str]
    answer: str


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that start a text under this tokenizer: its <bos>, where it has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of the prompt: the question and a newline, behind <bos>."""
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


class CopyPairs(MadeWhenRead[tuple[list[int], list[int]]]):
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
