"""Train a causal LM on questions and their chains of thought: the autoregressive baseline, or a base LM from scratch.

Reads data.train, writes runs/<name>/models/<ar.phase>.  ar.from_scratch=true builds a new LM from backbone.scratch; else training
continues from backbone.name_or_path.  Start it under the deepspeed launcher, torchrun, srun, or plain python (one process);
started again it continues, or finishes at once.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

from collections.abc import Sequence

from training.phases.ar import ar_phase
from training.runtime.distributed import run_as_program
from training.runtime.ending import finished_before
from training.runtime.job import job
from training.runtime.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: config.ar.phase, trains=True) as run:
        if finished_before(run) is None:
            train(run, ar_phase(run.config, run.world, run.stop))


if __name__ == "__main__":
    run_as_program(main)
