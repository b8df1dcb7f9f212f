"""Triton kernel of keyed dropout, see ``fuseddropout``."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK: Final = 1024
"""Most features per program of the kernel."""


def drop(x: Tensor, keys: Tensor, salt: Tensor, probability: float, out: Tensor) -> None:
    """Write ``x`` after dropout to ``out``; arguments as of ``fuseddropout.keyed_dropout``, all
    contiguous, none empty."""
    tokens, features = x.shape[-2:]
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(features))
    grid = (x.numel() // features, triton.cdiv(features, block))
    _drop[grid](
        x, keys, salt, out, features, tokens, tokens - keys.shape[-1], int(probability * 2**32),
        1.0 - probability, BLOCK=block,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _drop(  # type: ignore[no-untyped-def]
    x, keys, salt, out, features, per_document, keyless, threshold, kept, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK features of one token."""
    token = tl.program_id(0).to(tl.int64)
    document, position = token // per_document, token % per_document - keyless
    place = document * (per_document - keyless) + tl.maximum(position, 0)
    key = tl.load(keys + place).to(tl.uint32, bitcast=True)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = (key ^ tl.load(salt).to(tl.uint32, bitcast=True)) + (feature + 1).to(tl.uint32) * 0x85EBCA77
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    inside = feature < features
    value = tl.load(x + token * features + feature, mask=inside, other=0.0)
    scaled = (value.to(tl.float32) / kept).to(value.dtype)
    kept_or_zero = tl.where(h >= threshold, scaled, tl.zeros_like(value))
    tl.store(
        out + token * features + feature,
        tl.where(position < 0, value, kept_or_zero),
        mask=inside,
    )
