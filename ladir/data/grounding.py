"""What follows every sentence of a chain: what a VAE's decoder learns beside the sentence itself (``vae.objective=grounded``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ladir.data.prompts import Frame
from ladir.data.token_lists import GroundedSentence, MadeWhenRead, Measured, lengths_of
from ladir.tokens import encode_text

if TYPE_CHECKING:
    from ladir.data.token_store import TokenStore


class GroundedSentences(MadeWhenRead[GroundedSentence], Measured):
    """Every block of records with what follows it: the next blocks, a line each, and the answer behind its mark.

    The blocks before it are hidden: whatever of them the rest needs must be in its latents.
    """

    def __init__(self, records: TokenStore, tokenizer: PreTrainedTokenizerBase, answer_prefix: str, frame: Frame) -> None:
        self._records, self._frame = records, frame
        self._newline, self._mark = encode_text(tokenizer, "\n"), encode_text(tokenizer, f"{answer_prefix} ")
        self._behind = frame.behind if frame.is_chat else self._newline
        self._around = len(frame.before) + len(self._behind)
        self._first = np.concatenate([[0], records.sizes(1)[:, 2].cumsum()])

    def __len__(self) -> int:
        return int(self._first[-1])

    def sizes(self) -> np.ndarray[Any, Any]:
        """Tokens of a sentence, of its prompt, and of what follows, of every one [n, 3]; none of them is read."""
        question, answer, counts, *_ = self._records.sizes(1).T
        sentence = lengths_of(self._records.blocks)
        lines = np.concatenate([[0], (sentence + len(self._newline)).cumsum()])
        later = lines[self._first[1:]].repeat(counts) - lines[1:]
        return np.stack(
            [sentence, (question + self._around).repeat(counts), later + (len(self._mark) + answer).repeat(counts)], 1
        )

    def of(self, record: int) -> list[GroundedSentence]:
        """The blocks of a record."""
        return self[self._first[record] : self._first[record + 1]]

    def length(self, place: int) -> int:
        """Tokens that are read for a sentence."""
        item = self._at(place)
        return 2 * len(item.sentence) + len(item.prompt) + len(item.follows)

    def _at(self, place: int) -> GroundedSentence:
        number = int(self._first.searchsorted(place, side="right")) - 1
        record, block = self._records[number], place - int(self._first[number])
        follows: list[int] = []
        for later in record.blocks[block + 1 :]:
            follows += [*later, *self._newline]
        prompt = [*self._frame.before, *record.question, *self._behind]
        return GroundedSentence(record.blocks[block], prompt, [*follows, *self._mark, *record.answer])
