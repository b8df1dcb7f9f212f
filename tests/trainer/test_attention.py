"""The kernels of attention against each other: by group, by span, and by offsets."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine import CPU, samples
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.engine.rows import attention
from finetune_trainer.engine.rows.context import ALONE, ContextGroup, Wanted
from finetune_trainer.engine.rows.feed import build_row

LENGTHS = [37, 12, 5, 40, 2]


@dataclass(frozen=True)
class Gathered(Wanted):
    """The keys of all processes are here already, in the order in which they would come."""

    order: Tensor

    def gather(self, x: Tensor) -> Tensor:
        return x.index_select(2, self.order).index_select(2, self.take)


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the kernel for a GPU is documented to do, by a mask; the diagonal ends at the last query
    and key of each span."""
    assert window_size[1] == 0
    span, place = _places(cu_seq_q, len(query))
    key_span, key_place = _places(cu_seq_k, len(key))
    sizes, key_sizes = cu_seq_q.diff(), cu_seq_k.diff()
    behind = (place + (key_sizes - sizes)[span])[:, None] - key_place[None, :]
    seen = (span[:, None] == key_span[None, :]) & (behind >= 0)
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)


def _places(bounds: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Number of each token's span, and its place there."""
    token = torch.arange(tokens)
    span = torch.searchsorted(bounds.long(), token, right=True) - 1
    return span, token - bounds[span]


@pytest.fixture
def kernel(monkeypatch):
    """The kernel for a GPU, by what it is documented to do."""
    monkeypatch.setattr(attention, "has_kernel", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen)


def row_of(context: ContextGroup):
    documents = samples(LENGTHS)
    return build_row(
        documents, range(len(documents)), seed=0, step=0, device=CPU, context=context
    ).layout


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)


@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_is_called_as_it_is_documented(kernel, monkeypatch, window):
    layout, (q, k, v) = row_of(ALONE), tensors(sum(LENGTHS))
    by_offsets = attention.attend(layout, q, k, v, 0.3, window)
    monkeypatch.undo()
    by_group = attention.attend(layout, q, k, v, 0.3, window)
    torch.testing.assert_close(by_offsets, by_group)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_make_the_whole(monkeypatch, size, window):
    padded = sum(LENGTHS) + ContextGroup(0, size, None).padding(sum(LENGTHS))
    q, k, v = tensors(padded)
    real = (x[:, :, : sum(LENGTHS)] for x in (q, k, v))
    whole = attention.attend(row_of(ALONE), *real, None, window)
    order = np.concatenate([ContextGroup(i, size, None).held(padded) for i in range(size)])
    for index in range(size):
        context = ContextGroup(index, size, object())
        layout = row_of(context)
        gathered = Gathered(layout.wanted.take, None, torch.from_numpy(order))
        layout = replace(layout, wanted=gathered)
        held = context.held(padded)
        real = held < sum(LENGTHS)
        spans = attention.attend(layout, q[:, :, held], k, v, None, window)
        torch.testing.assert_close(spans[0][real], whole[0][held[real]])
        with monkeypatch.context() as patch:
            patch.setattr(attention, "has_kernel", lambda query, value: True)
            patch.setattr(attention, "varlen_attn", varlen)
            offsets = attention.attend(layout, q[:, :, held], k, v, None, window)
        torch.testing.assert_close(offsets, spans)
