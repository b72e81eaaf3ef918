"""The one adapter over DeepSpeed: forward, backward, step, averaged weights, full weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ladir.config import DeepSpeedSettings, TrainSettings
from ladir.models.backbone import DTYPES, Backbone, choose_dtype
from training.runtime.distributed import World
from training.runtime.ds_config import PERSISTENCE_THRESHOLD, complete_ds_config, read_ds_config, zero_stage
from training.runtime.muon import MuonAdamW, Part, layer_classes, layer_matrices
from training.runtime.partitions import partitions_of
from training.runtime.phase import Batch

logger = logging.getLogger(__name__)

#: what the optimizers remember of every element
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


@dataclass(frozen=True)
class Lag:
    """How the weights of an old model follow those that are trained: their moving average, taken every so many steps."""

    decay: float
    every: int


class Engine:
    """A model under DeepSpeed, of any ZeRO stage, trained with AdamW or Muon.

    Gradients are sums: what is passed to :meth:`backward` is neither divided by the number of micro batches nor by the
    number of ranks.  Parameters without ``requires_grad`` are partitioned too, but neither stepped nor checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainSettings,
        dtype: str,
        deepspeed: DeepSpeedSettings,
        world: World,
        lag: Lag | None = None,
    ) -> None:
        """``dtype``: ``backbone.dtype``, of weights and activations; bfloat16 has fp32 master weights.

        ``lag``: of an old model that is kept beside (:meth:`copy_old_weights`); None: there is none.
        """
        import deepspeed as ds

        torch_dtype = DTYPES[choose_dtype(dtype, world.device.type)]
        self.world, self.train_settings = world, train
        for parameter in model.parameters():
            # DeepSpeed casts only to bf16, and nothing at all once a part of the model was sharded while loading.
            if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(torch_dtype)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        config = complete_ds_config(read_ds_config(deepspeed.config), train, torch_dtype, world.size)
        self.stage = zero_stage(config)
        if deepspeed.leaf_layers and self.stage == 3 and getattr(model, "layers_run_once", False):
            config["zero_optimization"]["leaf_module"] = {"classes": layer_classes(model)}
        if self.stage == 3 and _weights_stay_whole(model, config["zero_optimization"]):
            # DeepSpeed's own linear layer keeps no weight for the backward pass, which would live on after its release.  Where
            # none is released it saves nothing, and costs a small model a tenth of its step in Python.
            config["zero_optimization"].setdefault("memory_efficient_linear", False)
        optimizer = _make_optimizer(model, train, config, torch_dtype, world)
        self._engine: Any = ds.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        world.wait_at_most(deepspeed.timeout_minutes)  # also in the process groups that DeepSpeed has just made
        self.partitions = partitions_of(self._engine, self._names, world.rank)
        self._optimizer: torch.optim.Optimizer = optimizer
        if isinstance(optimizer, MuonAdamW):
            self._place_matrices(optimizer)
        self.steps = 0
        self._frozen: str | None = None
        self.ema: list[Tensor] | None = None
        if train.ema > 0:
            self.ema = [master.detach().clone() for master in self.partitions.masters]
        self.lag = lag
        self.old: list[Tensor] | None = None
        if lag is not None:
            self.old = [master.detach().clone() for master in self.partitions.masters]

    @property
    def model(self) -> nn.Module:
        """The wrapped model; its submodules may be called directly (by all ranks alike)."""
        return cast(nn.Module, self._engine.module)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @property
    def skipped_steps(self) -> int:
        """Steps that DeepSpeed left out since the start because of an overflow."""
        return int(self._engine.skipped_steps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``model(batch)`` in training mode."""
        self._engine.train()
        return cast(dict[str, Tensor], self._engine(batch.to(self.world.device)))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """``model(batch)`` in evaluation mode, without gradient."""
        self._engine.eval()
        return cast(dict[str, Tensor], self._engine(batch.to(self.world.device)))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss`` (a scalar); ``last``: the step follows."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; each rank's loss is its share of the sum.
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    @torch.no_grad()
    def gradient_square(self) -> Tensor:
        """This rank's share of the squared gradient norm (before clipping): the sum over the ranks is the whole."""
        if self.partitions.replicated and not self.world.is_main:
            return torch.zeros((), device=self.world.device)
        norms = torch._foreach_norm(self.partitions.gradients(), 2, dtype=torch.float32)
        return torch.stack(norms).square().sum().to(self.world.device)

    def step(self, lr: float) -> None:
        """Clip, step with learning rate ``lr`` (fresh heads: ``heads_lr_factor`` times as much), forget the gradients, update the
        averaged weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.step()
        self.partitions.clear_gradients()
        self.steps += 1
        if self.ema is not None:
            # Early on the average follows closely, so that the initial weights do not linger in it.
            decay = min(self.train_settings.ema, (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.partitions.masters, 1 - decay)
        if self.old is not None and self.lag is not None and self.steps % self.lag.every == 0:
            with torch.no_grad():
                torch._foreach_lerp_(self.old, self.partitions.masters, 1 - self.lag.decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged (EMA) weights, where there are any.  Entered by all ranks together."""
        if self.ema is None:
            yield
            return
        self._swap(self.ema)
        yield  # after an error the engine is not used again, and swapping back would wait for ranks that are elsewhere
        self._swap(self.ema)

    @torch.no_grad()
    def _swap(self, others: list[Tensor]) -> None:
        for master, other in zip(self.partitions.masters, others, strict=True):
            kept = master.clone()
            master.copy_(other)
            other.copy_(kept)
        self.partitions.publish()

    @torch.no_grad()
    def copy_old_weights(self, target: nn.Module) -> None:
        """Bring the old model's weights, whole, into ``target`` on every rank (collective).

        ``target`` has the same structure, and what is not trained already.
        """
        assert self.old is not None
        others = dict(target.named_parameters())
        self._swap(self.old)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with self._gathered(parameter):
                    others[name].copy_(parameter)
        self._swap(self.old)

    def full_state(self, ema: bool) -> Iterator[tuple[str, Tensor]]:
        """Every parameter (frozen ones too) and persistent buffer, whole, one at a time, in its stored dtype.

        Collective: all ranks must exhaust the iterator; only rank 0 is given anything (CPU tensors).  ``ema`` yields
        the averaged weights.  Tied parameters come once, under their first name.
        """
        with self.averaged_weights() if ema else nullcontext():
            for name, parameter in self.model.named_parameters():
                with self._gathered(parameter):
                    value = parameter.detach().cpu().clone() if self.world.is_main else None
                if value is not None:
                    yield name, value
            if self.world.is_main:
                for name, buffer in persistent_buffers(self.model):
                    yield name, buffer.detach().cpu().clone()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.stage != 3:
            return nullcontext()
        import deepspeed

        return cast(AbstractContextManager[Any], deepspeed.zero.GatheredParameters([parameter]))

    def state(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
        """What a checkpoint holds of this rank: kind, tensors by parameter, and by parameter ``start/size`` of its part.

        Kinds are master, exp_avg, exp_avg_sq, momentum, ema, old, and buffer (rank 0).  Without ZeRO all ranks hold the same, so
        only rank 0 yields any.
        """
        if self.partitions.replicated and not self.world.is_main:
            return
        sizes = self.trainable_sizes()
        parts = [fragment for fragment in self.partitions.fragments if fragment.numel]
        places = {part.name: f"{part.start}/{sizes[part.name]}" for part in parts}
        for kind, values in self._kinds().items():
            flat = {master: value.detach().view(-1) for master, value in values.items()}
            held = [part for part in parts if part.master in flat]
            tensors = {part.name: flat[part.master][part.offset : part.offset + part.numel] for part in held}
            yield kind, tensors, {name: places[name] for name in tensors}
        if self.world.is_main:
            yield "buffer", dict(persistent_buffers(self.model)), {}

    @torch.no_grad()
    def load_state(self, shards: StateReader, steps: int) -> None:
        """Read the state saved after ``steps`` steps, by any number of ranks, under any ZeRO stage.

        Nothing collective happens here, so that a failure can be told to the other ranks; :meth:`publish` follows.
        """
        for kind, values in self._kinds().items():
            for fragment in self.partitions.fragments:
                if fragment.master not in values:
                    continue
                flat = values[fragment.master].detach().view(-1)
                shards.read(kind, fragment.name, fragment.start, flat[fragment.offset : fragment.offset + fragment.numel])
        for state in (state for state in self._optimizer_states() if "step" in state):
            state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], Tensor) else steps
        for name, buffer in persistent_buffers(self.model):
            buffer.copy_(shards.buffer(name))
        self.steps = steps

    def publish(self) -> None:
        """Bring what :meth:`load_state` read into the weights of all ranks (collective)."""
        self.partitions.publish()

    def trainable_sizes(self) -> dict[str, int]:
        """Number of elements of every trained parameter."""
        named = self.model.named_parameters()
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in named if p.requires_grad}

    def _place_matrices(self, optimizer: MuonAdamW) -> None:
        """Tell Muon which part of which matrix lies where."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        held = {(part.master, part.name): part for part in self.partitions.fragments}
        orthogonal = self._orthogonal_masters()
        parts: dict[Tensor, list[Part]] = {}
        for master, (key, names) in enumerate(zip(self.partitions.keys, self.partitions.members, strict=True)):
            if master in orthogonal:
                found = [(tuple(shapes[name]), held.get((master, name))) for name in names]
                parts[key] = [Part(shape, f.start, f.numel, f.offset) if f is not None else Part(shape) for shape, f in found]
        optimizer.place(parts, sharded=not self.partitions.replicated)

    def _orthogonal_masters(self) -> set[int]:
        """Indices of the masters that Muon steps."""
        wanted = layer_matrices(self.model) if self.train_settings.optimizer == "muon" else set()
        return {master for master, names in enumerate(self.partitions.members) if wanted.issuperset(names)}

    def _kinds(self) -> dict[str, dict[int, Tensor]]:
        """What there is of every kind by master; AdamW's and Muon's masters have different states."""
        kinds = {"master": dict(enumerate(self.partitions.masters))}
        for master, state in enumerate(self._optimizer_states()):
            for kind in _MOMENTS:
                if kind in state:
                    kinds.setdefault(kind, {})[master] = state[kind]
        if self.ema is not None:
            kinds["ema"] = dict(enumerate(self.ema))
        if self.old is not None:
            kinds["old"] = dict(enumerate(self.old))
        return kinds

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The state of every master, created as the optimizer itself would where no step has been made."""
        orthogonal = self._orthogonal_masters()
        for number, master in enumerate(self.partitions.keys):
            state = self._optimizer.state[master]
            if number in orthogonal:
                cast(MuonAdamW, self._optimizer).momentum_of(master)
            elif not state:
                fused = self._optimizer.defaults.get("fused")
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
        return [self._optimizer.state[master] for master in self.partitions.keys]

    def frozen_fingerprint(self) -> str:
        """Hash of the parameters that are not trained: equal weights give equal values on any number of ranks (collective)."""
        if self._frozen is None:  # once: it takes most of a minute where 8B weights lie in host memory
            self._frozen = self._hash_frozen()
        return self._frozen

    def _hash_frozen(self) -> str:
        total = torch.zeros(2, dtype=torch.int64)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                total += _checksum(name, *_local_part(parameter, self.world))
        sums = self.world.gather(total.tolist()) if self.stage == 3 else [total.tolist()]
        merged = [sum(values) % 2**64 for values in zip(*sums, strict=True)]
        return hashlib.sha256(str(merged).encode()).hexdigest()[:16]


