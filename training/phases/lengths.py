"""Whether a phase's longest samples have positions in its LM: looked at when the records are known, before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from ladir.config import Config
from ladir.data.columns import RecordStore
from ladir.data.grounding import GroundedSentences
from ladir.data.prompts import Frame
from ladir.data.token_lists import lengths_of
from ladir.layout import block_length, longest_block
from ladir.models.positions import check_positions, check_room
from ladir.spans import with_room

_COMPLETION = "set a lower evaluate.ar_max_tokens, or leave long questions out (a lower data.max_question_tokens)"
_SHORTER = "leave long ones out (data.on_bad_record=skip with a lower {names})"


def check_sentences(config: Config, lm: PretrainedConfig, marks: int, *sets: Sequence[Any]) -> None:
    """What the VAE reads of the sentences of some ``sets``: its latents, the sentence, and ``marks`` tokens around them; with its
    question and what follows where the decoder learns that.  UnusableError where the LM has no positions for it."""
    vae, names = config.vae, "data.max_block_tokens"
    if vae.objective == "grounded":
        names = "data.max_block_tokens or data.max_question_tokens, or set a lower vae.grounded_tokens"
    read = np.concatenate([_read_of(sentences, vae.grounded_tokens, marks) for sentences in sets])
    check_positions(lm, read + vae.latents_per_block, "sentences with their latents", _SHORTER.format(names=names))


def _read_of(sentences: Sequence[Any], most: int, marks: int) -> np.ndarray:
    """Tokens [n] that are read of some sentences beside their latents."""
    if not isinstance(sentences, GroundedSentences):
        return marks + lengths_of(sentences)
    alone, prompt, follows = sentences.sizes().T
    return np.maximum(marks + alone, prompt + np.minimum(follows, most))


def check_records(config: Config, lm: PretrainedConfig, stores: Sequence[RecordStore | None], frame: Frame) -> None:
    """What the denoiser reads of a record: question, blocks (whole spans of them), <SOA>, answer.  UnusableError as above."""
    span, block = config.denoiser.span, block_length(config.vae.latents_per_block)
    sizes = np.concatenate([store.sizes(span) for store in stores if store is not None])
    question, answer, blocks, *_ = sizes.T
    behind = -(-blocks // span) * span * block + 1 + answer  # a chain's last span may reach beyond its end
    if config.denoiser.context == "text":
        behind = _behind_question(sizes, span, block)
    lengths = len(frame) + question + behind
    names = "data.max_question_tokens, data.max_blocks or data.max_answer_tokens, and encode again"
    check_positions(lm, lengths, "records with their blocks", _SHORTER.format(names=names))
    finished = longest_block(config.vae.latents_per_block, config.sample.max_thought_tokens, config.denoiser.context)
    room = with_room(config.sample.max_blocks, span) * finished
    own = max(store.longest_question for store in stores if store is not None) + room
    most = len(frame) + own + 1 + config.sample.max_answer_tokens
    check_room(lm, most, "the model's own thoughts and answer", "set a lower sample.max_blocks or sample.max_answer_tokens")


def _behind_question(sizes: np.ndarray, span: int, block: int) -> np.ndarray:
    """Positions [N] behind a question where finished blocks stand as text, of records with :meth:`RecordStore.sizes`: up to the
    answer's end, or to that of the last span's noisy copies, ``block`` tokens a block, which begin where the span does."""
    _, answer, blocks, words, of_last = sizes.T
    before_last = np.maximum(blocks - 1, 0) // span * span
    clean = words + blocks * block_length(0) + 1 + answer
    noisy = words - of_last + before_last * block_length(0) + span * block - 1  # no <EOT> has a noisy copy
    return np.maximum(clean, noisy)


def check_chains(
    config: Config, lm: PretrainedConfig, pairs: Sequence[Any], stores: Sequence[RecordStore | None], frame: Frame
) -> None:
    """What the AR LM reads of a record, prompt and chain as text, and writes behind a prompt.  UnusableError as above."""
    lengths = lengths_of(pairs) + (len(frame) if frame.is_chat else 0) - 1  # the last token is predicted alone
    names = "data.max_question_tokens, data.max_blocks or data.max_block_tokens"
    check_positions(lm, lengths, "chains as text", _SHORTER.format(names=names))
    longest = max((store.longest_question for store in stores if store is not None), default=0)
    most = len(frame) + longest + 1 + config.evaluate.ar_max_tokens  # a newline behind the question
    check_room(lm, most, "the longest question with its completion", _COMPLETION)
