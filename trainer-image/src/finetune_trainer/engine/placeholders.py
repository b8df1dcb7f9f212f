"""Placeholders: tensors of zeros that take no memory, for weights that are loaded later or held by
other ranks.

Unlike meta tensors they are real CPU tensors: tensors derived from them are on the CPU, and FSDP
can shard them. All are views of shared zero pages, which are only read. Weights replace them by
parameter name.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

_zero_pages: Final[list[Tensor]] = []
"""Zero bytes, the longest tensor last. Private pages take no memory while they are only read."""


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that must not be written to."""
    size = math.prod(shape) * dtype.itemsize
    if not _zero_pages or _zero_pages[-1].nbytes < size:
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _zero_pages.append(torch.frombuffer(pages, dtype=torch.uint8))
    return _zero_pages[-1][:size].view(dtype).reshape(tuple(shape))


def is_placeholder(values: Tensor) -> bool:
    """Return whether ``placeholder`` made a tensor."""
    held = values.untyped_storage().data_ptr()
    return any(room.untyped_storage().data_ptr() == held for room in _zero_pages)


def in_float32(values: Tensor) -> Tensor:
    """Return the values in float32; of a placeholder, a placeholder."""
    return placeholder(values.shape, torch.float32) if is_placeholder(values) else values.float()


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter by ``make(name, parameter)``, with the first of its names; shared
    parameters stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = make(f"{path}.{name}".removeprefix("."), parameter)
            setattr(module, name, made[parameter])


def materialize(
    model: nn.Module, device: torch.device, only: Callable[[Tensor], bool] = lambda parameter: True
) -> None:
    """Allocate the parameters of a model of placeholders on a device, as zeros; with ``only``,
    just the parameters that it selects."""

    def made(_name: str, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.zeros_like(p, device=device), p.requires_grad) if only(p) else p

    replace_parameters(model, made)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter that has a name."""
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, parameter)
