"""torch.compile, one decoder block at a time.

Blocks have the same code, so one compilation serves all of them, and the modules around them
(embedding, logits at supervised positions) may have any shape. Micro-batches are padded to one size
(``feed.StaticShape``). Only the number of documents varies, and is marked as dynamic. So a run
compiles at its first step and not again; the number of compilations is a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.engine.parameters import decoder_blocks


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Have the decoder blocks of a model compiled at their first call."""
    for block in decoder_blocks(model):
        block.compile(backend=backend)


def varies(tensor: Tensor) -> None:
    """Mark the first dimension of a tensor as dynamic."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def uncompiled(blocks: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Run decoder blocks eagerly in this context, for shapes that occur once (evaluation)."""
    if not any(getattr(block, "_compiled_call_impl", None) for block in blocks):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def compilation_seconds() -> float:
    """Seconds that this process has spent compiling."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def compilations() -> int:
    """Number of graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
