"""Attention kernels compared with each other: by group, by span, and by ``cu_seqlens``."""

import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine import CPU, samples
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.engine.packing import attention
from finetune_trainer.engine.packing.context import ALONE, ContextGroup, SharedKeys
from finetune_trainer.engine.packing.feed import build_packed

LENGTHS = [37, 12, 5, 40, 2]


@dataclass(frozen=True)
class Gathered(SharedKeys):
    """Stand-in for the collective: local keys of all processes, reordered as a gather does."""

    order: Tensor

    def gather(self, x: Tensor) -> Tensor:
        return x.index_select(2, self.order).index_select(2, self.index)


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Reference of torch's ``varlen_attn``, by a mask; the diagonal ends at the last query and key
    of each span."""
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
    """Return the span index of each token, and its position in the span."""
    token = torch.arange(tokens)
    span = torch.searchsorted(bounds.long(), token, right=True) - 1
    return span, token - bounds[span]


@pytest.fixture
def kernel(monkeypatch):
    """Replace the GPU kernel by its reference."""
    monkeypatch.setattr(attention, "has_kernel", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen)


def micro_batch_of(context: ContextGroup):
    documents = samples(LENGTHS)
    return build_packed(
        documents, range(len(documents)), seed=0, step=0, device=CPU, context=context
    ).layout


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)


@pytest.mark.parametrize("window", [None, 7])
def test_varlen_kernel_matches_grouped_attention(kernel, monkeypatch, window):
    layout, (q, k, v) = micro_batch_of(ALONE), tensors(sum(LENGTHS))
    by_offsets = attention.attend(layout, q, k, v, 0.3, window)
    monkeypatch.undo()
    by_group = attention.attend(layout, q, k, v, 0.3, window)
    torch.testing.assert_close(by_offsets, by_group)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_shares_match_the_whole_sequence(monkeypatch, size, window):
    padded = sum(LENGTHS) + ContextGroup(0, size, None).padding(sum(LENGTHS))
    q, k, v = tensors(padded)
    real = (x[:, :, : sum(LENGTHS)] for x in (q, k, v))
    whole = attention.attend(micro_batch_of(ALONE), *real, None, window)
    order = np.concatenate([ContextGroup(i, size, None).held(padded) for i in range(size)])
    for index in range(size):
        context = ContextGroup(index, size, object())
        layout = micro_batch_of(context)
        gathered = Gathered(layout.shared_keys.index, None, torch.from_numpy(order))
        layout = replace(layout, shared_keys=gathered)
        held = context.held(padded)
        real = held < sum(LENGTHS)
        spans = attention.attend(layout, q[:, :, held], k, v, None, window)
        torch.testing.assert_close(spans[0][real], whole[0][held[real]])
        with monkeypatch.context() as patch:
            patch.setattr(attention, "has_kernel", lambda query, value: True)
            patch.setattr(attention, "varlen_attn", varlen)
            offsets = attention.attend(layout, q[:, :, held], k, v, None, window)
        torch.testing.assert_close(offsets, spans)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("width", "value_width"), [(12, 6), (6, 12), (8, 8)])
def test_head_widths_are_padded_for_the_kernels(kernel, monkeypatch, window, width,
                                                         value_width):  # fmt: skip
    """As in latent attention, where values are narrower than keys."""
    layout = micro_batch_of(ALONE)
    torch.manual_seed(1)
    tokens = sum(LENGTHS)
    q, k = torch.randn(1, 4, tokens, width), torch.randn(1, 2, tokens, width)
    v = torch.randn(1, 2, tokens, value_width)
    taken = []
    monkeypatch.setattr(
        attention, "varlen_attn", lambda *given, **named: taken.append(given[:3])
        or varlen(*given, **named),
    )  # fmt: skip
    flash = attention.attend(layout, q, k, v, None, window)
    assert {x.shape[-1] for x in taken[0]} == {max(width, value_width) + 7 & ~7}
    efficient = attention._by_group(
        layout, *attention.for_efficient(q, k, v), width**-0.5, window
    )[..., :value_width]  # fmt: skip
    monkeypatch.undo()
    plain = attention.attend(layout, q, k, v, None, window)
    assert plain.shape == flash.shape == (1, tokens, 4, value_width)
    torch.testing.assert_close(flash, plain)
    torch.testing.assert_close(efficient, plain)


def test_kernels_get_supported_shapes_and_dtypes():
    def widths(fitted, query, value, keys=2):
        q, k, v = torch.empty(1, 4, 3, query), torch.empty(1, keys, 3, query), torch.empty(
            1, keys, 3, value)  # fmt: skip
        return [x.shape[1:] for x in fitted(q, k, v)]

    assert widths(attention.for_flash, 192, 128) == [(4, 3, 192), (2, 3, 192), (2, 3, 192)]
    assert {w[-1] for w in widths(attention.for_flash, 200, 200)} == {256}
    assert widths(attention.for_efficient, 300, 512) == [(4, 3, 304), (4, 3, 304), (4, 3, 512)]
    half = torch.empty(1, 4, 3, 256, dtype=torch.bfloat16)
    assert attention.is_flash(half, half)
    assert not attention.is_flash(half.float(), half.float())
    assert not attention.is_flash(half, torch.empty(1, 4, 3, 320, dtype=torch.bfloat16))


def test_enable_gqa_is_passed_only_to_kernels_that_accept_it():
    assert attention._grouped(varlen) == {"enable_gqa": True}
    assert attention._grouped(lambda query, key, value, *, scale, window_size: None) == {}


@pytest.mark.parametrize("at_once", [1, 5, 16, 40, 64])
def test_windowed_attention_is_the_same_in_chunks_of_queries(at_once):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 40, 8, requires_grad=True) for _ in range(3))
    whole = attention._windowed(q, k, v, 7, None, 40)
    parts = attention._windowed(q, k, v, 7, None, at_once)
    torch.testing.assert_close(parts, whole)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (parts, whole)]
    torch.testing.assert_close(*grads)


def test_cudnn_attention_and_tf32_are_disabled():
    """TF32 would round the factors of float32 products."""
    script = (
        "import torch; from finetune_trainer.engine.backends import choose_backends as choose;"
        "choose(); print(torch.backends.cuda.cudnn_sdp_enabled(),"
        " torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["False"] * 3
