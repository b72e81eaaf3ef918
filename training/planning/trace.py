"""What a forward and backward pass allocates and computes, found by running it, on the meta device or on a real one.

On the meta device tensors have sizes but no data, so that the pass of an 8B model is traced in seconds on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ladir.inference.rollout import Rollout
from ladir.models import lean
from ladir.spans import step_schedule

#: records of up to so many blocks are traced as they are, longer ones extrapolated from these
_TRACED_BLOCKS = (2, 4, 6)


#: operators that only make or rename tensors, besides views
_FREE = frozenset(
    (
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.detach,
        torch.ops.aten._unsafe_view,
        torch.ops.aten.resize_,
        torch.ops.aten.set_,
    )
)


class LiveMemory(TorchDispatchMode):
    """Within, counts the bytes of storages that operators allocate and that are still alive, and their peak.

    Only storages of the device type ``device`` count, and none that was there before (weights, batch: ``known``).
    ``flops`` counts matrix products; ``launches`` the operators that a GPU has work with, of which each is launched by the host.
    """

    def __init__(self, device: str, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._device = device
        self.live = self.peak = 0
        self.flops = 0
        self.launches = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        self.launches += not (func.is_view or func._overloadpacket in _FREE)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen or storage.device.type != self._device:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def beside(self, size: int) -> None:
        """So many bytes more are alive for a moment."""
        self.peak = max(self.peak, self.live + size)


@contextmanager
def fused_attention(add_flops: Callable[[int], None]) -> Iterator[None]:
    """Within, scaled_dot_product_attention allocates what the fused kernels do: no matrix of attention weights.

    A function in its place, because a torch function mode is suspended while the backward pass recomputes activations.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return _Attention.apply(query, key, value, attn_mask, add_flops)

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    """Shapes of fused attention [N, heads, T, D]: it keeps its inputs, its output and one statistic per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, add_flops: Any) -> Tensor:
        out = torch.empty_like(query)
        statistic = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        bias = None if mask is None else torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, bias, out, statistic)
        ctx.add_flops, ctx.flops = add_flops, 4 * query.numel() * key.shape[-2]
        add_flops(ctx.flops)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        torch.empty(query.shape, dtype=torch.float32, device=query.device)  # the kernels accumulate this one in fp32
        ctx.add_flops(2 * ctx.flops)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


@contextmanager
def fused_norms(launched: Callable[[], None]) -> Iterator[None]:
    """Within, a norm is one operator that keeps one number per vector, and so is its gradient, as on a GPU."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        launched()
        return torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)

    def gradients(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, trained: bool) -> tuple[Tensor, Tensor | None]:
        launched()
        return torch.empty_like(x), torch.empty_like(weight) if trained else None

    original = lean.norm, lean.norm_gradients
    lean.norm, lean.norm_gradients = norm, gradients
    try:
        yield
    finally:
        lean.norm, lean.norm_gradients = original


@dataclass(frozen=True)
class Pass:
    """A traced pass: most bytes alive at once (weights, their gradients and the batch not counted), its FLOPs, and the operators
    that the host launches for it."""

    peak_bytes: int
    flops: int
    launches: int = 0


def extrapolated(one: Pass, two: Pass, steps: float) -> Pass:
    """What lies ``steps`` times as far from ``one`` as ``two`` does, in a straight line."""
    peak, flops, launches = (
        int(getattr(one, name) + steps * (getattr(two, name) - getattr(one, name)))
        for name in ("peak_bytes", "flops", "launches")
    )
    return Pass(max(peak, two.peak_bytes), flops, launches)


def weighted(passes: Sequence[tuple[float, Pass]]) -> Pass:
    """The sum of passes times their weights; of their peaks the highest."""
    flops, launches = (round(sum(weight * getattr(one, name) for weight, one in passes)) for name in ("flops", "launches"))
    return Pass(max(one.peak_bytes for _, one in passes), flops, launches)


#: bytes that the engine has for a moment, beside a complete gradient of so many elements
TakingIn = Callable[[int], int]


def at_no_cost(numel: int) -> int:
    """Nothing beside it."""
    return 0


def trace_training(model: nn.Module, batch: Any, taking_in: TakingIn = at_no_cost) -> Pass:
    """Forward and backward of ``model(batch)``, each weight's gradient given up as soon as it is complete.

    That is what the engine does: it moves a gradient into its own buffers the moment autograd has it.
    """
    model.train()
    memory = LiveMemory(_device(model), _known(model, batch))
    with _gradients_given_up(model, memory, taking_in), memory, _fused(model, memory):
        outputs = model(batch)
        losses = [value for name, value in outputs.items() if not name.startswith("metric/")]
        torch.stack(losses).sum().backward()
    return Pass(memory.peak, memory.flops, memory.launches)


