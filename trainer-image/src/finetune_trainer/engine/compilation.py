"""torch.compile, one decoder block at a time.

Blocks are alike, so one compilation serves all of them, and what stands around them (embedding,
logits at supervised positions) may have any shape. Rows are padded to one size
(``feed.StaticShape``) and only the number of documents varies, which is marked as dynamic: a run
compiles at its first step and not again. How often it did is a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.engine.parameters import decoder_blocks


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Have the blocks of a model compiled when they are first run."""
    for block in decoder_blocks(model):
        block.compile(backend=backend)


def varies(tensor: Tensor) -> None:
    """Have the first dimension of a tensor compiled as one that varies."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def uncompiled(blocks: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Decoder blocks as they were written, for shapes that are seen once (in evaluation)."""
    if not any(getattr(block, "_compiled_call_impl", None) for block in blocks):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def compilation_seconds() -> float:
    """Seconds that compiling has taken in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def compilations() -> int:
    """Graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
