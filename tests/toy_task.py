"""A task for tests of what stands around one."""

from __future__ import annotations

from collections.abc import Sequence

from ladir.data.records import Record
from ladir.tasks.verdict import Verdict


class Judge:
    """A task without opinions."""

    name = "none"

    def check(self, record: Record) -> None:
        pass

    def verdict(self, answer: str, record: Record) -> Verdict:
        return Verdict(False)

    def unread(self, record: Record) -> bool:
        return False

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        return None

    def lenient(self, thoughts: Sequence[str], record: Record) -> bool | None:
        return None

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        return None

    def canonical(self, answer: str) -> str:
        return answer
