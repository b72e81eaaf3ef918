"""What follows every sentence of a chain: what a VAE's decoder learns beside the sentence itself (``vae.objective=grounded``)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ladir.data.prompts import Frame
from ladir.data.token_lists import GroundedSentence, MadeWhenRead
from ladir.tokens import encode_text

if TYPE_CHECKING:
    from ladir.data.columns import TokenRecord


class GroundedSentences(MadeWhenRead[GroundedSentence]):
    """Every block of records with what follows it: the next blocks, a line each, and the answer behind its mark.

    The blocks before it are hidden: whatever of them the rest needs must be in its latents.
    """

    def __init__(
        self, records: Sequence[TokenRecord], tokenizer: PreTrainedTokenizerBase, answer_prefix: str, frame: Frame
    ) -> None:
        self._records, self._frame = records, frame
        self._newline, self._mark = encode_text(tokenizer, "\n"), encode_text(tokenizer, f"{answer_prefix} ")
        self._first = [0, *accumulate(len(record.blocks) for record in records)]

    def __len__(self) -> int:
        return self._first[-1]

    def of(self, record: int) -> list[GroundedSentence]:
        """The blocks of a record."""
        return self[self._first[record] : self._first[record + 1]]

    def length(self, place: int) -> int:
        """Tokens that are read for a sentence."""
        item = self._at(place)
        return 2 * len(item.sentence) + len(item.prompt) + len(item.follows)

    def _at(self, place: int) -> GroundedSentence:
        number = bisect_right(self._first, place) - 1
        record, block = self._records[number], place - self._first[number]
        follows: list[int] = []
        for later in record.blocks[block + 1 :]:
            follows += [*later, *self._newline]
        before = [*self._frame.before, *record.question]
        prompt = [*before, *(self._frame.behind if self._frame.is_chat else self._newline)]
        return GroundedSentence(record.blocks[block], prompt, [*follows, *self._mark, *record.answer])
