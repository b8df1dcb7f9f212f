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
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.engine.packing.context import Span, Wanted
from finetune_trainer.engine.packing.transfer import on_device

# Documents at least this fraction as long as the longest of their group share a padded call: more
# calls cost overhead, fewer calls compute more padding. Measured on 2 cores with packed sequences
# of 2,048 tokens.
_GROUP_RATIO: Final = 0.8


class Group(NamedTuple):
    """Documents of similar length that are attended in one padded call."""

    documents: int
    longest: int
    """Tokens of the longest document; the others are padded to this length."""


@dataclass(frozen=True)
class Groups:
    """The documents of a packed sequence in padded groups. Padding follows each document, so causal
    attention never sees it."""

    pad_index: Tensor
    """Position in the packed sequence of each (document, offset) of each group; shape [padded
    tokens]."""
    unpad_index: Tensor
    """Position among the padded tokens of each token of the packed sequence; shape [tokens]."""
    sizes: tuple[Group, ...]
    """The groups, in the order of ``pad_index``."""


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
    lengths: Tensor | None = None
    """Length of each token's document, shape [tokens]; None as for ``dropout_keys``."""
    document_dropout_keys: Tensor | None = None
    """Dropout key of each document of a padded micro-batch, shape [documents]. A padded micro-batch
    has no spans: the model's own attention is used, and its tokens include padding."""
    wanted: Wanted | None = None
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


def group_documents(lengths: list[int], device: torch.device) -> Groups:
    """Group the documents of a packed sequence, given by their lengths, by similar length."""
    starts = [0, *accumulate(lengths)]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= _GROUP_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    gather, back, padded = [], np.empty(starts[-1], np.int64), 0
    for group in groups:
        longest = lengths[group[0]]
        offsets = np.arange(longest)[None, :]
        begins = np.array([starts[i] for i in group])[:, None]
        size = np.array([lengths[i] for i in group])[:, None]
        position = (begins + np.minimum(offsets, size - 1)).ravel()
        kept = np.flatnonzero(offsets < size)
        back[position[kept]] = padded + kept
        gather.append(position)
        padded += len(position)
    return Groups(
        pad_index=on_device(np.concatenate(gather), device),
        unpad_index=on_device(back, device),
        sizes=tuple(Group(len(group), lengths[group[0]]) for group in groups),
    )
