"""Token ids kept in one array read as the lists they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.data.encode import EncodedRecord, EncodedRecords
from ladir.data.records import Record
from ladir.data.token_lists import Joined, TokenLists, TokenPairs

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
SLICES = st.slices(12)


@given(lists=st.lists(IDS, max_size=12), places=SLICES)
def test_lists_read_as_they_were_put_in(lists: list[list[int]], places: slice) -> None:
    kept = TokenLists(tuple(ids) for ids in lists)
    assert (len(kept), list(kept), kept[places]) == (len(lists), lists, lists[places])
    assert [kept[-place] for place in range(1, len(lists) + 1)] == lists[::-1]
    assert bool(kept) == bool(lists)
    for beyond in (len(lists), -len(lists) - 1):
        with pytest.raises(IndexError):
            kept[beyond]


@given(pairs=st.lists(st.tuples(IDS, IDS), max_size=12), places=SLICES)
def test_pairs_read_as_they_were_put_in(pairs: list[tuple[list[int], list[int]]], places: slice) -> None:
    kept = TokenPairs(*(TokenLists(pair[side] for pair in pairs) for side in (0, 1)))
    assert (len(kept), list(kept), kept[places]) == (len(pairs), pairs, pairs[places])


@given(records=st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4), IDS), max_size=12), places=SLICES)
def test_records_read_as_they_were_put_in(records: list[tuple[list[int], list[list[int]], list[int]]], places: slice) -> None:
    made, kept = [], EncodedRecords()
    for number, (question, blocks, answer) in enumerate(records):
        text = Record("q", tuple("b" for _ in blocks), "a", f"file:{number}")
        made.append(EncodedRecord(question, blocks, answer, text))
        kept.append(made[-1])
    assert (len(kept), list(kept), kept[places]) == (len(made), made, made[places])


def test_an_id_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        TokenLists([[2**31]])


def test_lengths_are_known_without_reading() -> None:
    lists = TokenLists([[1, 2], [], [3]])
    pairs = TokenPairs(lists, [[4], [5, 6], [7]])
    both: Joined[tuple[list[int], list[int]]] = Joined(pairs, pairs)
    assert [lists.length(i) for i in range(3)] == [2, 0, 1]
    assert [both.length(i) for i in range(6)] == [3, 2, 2] * 2
