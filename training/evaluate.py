"""Ask the held-out questions and judge the answers: LaDiR beside the autoregressive baseline, in one table.

Reads runs/<name>/export, models/ar and models/rollout, writes runs/<name>/results.json and generations.jsonl; with
evaluate.name=NAME results-NAME.json and generations-NAME.jsonl, for other controls of the same models, with
evaluate.snapshot=STEP results-STEP.json (results-NAME-STEP.json) for models of that training step (train.snapshot_every).
Before a model is loaded all models and files are looked for, and the records' own answers are judged (kept in gold.json).
Questions are split over the ranks; answers are kept as they come, so that a stopped evaluation continues where it was.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

from collections.abc import Sequence

from training.evaluation.stages import evaluate
from training.runtime.distributed import run_as_program
from training.runtime.job import job


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with job(argv, __doc__ or "", lambda config: "evaluate") as run:
        evaluate(run)


if __name__ == "__main__":
    run_as_program(main)
