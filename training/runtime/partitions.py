"""This rank's share of a DeepSpeed optimizer's state, in one shape for every ZeRO stage.

Everything DeepSpeed keeps under a private name is touched here and nowhere else.  A *master* is a local fp32 tensor the
optimizer steps: a flat partition under ZeRO, a whole parameter without.  A :class:`Fragment` says which elements of which
parameter lie where in a master, so that averages, checkpoints and other numbers of ranks need no knowledge of the stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class DeepSpeedMismatch(RuntimeError):
    """The installed DeepSpeed lacks something this adapter relies on."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of the flattened parameter ``name`` lie in ``masters[master]`` from ``offset`` on."""

    name: str
    start: int
    numel: int
    master: int
    offset: int


class Partitions(Protocol):
    """The optimizer's state on this rank."""

    masters: list[Tensor]
    keys: list[Tensor]
    """What the optimizer knows each master by (the master itself, except for fp32 parameters without ZeRO)."""
    fragments: list[Fragment]
    members: list[list[str]]
    """Names of the parameters of which every master holds a part on some rank, alike on all ranks."""
    replicated: bool
    """Every rank holds everything (no ZeRO), instead of a part each."""

    def gradients(self) -> list[Tensor]:
        """The accumulated, reduced gradients of this rank's part, after the last backward pass of a step."""

    def clear_gradients(self) -> None:
        """Forget all gradients, so that a parameter unused in the next step has gradient zero there."""

    def publish(self) -> None:
        """Bring changed masters into the model's weights, on all ranks (collective)."""


def private(owner: Any, name: str) -> Any:
    """``owner.name``, with a clear error where another DeepSpeed version has renamed it."""
    if not hasattr(owner, name):
        import deepspeed

        raise DeepSpeedMismatch(
            f"DeepSpeed {deepspeed.__version__}: {type(owner).__name__} has no '{name}', which the training runtime "
            "needs; install the version pinned in requirements.txt"
        )
    return getattr(owner, name)


class Stage3Partitions:
    """ZeRO-3: parameters, gradients and optimizer state are all partitioned."""

    replicated = False

    def __init__(self, optimizer: Any, names: dict[int, str], rank: int) -> None:
        self._optimizer = optimizer
        self.masters: list[Tensor] = list(private(optimizer, "fp32_partitioned_groups_flat"))
        self.keys = self.masters
        private(optimizer, "grad_partitions_flat_buffer")
        self.fragments = []
        groups = private(optimizer, "fp16_groups")
        self.members = [[names[id(parameter)] for parameter in group] for group in groups]
        for master, group in enumerate(groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = min(rank * size, parameter.ds_numel)
                numel = min(size, parameter.ds_numel - start)  # the last ranks' partitions may be padding
                self.fragments.append(Fragment(names[id(parameter)], start, numel, master, offset))
                offset += size

    def gradients(self) -> list[Tensor]:
        """One flat buffer; it must be read anew each time because DeepSpeed may move it."""
        return [self._optimizer.grad_partitions_flat_buffer]

    def clear_gradients(self) -> None:
        """DeepSpeed writes the buffer only where a gradient arrives and never clears it: without this, a parameter
        that gets no gradient is stepped again with its previous one (or has it added to the next)."""
        self._optimizer.grad_partitions_flat_buffer.zero_()
        for master in self.masters:
            if master.grad is not None:  # kept between steps with optimizer offload
                master.grad.zero_()

    def publish(self) -> None:
        """Masters to low-precision partitions, then the small persistent parameters are gathered again."""
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self.masters)):
            private(self._optimizer, "_reassign_or_swap_out_partitioned_parameters")(group)
        self._optimizer.checkpoint_event_epilogue()


class Stage2Partitions:
    """ZeRO-2: gradients and optimizer state are partitioned, weights are not."""

    replicated = False

    def __init__(self, optimizer: Any, names: dict[int, str]) -> None:
        self._optimizer = optimizer
        self.masters: list[Tensor] = list(private(optimizer, "single_partition_of_fp32_groups"))
        self.keys = self.masters
        self.fragments = []
        groups = private(optimizer, "bit16_groups")
        self.members = [[names[id(parameter)] for parameter in group] for group in groups]
        for master, group in enumerate(groups):
            for parameter in group:
                mapping = private(parameter, "_hp_mapping")
                if mapping is None:  # no element of it is on this rank
                    continue
                low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                self.fragments.append(Fragment(names[id(parameter)], low.start, low.numel, master, high.start))

    def gradients(self) -> list[Tensor]:
        """Offloaded gradients lie in the masters, others in DeepSpeed's lists of averaged gradients."""
        if private(self._optimizer, "cpu_offload"):
            return [master.grad for master in self.masters if master.grad is not None]
        found: list[Tensor] = []
        for value in private(self._optimizer, "averaged_gradients").values():
            found.extend(value or [])
        return found

    def clear_gradients(self) -> None:
        """Stage 2 forgets its gradients by itself, except the offloaded ones."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.zero_()

    def publish(self) -> None:
        """Masters to low-precision weights, which all ranks then share."""
        self._optimizer.update_lp_params()


class WholeParameters:
    """No ZeRO: every rank holds everything."""

    replicated = True

    def __init__(self, optimizer: Any, names: dict[int, str], parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        groups = getattr(optimizer, "fp32_groups", None)
        if groups is None:
            self._low = self.masters = [parameter.data for parameter in parameters]
            self.keys: list[Tensor] = list(parameters)
            ordered = parameters
        else:
            ordered = [parameter for group in private(optimizer, "fp16_groups") for parameter in group]
            self.keys = self.masters = [master for group in groups for master in group]
            self._low = [parameter.data for parameter in ordered]
            # DeepSpeed made a step with zero gradients to create AdamW's state: undo its decay and its count.
            optimizer.optimizer.state.clear()
            for low, master in zip(self._low, self.masters, strict=True):
                master.data.copy_(low)
        self.members = [[names[id(parameter)]] for parameter in ordered]
        self.fragments = [Fragment(names[id(p)], 0, p.numel(), master, 0) for master, p in enumerate(ordered)]

    def gradients(self) -> list[Tensor]:
        """The parameters' own, already averaged over the ranks."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def clear_gradients(self) -> None:
        """Nothing is kept between steps; DeepSpeed fills in zeros for unused parameters when it averages."""
        for parameter in self._parameters:
            parameter.grad = None

    def publish(self) -> None:
        """Masters to low-precision weights (the same tensors in fp32)."""
        for low, master in zip(self._low, self.masters, strict=True):
            if low is not master:
                low.copy_(master)


def partitions_of(engine: Any, names: dict[int, str], rank: int) -> Partitions:
    """The view that fits the stage of a DeepSpeed ``engine``; ``names`` maps id(parameter) to its name."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return Stage3Partitions(engine.optimizer, names, rank)
    if stage == 2:
        return Stage2Partitions(engine.optimizer, names)
    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return WholeParameters(engine.optimizer, names, trainable)
