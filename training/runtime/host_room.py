"""Room in this machine's memory for a rank's state, from which a checkpoint is written while the training goes on."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

#: a kind of state, its tensors by parameter, and where each lies in its parameter (:meth:`training.runtime.engine.Engine.state`)
Kind = tuple[str, dict[str, Tensor], dict[str, str]]

#: bytes to a multiple of which every copy begins: more than the widest element has
_ALIGNED = 64


class HostRoom:
    """Made at the first copy and kept for the next ones, since to make it takes longer than to fill it.

    What a GPU fills is page-locked: it is filled at the full speed of the bus, all tensors at once.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copies(self, kinds: Iterable[Kind]) -> list[Kind]:
        """``kinds`` with their tensors as they are now, in this room, in the place of what was copied there before.

        Raises OSError where so much memory cannot be page-locked.
        """
        held = list(kinds)
        tensors = [tensor for _, those, _ in held for tensor in those.values()]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        self._make(sum(_room_of(tensor) for tensor in tensors), on_gpu)
        start, copied = 0, []
        for kind, those, places in held:
            found = {}
            for name, tensor in those.items():
                found[name] = self._at(start, tensor).copy_(tensor.detach(), non_blocking=on_gpu)
                start += _room_of(tensor)
            copied.append((kind, found, places))
        if on_gpu:
            torch.cuda.synchronize()
        return copied

    def _at(self, start: int, like: Tensor) -> Tensor:
        """The place that begins with byte ``start``, of the dtype and shape of ``like``."""
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _make(self, size: int, page_locked: bool) -> None:
        """So many bytes at least."""
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # given back first
            self._bytes = torch.empty(size, dtype=torch.uint8)
            if page_locked:
                _lock_pages(self._bytes)


def _room_of(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _lock_pages(room: Tensor) -> None:
    """Have CUDA lock the pages of ``room`` for as long as it lives.

    PyTorch's own page-locked memory is rounded up to a power of two: of 18 GiB it makes 32.
    """
    cudart, address = torch.cuda.cudart(), room.data_ptr()
    status = int(cudart.cudaHostRegister(address, room.nbytes, 0))
    if status:
        raise OSError(
            errno.ENOMEM,
            f"{room.nbytes / 2**30:.1f} GiB of this machine's memory could not be page-locked for the copy of a checkpoint (CUDA "
            f"error {status}): say <phase>.train.checkpoint_in_background=false, or use a machine with more memory",
        )
    weakref.finalize(room, cudart.cudaHostUnregister, address).atexit = False  # the process' end gives everything back
