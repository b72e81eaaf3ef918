"""Fixtures shared by all tests."""

from hypothesis import settings

from tests.distributed import one_process, two_processes

__all__ = ["one_process", "two_processes"]

# Tests never assert a time: on a busy machine an example may take any.
settings.register_profile("ladir", deadline=None)
settings.load_profile("ladir")
