"""Train the denoiser on its own thoughts and answers: stage 3, reinforcement learning; with rl.policy=text the AR baseline.

Asks the questions of data.train (or rl.questions; no reasoning is needed), judges the answers as evaluate.task says, and learns.
Reads runs/<name>/latents, models/vae, and models/rollout or models/denoiser; writes models/rl, which export.py then prefers.
The AR baseline (rl.policy=text) goes on from models/ar; it is written to models/ar-rl.

Start it under the deepspeed launcher, torchrun, srun, or plain python (one process); started again it continues, or finishes at
once.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

from collections.abc import Sequence

from training.phases.rl import rl_phase
from training.phases.rl_text import rl_text_phase
from training.runtime.distributed import run_as_program
from training.runtime.ending import finished_before
from training.runtime.job import job
from training.runtime.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "ar-rl" if config.rl.policy == "text" else "rl", trains=True) as run:
        if finished_before(run) is None:
            build = rl_text_phase if run.phase == "ar-rl" else rl_phase
            train(run, build(run.config, run.world, run.stop))


if __name__ == "__main__":
    run_as_program(main)
