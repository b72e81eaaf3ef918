"""The autoregressive baseline: an LM that writes its chain of thought as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ladir.data.batches import pad_left
from ladir.inference.cache import Prefix
from ladir.inference.decode import decode
from ladir.inference.sampler import TrajectoryNoise
from ladir.models.backbone import Backbone
from ladir.models.positions import check_room

_SHORTER = "set a lower evaluate.ar_max_tokens, or leave long questions out (a lower data.max_question_tokens)"


@torch.no_grad()
def complete(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    num_samples: int,
    eos_id: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    bidirectional_question: bool = False,
    top_p: float = 1.0,
) -> list[list[list[int]]]:
    """Sampled completions: ``num_samples`` token-id lists per prompt.  UnusableError where the LM's table of positions may end.

    The prompt's cache is computed once and shared by its samples.  ``keys`` name the prompts for the random numbers;
    ``bidirectional_question``: their tokens see each other, as the model was trained; ``top_p``: tokens are of the nucleus.
    """
    device = next(backbone.parameters()).device
    longest = max(map(len, prompts))
    check_room(backbone.base.config, longest + max_tokens, f"a prompt of {longest} tokens with its completion", _SHORTER)
    ids, lengths = pad_left(prompts, eos_id)  # which the embedding has for certain
    inputs, lengths = backbone.embed(ids.to(device)), lengths.to(device)
    prefix, hidden = Prefix.start(backbone, inputs, lengths, bidirectional_question)
    owner = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
    noise = TrajectoryNoise(seed, [(key, i) for key in keys for i in range(num_samples)])
    uniform = noise.uniform(list(range(len(owner))), max_tokens).to(device)
    texts = decode(prefix.share(owner), hidden[owner], eos_id, max_tokens, temperature, uniform, top_p)
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
