"""Text from a cached prefix, token by token: the answer, a block's sentence, and the AR baseline's whole chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.inference.cache import Prefix
from ladir.models.denoiser import TokenHead
from ladir.models.positions import room_left
from ladir.models.vae import ThoughtDecoder, Vae, encode_sentences
from ladir.tokens import decode_text

#: called after every step with (rows that have not ended, the token that each of them got)
TokenHook = Callable[[list[int], list[int]], None]

#: logits [r, V] of the rows [r] that have not ended, the number of the token, and the tokens [r] before it (none before the
#: first), to other logits
Steer = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]

#: called again and again in the middle of longer work; what it raises ends that
Between = Callable[[], None]

#: a smaller temperature is no number in fp32; its choice is greedy as well
_COLDEST = float(torch.finfo(torch.float32).tiny)


def choose_tokens(logits: Tensor, temperature: float, uniform: Tensor | None, top_p: float = 1.0) -> Tensor:
    """Token ids [R] from logits [R, V]: greedy at temperature 0, else by inverting the distribution at ``uniform`` [R].

    With ``top_p`` below 1 it is that of the nucleus alone (:func:`nucleus`).
    """
    if temperature == 0.0 or uniform is None:
        return logits.argmax(-1)
    below = logits.float() - logits.max(-1, keepdim=True).values.float()  # so that no temperature divides to infinity above
    probabilities = (below / max(temperature, _COLDEST)).softmax(-1)
    if top_p < 1.0:
        probabilities = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None].contiguous(), right=True)[:, 0]
    if top_p < 1.0:  # where rounding leads behind the last token, to the last one of the nucleus
        return torch.minimum(drawn, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0])
    return drawn.clamp_max(logits.shape[-1] - 1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` [R, V] without those outside the nucleus, not normalised: the smallest set of likeliest tokens that have
    ``top_p`` together (Holtzman et al. 2020, section 3.1); of equally likely ones the first come first."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = torch.zeros_like(ordered, dtype=torch.bool)
    outside[:, 1:] = ordered[:, :-1].double().cumsum(-1) >= top_p  # the likelier ones have it without them
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)


def decode(
    prefix: Prefix,
    hidden: Tensor,
    eos_id: int,
    max_tokens: int,
    temperature: float = 0.0,
    uniform: Tensor | None = None,
    top_p: float = 1.0,
    on_tokens: TokenHook | None = None,
    steer: Steer | None = None,
) -> list[list[int]]:
    """Token ids of each row up to, without, <eos>; ``on_tokens`` sees them come, ``steer`` changes what they are chosen by.

    ``hidden`` [R, H]: last hidden states of the prefix; ``uniform`` [R, max_tokens] in [0, 1): one number per row and token,
    so that a row's text does not depend on its neighbours.  Rows that have ended leave the batch.
    """
    backbone = prefix.backbone
    texts: list[list[int]] = [[] for _ in range(len(prefix))]
    rows, tokens = torch.arange(len(prefix), device=hidden.device), None
    for step in range(max_tokens):
        draw = uniform[rows, step] if uniform is not None else None
        logits = backbone.logits(hidden)
        tokens = choose_tokens(logits if steer is None else steer(logits, rows, step, tokens), temperature, draw, top_p)
        alive = tokens != eos_id
        going, new = rows[alive].tolist(), tokens[alive].tolist()
        for row, token in zip(going, new, strict=True):
            texts[row].append(token)
        if on_tokens is not None:
            on_tokens(going, new)
        if not alive.any() or step + 1 == max_tokens:
            break
        if not alive.all():
            keep = alive.nonzero()[:, 0]
            prefix, rows, tokens = prefix.select(keep), rows[keep], tokens[keep]
        hidden = prefix.append(backbone.embed(tokens)[:, None])[:, 0]
    return texts


def between_tokens(between: Between | None) -> TokenHook | None:
    """A hook that looks at no token: ``between`` is called after each."""
    return None if between is None else lambda going, tokens: between()


@dataclass(frozen=True)
class TokenHeadReading:
    """What the token head says of the first P tokens of K blocks, with ``features`` [K, P, rank], and its ``weight``.

    Logits are made token by token: those of all positions are too large where the vocabulary is.
    """

    head: TokenHead
    features: Tensor
    weight: float

    def steer(self, eos_id: int) -> Steer:
        """The reader's distribution times the head's to the power of its weight, up to a factor, over all tokens but <eos>.

        A product of experts (Hinton 2002): the reader knows how a sentence goes on, the head which numbers are in it.  The head
        was never shown an end: a sentence ends where the reader alone would end it.
        """

        def steered(logits: Tensor, rows: Tensor, step: int, before: Tensor | None) -> Tensor:
            if step >= self.features.shape[1]:
                return logits
            both = logits.float().log_softmax(-1)
            both += self.weight * self.head.up(self.features[rows, step]).float().log_softmax(-1)
            ends = logits.argmax(-1) == eos_id
            is_end = torch.arange(both.shape[-1], device=both.device) == eos_id
            return both.masked_fill(is_end != ends[:, None], -torch.inf)

        return steered


class LmReading:
    """What the denoiser's LM expects of sentences, each behind the question and the sentences before it; and its ``weight``.

    It has not seen the blocks that are read: it knows what may be written next, the decoder what the block says.
    """

    def __init__(self, prefix: Prefix, begin: Tensor, weight: float) -> None:
        """``prefix``: what stands before the sentences, which grows; ``begin`` [H]: the mark behind which each begins."""
        self._prefix, self.weight = prefix, weight
        self._rows = torch.arange(len(prefix), device=begin.device)
        self._hidden = prefix.append(begin.expand(len(prefix), 1, -1))[:, 0]

    def steer(self, logits: Tensor, rows: Tensor, step: int, before: Tensor | None) -> Tensor:
        """The decoder's distribution times the LM's to the power of its weight, up to a factor (a product of experts); both know
        ends."""
        with self._prefix.backbone.adapter_on():  # the decoder may be the same LM without them
            if before is not None:
                self._go_on(rows, before)
            expected = self._prefix.backbone.logits(self._hidden).float().log_softmax(-1)
        return logits.float().log_softmax(-1) + self.weight * expected

    def _go_on(self, rows: Tensor, tokens: Tensor) -> None:
        """Read the last ``tokens`` [r] of the ``rows`` [r] that have not ended."""
        if len(rows) < len(self._rows):
            self._prefix, self._rows = self._prefix.select(torch.isin(self._rows, rows).nonzero()[:, 0]), rows
        self._hidden = self._prefix.append(self._prefix.backbone.embed(tokens)[:, None])[:, 0]


def steered_by(*steers: Steer) -> Steer | None:
    """One after another; None where there is none."""
    if not steers:
        return None

    def steered(logits: Tensor, rows: Tensor, step: int, before: Tensor | None) -> Tensor:
        for steer in steers:
            logits = steer(logits, rows, step, before)
        return logits

    return steered


def thought_limit(decoder: ThoughtDecoder, latents: int, max_tokens: int) -> int:
    """The most tokens that are read of a block of ``latents``.

    Where a table of positions ends, so does every sentence that the VAE was trained on.
    """
    return room_left(decoder.backbone.base.config, decoder.marks + latents, max_tokens)


@torch.no_grad()
def thought_ids(
    decoder: ThoughtDecoder,
    eos_id: int,
    z: Tensor,
    max_tokens: int,
    steer: Steer | None = None,
    between: Between | None = None,
    temperature: float = 0.0,
    uniform: Tensor | None = None,
) -> list[list[int]]:
    """Token ids of each block of latents ``z`` [K, L, d] (not standardised), at most ``max_tokens`` of them; ``steer``
    changes what they are chosen by, ``between`` is called after every token; ``temperature``, ``uniform``: of :func:`decode`."""
    with decoder.lm() as lm:
        inputs = decoder.prefix(z)
        prefix, hidden = Prefix.start(lm, inputs, torch.full((len(z),), inputs.shape[1], device=z.device))
        most = thought_limit(decoder, z.shape[1], max_tokens)
        return decode(prefix, hidden, eos_id, most, temperature, uniform, on_tokens=between_tokens(between), steer=steer)


def decode_thoughts(
    decoder: ThoughtDecoder, tokenizer: PreTrainedTokenizerBase, z: Tensor, max_tokens: int, between: Between | None = None
) -> list[str]:
    """Text of each block of latents ``z`` [K, L, d] (not standardised), greedily, at most ``max_tokens`` long; ``between`` is
    called after every token."""
    ids = thought_ids(decoder, int(tokenizer.eos_token_id), z, max_tokens, between=between)
    return [decode_text(tokenizer, row) for row in ids]


@torch.no_grad()
def encode_read(encoder: Vae, texts: Sequence[Sequence[int]]) -> Tensor:
    """What the VAE makes of sentences that were read from blocks: posterior means [K, L, d].

    For latents of whole sentences what the clamping trick of Diffusion-LM (Li et al. 2022) is for words.  A sentence that
    several blocks share is encoded once.
    """
    read = [tuple(ids) for ids in texts]
    places = {text: place for place, text in enumerate(dict.fromkeys(read))}
    means, _ = encode_sentences(encoder, list(places))
    return means[torch.tensor([places[text] for text in read], device=means.device)]
