"""A task for tests of what stands around one."""

from __future__ import annotations

from collections.abc import Sequence

from ladir.data.records import Record


class Judge:
    """A task without opinions."""

    name = "none"

    def check(self, record: Record) -> None:
        pass

    def correct(self, answer: str, record: Record) -> bool:
        return False

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        return None

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        return None

    def canonical(self, answer: str) -> str:
        return answer
