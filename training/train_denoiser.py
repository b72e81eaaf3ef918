"""Train the denoiser on the stored latents (stage 1: teacher forcing, all blocks and noise draws in one pass).

Reads runs/<name>/latents and models/vae, writes runs/<name>/models/denoiser.  Start it under the deepspeed launcher, torchrun,
srun, or plain python (one process); started again it continues, or finishes at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.phases import denoiser_phase
from training.runtime.job import job
from training.runtime.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "denoiser") as run:
        if run.outcome is None:
            train(run, denoiser_phase(run.config, run.world))


if __name__ == "__main__":
    main()
