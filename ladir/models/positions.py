"""How long a text an LM has positions for: known by its config, and held against lengths before weights are read."""

from __future__ import annotations

import logging

import numpy as np
from transformers import PretrainedConfig

from ladir.errors import UnusableError
from ladir.models.architectures import has_position_table

logger = logging.getLogger(__name__)


def position_limit(lm: PretrainedConfig) -> int | None:
    """``max_position_embeddings`` of an LM; None where its config names none."""
    limit = getattr(lm.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def check_positions(lm: PretrainedConfig, lengths: np.ndarray, what: str, remedy: str) -> None:
    """UnusableError where texts of ``lengths`` [n] tokens are longer than an LM's table of positions; a warning where its
    positions are rotary, which go on, but were not trained there.

    ``what``: the texts in words; ``remedy``: what to set.
    """
    limit = position_limit(lm)
    if limit is None or (longer := int((lengths > limit).sum())) == 0:
        return
    told = f"{longer} of {len(lengths)} {what} are longer than the {limit} positions of the LM ({lm.model_type}): the longest "
    told += f"takes {int(lengths.max())}"
    if has_position_table(lm):
        raise UnusableError(f"{told}. Its positions are a table, with none behind the last; {remedy}, or take an LM with more")
    logger.warning("%s. Its rotary positions go on, but were not trained there; %s", told, remedy)


def check_room(lm: PretrainedConfig, most: int, what: str, remedy: str) -> None:
    """UnusableError where ``what`` is made may come to the end of an LM's table of positions; ``most``: with all before it."""
    limit = position_limit(lm)
    if limit is not None and most > limit and has_position_table(lm):
        raise UnusableError(
            f"{what} may take {most} positions, but those of this LM ({lm.model_type}) are a table of {limit}; {remedy}"
        )


def room_left(lm: PretrainedConfig, before: int, wanted: int) -> int:
    """How many of ``wanted`` tokens an LM has positions for behind ``before`` others."""
    limit = position_limit(lm)
    return max(limit - before, 1) if limit is not None and before + wanted > limit and has_position_table(lm) else wanted
