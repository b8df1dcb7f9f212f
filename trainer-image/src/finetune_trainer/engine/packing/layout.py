"""Layout of the documents in a packed sequence.

A packed sequence is a concatenation of documents. During its forward and backward pass,
``layout_context`` provides the layout to attention, which isolates the documents, and to dropout
and noise, which are drawn per token.

A process holds the whole packed sequence or, with context parallelism, a share of it (see
``context``). Either way the layout is a list of spans: the local queries and the keys they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.engine.packing.context import SharedKeys, Span
from finetune_trainer.engine.packing.groups import Groups, group_documents
from finetune_trainer.engine.packing.transfer import on_device


@dataclass(frozen=True)
class CuSeqlens:
    """Cumulative sequence lengths of the spans, for variable-length kernels: the start of each
    span, then the total."""

    q: Tensor
    """int32, shape [spans + 1]."""
    kv: Tensor
    """As ``q``; the same tensor if every span is a whole document."""


@dataclass(frozen=True)
class DocumentLayout:
    """Spans, dropout keys and document lengths of a micro-batch."""

    spans: tuple[Span, ...]
    """Local queries, in order, and their keys."""
    cu_seqlens: CuSeqlens
    max_seqlen: int
    """Upper bound of the keys of a span."""
    dropout_keys: Tensor | None = None
    """Dropout key of each local token, int32, shape [tokens]; see ``dropout``. None if training
    draws neither dropout nor noise."""
    document_lengths: Tensor | None = None
    """Length of each token's document, shape [tokens]; None as for ``dropout_keys``."""
    document_dropout_keys: Tensor | None = None
    """Dropout key of each document of a padded micro-batch, shape [documents]. A padded micro-batch
    has no spans: the model's own attention is used, and its tokens include padding."""
    shared_keys: SharedKeys | None = None
    """Keys of other processes that the spans see; None if the packed sequence is not shared."""

    @cached_property
    def groups(self) -> Groups:
        """Documents grouped by length. Requires a packed sequence that is not shared."""
        return group_documents([s.q_len for s in self.spans], self.cu_seqlens.q.device)


def cu_seqlens_of(spans: Sequence[Span], device: torch.device) -> CuSeqlens:
    """Cumulative query and key lengths of spans."""

    def begins(sizes: Iterator[int]) -> Tensor:
        return on_device(np.array([0, *accumulate(sizes)], np.int32), device)

    queries = begins(span.q_len for span in spans)
    if all(span.q_len == span.kv_len for span in spans):
        return CuSeqlens(queries, queries)
    return CuSeqlens(queries, begins(span.kv_len for span in spans))


# Per process, not per thread: autograd runs the backward pass of a GPU, including the recomputation
# of gradient checkpointing, in a thread of its own.
_current: DocumentLayout | None = None


def current_layout() -> DocumentLayout | None:
    """Layout of the current micro-batch; None outside of training and loss evaluation."""
    return _current


@contextmanager
def layout_context(layout: DocumentLayout) -> Iterator[None]:
    """Make a layout current, for the forward and backward pass of its micro-batch (including
    recomputation)."""
    global _current
    before, _current = _current, layout
    try:
        yield
    finally:
        _current = before
