"""How much of a training's time may go into what is only looked at."""

from __future__ import annotations

from collections.abc import Mapping


class Allowance:
    """A ``share`` of the training's seconds; the first time is free, since nobody knows what it costs.

    It goes by figures that all ranks have agreed on.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._spent = self._last = 0.0

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"spent": self._spent, "last": self._last}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self._spent, self._last = state.get("spent", 0.0), state.get("last", 0.0)

    def covers(self, seconds: float) -> bool:
        """Whether as much as the last time is left after ``seconds`` of training."""
        return self._last == 0 or self._spent + self._last <= self._share * seconds

    def took(self, seconds: float) -> None:
        """So long it took this time."""
        self._spent, self._last = self._spent + seconds, seconds
