"""Train the verifier: a head that foretells from a trajectory's thoughts whether its answer will be right.

First the denoiser is asked (verifier.questions, else data.train) and its answers are judged by the task's checker
(evaluate.task); what it thought is kept in runs/<name>/judged.  Then the head is trained on that, the denoiser stays as it is.
Reads models/denoiser or models/rollout, writes models/verifier, which export.py takes along: rows ladir-best and ladir-weighted,
--choose best, sample.verifier_scale.

Start it under the deepspeed launcher, torchrun, srun, or plain python (one process); started again it continues, or finishes at
once.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import logging
from collections.abc import Sequence
from pathlib import Path

from ladir.config import Config
from training.phases.judged import collect
from training.phases.verifier import verifier_phase
from training.runtime.alone import GiveWay, unbroken
from training.runtime.distributed import run_as_program
from training.runtime.ending import finished_before
from training.runtime.job import job
from training.runtime.loop import train
from training.runtime.run import RunFolder
from training.runtime.stages import last_denoiser

logger = logging.getLogger(__name__)


def judged_denoiser(config: Config, folder: RunFolder, give_way: GiveWay = lambda: None) -> Path:
    """The denoiser whose trajectories are judged.  FileNotFoundError where it was not trained."""
    stage = config.verifier.stage
    found = last_denoiser(folder, give_way=give_way) if stage == "last" else folder.model(stage)
    if not found.is_dir():
        raise FileNotFoundError(f"{found} is not there: run training/train_denoiser.py first (verifier.stage={stage})")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "verifier", trains=True) as run:
        if finished_before(run) is None:
            denoiser = unbroken(run.world, run.stop, lambda give_way: judged_denoiser(run.config, run.folder, give_way))
            judged = collect(run, denoiser)
            if judged is None:
                run.interrupt()
                logger.info("verifier interrupted, what is judged is kept: the same command continues")
            else:
                train(run, verifier_phase(run.config, denoiser, judged))


if __name__ == "__main__":
    run_as_program(main)
