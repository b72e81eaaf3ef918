"""Command lines whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class LineParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments, and not how all of them are written: that is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")
