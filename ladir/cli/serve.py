"""python -m ladir serve --model DIR: a server that speaks OpenAI's protocol (/v1/chat/completions, /v1/completions, /v1/models).

/health and /metrics are for those who watch it, the page at / asks and shows thoughts forming.  Needs pip install -r
requirements-serve.txt.  It listens on this machine alone unless --host says otherwise; the environment variable LADIR_KEY is the
key that requests must bring, where it is set.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ladir.arguments import LineParser
from ladir.cli.controls import add_controls, canonical_of, controls_of
from ladir.cli.loading import add_model, be_quiet, load_reasoner

if TYPE_CHECKING:
    from ladir.serve.running import Server

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LADIR_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = LineParser(prog="python -m ladir serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--name", metavar="NAME", help="the model's name in requests; not set: its folder's, or its run's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one (8000)")
    parser.add_argument("--max-trajectories", type=int, default=64, metavar="N", help="trajectories thought at a time (64)")
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests that may wait (256)")
    add_controls(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Serve until a signal asks to stop."""
    server = prepare(build_parser().parse_args(argv))
    server.run()
    return 0 if server.started else 1


def prepare(arguments: argparse.Namespace) -> Server:
    """The server with its model loaded, not listening yet."""
    import fastapi  # noqa: F401 - before the model is loaded: what is not installed is told at once

    from ladir.serve.running import Server

    for name in ("max_trajectories", "max_waiting"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    be_quiet(logging.INFO)
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(arguments.host):
        logger.warning("--host %s: whoever reaches this machine may ask, since %s is not set", arguments.host, KEY_VARIABLE)
    reasoner = load_reasoner(arguments)
    reasoner.settings = reasoner.settings_with(**controls_of(arguments))
    name = arguments.name or _name_of(Path(arguments.model).resolve())
    limits = (arguments.max_trajectories, arguments.max_waiting)
    return Server(reasoner, name, (arguments.host, arguments.port), limits, key, canonical_of(arguments))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(folder: Path) -> str:
    return folder.parent.name if folder.name == "export" else folder.name
