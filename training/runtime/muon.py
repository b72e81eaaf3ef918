"""Muon for the matrices of the LM's layers, AdamW for everything else, over the partitions of any ZeRO stage.

DeepSpeed's own Muon is not used: it clips the orthogonalised step instead of the gradient, runs Newton-Schulz in half precision
also where a CPU only emulates it, and compiles its kernels on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladir.models.orthogonal import orthogonalised, step_scale
from training.runtime.distributed import World

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
                for master in group["params"]:
                    if master.grad is not None and id(master) in self._parts:
                        self._step_matrices(master, group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, master: Tensor, group: Mapping[str, Any]) -> None:
        assert master.grad is not None
        gradient, momentum = master.grad.float(), self.momentum_of(master)
        momentum.lerp_(gradient, 1 - self._momentum)
        step = gradient.lerp(momentum, self._momentum).view(-1)
        for parts in _buckets(self._parts[id(master)]):
            self._orthogonalise(step, parts)
        master.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.view_as(master), alpha=group["lr"])

    def momentum_of(self, master: Tensor) -> Tensor:
        """The running mean of a master's gradients, zero before the first step."""
        state = self.state[master]
        if not state:
            state["momentum"] = torch.zeros_like(master, requires_grad=False)
        momentum: Tensor = state["momentum"]
        return momentum

    def _orthogonalise(self, step: Tensor, parts: Sequence[Part]) -> None:
        """Replace these matrices' elements of ``step``; sharded ones are put together and shared out to be worked on."""
        whole = torch.zeros(sum(part.whole for part in parts), device=self._world.device)
        matrices = [flat.view(part.shape) for part, flat in zip(parts, whole.split([p.whole for p in parts]), strict=True)]
        self._copy(step, parts, matrices, back=False)
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
        self._copy(step, parts, matrices, back=True)

    @staticmethod
    def _copy(step: Tensor, parts: Sequence[Part], matrices: Sequence[Tensor], back: bool) -> None:
        for part, matrix in zip(parts, matrices, strict=True):
            mine = step[part.offset : part.offset + part.numel]
            there = matrix.view(-1)[part.start : part.start + part.numel]
            (mine if back else there).copy_(there if back else mine)


def _by_shape(matrices: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Matrices of one shape together: small ones cost a call, not arithmetic."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.shape, []).append(matrix)
    return groups.values()


def _buckets(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Matrices in their order, as many at a time as a bucket holds, at least one."""
    bucket: list[Part] = []
    for part in parts:
        if bucket and sum(p.whole for p in bucket) + part.whole > BUCKET:
            yield bucket
            bucket = []
        bucket.append(part)
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
