"""Where documents lie in a row of tokens.

A row is a concatenation of documents. While it is in work, ``layout_context`` says where they lie:
to the attention, which keeps them apart, and to force is drawn token by token.

A process holds a row whole, or, under context parallelism, its share of one (see ``context``).
Either way the row is a list of spans: queries that are here, and the keys that they may see.
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

# Documents whose length is within this factor of the longest of their group share a call: more
# calls cost overhead, fewer cost work on padding. Measured on 2 cores with rows of 2,048 tokens.
_GROUP_RATIO: Final = 0.8


class Group(NamedTuple):
    """Documents of like length that are attended in one padded call."""

    documents: int
    longest: int
    """Tokens of the longest, which the others are padded to."""


@dataclass(frozen=True)
class Groups:
    """A row's documents in padded groups. Padding stands behind the document, where causal
    attention never looks."""

    pad_index: Tensor
    """Row position of each (document, offset) of each group; shape [padded tokens]."""
    unpad_index: Tensor
    """Where each token of the row is among the padded ones; shape [tokens]."""
    sizes: tuple[Group, ...]
    """In the order of ``pad_index``."""


@dataclass(frozen=True)
class CuSeqlens:
    """Spans as kernels for variable lengths want them: where each begins, and the end."""

    q: Tensor
    """int32, shape [spans + 1]."""
    kv: Tensor
    """As ``q``; the same tensor where every span is a whole document."""


@dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of a row lie, and what is drawn for each token."""

    spans: tuple[Span, ...]
    """Queries that are here, in order, and their keys."""
    cu_seqlens: CuSeqlens
    max_seqlen: int
    """No span has more keys."""
    dropout_keys: Tensor | None = None
    """Random key of each token that is here, int32, shape [tokens]; see ``dropout``. None where
    nothing is drawn."""
    lengths: Tensor | None = None
    """Tokens of each token's document, shape [tokens]; None where nothing is drawn."""
    document_dropout_keys: Tensor | None = None
    """Random key of each document of a padded row, shape [documents]. Such a row has no spans: it
    is attended by the model's own kernels, and its tokens count padding."""
    wanted: Wanted | None = None
    """Keys of other processes that the spans see; None where the row is here whole."""

    @cached_property
    def groups(self) -> Groups:
        """The documents of a row that is here whole, by length."""
        return group_documents([s.q_len for s in self.spans], self.cu_seqlens.q.device)


def cu_seqlens_of(spans: Sequence[Span], device: torch.device) -> CuSeqlens:
    """Where the queries and the keys of each span begin."""

    def begins(sizes: Iterator[int]) -> Tensor:
        return on_device(np.array([0, *accumulate(sizes)], np.int32), device)

    queries = begins(span.q_len for span in spans)
    if all(span.q_len == span.kv_len for span in spans):
        return CuSeqlens(queries, queries)
    return CuSeqlens(queries, begins(span.kv_len for span in spans))


# Of the process, not of the thread: autograd runs the backward pass of a GPU, and with it what
# gradient checkpointing computes again, in a thread of its own.
_current: DocumentLayout | None = None


def current_layout() -> DocumentLayout | None:
    """Layout of the row in work, or None outside of training and loss evaluation."""
    return _current


@contextmanager
def layout_context(layout: DocumentLayout) -> Iterator[None]:
    """Make a row the one in work, for its forward and backward pass (recomputation included)."""
    global _current
    before, _current = _current, layout
    try:
        yield
    finally:
        _current = before


def group_documents(lengths: list[int], device: torch.device) -> Groups:
    """Groups of documents of like length, for a row made of documents of these lengths."""
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
