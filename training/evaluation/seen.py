"""Whether questions that are asked were trained on: what is right of such ones may be known by heart."""

from __future__ import annotations

import logging

import numpy as np

from ladir.data.latents import LatentStore
from ladir.data.question_store import Questions
from ladir.errors import UnusableError
from training.runtime.run import Run

logger = logging.getLogger(__name__)


def count_seen(run: Run, questions: Questions) -> int:
    """How many of ``questions`` have the tokens of one in the run's encoded training records, which is told (rank 0).

    0 where the run has none, or torn ones.
    """
    try:
        trained = LatentStore.open(run.folder.latents / "train")
    except (FileNotFoundError, UnusableError):
        return 0
    found = np.flatnonzero(np.isin(questions.ids, trained.question_digests()))
    if len(found):
        logger.warning(
            "%d of %d questions were trained on, the first at %s (the training records of %s have them, too): what is right of "
            "them may be known by heart; ask others (data.%s)",
            len(found),
            len(questions),
            questions[int(found[0])].source,
            trained.folder,
            run.config.evaluate.split,
        )
    return len(found)
