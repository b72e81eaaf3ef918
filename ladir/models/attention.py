"""Attention backends: which kernel serves a pass, and how what tokens see reaches it.

Four kernels give the same numbers.  Eager and SDPA take a dense mask and serve every pass.  FlexAttention takes a block-sparse
mask made from a :class:`~ladir.layout.Layout`, so that its cost grows with what is visible.  flash-attn knows two passes only:
causal documents laid end to end, and new tokens that see their whole prefix and each other.  Where the chosen kernel cannot
serve a pass, the next one of flash, flex, SDPA does.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ladir.errors import UnusableError
from ladir.layout import Layout
from ladir.models.prefix_attention import PREFIX_ATTENTION, SharedPrefix, has_plain_attention
from ladir.models.sliding import FULL, SLIDING, SlidingWindow

logger = logging.getLogger(__name__)

#: names under which transformers knows our two kernels (it takes any with "flash" in it for its own)
FLEX, FLASH = "ladir_flex", "ladir_fa"
_NAMES = {"flex": FLEX, "flash": FLASH}

#: side of the squares of a BlockMask; rows are padded to multiples of it, so that few shapes are compiled
BLOCK = 128
#: a CPU's choice: eager attention for short rows, SDPA, which never writes the whole square of weights down, for long ones
CPU = "ladir_cpu"
#: queries from which on SDPA is the faster one (docs/log.md)
SHORTEST_SDPA = 256

#: narrower rows go through SDPA: on an H200 their dense mask costs less than padding and few squares to skip
NARROWEST_FLEX = 8 * BLOCK
#: the compiled kernels multiply tiles of this many rows and columns at least
SMALLEST_HEAD = 16
#: tiles of FlexAttention's kernels by head size, where an H200 is much faster with them than with PyTorch's choice: that one's
#: forward kernel for heads of 64 runs out of registers (three times as long)
_TILES = {
    64: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64,
         "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_warps": 4, "bwd_num_stages": 3}
}  # fmt: skip
_CACHED_MASKS = 16


@dataclass(frozen=True)
class WholePrefix:
    """``length`` new tokens per row that see each other and everything cached of their row.

    ``valid`` bool [R, P + length] marks the real tokens; ``padded`` says whether there are others.
    """

    valid: Tensor
    length: int
    padded: bool

    def dense(self) -> Tensor:
        """The mask [R, length, P + length]."""
        return self.valid[:, None, :].expand(-1, self.length, -1)


Visibility = Tensor | Layout | WholePrefix | SharedPrefix


@dataclass(frozen=True)
class Attend:
    """How one pass calls transformers: the implementation's name, its 4D mask, and what else it takes.

    Masks go by the kind of the layer where some have a sliding window.  ``width``: the tokens that rows must be padded to; 0
    where any number will do.
    """

    implementation: str
    mask: Tensor | BlockMask | dict[str, Tensor] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    width: int = 0


class BlockMasks:
    """The newest BlockMasks by their layout's content."""

    def __init__(self) -> None:
        self._masks: OrderedDict[tuple[bytes, torch.device], BlockMask] = OrderedDict()

    def __call__(self, layout: Layout, width: int) -> BlockMask:
        """The mask of a layout with its rows padded to ``width`` tokens, made once."""
        key = (layout.digest(), layout.position.device)
        if key not in self._masks:
            self._masks[key] = block_mask(layout.padded_to(width))
            while len(self._masks) > _CACHED_MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]


