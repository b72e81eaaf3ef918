"""Ports of this machine, in plain sockets: launchers' helpers ask, too, which load no PyTorch."""

from __future__ import annotations

import errno
import socket


def is_taken(port: int) -> bool:
    """Whether another process of this machine listens at ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that an ended job has left behind is free
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
