"""Token ids of many texts in little memory, and sequences whose items are made when they are read."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")


class MadeWhenRead(Sequence[T]):
    """A sequence whose items are made when they are read."""

    @abstractmethod
    def _at(self, place: int) -> T:
        """The item at ``place``, from 0 on."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]


class Measured(ABC):
    """Items that know how long each is without its being made.  Shares of equal work are cut by that."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abstractmethod
    def length(self, place: int) -> int:
        """About how many tokens the item at ``place`` is."""

    def lengths(self) -> np.ndarray[Any, Any]:
        """:meth:`length` of all, int64 [n]; at once in those that can."""
        return np.fromiter(map(self.length, range(len(self))), np.int64, len(self))


class TokenLists(MadeWhenRead[list[int]], Measured):
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

    def _at(self, place: int) -> list[int]:
        return self._ids[self._ends[place] : self._ends[place + 1]].tolist()

    def length(self, place: int) -> int:
        """Ids of the list at ``place``."""
        return self._ends[place + 1] - self._ends[place]


@dataclass(frozen=True)
class GroundedSentence:
    """Token ids of a ``sentence``, of the ``prompt`` (its question, as the AR baseline reads it), and of what ``follows`` it."""

    sentence: list[int]
    prompt: list[int]
    follows: list[int]


@dataclass(frozen=True)
class TokenPairs(MadeWhenRead[tuple[list[int], list[int]]], Measured):
    """(prompt ids, completion ids) of many texts."""

    prompts: Sequence[list[int]]
    completions: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def _at(self, place: int) -> tuple[list[int], list[int]]:
        return self.prompts[place], self.completions[place]

    def length(self, place: int) -> int:
        """Ids of both."""
        return length_of(self.prompts, place) + length_of(self.completions, place)

    def lengths(self) -> np.ndarray[Any, Any]:
        """The same of all [n]."""
        return lengths_of(self.prompts) + lengths_of(self.completions)


class Joined(MadeWhenRead[T], Measured):
    """Some sequences end to end."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self._parts, self._starts = parts, [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, place: int) -> T:
        part, within = self._find(place)
        return part[within]

    def length(self, place: int) -> int:
        """Tokens of the item at ``place``."""
        return length_of(*self._find(place))

    def lengths(self) -> np.ndarray[Any, Any]:
        """The same of all [n]."""
        return np.concatenate([lengths_of(part) for part in self._parts])

    def _find(self, place: int) -> tuple[Sequence[T], int]:
        number = bisect_right(self._starts, place) - 1
        return self._parts[number], place - self._starts[number]


def length_of(items: Sequence[Any], place: int) -> int:
    """About how many tokens an item is: without reading it where ``items`` knows, else as many as it has."""
    return items.length(place) if isinstance(items, Measured) else len(items[place])


def lengths_of(items: Sequence[Any]) -> np.ndarray[Any, Any]:
    """:func:`length_of` all items, int64 [n]."""
    return items.lengths().astype(np.int64) if isinstance(items, Measured) else np.fromiter(map(len, items), np.int64, len(items))
