"""Muon for the matrices of the LM's layers, AdamW for everything else, over the partitions of any ZeRO stage.

DeepSpeed's own Muon is not used: it clips the orthogonalised step instead of the gradient, runs Newton-Schulz in half precision
also where a CPU only emulates it, and compiles its kernels on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladir.models.orthogonal import orthogonalised, step_scale
from training.runtime.distributed import World

T = TypeVar("T")

#: elements of whole matrices that are gathered at a time
BUCKET = 1 << 26


@dataclass(frozen=True)
class Part:
    """This rank's elements of a matrix ``shape``: ``[start, start + numel)`` of it lie in its master from ``offset`` on."""

    shape: tuple[int, int]
    start: int = 0
    numel: int = 0
    offset: int = 0

    @property
    def whole(self) -> int:
        """Elements of the matrix."""
        return self.shape[0] * self.shape[1]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``orthogonal=True`` make Muon's steps instead, with Nesterov momentum.

    Until :meth:`place` has said what lies where in their masters, those groups do not move.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], world: World, momentum: float, precision: torch.dtype, **arguments: Any
    ) -> None:
        """``precision``: what Newton-Schulz computes in; ``arguments``: AdamW's."""
        super().__init__([dict(group) for group in groups], **arguments)
        self._world, self._momentum, self._precision = world, momentum, precision
        self._parts: dict[int, list[Part]] = {}
        self._sharded = False

    def place(self, parts: Mapping[Tensor, list[Part]], sharded: bool) -> None:
        """The matrices of every master, alike on all ranks but for where they lie; ``sharded``: no rank has them whole."""
        self._parts = {id(master): found for master, found in parts.items()}
        self._sharded = sharded and self._world.size > 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all groups, from the gradients in their masters' ``grad``; collective where they are sharded."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                for masters in self._together(group["params"]):
                    self._step_matrices(masters, group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _together(self, masters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Those that are stepped, in groups whose matrices fill a bucket: without ZeRO every matrix is a master of its own."""
        stepped = [master for master in masters if master.grad is not None and id(master) in self._parts]
        return _buckets(stepped, lambda master: sum(part.whole for part in self._parts[id(master)]))

    def _step_matrices(self, masters: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        gradients = [master.grad.float() for master in masters if master.grad is not None]
        momenta = [self.momentum_of(master) for master in masters]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        steps = torch._foreach_lerp(gradients, momenta, self._momentum)
        held = [(part, step.view(-1)) for master, step in zip(masters, steps, strict=True) for part in self._parts[id(master)]]
        for bucket in _buckets(held, lambda piece: piece[0].whole):
            self._orthogonalise(bucket)
        torch._foreach_mul_(list(masters), 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(list(masters), list(steps), alpha=group["lr"])

    def momentum_of(self, master: Tensor) -> Tensor:
        """The running mean of a master's gradients, zero before the first step."""
        state = self.state[master]
        if not state:
            state["momentum"] = torch.zeros_like(master, requires_grad=False)
        momentum: Tensor = state["momentum"]
        return momentum

    def _orthogonalise(self, held: Sequence[tuple[Part, Tensor]]) -> None:
        """Replace these matrices' elements of the flat steps they are held in; sharded ones are put together and shared out to be
        worked on."""
        parts = [part for part, _ in held]
        whole = torch.zeros(sum(part.whole for part in parts), device=self._world.device)
        matrices = [flat.view(part.shape) for part, flat in zip(parts, whole.split([p.whole for p in parts]), strict=True)]
        mine = [step[part.offset : part.offset + part.numel] for part, step in held]
        there = [matrix.view(-1)[part.start : part.start + part.numel] for part, matrix in zip(parts, matrices, strict=True)]
        torch._foreach_copy_(there, mine)
        if self._sharded:
            dist.all_reduce(whole)
        own, ranks = (self._world.rank, self._world.size) if self._sharded else (0, 1)
        for number, matrix in enumerate(matrices):
            if number % ranks != own:
                matrix.zero_()
        for alike in _by_shape(matrices[own::ranks]):
            found = orthogonalised(torch.stack(alike).to(self._precision)).mul_(step_scale(*alike[0].shape))
            torch._foreach_copy_(alike, list(found.float().unbind()))
        if self._sharded:
            dist.all_reduce(whole)
        torch._foreach_copy_(mine, there)


def _by_shape(matrices: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Matrices of one shape together: small ones cost a call, not arithmetic."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.shape, []).append(matrix)
    return groups.values()


def _buckets(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in their order, as many at a time as a bucket holds, at least one."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        more = size(item)
        if bucket and filled + more > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += more
    if bucket:
        yield bucket


def layer_matrices(model: nn.Module) -> set[str]:
    """Names of the trained matrices in the layers of the LMs in ``model``."""
    classes = layer_classes(model)
    layers = [(prefix, module) for prefix, module in model.named_modules() if type(module).__name__ in classes]
    return {
        f"{prefix}.{name}"
        for prefix, layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and len(getattr(parameter, "ds_shape", parameter.shape)) == 2
    }


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the layers of the LMs in ``model``."""
    lms = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return sorted({name for lm in lms for name in lm._no_split_modules or ()})
