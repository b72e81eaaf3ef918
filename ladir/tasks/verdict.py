"""What a checker says of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Right or wrong, and why."""

    right: bool
    reason: str = ""
    """Why it is not right, in a few words; may be empty."""
    undecided: bool = False
    """Whether the checker came to no end or could not read the answer: it counts as wrong, and is counted apart as well."""

    def __post_init__(self) -> None:
        if self.right and self.undecided:
            raise ValueError("an answer that is right is decided")
