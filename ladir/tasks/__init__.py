"""What a question and a right answer are: one checker per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ladir.config import EvaluateSettings
from ladir.data.records import Record
from ladir.tasks.verdict import Verdict


class Task(Protocol):
    """A checker: judges answers and decoded thoughts, and tells different solutions apart."""

    name: str

    def check(self, record: Record) -> None:
        """Raise UnusableError where the record lacks what answers are judged by."""
        ...

    def verdict(self, answer: str, record: Record) -> Verdict:
        """Whether the answer text is right for the record, or why not.  Never raises on any answer text, and ends on any."""
        ...

    def unread(self, record: Record) -> bool:
        """Whether the record's own answer cannot be read, so that its very text alone is right and others are undecided."""
        ...

    def chain_correct(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the thoughts alone solve the record; None where the task cannot judge that."""
        ...

    def lenient(self, thoughts: Sequence[str], record: Record) -> bool | None:
        """Whether the thoughts pass the looser rule of the task's published figures; None where there is none."""
        ...

    def agrees(self, thoughts: Sequence[str], answer: str) -> bool | None:
        """Whether the thoughts lead to this answer, right or wrong; None where the task cannot tell.  Never raises."""
        ...

    def canonical(self, answer: str) -> str:
        """Normal form of an answer: equal texts are the same solution.  Never raises."""
        ...


def get_task(name: str, settings: EvaluateSettings | None = None) -> Task:
    """The task of that name, within the limits of ``settings`` (not given: the defaults).  Raises ValueError naming the
    valid ones, UnusableError (one, too) where this machine cannot judge its answers safely."""
    from ladir.tasks.code import isolated_code_task
    from ladir.tasks.countdown import CountdownTask
    from ladir.tasks.maths import MathsTask
    from ladir.tasks.sandbox import Limits

    settings = settings or EvaluateSettings()
    seconds, memory = settings.check_seconds, settings.check_memory_mb << 20
    tasks: dict[str, Callable[[], Task]] = {
        "countdown": CountdownTask,
        "maths": lambda: MathsTask(seconds, memory, settings.tolerance),
        "code": lambda: isolated_code_task(Limits(seconds=seconds, memory=memory), settings.isolation),
    }
    if name not in tasks:
        raise ValueError(f"no task {name!r}; valid: {', '.join(tasks)} (evaluate.task)")
    return tasks[name]()
