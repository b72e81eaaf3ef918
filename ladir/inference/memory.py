"""How many trajectories fit into the free memory at once."""

from __future__ import annotations

import psutil
import torch

from ladir.config import SampleSettings
from ladir.layout import block_length
from ladir.models.backbone import Backbone
from ladir.models.denoiser import Denoiser
from ladir.models.vae import ThoughtDecoder

#: of the free memory; the rest is for what is not counted here, and for what others take meanwhile
_SHARE = 0.5
#: keys and values lie there twice for a moment where a row is added to, or others leave the batch
_COPIES = 2
#: fp32 tables of the vocabulary's size that are there together when a token is drawn
_TABLES = 4


def trajectories_that_fit(
    denoiser: Denoiser,
    settings: SampleSettings,
    question_tokens: int,
    device: torch.device,
    decoder: ThoughtDecoder | None = None,
) -> int:
    """The most trajectories, one at least, that half of the free memory of ``device`` holds, each as long as it may become."""
    return max(int(_SHARE * free_bytes(device) / trajectory_bytes(denoiser, settings, question_tokens, decoder)), 1)


def trajectory_bytes(
    denoiser: Denoiser, settings: SampleSettings, question_tokens: int, decoder: ThoughtDecoder | None = None
) -> int:
    """Memory of a trajectory of the longest chain and answer, behind a question that it does not share: keys and values, a
    pass's activations in one layer, and the tables of the vocabulary's size by which a token is drawn.

    ``decoder``: what reads finished blocks as text before the next ones; None: nothing does.
    """
    backbone = denoiser.backbone
    config, itemsize = backbone.base.config.get_text_config(), backbone.dtype.itemsize
    block = block_length(denoiser.latents_per_block)
    finished = denoiser.longest_block(settings.max_thought_tokens)
    length = question_tokens + settings.max_blocks * finished + 1 + settings.max_answer_tokens
    cache = length * _token_bytes(backbone)
    width = max(denoiser.settings.span * block, finished)  # of a denoising step, or of a sentence that is added
    step = width * (config.num_attention_heads * length + 8 * config.hidden_size) * itemsize
    branches = 2 if settings.guidance_scale != 1 else 1
    reading = _COPIES * cache if settings.lm_weight else 0  # the LM writes along from a copy
    drawn = 1
    if decoder is not None:  # beside that cache, behind every block's latents
        drawn = 1 if settings.lag or settings.lm_weight else denoiser.settings.span  # blocks of a line that are read at once
        sentence = denoiser.latents_per_block + decoder.marks + settings.max_thought_tokens
        reading += drawn * _COPIES * sentence * _token_bytes(decoder.backbone)
    return branches * (_COPIES * cache + step) + reading + drawn * _TABLES * 4 * backbone.vocab_size


def _token_bytes(backbone: Backbone) -> int:
    """Keys and values of a token."""
    config = backbone.base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head * backbone.dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken: of the GPU, with what PyTorch holds of it and does not use; else of the machine."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
