"""The verifier as the train loop sees it: a head on judged trajectories, beside a denoiser that stays as it is."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ladir.config import Config
from ladir.data.judged import JudgedStore, collate_judged
from ladir.errors import UnusableError
from ladir.models.store import heads_fingerprint
from ladir.models.verifier import Renoise, Verifier, save_verifier
from training.phases.base import Samples, TrainingPhase
from training.phases.judged import judged_trajectories

logger = logging.getLogger(__name__)


def verifier_phase(config: Config, denoiser: Path, judged: Path) -> TrainingPhase:
    """A new head on the trajectories of ``denoiser`` in the folder ``judged``.

    UnusableError where their answers are all right or all wrong.
    """
    trajectories = judged_trajectories(judged)
    items, held_out = split_by_question(trajectories, config.verifier.held_out)
    right = int(items.right.sum())
    logger.info("judged trajectories: %d to learn from, %d of them right; %d held out", len(items), right, len(held_out))
    if not 0 < right < len(items):
        raise UnusableError(
            f"{judged}: of {len(items)} judged trajectories {right} are right: there is nothing to tell apart; ask harder or "
            "easier questions (verifier.questions), or more of them (verifier.num_questions)"
        )
    sample = config.sample
    renoise = Renoise(sample.renoise_time, sample.renoise_steps) if config.verifier.drift else None
    model = Verifier(items[0].states.shape[1], config.verifier.width, renoise)
    fingerprint = heads_fingerprint(denoiser)
    return TrainingPhase(
        items=items,
        collator=collate_judged,
        name="verifier",
        model=model,
        weights={"verifier": 1.0, "value": config.verifier.value_weight},
        validation=Samples(held_out, collate_judged) if held_out else None,
        write=lambda folder, state: save_verifier(model, folder, fingerprint, state),
    )


def split_by_question(trajectories: JudgedStore, share: float) -> tuple[JudgedStore, JudgedStore]:
    """Trajectories to learn from, and those of the last ``share`` of the questions: none has some in both."""
    numbers = trajectories.question.unique()  # in order
    kept = torch.isin(trajectories.question, numbers[: len(numbers) - round(share * len(numbers))])
    return trajectories.chosen(kept), trajectories.chosen(~kept)
