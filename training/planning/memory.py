"""What an engine holds of weights, gradients and optimizer state on one GPU and in host memory, by arithmetic.

The rules are DeepSpeed's as :mod:`training.runtime.engine` uses it; tests compare them with real engines, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from training.runtime.ds_config import PERSISTENCE_THRESHOLD, zero_stage
from training.runtime.muon import BUCKET, layer_matrices

FP32 = 4
#: a master weight with AdamW's two moments, or with Muon's momentum
_ADAMW_TENSORS, _MUON_TENSORS = 3, 2
#: elements of an offloaded gradient whose norm DeepSpeed takes at a time, in fp64
_NORM_ELEMENTS, _FP64 = 250_000_000, 8

# DeepSpeed's own values where a configuration is silent.
_DEFAULTS = {
    "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class Weight:
    """A parameter: its elements, whether it is trained (and decayed: matrices are), and whether Muon does it."""

    numel: int
    trained: bool
    matrix: bool
    orthogonal: bool = False

    @property
    def tensors(self) -> int:
        """Tensors of its size that an optimizer holds."""
        return _MUON_TENSORS if self.orthogonal else _ADAMW_TENSORS


def weights_of(model: nn.Module, optimizer: str = "adamw") -> list[Weight]:
    """The parameters of a model, tied ones once."""
    orthogonal = layer_matrices(model) if optimizer == "muon" else set()
    return [Weight(p.numel(), p.requires_grad, p.ndim >= 2, name in orthogonal) for name, p in model.named_parameters()]


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides about memory."""

    stage: int
    world_size: int
    element_bytes: int
    offload_optimizer: bool
    offload_weights: bool
    persistence_threshold: int
    max_live: int
    prefetch: int
    reduce_bucket: int
    sub_group: int

    @property
    def weight(self) -> tuple[int, bool, bool]:
        """The larger, the more is split, or moved to the host."""
        return self.stage, self.offload_optimizer, self.offload_weights

    @staticmethod
    def of(ds_config: dict[str, Any], world_size: int, element_bytes: int) -> Zero:
        """Read a configuration file's content; ``element_bytes``: 2 in bf16, 4 in fp32."""
        zero = {**_DEFAULTS, **ds_config.get("zero_optimization", {})}
        return Zero(
            stage=zero_stage(ds_config),
            world_size=world_size,
            element_bytes=element_bytes,
            offload_optimizer="offload_optimizer" in zero,
            offload_weights="offload_param" in zero,
            persistence_threshold=int(zero["stage3_param_persistence_threshold"]),
            max_live=int(zero["stage3_max_live_parameters"]),
            prefetch=int(zero["stage3_prefetch_bucket_size"]),
            reduce_bucket=int(zero["reduce_bucket_size"]),
            sub_group=int(zero["sub_group_size"]),
        )


