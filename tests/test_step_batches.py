"""Batches made ahead: the same by a thread and by processes, from any place on; nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy_phase import ToyPhase
from training.runtime.distributed import World
from training.runtime.sampler import DataOrder
from training.runtime.step_batches import StepBatch, StepBatchLoader

ROOT = Path(__file__).resolve().parents[1]

#: a training that is asked to stop, process group and all, goes on, and then fails or goes on for ever
PROGRAM = """
import os, signal, sys
from tests.test_step_batches import loader
from training.runtime.preemption import StopRequest
with StopRequest("USR1") as stop, loader(processes=2) as made:
    for number, step_batch in enumerate(made):
        if number == 3:
            for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.killpg(0, sent)
        if number == 30:
            assert stop.requested
            print("running", flush=True)
            if sys.argv[1] == "fails":
                raise RuntimeError("as intended")
"""


def loader(consumed: int = 0, processes: int = 0, phase: ToyPhase | None = None) -> StepBatchLoader:
    """Global batches of 8 in micro batches of 4, of rank 1 of 2."""
    world = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    phase = phase or ToyPhase()
    return StepBatchLoader(phase, DataOrder(phase.num_samples, 8, seed=0), consumed, world, 4, processes)


def content(step_batch: StepBatch) -> list[object]:
    """What a batch holds, but for the time it took."""
    return [step_batch.numbers, [(batch.sample_ids, batch.inputs.tolist()) for batch in step_batch.batches]]


def first(count: int, consumed: int, processes: int) -> list[list[object]]:
    with loader(consumed, processes) as made:
        return [content(step_batch) for step_batch, _ in zip(made, range(count), strict=False)]


@settings(max_examples=8, deadline=None)
@given(start=st.integers(0, 9).map(lambda steps: 8 * steps), processes=st.integers(1, 3))
def test_processes_and_the_thread_make_the_same_batches_from_any_step(start: int, processes: int) -> None:
    expected = first(5, start, 0)
    assert first(5, start, processes) == expected
    assert first(4, start + 8, processes) == expected[1:]


def error_of(made: StepBatchLoader) -> str:
    """What the error says that ends them."""
    try:
        with made:
            for _ in made:
                pass
    except ValueError:
        return traceback.format_exc()
    return ""


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_names_the_samples_and_leaves_no_process(processes: int) -> None:
    phase, others = ToyPhase(), multiprocessing.active_children()

    def refuse(numbers: list[int]) -> None:
        if 20 in numbers:
            raise ValueError("torn sample")

    phase.before_collate = refuse
    told = error_of(loader(processes=processes, phase=phase))
    assert "torn sample" in told and "while samples [" in told
    assert set(multiprocessing.active_children()) == set(others)


def program(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT, start_new_session=True
    )


def test_signals_to_all_processes_stop_none_that_make_batches_and_a_failing_training_ends_them() -> None:
    with program("fails") as training:
        out, err = training.communicate(timeout=120)
    assert out == b"running\n" and b"RuntimeError: as intended" in err and b"DataLoader" not in err
    assert training.returncode == 1


def test_a_killed_training_leaves_no_process_behind() -> None:
    with program("goes on") as training:
        assert training.stdout is not None and training.stdout.readline() == b"running\n"
        makers = psutil.Process(training.pid).children(recursive=True)
        training.kill()
    assert len(makers) >= 2
    end = time.monotonic() + 60
    while any(maker.is_running() and maker.status() != psutil.STATUS_ZOMBIE for maker in makers):
        assert time.monotonic() < end, "processes that make batches outlive their training"
        time.sleep(0.2)
