"""What every row measures with: models and records of one size on one device, a clock, and rows of results."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ladir.config import Config
from ladir.data.batches import DenoiserBatch, DenoiserCollator, VaeBatch, VaeCollator
from ladir.data.latents import LatentRecord
from ladir.data.rollout import Golds, RolloutBatch, RolloutCollator
from ladir.models.backbone import DTYPES, choose_dtype
from ladir.models.denoiser import Denoiser
from ladir.models.vae import Vae
from training.benchmarks.sizes import Size
from training.planning.models import Lengths, bos_of, new_model, separator_of
from training.planning.trace import LiveMemory

EOS = 1
_FIRST_ID = 2  # the ids below are <pad> and <eos>
#: seconds of a round from which on two are made
_LONG = 2.5


class UnequalError(RuntimeError):
    """Two ways that should give the same numbers do not."""


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio`` says how many times less ours needs than the obvious way.

    ``key``: its name in the JSON file; ``title`` names ours, ``against`` the obvious way; ``ours`` and ``obvious`` in ``unit``;
    ``at_most``: the ratio of the tokens (or positions) computed, which the measured one approaches where the hardware is as busy
    in both; ``details``: whatever else is of use.
    """

    key: str
    title: str
    against: str
    ours: float
    obvious: float
    unit: str = "s"
    at_most: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.obvious / self.ours


class Bench:
    """Models, records and batches of one size on one device, the same whenever they are asked for."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.config = size.config(device.type)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[choose_dtype(self.config.backbone.dtype, self.device.type)]

    @property
    def tolerance(self) -> float:
        """Largest relative difference of two ways that are the same but for rounding."""
        return 1e-3 if self.dtype == torch.float32 else 5e-2

    def denoiser(self, change: Callable[[Config], None] | None = None) -> Denoiser:
        """A denoiser with random weights that depend on nothing but the settings (ours, changed by ``change``)."""
        model = self._model("denoiser", change)
        assert isinstance(model, Denoiser)
        with torch.no_grad():  # fresh ones are zero: the time would have no effect
            nn.init.normal_(model.time_out.weight, std=0.02)
        return model

    def vae(self, change: Callable[[Config], None] | None = None) -> Vae:
        """A VAE with random weights."""
        model = self._model("vae", change)
        assert isinstance(model, Vae)
        return model

    def _model(self, phase: str, change: Callable[[Config], None] | None) -> nn.Module:
        config = deepcopy(self.config)
        if change is not None:
            change(config)
        torch.manual_seed(0)
        return new_model(config, phase, config.backbone.activation_checkpointing, self.device)

    def token_ids(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Random token ids of the given lengths."""
        rng = np.random.default_rng(seed)
        highest = self.size.scratch["vocab_size"]
        return [rng.integers(_FIRST_ID, highest, length).tolist() for length in lengths]

    def records(self, lengths: Sequence[Lengths], latents: int | None = None) -> list[LatentRecord]:
        """Records of the given sizes with random latents."""
        rng = np.random.default_rng(0)
        made = []
        for number, sizes in enumerate(lengths):
            shape = (sizes.blocks, latents or self.size.latents, self.size.latent_dim)
            mu = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
            question, answer, *blocks = self.token_ids([sizes.question, sizes.answer, *[sizes.block] * sizes.blocks], number)
            made.append(LatentRecord(question, blocks, answer, mu, torch.full_like(mu, -4.0)))
        return made

    def denoiser_batch(self, records: Sequence[LatentRecord], draws: int, pack_tokens: int = 0) -> DenoiserBatch:
        """The micro batch of ``records``, every one with its answer."""
        return self._denoiser_collator(draws, pack_tokens, len(records))(records, range(len(records))).to(self.device)

    def _denoiser_collator(self, draws: int, pack_tokens: int, count: int) -> DenoiserCollator:
        settings = replace(self.config.denoiser, draws=draws)
        zeros = np.zeros(self.size.latent_dim, dtype=np.float32)
        return DenoiserCollator(settings, zeros, zeros + 1, EOS, 0, count, pack_tokens=pack_tokens)

    def rollout_batch(self, records: Sequence[LatentRecord]) -> RolloutBatch:
        """The micro batch of ``records`` for stage 2."""
        teacher = self._denoiser_collator(self.config.denoiser.draws, 0, len(records))
        golds = [Golds(record) for record in records]
        return RolloutCollator(teacher, self.config.rollout, 0)(golds, range(len(records))).to(self.device)

    def vae_batch(self, sentences: Sequence[Sequence[int]], pack_tokens: int = 0) -> VaeBatch:
        """The micro batch of ``sentences``."""
        around = bos_of(self.config), separator_of(self.config)
        collator = VaeCollator(self.config.vae, range(self.size.scratch["vocab_size"]), EOS, 0, pack_tokens, *around)
        return collator(sentences, range(len(sentences))).to(self.device)

    def seconds(self, way: Callable[[], Any]) -> float:
        """Seconds of ``way()``, the device's work included."""
        start = self.now()
        way()
        return self.now() - start

    def now(self) -> float:
        """The clock once the device has finished.

        CPU seconds where a single thread computes, which other work on the machine hardly changes; else wall seconds.
        """
        self.wait()
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def wait(self) -> None:
        """Let the device finish what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turn(self, ways: Mapping[str, Callable[[], Any]], rounds: int | None = None, warm_up: bool = True) -> dict[str, float]:
        """Median seconds of each way, run one after another in every round, so that a busy machine slows all alike.

        Rounds of more than ``_LONG`` seconds average over much by themselves: two of them do.
        """
        if warm_up:
            for way in ways.values():
                way()
        found: list[dict[str, float]] = []
        for number in range(rounds or self.size.rounds):
            if number >= 2 and sum(found[-1].values()) > _LONG:
                break
            found.append({name: self.seconds(way) for name, way in ways.items()})
        return {name: statistics.median(seconds[name] for seconds in found) for name in ways}

    def peak_bytes(self, way: Callable[[], Any], known: Iterable[Tensor]) -> int:
        """Most bytes that ``way()`` has allocated at once, beside the ``known`` tensors that it reads."""
        if self.device.type != "cuda":
            with LiveMemory(self.device.type, known) as memory:
                way()
            return memory.peak
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        way()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def check_equal(self, name: str, ours: Tensor, obvious: Tensor) -> None:
        """Raise :class:`UnequalError` where the two differ by more than rounding (relative to the largest number)."""
        difference = float((ours.float() - obvious.float()).abs().max() / obvious.float().abs().max())
        if not difference <= self.tolerance:
            raise UnequalError(
                f"{name}: ours and the obvious way differ by {difference:.2g} of the largest number, more than rounding "
                f"({self.tolerance:g}): one of the two is wrong, and its time means nothing"
            )


@contextmanager
def released() -> Iterator[None]:
    """Afterwards the memory of what was made inside is free again, for the next row's models."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def backward(model: nn.Module, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Add the gradients of the weighted sum of ``losses`` to the model's; returns the sum."""
    loss = torch.stack([weight * losses[name].float() for name, weight in weights.items() if name in losses]).sum()
    loss.backward()
    return loss.detach()


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad.float() for p in model.parameters() if p.grad is not None])