class StateReader:
    """Interface of what :meth:`Engine.load_state` reads from (see :mod:`training.runtime.checkpoint`)."""

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with elements ``[start, start + out.numel())`` of the flattened ``kind`` of parameter ``name``."""
        raise NotImplementedError

    def buffer(self, name: str) -> Tensor:
        """The saved buffer ``name``."""
        raise NotImplementedError


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the buffers that belong to a model's state dict."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _weights_stay_whole(model: nn.Module, zero: dict[str, Any]) -> bool:
    """Whether every weight is below the size from which on ZeRO-3 releases weights between uses."""
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
    return all(getattr(parameter, "ds_numel", parameter.numel()) <= threshold for parameter in model.parameters())


def _make_optimizer(
    model: nn.Module, train: TrainSettings, config: dict[str, Any], dtype: torch.dtype, world: World
) -> torch.optim.Optimizer:
    """AdamW or Muon, with weight decay on matrices only; DeepSpeed's CPU kernel where a GPU run offloads AdamW's state."""
    muon = train.optimizer == "muon"
    groups = _parameter_groups(model, train, layer_matrices(model) if muon else set())
    if not groups:
        raise ValueError("the model has no trainable parameter: nothing requires a gradient")
    arguments: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if muon:
        # DeepSpeed knows optimizers by their exact class, and for offloading would have its own.
        config.update(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
        # The original computes in bfloat16 throughout; a CPU may only emulate it, and then does not train in it either.
        precision = dtype if world.device.type == "cpu" else torch.bfloat16
        return MuonAdamW(groups, world, train.momentum, precision, fused=True, **arguments)
    if world.device.type == "cuda" and config.get("zero_optimization", {}).get("offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments))
    return torch.optim.AdamW(groups, fused=True, **arguments)


def _parameter_groups(model: nn.Module, train: TrainSettings, orthogonal: set[str]) -> list[dict[str, Any]]:
    """The optimizer's groups: Muon's matrices (names in ``orthogonal``), what decays, the rest; of heads with an ``lr_factor`` of
    their own each apart."""
    heads = fresh_heads(model) if train.heads_lr_factor != 1 else set()
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for kind in ("orthogonal", "decayed", "other"):  # in this order, with heads behind the LM's own
        found |= {(kind, False): [], (kind, True): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # under sharded construction only ds_shape tells the real shape
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            kind = "orthogonal" if name in orthogonal else "decayed" if is_matrix else "other"
            found[kind, name in heads].append(parameter)
    return [
        {
            "params": group,
            "weight_decay": 0.0 if kind == "other" else train.weight_decay,
            "lr_factor": train.heads_lr_factor if is_head else 1.0,
            "orthogonal": kind == "orthogonal",
        }
        for (kind, is_head), group in found.items()
        if group
    ]


def fresh_heads(model: nn.Module) -> set[str]:
    """Names of the parameters that are of none of the LMs in ``model``."""
    lms = [module for module in model.modules() if isinstance(module, Backbone)]
    own = {id(parameter) for lm in lms for parameter in lm.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in own}


def _local_part(parameter: nn.Parameter, world: World) -> tuple[Tensor, int]:
    """(this rank's elements of a parameter, flattened; index of the first)."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().reshape(-1), 0
    partition: Tensor = parameter.ds_tensor
    start = world.rank * partition.ds_numel  # type: ignore[attr-defined]
    real = max(0, min(partition.ds_numel, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return partition.detach().reshape(-1)[:real], start


def _checksum(name: str, values: Tensor, start: int, chunk: int = 1 << 22) -> Tensor:
    """Two int64 sums (modulo 2^64) over the bits of ``values``, weighted by position: additive over partitions."""
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    total = torch.zeros(2, dtype=torch.int64)
    for begin in range(0, bits.numel(), chunk):
        part = bits[begin : begin + chunk].to(torch.int64)
        weight = torch.arange(start + begin, start + begin + part.numel(), device=part.device) * 2654435761 + salt
        total += torch.stack([(part * weight).sum(), (part * (weight ^ (weight >> 15))).sum()]).cpu()
    return total
