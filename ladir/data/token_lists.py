"""Token ids of many texts in little memory: every rank holds those of all records."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload


class TokenLists(Sequence[list[int]]):
    """Lists of token ids, one behind the other in one array: four bytes an id, where a Python list takes up to 36."""

    def __init__(self, lists: Iterable[Iterable[int]] = ()) -> None:
        self._ids, self._ends = array("i"), array("q", [0])
        for ids in lists:
            self.append(ids)

    def append(self, ids: Iterable[int]) -> None:
        """Add a list at the end."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]

    def _at(self, place: int) -> list[int]:
        return self._ids[self._ends[place] : self._ends[place + 1]].tolist()


@dataclass(frozen=True)
class TokenPairs(Sequence[tuple[list[int], list[int]]]):
    """(prompt ids, completion ids) of many texts."""

    prompts: TokenLists
    completions: TokenLists

    @staticmethod
    def of(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> TokenPairs:
        """All of ``pairs``, which are taken one by one."""
        made = TokenPairs(TokenLists(), TokenLists())
        for prompt, completion in pairs:
            made.prompts.append(prompt)
            made.completions.append(completion)
        return made

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> tuple[list[int], list[int]]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[list[int], list[int]]]: ...

    def __getitem__(self, index: int | slice) -> tuple[list[int], list[int]] | list[tuple[list[int], list[int]]]:
        if isinstance(index, slice):
            return list(zip(self.prompts[index], self.completions[index], strict=True))
        return self.prompts[index], self.completions[index]
