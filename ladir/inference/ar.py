"""The autoregressive baseline: an LM that writes its chain of thought as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladir.data.batches import pad_left
from ladir.inference.cache import Prefix
from ladir.inference.decode import TokenHook, choose_tokens, decode
from ladir.inference.sampler import TrajectoryNoise
from ladir.models.backbone import Backbone
from ladir.models.positions import check_room

_SHORTER = "set a lower evaluate.ar_max_tokens, or leave long questions out (a lower data.max_question_tokens)"
#: new prompts are read together where one of so many parts of the rows' places is free
_PARTS = 8


@dataclass(frozen=True)
class Writing:
    """How completions are written, up to ``eos_id`` or ``max_tokens``; ``top_p``: tokens are of the nucleus.

    ``bidirectional_question``: a prompt's tokens see each other, as the model was trained.
    """

    eos_id: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    bidirectional_question: bool = False

    def read(self, backbone: Backbone, prompts: Sequence[Sequence[int]]) -> tuple[Prefix, Tensor]:
        """The prompts in a cache, and their last hidden states [R, H]."""
        device = next(backbone.parameters()).device
        ids, lengths = pad_left(prompts, self.eos_id)  # which the embedding has for certain
        return Prefix.start(backbone, backbone.embed(ids.to(device)), lengths.to(device), self.bidirectional_question)


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
    most_rows: int | None = None,
    on_tokens: TokenHook | None = None,
) -> list[list[list[int]]]:
    """Sampled completions: ``num_samples`` token-id lists per prompt.  UnusableError where the LM's table of positions may end.

    ``keys`` name the prompts for the random numbers; ``bidirectional_question``: their tokens see each other, as the model was
    trained; ``top_p``: tokens are of the nucleus.  With more than ``most_rows`` samples they join one by one as others end;
    else the prompt's cache is computed once and shared by its samples.  ``on_tokens`` sees tokens come, rows in the order of the
    prompts.
    """
    longest = max(map(len, prompts))
    check_room(backbone.base.config, longest + max_tokens, f"a prompt of {longest} tokens with its completion", _SHORTER)
    writing = Writing(eos_id, max_tokens, temperature, top_p, bidirectional_question)
    noise = TrajectoryNoise(seed, [(key, i) for key in keys for i in range(num_samples)])
    if most_rows is not None and len(prompts) * num_samples > most_rows:
        texts = _Queue(backbone, writing, prompts, num_samples, most_rows, noise, on_tokens).written()
    else:
        prefix, hidden = writing.read(backbone, prompts)
        owner = torch.arange(len(prompts), device=hidden.device).repeat_interleave(num_samples)
        uniform = noise.uniform(list(range(len(owner))), max_tokens).to(hidden.device)
        texts = decode(prefix.share(owner), hidden[owner], eos_id, max_tokens, temperature, uniform, top_p, on_tokens)
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


class _Queue:
    """Continuous batching (Yu et al. 2022, Orca): a sample joins as soon as another one's place is free.

    A row's text does not depend on when it joins: its tokens see its own alone, and its random numbers are its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        writing: Writing,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        most_rows: int,
        noise: TrajectoryNoise,
        on_tokens: TokenHook | None = None,
    ) -> None:
        self._backbone, self._writing, self._prompts, self._noise = backbone, writing, prompts, noise
        self._on_tokens = on_tokens
        self._samples, self._most = num_samples, most_rows
        self._texts: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
        self._asked = 0  # samples that have joined
        self._last: tuple[Prefix, Tensor] | None = None  # the prompt of the last one, where others of it are to come
        self._rows: list[int] = []  # that are being written; of each its random numbers [R, max_tokens] and last state [R, H]
        self._prefix: Prefix | None = None
        self._uniform = self._hidden = torch.zeros(0)

    def written(self) -> list[list[int]]:
        """Every sample's tokens, without <eos>."""
        while self._rows or self._asked < len(self._texts):
            self._ask()
            self._step()
        return self._texts

    def _ask(self) -> None:
        """Let the next samples join, as many as there is room for; where that is too little to read a prompt for, those of the
        prompt that was read last."""
        room = self._most - len(self._rows)
        rows = range(self._asked, min(self._asked + room, len(self._texts)))
        if self._rows and room < self._most // _PARTS:
            rows = rows[: -self._asked % self._samples]
        if rows:
            self._join(rows)

    def _join(self, rows: range) -> None:
        """Write the samples ``rows`` beside the others from now on."""
        prefix, hidden = self._read(rows)
        uniform = self._noise.uniform(list(rows), self._writing.max_tokens).to(hidden.device)
        if self._prefix is not None and self._rows:
            prefix = self._prefix.trimmed().joined(prefix)
            hidden, uniform = torch.cat([self._hidden, hidden]), torch.cat([self._uniform, uniform])
        self._prefix, self._hidden, self._uniform = prefix, hidden, uniform
        self._rows, self._asked = [*self._rows, *rows], rows.stop

    def _read(self, rows: range) -> tuple[Prefix, Tensor]:
        """What stands before the samples ``rows``, and last states [R, H]; each prompt is read once, whenever they join."""
        first, end = rows.start // self._samples, -(-rows.stop // self._samples)
        new = self._prompts[first + (self._last is not None) : end]
        read = self._last
        if new:
            read = self._writing.read(self._backbone, new)
            if self._last is not None:
                read = self._last[0].joined(read[0]), torch.cat([self._last[1], read[1]])
        assert read is not None
        prefix, hidden = read
        last = torch.tensor([end - first - 1], device=hidden.device)
        self._last = (prefix.select(last).trimmed(), hidden[last]) if rows.stop % self._samples else None
        owner = torch.tensor([row // self._samples - first for row in rows], device=hidden.device)
        return prefix.select(owner), hidden[owner]

    def _step(self) -> None:
        """A token for every row; those that have ended leave."""
        assert self._prefix is not None
        w = self._writing
        lengths = torch.tensor([len(self._texts[row]) for row in self._rows], device=self._hidden.device)
        drawn = self._uniform.gather(1, lengths[:, None])[:, 0]
        tokens = choose_tokens(self._backbone.logits(self._hidden), w.temperature, drawn, w.top_p)
        going, written = [], list[tuple[int, int]]()
        for place, (row, token) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
            if token != w.eos_id:
                self._texts[row].append(token)
                written.append((row, token))
                if len(self._texts[row]) < w.max_tokens:
                    going.append(place)
        if self._on_tokens is not None:
            self._on_tokens([row for row, _ in written], [token for _, token in written])
        if len(going) < len(self._rows):
            keep = torch.tensor(going, dtype=torch.int64, device=tokens.device)
            self._rows, self._uniform, tokens = [self._rows[place] for place in going], self._uniform[keep], tokens[keep]
            self._prefix = self._prefix.select(keep)
        if self._rows:
            self._hidden = self._prefix.append(self._backbone.embed(tokens)[:, None])[:, 0]
