"""Norms and rotary positions in few operators: half of what a layer launches are theirs where every product has its own operator.

A step of few tokens takes the time of launching its operators, not of computing them (docs/benchmark.md).  transformers writes a
norm as eight of them and a rotation as five, and autograd twice as many behind each.  Here a norm is one on a GPU, and queries
and keys turn together in four.  Values are transformers' own up to rounding; what is kept for the backward pass is less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

#: architectures whose norms are ``weight * x / rms(x)`` and whose heads turn by halves, as Llama's
_LIKE_LLAMA = frozenset(["granite", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3"])
#: the name of the function in a model's file that turns queries and keys
_TURNS = "apply_rotary_pos_emb"

#: rotated queries and keys [N, heads, T, head]
_Turned = tuple[Tensor, Tensor]


def lean_layers(lm: PreTrainedModel) -> None:
    """Let a model of a known architecture compute its norms and rotary positions as here; others stay as they are.

    The function that turns is one for all models of that architecture in this process.
    """
    if lm.config.model_type not in _LIKE_LLAMA:
        return
    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            kind: Any = type(module)
            module.__class__ = _lean_norm(kind)
    file: Any = sys.modules[type(lm).__module__]
    if not hasattr(getattr(file, _TURNS), "plain"):
        setattr(file, _TURNS, _lean_turn(getattr(file, _TURNS)))


@cache
def _lean_norm(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a norm with another forward, under the same name; compiled layers keep the one that they had."""
    if hasattr(kind, "plain"):
        return kind

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or hidden_states.dtype != self.weight.dtype:
            plain: Tensor = kind.forward(self, hidden_states)
            return plain
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        normed: Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
        return normed

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (kind,), self.__dict__

    parts = {"forward": forward, "plain": kind, "__module__": kind.__module__, "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), parts)


def _unpickled(kind: Any) -> nn.Module:
    """A norm without its state, of the class that no pickle knows by name."""
    lean: type[nn.Module] = _lean_norm(kind)
    norm: nn.Module = lean.__new__(lean)
    return norm


def _lean_turn(plain: Callable[..., _Turned]) -> Callable[..., _Turned]:
    """``apply_rotary_pos_emb`` of a model's file in other words, ``plain`` where it is not called as we know it."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> _Turned:
        known = unsqueeze_dim == 1 and q.dtype == k.dtype == cos.dtype and cos.shape[-1] == q.shape[-1]
        if torch.compiler.is_compiling() or not known:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        turned: _Turned = _Turn.apply(q, k, cos, sin)
        return turned

    turn.plain = plain  # type: ignore[attr-defined]
    return turn


class _Norm(torch.autograd.Function):
    """``weight * x / rms(x)``, which keeps its input and one number per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x`` [..., H], ``weight`` [H]."""
        normed, inverse = norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of the input, and of the weight where it is trained."""
        x, weight, inverse = ctx.saved_tensors
        return *norm_gradients(gradient, x, weight, inverse, ctx.needs_input_grad[1]), None


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed vectors [..., H] and the inverse of each one's root mean square [..., 1], fp32.

    In transformers' own operators, to the last bit; on a GPU PyTorch's fused norm takes its place.
    """
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return weight * (wide * inverse).to(x.dtype), inverse


def norm_gradients(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, trained: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and of ``weight`` (None: it is not ``trained``) where :func:`norm` gave ``inverse``."""
    unit, wanted = x.float().mul(inverse), (gradient * weight).float()
    of_weight = (gradient * unit).flatten(0, -2).sum(0).to(weight.dtype) if trained else None
    along = (wanted * unit).mean(-1, keepdim=True)
    return wanted.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype), of_weight


class _Turn(torch.autograd.Function):
    """Queries and keys turned by their positions, together."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> _Turned:
        """``q`` [N, heads, T, head], ``k`` [N, kv heads, T, head]; ``cos``, ``sin`` [N or 1, T, head], whose halves are alike."""
        ctx.save_for_backward(cos, sin)
        return _both_turned(q, k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> Any:
        """The same, turned back."""
        cos, sin = ctx.saved_tensors
        return *_both_turned(q, k, cos, sin, -1), None, None


def _both_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> _Turned:
    """Side by side as they lie in memory, token by token."""
    x = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], dim=2)
    cos, sin, half = cos[:, :, None], sin[:, :, None, : x.shape[-1] // 2], x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin, value=sign)
    first, second = turned.split([q.shape[1], k.shape[1]], dim=2)
    return first.transpose(1, 2), second.transpose(1, 2)