def whole_squares(length: int) -> int:
    """Tokens of the squares that a row of ``length`` tokens needs."""
    return -(-length // BLOCK) * BLOCK


def attend(
    visible: Visibility,
    implementation: str,
    dtype: torch.dtype,
    masks: BlockMasks,
    positions: Tensor,
    window: SlidingWindow | None = None,
) -> Attend:
    """How a pass with ``visible`` for new tokens at ``positions`` [N or 1, T] runs in a model that was set to ``implementation``.

    ``window``: the model's; such a model has a dense mask in every pass.
    """
    if isinstance(visible, SharedPrefix):
        return Attend(PREFIX_ATTENTION, None, {"shared_prefix": visible})
    if isinstance(visible, Layout):
        if implementation == FLASH and visible.boundaries is not None:
            return Attend(FLASH, None, {"documents": visible})
        if implementation in (FLEX, FLASH) and visible.position.shape[1] >= NARROWEST_FLEX:
            width = whole_squares(visible.position.shape[1])
            return Attend(FLEX, masks(visible, width), width=width)
        dense = visible.visible()
    elif isinstance(visible, WholePrefix):
        if implementation == FLASH and not visible.padded:
            return Attend(FLASH)
        dense = visible.dense()
    else:
        dense = visible
    short = implementation == CPU and dense.shape[1] < SHORTEST_SDPA
    name = "eager" if implementation == "eager" or short else "sdpa"
    if window is None or window.spans(dense.shape[2], dense.shape[1]):
        return Attend(name, attention_mask(dense, name, dtype))
    near = attention_mask(window.near(dense, positions), name, dtype)
    return Attend(name, {FULL: attention_mask(dense, name, dtype), SLIDING: near} if window.mixed else near)


def attention_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """The 4D mask [N, 1, Tq, Tk] for a boolean ``visible`` [N, Tq, Tk].

    Eager attention adds its mask, so it needs 0 / -max (a 0/1 mask cast to float would mask nothing); SDPA takes booleans.
    """
    if implementation != "eager":
        return visible[:, None]
    blocked = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, blocked)[:, None]


def block_mask(layout: Layout) -> BlockMask:
    """The rule of :meth:`Layout.visible` as a BlockMask: squares that nobody sees are skipped by the kernel.

    ``layout``'s rows are a multiple of BLOCK wide.  The rule goes by :meth:`Layout.spans`: in a square that is seen in part the
    kernel reads four numbers per query and none per key, and the dense mask is never there (``create_block_mask`` makes it).
    It asks for the distance from a stretch's middle, in floats (exact up to 2^23 tokens), of which a GPU compares twice as many.
    """
    start, end, own_start, own_end = (bound.to(torch.int32) for bound in layout.spans())
    middle, half = (start + end - 1) / 2, (end - start) / 2
    own_middle, own_half = (own_start + own_end - 1) / 2, (own_end - own_start) / 2

    def visible(row: Tensor, _head: Tensor, viewer: Tensor, other: Tensor) -> Tensor:
        place = other.to(torch.float32)
        clean = (place - middle[row, viewer]).abs() < half[row, viewer]
        own = (place - own_middle[row, viewer]).abs() < own_half[row, viewer]
        return clean | own

    width = start.shape[1]
    left = torch.arange(0, width, BLOCK, dtype=torch.int32, device=start.device)  # of every square of keys
    bounds = [bound[..., None].clamp(left, left + BLOCK) for bound in (start, end, own_start, own_end)]
    clean, own = (bounds[1] - bounds[0]).clamp_min(0), (bounds[3] - bounds[2]).clamp_min(0)
    both = (torch.minimum(bounds[1], bounds[3]) - torch.maximum(bounds[0], bounds[2])).clamp_min(0)
    seen = (clean + own - both).unflatten(1, (-1, BLOCK))  # keys of the square, by viewer: [N, Q, BLOCK, K]
    some, whole = (seen > 0).any(2), (seen == BLOCK).all(2)
    return BlockMask.from_kv_blocks(
        *_squares(some & ~whole), *_squares(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(width, width)
    )


def _squares(marked: Tensor) -> tuple[Tensor, Tensor]:
    """How many squares of each strip are ``marked`` [N, Q, K], and which first: int32 [N, 1, Q] and [N, 1, Q, K]."""
    order = marked.int().argsort(dim=-1, descending=True, stable=True)
    return marked.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """FlexAttention of ``query`` [N, heads, T, head] over ``key`` and ``value`` [N, kv heads, T, head]; [N, T, heads, head].

    Compiled on CUDA (with what is around it, where that is compiled); elsewhere the operator's own plain arithmetic runs,
    forward only (PyTorch has no backward of it there).
    """
    run = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    grouped = query.shape[1] != key.shape[1]
    # Rows are whole squares, which kernels compiled for any width cannot know: they would check the bounds of every load.
    options = {"IS_DIVISIBLE": True, **_TILES.get(query.shape[-1], {})}
    output = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped, kernel_options=options)
    return output.transpose(1, 2).contiguous(), None


def flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    *,
    documents: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """flash-attn over causal ``documents`` laid end to end; without them every query sees every key.  Shapes as there."""
    kernels = importlib.import_module("flash_attn")
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    common = {"dropout_p": dropout, "softmax_scale": scaling}
    if documents is None:
        return kernels.flash_attn_func(query, key, value, causal=False, **common), None
    output = kernels.flash_attn_varlen_func(
        *(tensor.flatten(0, 1) for tensor in (query, key, value)),
        cu_seqlens_q=documents.boundaries,
        cu_seqlens_k=documents.boundaries,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        causal=True,
        **common,
    )
    return output.unflatten(0, query.shape[:2]), None


AttentionInterface.register(FLEX, flex)
AttentionInterface.register(FLASH, flash)
AttentionInterface.register(CPU, ALL_ATTENTION_FUNCTIONS["sdpa"])  # for whoever calls the LM directly; we choose by the pass


def set_attention(lm: PreTrainedModel, setting: str, device_type: str) -> None:
    """Give ``lm`` the attention that ``backbone.attention`` asks for on a device; ``auto`` says what it took.

    On a CPU auto is eager for short rows, where SDPA's backward is half of a step, and SDPA for long ones; on CUDA the first of
    flash, flex and SDPA that this machine and model can run.  Raises UnusableError where a kernel is asked for that they cannot.
    """
    if setting == "auto" and device_type == "cpu" and has_plain_attention(lm.config):
        logger.info("backbone.attention=auto: eager, and sdpa for rows of %d tokens and more", SHORTEST_SDPA)
        setting = CPU
    elif setting == "auto":
        kernels = () if device_type == "cpu" else ("flash", "flex", "sdpa")
        setting = next((name for name in kernels if not _lacks(name, lm, device_type)), "eager")
        rest = f", and sdpa for rows of less than {NARROWEST_FLEX} tokens" if setting in _NAMES else ""
        logger.info("backbone.attention=auto: %s%s", setting, rest)
    elif lacks := _lacks(setting, lm, device_type):
        raise UnusableError(f"backbone.attention={setting} cannot be used: {lacks}; auto takes the fastest that can")
    lm.set_attn_implementation(_NAMES.get(setting, setting))


def _lacks(setting: str, lm: PreTrainedModel, device_type: str) -> str:
    """Why a kernel cannot train this model here; empty where it can."""
    config = lm.config.get_text_config()
    if setting == "sdpa" and not lm._supports_sdpa:  # a soft cap, sinks: what SDPA would leave out
        return f"{config.model_type} models compute what it does not"
    if setting not in _NAMES:
        return ""
    if device_type != "cuda":
        return f"it trains on CUDA only, and this process runs on {device_type}"
    if lm.dtype != torch.bfloat16:
        return "it is for backbone.dtype=bfloat16"
    if not has_plain_attention(lm.config):
        return f"{config.model_type} models compute attention in a way of their own"
    if window := SlidingWindow.of(lm.config):
        return f"the model has a sliding window of {window.size} tokens, which needs a dense mask"
    if (head := getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) < SMALLEST_HEAD:
        return f"it is for heads of at least {SMALLEST_HEAD}, the model's are of {head}"
    if getattr(config, "attention_dropout", 0.0):
        return f"the model was made with attention_dropout={config.attention_dropout}"
    if importlib.util.find_spec("triton") is None:
        return "triton, which comes with PyTorch for CUDA, is not installed"
    return flash_lacks() if setting == "flash" else ""


def flash_lacks() -> str:
    """Why flash-attn cannot be used in this process; empty where it can."""
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        return f"flash-attn cannot be imported ({error}): pip install -r requirements-cuda.txt --no-build-isolation"
    return ""


def causal(length: int, device: torch.device) -> Tensor:
    """Boolean mask [1, length, length]: a token sees the tokens up to itself."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]


def left_padded(lengths: Tensor, width: int, bidirectional: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Causal sequences (or ``bidirectional`` ones) of ``lengths`` [N] padded on the left to ``width``.

    Returns which tokens are real, bool [N, width]; who sees whom, bool [N, width, width], padding itself only; and the
    positions, int64 [N, width], that start at the first real token.
    """
    order = torch.arange(width, device=lengths.device)[None]
    padding = (width - lengths)[:, None]
    valid = order >= padding
    itself = torch.eye(width, dtype=torch.bool, device=lengths.device)
    order_allows = valid[:, :, None] if bidirectional else causal(width, lengths.device)
    visible = order_allows & valid[:, None, :] | itself
    return valid, visible, (order - padding).clamp_min(0)
