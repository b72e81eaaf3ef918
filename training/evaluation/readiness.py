"""What an evaluation needs is there: looked for before anything is read or loaded."""

from __future__ import annotations

import logging

from training.evaluation.rows import PHASES, model_of, sampling_of
from training.runtime.run import Run

logger = logging.getLogger(__name__)


def check_snapshot(run: Run) -> None:
    """FileNotFoundError where a model of the asked training step, or what its training said of it, is missing."""
    step, folder = run.config.evaluate.snapshot, run.folder
    models = dict.fromkeys(model_of(sampling_of(method)[0]) for method in run.config.evaluate.methods if step is not None)
    for phase in [PHASES[model][-1] for model in models if model != "rollout"]:
        name = folder.snapshot(phase, step)
        if missing := [str(path) for path in (folder.model(name), folder.outcome_file(name)) if not path.exists()]:
            found = [path.name.removeprefix(f"{phase}-") for path in folder.model(phase).parent.glob(f"{phase}-*")]
            kept = sorted(int(number) for number in found if number.isdecimal() and folder.outcome(f"{phase}-{number}"))
            raise FileNotFoundError(
                f"there is no snapshot of step {step}: {' and '.join(missing)} missing; kept are the steps {kept or 'none'}; set "
                f"{phase}.train.snapshot_every in training, or ask for the other model's evaluate.methods only"
            )


def is_trained(run: Run, method: str) -> bool:
    """False for the one method that is part of the default table and of which a run may have no model."""
    rollout = run.folder.model(run.folder.snapshot("rollout", run.config.evaluate.snapshot))
    trained = model_of(sampling_of(method)[0]) != "rollout" or rollout.is_dir()
    if not run.world.broadcast(trained):
        logger.info("%s: left out, %s was not trained", method, rollout)
        return False
    return True
