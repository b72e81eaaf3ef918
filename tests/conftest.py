"""Fixtures shared by all tests."""

import signal

from hypothesis import settings

from tests.distributed import one_process, two_processes

__all__ = ["one_process", "two_processes"]

# Tests never assert a time: on a busy machine an example may take any.
settings.register_profile("ladir", deadline=None)
settings.load_profile("ladir")

# A shell starts background commands with SIGINT ignored, and processes inherit that: tests of Ctrl-C would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
