"""Signs of life, as one process sees them (the others: :mod:`tests.test_loop`)."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from training.runtime.distributed import World
from training.runtime.heartbeat import SAMPLES_READ, Heartbeat


def test_an_overdue_beat_is_reported_once_with_rank_step_and_samples(caplog: pytest.LogCaptureFixture) -> None:
    heartbeat = Heartbeat(World(0, 1, 0, torch.device("cpu")), "vae")
    assert heartbeat.where() == "phase vae, rank 0, its start"
    with caplog.at_level(logging.ERROR):
        heartbeat.watch(every_seconds=0.01)
        heartbeat.beat(7, SAMPLES_READ, [[3, 4]])
        time.sleep(0.05)
        assert caplog.messages == []
        heartbeat.expect_within(minutes=0.001)
        end = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        heartbeat.end()
    (message,) = caplog.messages
    assert "phase vae, rank 0, step 7 (samples read), samples [[3, 4]]: nothing has happened for 0.001 minutes" in message
    assert "step_timeout_minutes" in message
