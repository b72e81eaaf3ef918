"""What the commands that ask a model do before: be quiet about libraries, load it."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ladir.reasoner import Reasoner


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and where it thinks."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder written by training/export.py")
    parser.add_argument("--base", metavar="DIR", help="the LM under the model's LoRA adapters, where it has moved")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; not set: CUDA where there is one")


def be_quiet(level: int = logging.WARNING) -> None:
    """Log warnings to stderr, of the commands lines from ``level`` on, and nothing that libraries say about one another."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="ladir: %(message)s", stream=sys.stderr)
    for name in ("ladir.cli", "ladir.serve"):
        logging.getLogger(name).setLevel(level)


def load_reasoner(arguments: argparse.Namespace, local: int = 0) -> Reasoner:
    """The model; where several processes share a machine and no device is named, number ``local`` takes a GPU of its own."""
    import torch

    from ladir.reasoner import Reasoner

    device = arguments.device
    if device is None and local and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    return Reasoner.from_pretrained(arguments.model, device=device, base=arguments.base)
