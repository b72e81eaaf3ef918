"""Encode every block of the training and validation records with the trained VAE.

Reads runs/<name>/models/vae, writes runs/<name>/latents/{train,validation}.  All ranks encode; started again it continues with
the part after the last one that is written, or finishes at once unless the VAE has changed or a file is damaged.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import logging
from collections.abc import Sequence

from training.phases.latents import encode
from training.runtime.distributed import run_as_program
from training.runtime.job import job

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "latents") as run:
        if not encode(run):
            run.interrupt()
            logger.info("latents interrupted, what is encoded is kept: the same command continues")


if __name__ == "__main__":
    run_as_program(main)
