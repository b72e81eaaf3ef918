"""Which questions are asked."""

from __future__ import annotations

from ladir.config import Config
from ladir.data.records import Record
from ladir.tokens import load_tokenizer
from training.phases.base import read_encoded


def read_questions_asked(config: Config) -> list[Record]:
    """The records of the split, as many as are asked."""
    path = config.data.test if config.evaluate.split == "test" else config.data.validation
    if path is None:
        raise FileNotFoundError(f"data.{config.evaluate.split} is not set: name the records to evaluate on")
    encoded = read_encoded(config, path, load_tokenizer(config.backbone))[: config.evaluate.num_questions]
    return [entry.record for entry in encoded]
