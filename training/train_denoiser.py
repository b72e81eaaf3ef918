"""Train the denoiser on the stored latents.

Stage 1 (stage=teacher): all blocks and noise draws behind the true blocks, in one pass.  Reads runs/<name>/latents and
models/vae, writes models/denoiser.  Stage 2 (stage=rollout): the answer through blocks that the model generates itself.  Reads
models/denoiser, too, writes models/rollout, which export.py then prefers.  Jointly (stage=joint, in place of stage 1): VAE and
denoiser in the same steps, from models/vae on; models/denoiser then holds its own VAE, on which the end reports as
encode_latents does, and there is no stage 2.

Start it under the deepspeed launcher, torchrun, srun, or plain python (one process); started again it continues, or finishes at
once.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import logging
from collections.abc import Callable, Sequence

from ladir.config import Config
from training.phases.base import TrainingPhase
from training.phases.denoiser import denoiser_phase
from training.phases.joint import joint_phase, report_joint
from training.phases.rollout import rollout_phase
from training.runtime.distributed import World, run_as_program
from training.runtime.ending import finished_before
from training.runtime.job import job
from training.runtime.loop import train
from training.runtime.preemption import StopRequest

logger = logging.getLogger(__name__)

Build = Callable[[Config, World, StopRequest], TrainingPhase]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "rollout" if config.stage == "rollout" else "denoiser", trains=True) as run:
        if finished_before(run) is None:
            build: dict[str, Build] = {"teacher": denoiser_phase, "joint": joint_phase, "rollout": rollout_phase}
            train(run, build[run.config.stage](run.config, run.world, run.stop))
        if run.config.stage == "joint" and not run.interrupted and not report_joint(run):
            run.interrupt()
            logger.info("denoiser interrupted, its model is kept, the report on its VAE is not: the same command continues")


if __name__ == "__main__":
    run_as_program(main)
