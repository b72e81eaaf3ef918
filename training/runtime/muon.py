"""Muon for the matrices of the LM's layers, AdamW for everything else, over the partitions of any ZeRO stage.

DeepSpeed's own Muon is not used: it clips the orthogonalised step instead of the gradient, runs Newton-Schulz in half precision
also where a CPU only emulates it, and compiles its kernels on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladir.models.orthogonal import orthogonalised, step_scale
from training.runtime.distributed import World

T = TypeVar("T")

#: elements of whole matrices that a rank works on at a time
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
        self._sharing: dict[int, Sharing] = {}

    def place(self, parts: Mapping[Tensor, list[Part]], sharded: bool) -> None:
        """The matrices of every master, alike on all ranks but for where they lie (collective).

        ``sharded``: no rank has them whole.
        """
        self._parts = {id(master): found for master, found in parts.items()}
        if sharded and self._world.size > 1:
            self._sharing = {id(master): Sharing(self._world, found, self._precision) for master, found in parts.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all groups, from the gradients in their masters' ``grad``; collective where they are sharded."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                self._step_group(group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_group(self, group: Mapping[str, Any]) -> None:
        stepped = [master for master in group["params"] if master.grad is not None and id(master) in self._parts]
        # Without ZeRO every matrix is a master of its own: as many together as a bucket holds.  ZeRO's masters hold many each.
        together = _buckets(stepped, lambda master: sum(part.whole for part in self._parts[id(master)]))
        for masters in together if not self._sharing else ([master] for master in stepped):
            self._step_matrices(masters, group)

    def _step_matrices(self, masters: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        gradients = [master.grad.float() for master in masters if master.grad is not None]
        momenta = [self.momentum_of(master) for master in masters]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        steps = torch._foreach_lerp(gradients, momenta, self._momentum)
        held = [(part, step.view(-1)) for master, step in zip(masters, steps, strict=True) for part in self._parts[id(master)]]
        mine = [step[part.offset : part.offset + part.numel] for part, step in held]
        if self._sharing:
            self._sharing[id(masters[0])].orthogonalise(mine)
        else:
            for bucket in _buckets(zip([part for part, _ in held], mine, strict=True), lambda piece: piece[0].whole):
                found = _worked_on([piece.view(part.shape) for part, piece in bucket], self._precision)
                torch._foreach_copy_([piece for _, piece in bucket], [matrix.flatten() for matrix in found])
        torch._foreach_mul_(list(masters), 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(list(masters), list(steps), alpha=group["lr"])

    def momentum_of(self, master: Tensor) -> Tensor:
        """The running mean of a master's gradients, zero before the first step."""
        state = self.state[master]
        if not state:
            state["momentum"] = torch.zeros_like(master, requires_grad=False)
        momentum: Tensor = state["momentum"]
        return momentum


class Sharing:
    """Matrices of which every rank holds a part, each worked on by one rank, its owner, to which the others send their parts.

    Owners are chosen so that all have about as much work.  What is sent has the precision that the work is done in.  Made by all
    ranks together.
    """

    def __init__(self, world: World, parts: Sequence[Part], precision: torch.dtype) -> None:
        """``parts``: this rank's, of the same matrices in the same order as on the other ranks."""
        self._world, self._precision = world, precision
        self._shapes = [part.shape for part in parts]
        #: by rank, where its elements of every matrix begin and how many they are
        self._places: list[list[tuple[int, int]]] = world.gather([(part.start, part.numel) for part in parts])
        own = owners([work(*shape) for shape in self._shapes], world.size)
        lists = [[number for number, owner in enumerate(own) if owner == rank] for rank in range(world.size)]
        buckets = [list(_buckets(numbers, lambda number: parts[number].whole)) for numbers in lists]
        #: rounds of work: in each every rank has some matrices of its own, or none
        self._rounds = [[one[r] if r < len(one) else [] for one in buckets] for r in range(max(map(len, buckets), default=0))]

    def orthogonalise(self, mine: Sequence[Tensor]) -> None:
        """Replace this rank's elements of every matrix, each flat, by those of the orthogonalised step (collective)."""
        for numbers in self._rounds:
            self._round(mine, numbers)

    def _round(self, mine: Sequence[Tensor], numbers: Sequence[Sequence[int]]) -> None:
        """``numbers``: by owner, the matrices of this round."""
        world, own = self._world, numbers[self._world.rank]
        sent = [self._joined([mine[number] for number in there]) for there in numbers]
        counts = [sum(places[number][1] for number in own) for places in self._places]
        received = world.exchange(sent, counts)
        matrices = [torch.empty(self._shapes[number], dtype=self._precision, device=world.device) for number in own]
        for target, source in self._pieces(matrices, own, received):
            target.copy_(source)
        matrices = _worked_on(matrices, self._precision)
        for source, target in self._pieces(matrices, own, received):
            target.copy_(source)
        back = world.exchange(received, [len(part) for part in sent])
        for there, part in zip(numbers, back, strict=True):
            if there:
                torch._foreach_copy_([mine[n] for n in there], list(part.split([mine[n].numel() for n in there])))

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces end to end, as they are sent."""
        if not pieces:
            return torch.empty(0, dtype=self._precision, device=self._world.device)
        return torch.cat([piece.to(self._world.device, self._precision) for piece in pieces])

    def _pieces(
        self, matrices: Sequence[Tensor], own: Sequence[int], received: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every rank's elements, in the matrices and in what it has sent."""
        for places, part in zip(self._places, received, strict=True):
            split = part.split([places[number][1] for number in own]) if own else ()
            for number, matrix, piece in zip(own, matrices, split, strict=True):
                start, count = places[number]
                yield matrix.view(-1)[start : start + count], piece


def work(rows: int, columns: int) -> int:
    """Multiplications of a Newton-Schulz step of a matrix, about: two products with its smaller side's square and one of that."""
    small, large = sorted((rows, columns))
    return small * small * (2 * large + small)


def owners(works: Sequence[int], ranks: int) -> list[int]:
    """Who does which piece of work, so that all have about as much: the largest first, each to who has least."""
    loads, found = [0] * ranks, [0] * len(works)
    for number in sorted(range(len(works)), key=lambda number: -works[number]):
        found[number] = min(range(ranks), key=loads.__getitem__)
        loads[found[number]] += works[number]
    return found


def _worked_on(matrices: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Orthogonalised and scaled, those of one shape in one call."""
    found: list[Tensor] = list(matrices)
    for numbers in _by_shape(matrices):
        alike = torch.stack([matrices[number] for number in numbers]).to(precision)
        scaled = orthogonalised(alike).mul_(step_scale(*alike.shape[1:]))
        for number, matrix in zip(numbers, scaled.unbind(), strict=True):
            found[number] = matrix.contiguous()
    return found


def _by_shape(matrices: Sequence[Tensor]) -> Iterable[list[int]]:
    """Numbers of the matrices of one shape together: small ones cost a call, not arithmetic."""
    groups: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(number)
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