@dataclass(frozen=True)
class Holdings:
    """Bytes on one rank, GPU and host apart."""

    weights: int = 0
    frozen: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    buckets: int = 0
    gathered: int = 0
    step: int = 0
    host_weights: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0
    host_average: int = 0

    @property
    def resident(self) -> int:
        """On the GPU at all times: without gathered weights and without what the step needs for a moment."""
        return self.weights + self.frozen + self.gradients + self.optimizer + self.average + self.buckets

    @property
    def host(self) -> int:
        """In host memory at all times."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name.startswith("host_"))


def part(numel: int, world_size: int) -> int:
    """Elements of a rank's part of a tensor: DeepSpeed pads to equal parts."""
    return -(-numel // world_size)


def holdings(weights: Sequence[Weight], zero: Zero, averaged: bool) -> Holdings:
    """What one rank holds once training runs; ``averaged``: there is an exponential moving average (EMA)."""
    trained = [w for w in weights if w.trained]
    frozen = [w for w in weights if not w.trained]
    rules = {0: _whole, 2: _stage2, 3: _stage3}
    state = rules[zero.stage](trained, frozen, zero, averaged)
    gathered = min(BUCKET, _numel(w for w in trained if w.orthogonal))  # matrices that Muon works on at a time, in fp32
    return replace(state, step=state.step + FP32 * gathered)


def _numel(weights: Iterable[Weight]) -> int:
    return sum(w.numel for w in weights)


def _whole(trained: Sequence[Weight], frozen: Sequence[Weight], zero: Zero, averaged: bool) -> Holdings:
    """Everything on every rank; in fp32 the weights are their own masters."""
    size, count = zero.element_bytes, _numel(trained)
    shared = size == FP32
    return Holdings(
        weights=size * count,
        frozen=size * _numel(frozen),
        gradients=size * count,
        optimizer=FP32 * sum((w.tensors - shared) * w.numel for w in trained),
        average=FP32 * count * averaged,
    )


def _stage2(trained: Sequence[Weight], frozen: Sequence[Weight], zero: Zero, averaged: bool) -> Holdings:
    """Whole weights; each of the groups of the optimizer is one flat tensor, padded and cut into equal parts."""
    size, count = zero.element_bytes, _numel(trained)
    groups: dict[tuple[bool, int], int] = {}
    for w in trained:
        kind = (w.matrix, w.tensors)
        groups[kind] = groups.get(kind, 0) + w.numel
    align = 2 * zero.world_size  # DeepSpeed aligns the parts to 4 bytes
    padded = {kind: -(-numel // align) * align for kind, numel in groups.items()}
    mine = sum(padded.values()) // zero.world_size
    state = Holdings(
        weights=size * sum(padded.values()),
        frozen=size * _numel(frozen),
        gradients=FP32 * mine,
        optimizer=FP32 * sum(tensors * numel for (_, tensors), numel in padded.items()) // zero.world_size,
        average=FP32 * mine * averaged,
        buckets=size * min(zero.reduce_bucket, max(count, 1)),
    )
    return _offloaded(state, zero)


def _stage3(trained: Sequence[Weight], frozen: Sequence[Weight], zero: Zero, averaged: bool) -> Holdings:
    """Every weight is cut into equal parts; small ones are on all ranks whole, besides."""
    size, ranks = zero.element_bytes, zero.world_size
    mine = sum(part(w.numel, ranks) for w in trained)
    everything = [*trained, *frozen]
    # The limit on live weights is one on prefetching: that ends with the weight that passes it, what a module needs is fetched in
    # any case, and what is used again soon is kept.
    largest = sum(sorted((w.numel for w in everything), reverse=True)[:3])
    state = Holdings(
        weights=size * (mine + _persistent(trained, zero)),
        frozen=size * (sum(part(w.numel, ranks) for w in frozen) + _persistent(frozen, zero)),
        gradients=FP32 * mine,
        optimizer=FP32 * sum(w.tensors * part(w.numel, ranks) for w in trained),
        average=FP32 * mine * averaged,
        buckets=size * zero.reduce_bucket,
        gathered=size * min(zero.max_live + largest, _numel(everything)) * (ranks > 1 or zero.offload_weights),
        step=FP32 * min(mine, zero.sub_group),
    )
    return _offloaded(state, zero)


def _persistent(weights: Sequence[Weight], zero: Zero) -> int:
    """Elements of weights that stay gathered, with their padding (a single rank's part without offloading is the weight)."""
    if zero.world_size == 1 and not zero.offload_weights:
        return 0
    small = [w.numel for w in weights if w.numel <= zero.persistence_threshold]
    return sum(part(numel, zero.world_size) * zero.world_size for numel in small)


def _offloaded(state: Holdings, zero: Zero) -> Holdings:
    """The same bytes with what is offloaded counted as host memory."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    moved = ["gradients", "optimizer", "average"] if zero.offload_optimizer else []
    moved += ["weights", "frozen"] if zero.offload_weights else []
    for name in moved:
        host = "host_weights" if name == "frozen" else f"host_{name}"
        values[host] += values[name]
        values[name] = 0
    if zero.offload_optimizer:
        values["step"] = 0  # done on the CPU
    return Holdings(**values)


def taking_in(numel: int, zero: Zero) -> int:
    """Bytes on the GPU, beside a complete gradient of ``numel`` elements, while DeepSpeed takes it into its own buffers.

    ZeRO-3 makes this rank's part fp32.  Where the optimizer is offloaded it copies that to the host and back, for its norm.
    """
    if zero.stage != 3:
        return 0
    mine = part(numel, zero.world_size)
    copies = (zero.element_bytes < FP32) + zero.offload_optimizer
    return FP32 * mine * copies + _FP64 * min(mine, _NORM_ELEMENTS) * zero.offload_optimizer


def checkpoint_bytes(weights: Sequence[Weight], averages: int) -> int:
    """Bytes of the tensors in one checkpoint: masters, moments and averages of what is trained, over all ranks."""
    return FP32 * sum((w.tensors + averages) * w.numel for w in weights if w.trained)


def copied_bytes(weights: Sequence[Weight], zero: Zero, averages: int) -> int:
    """Bytes of host memory that one rank keeps for the copies of checkpoints written in the background: its part of all state
    (without ZeRO rank 0 has it all)."""
    ranks = zero.world_size if zero.stage else 1
    return FP32 * sum((w.tensors + averages) * part(w.numel, ranks) for w in weights if w.trained)


def writing_bytes(weights: Sequence[Weight], zero: Zero) -> int:
    """Bytes of host memory that one rank takes while it writes a checkpoint: one kind of state as the bytes of a file, and as a
    copy, where it is on the GPU."""
    ranks = zero.world_size if zero.stage else 1
    return (1 if zero.offload_optimizer else 2) * FP32 * sum(part(w.numel, ranks) for w in weights if w.trained)
