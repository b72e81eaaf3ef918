"""Two real processes joined by gloo, kept alive over many tests because starting one costs seconds.

``two_processes.run(function, *args)`` calls ``function(world, *args)`` on both and returns both results; the function must
be importable (module level) and its arguments and results picklable.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

NUM_PROCESSES = 2
#: that joining may take: libraries load slowly on a busy machine, and what a test allows its function is not for that
_START_SECONDS = 240


class ProcessError(AssertionError):
    """A function raised on some rank, died or hung; the message holds every rank's traceback."""


class ProcessGroup:
    """Worker processes that execute functions together; restarted after a failure."""

    def __init__(self, size: int = NUM_PROCESSES) -> None:
        self.size = size
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """Results by rank.  Raises :class:`ProcessError` when any rank raises or does not answer in ``timeout`` seconds, which
        begin when all have joined."""
        answers = self.outcomes(function, *args, timeout=timeout)
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if errors:
            raise ProcessError("\n".join(errors))
        return [value for value, _ in answers]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 180) -> list[tuple[Any, str | None]]:
        """Like :meth:`run`, but (result, traceback or None) by rank, for functions that are meant to fail."""
        try:
            if not self._workers:
                self._start()
            for pipe in self._pipes:
                pipe.send((function, args))
            end = time.monotonic() + timeout
            answers = [self._answer(rank, end - time.monotonic()) for rank in range(self.size)]
        except BaseException:  # such as pytest's own limit: what they answer later is not the next test's
            self.close()
            raise
        if any(error for _, error in answers):
            self.close()  # collectives may be out of step
        return answers

    def _answer(self, rank: int, timeout: float) -> tuple[Any, str | None]:
        if not self._pipes[rank].poll(max(timeout, 0.1)):
            os.kill(self._workers[rank].pid, signal.SIGUSR1)  # it writes where it stands to its stderr
            time.sleep(0.5)
            return None, "no answer in time"
        try:
            value, error = self._pipes[rank].recv()
        except EOFError:
            return None, "the process died"
        return value, error

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, rank, self.size, port))  # no daemon: those have no children
            with _environment(OMP_NUM_THREADS="1"):  # read while libraries load, before any of our code runs
                worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        end = time.monotonic() + _START_SECONDS
        errors = [self._answer(rank, end - time.monotonic())[1] for rank in range(self.size)]
        if any(errors):
            raise ProcessError(f"the processes have not joined: {errors}")

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    """A worker's life: join the group, then execute what comes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **address})
    import torch

    from ladir.config import DeepSpeedSettings
    from training.runtime.distributed import start

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    world = start(DeepSpeedSettings(timeout_minutes=3, start_seconds=_START_SECONDS))
    pipe.send((None, None))  # has joined
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            sys.exit(0)
        try:
            pipe.send((function(world, *args), None))
        except Exception:  # reported to the test, whatever it is
            pipe.send((None, traceback.format_exc()))


@pytest.fixture(scope="session")
def two_processes() -> Iterator[ProcessGroup]:
    """Two processes under one DeepSpeed process group (gloo), ready for many functions."""
    group = ProcessGroup()
    yield group
    group.close()


@pytest.fixture(scope="session")
def one_process() -> Iterator[ProcessGroup]:
    """One process with a DeepSpeed process group of its own."""
    group = ProcessGroup(1)
    yield group
    group.close()
