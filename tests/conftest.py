"""Fixtures shared by all tests."""

from tests.distributed import one_process, two_processes

__all__ = ["one_process", "two_processes"]
