"""Tensors of zeros that take no memory: what stands for weights that are read later, or elsewhere.

Unlike those of the meta device they are real ones, so what is made beside them is made on the CPU,
and FSDP cuts shards from them. They lie in pages that nobody writes to, and all in the same.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_rooms: Final[list[Tensor]] = []
"""Bytes of zero, the most last. Private pages take no memory while they are only read."""


def hollow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, which must not be written to."""
    size = math.prod(shape) * dtype.itemsize
    if not _rooms or _rooms[-1].nbytes < size:
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _rooms.append(torch.frombuffer(pages, dtype=torch.uint8))
    return _rooms[-1][:size].view(dtype).reshape(tuple(shape))


def is_hollow(values: Tensor) -> bool:
    """Whether ``hollow`` made a tensor."""
    held = values.untyped_storage().data_ptr()
    return any(room.untyped_storage().data_ptr() == held for room in _rooms)


def widened(values: Tensor) -> Tensor:
    """The same in float32."""
    return hollow(values.shape, torch.float32) if is_hollow(values) else values.float()
