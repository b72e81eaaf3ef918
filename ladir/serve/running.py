"""The server as a process: it says where it listens, and when it is asked to stop, so is the model."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ladir.reasoner import Reasoner
from ladir.serve.app import build_app
from ladir.serve.scheduler import Scheduler

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5  # in which clients that were told may read it


class Server(uvicorn.Server):
    """uvicorn, whose connections end at once when it stops: nobody waits for an answer that does not come."""

    def __init__(
        self,
        reasoner: Reasoner,
        name: str,
        address: tuple[str, int],
        limits: tuple[int, int],
        key: str | None,
        canonical: Callable[[str], str],
    ) -> None:
        """``address``: host and port; ``limits``: trajectories at a time, requests that may wait; ``key``: needed where it is
        given; ``canonical``: which answers are the same."""
        self.name, self.scheduler = name, Scheduler(reasoner, *limits, canonical)
        host, port = address
        app = build_app(self.scheduler, name, key)
        super().__init__(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS))

    @property
    def port(self) -> int:
        """Where it listens, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, and a line that says where."""
        await super().startup(sockets)
        if self.started:
            logger.info("%s is served at http://%s:%d (Ctrl-C stops it)", self.name, self.config.host, self.port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: whoever waits is told."""
        self.scheduler.stop()
        super().handle_exit(sig, frame)
