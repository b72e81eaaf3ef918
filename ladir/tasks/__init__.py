"""What a question and a right answer are: one checker per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ladir.data.records import Record


class Task(Protocol):
    """A checker: judges answers and decoded thoughts, and tells different solutions apart."""

    name: str

    def correct(self, answer: str, record: Record) -> bool:
        """Whether the answer text is right for the record.  Never raises on any answer text."""
        ...

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the thoughts alone solve the record; None where the task cannot judge that."""
        ...

    def canonical(self, answer: str) -> str:
        """Normal form of an answer: equal texts are the same solution.  Never raises."""
        ...


def get_task(name: str) -> Task:
    """The task of that name.  Raises ValueError naming the valid ones."""
    from ladir.tasks.countdown import CountdownTask
    from ladir.tasks.maths import MathsTask

    tasks: dict[str, type[Task]] = {"countdown": CountdownTask, "maths": MathsTask}
    if name not in tasks:
        raise ValueError(f"no task {name!r}; valid: {', '.join(tasks)} (evaluate.task)")
    return tasks[name]()
