"""Spans: so many blocks are denoised together, each starting ``lag`` passes after the one before it."""

from __future__ import annotations

from collections.abc import Sequence


def num_spans(blocks: int, span: int) -> int:
    """Spans of ``span`` blocks that hold ``blocks`` blocks; the last one may have room for more."""
    return -(-blocks // span)


def with_room(blocks: int, span: int) -> int:
    """Blocks that those spans have room for."""
    return num_spans(blocks, span) * span


def num_passes(steps: int, span: int, lag: int) -> int:
    """Passes in which every block of a span takes its ``steps``; a lag of ``steps`` is one after another."""
    return steps + min(lag, steps) * (span - 1)


def step_schedule(steps: int, span: int, lag: int) -> list[list[tuple[int, int]]]:
    """Per pass which blocks of a span move, and the steps that they take: (block, step)."""
    lag = min(lag, steps)
    starts = [lag * block for block in range(span)]
    return [
        [(block, number - start) for block, start in enumerate(starts) if 0 <= number - start < steps]
        for number in range(num_passes(steps, span, lag))
    ]


def staggered(times: Sequence[float], span: int, lag: int) -> list[list[float]]:
    """Times [passes + 1][span]: every block of a span takes all the ``times`` in its :func:`step_schedule`."""
    last = len(times) - 1
    lag = min(lag, last)
    count = num_passes(last, span, lag) + 1
    return [[times[min(max(number - lag * block, 0), last)] for block in range(span)] for number in range(count)]