def trace_rollout(model: Rollout, batch: Any, taking_in: TakingIn = at_no_cost) -> Pass:
    """As :func:`trace_training`, from rollouts of few passes per span: every further pass costs the same again.

    A pass without gradient stores nothing, and costs what it adds before those with gradient.
    """
    settings = model.settings
    all_passes, with_gradient = _passes_per_span(model)
    few = min(max(with_gradient, 1), 2)
    passes = []
    for steps, learned in ((few, few), (few + 1, few + 1), (few + 1, few)):
        model.settings = replace(settings, num_steps=steps, gradient_steps=learned, lag=0)
        passes.append(trace_training(model, batch, taking_in))
    model.settings = settings
    base, longer, begun = passes
    more, forward = max(with_gradient - few, 0), all_passes - max(with_gradient, few)
    return Pass(
        base.peak_bytes + more * (longer.peak_bytes - base.peak_bytes),
        base.flops + more * (longer.flops - base.flops) + forward * (begun.flops - base.flops),
        base.launches + more * (longer.launches - base.launches) + forward * (begun.launches - base.launches),
    )


def _passes_per_span(model: Rollout) -> tuple[int, int]:
    """Passes in which a span's blocks take their Euler steps, and how many of them carry gradient."""
    how, gradient = model.sampling, model.settings.gradient_steps
    first = 0 if gradient is None else how.num_steps - gradient
    passes = step_schedule(how.num_steps, model.denoiser.settings.span, how.lag)
    return len(passes), sum(any(step >= first for _, step in moving) for moving in passes)


def trace_long_rollout(model: Rollout, batch_of: Callable[[int], Any], blocks: int, taking_in: TakingIn = at_no_cost) -> Pass:
    """As :func:`trace_rollout` of ``batch_of(blocks)``; records of many blocks are extrapolated from shorter ones.

    Every block adds as many passes, over a prefix that is longer by one block: bytes and FLOPs are quadratic in the blocks.
    """
    traced = [count * model.denoiser.settings.span for count in _TRACED_BLOCKS]
    if blocks <= traced[-1]:
        return trace_rollout(model, batch_of(blocks), taking_in)
    passes = [trace_rollout(model, batch_of(count), taking_in) for count in traced]
    weights = _lagrange(traced, blocks)
    peak = sum(weight * found.peak_bytes for weight, found in zip(weights, passes, strict=True))
    flops = sum(weight * found.flops for weight, found in zip(weights, passes, strict=True))
    launches = sum(weight * found.launches for weight, found in zip(weights, passes, strict=True))
    return Pass(max(int(peak), passes[-1].peak_bytes), int(flops), int(launches))


def _lagrange(points: Sequence[int], x: int) -> list[Fraction | int]:
    """Weights of the values at ``points`` in the value at ``x`` of the polynomial through them."""
    return [prod(Fraction(x - other, point - other) for other in points if other != point) for point in points]


def trace_inference(model: nn.Module, run: Callable[[], Any], batch: Any = None) -> Pass:
    """``run()`` in evaluation mode without gradient; ``model`` holds the weights that do not count."""
    model.eval()
    memory = LiveMemory(_device(model), _known(model, batch))
    with torch.no_grad(), memory, _fused(model, memory):
        run()
    return Pass(memory.peak, memory.flops, memory.launches)


@contextmanager
def _fused(model: nn.Module, memory: LiveMemory) -> Iterator[None]:
    """On the meta device, which stands for a GPU: its operators in place of a CPU's."""

    def add(flops: int = 0) -> None:
        memory.flops += flops
        memory.launches += 1

    if _device(model) != "meta":
        yield
        return
    with fused_attention(add), fused_norms(add):
        yield


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _known(model: nn.Module, batch: Any) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    pending = list(vars(batch).values()) if batch is not None else []
    for value in pending:
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            pending.extend(vars(value).values())


@contextmanager
def _gradients_given_up(model: nn.Module, memory: LiveMemory, taking_in: TakingIn) -> Iterator[None]:
    def give_up(parameter: Tensor) -> None:
        memory.beside(taking_in(parameter.numel()))
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(give_up) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
