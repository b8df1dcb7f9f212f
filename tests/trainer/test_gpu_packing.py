"""Attention of packed sequences and their copies to a GPU; skipped without a GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from engine import samples
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.engine.backends import choose_backends
from finetune_trainer.engine.packing import attention
from finetune_trainer.engine.packing.feed import Feed, build_packed
from finetune_trainer.engine.packing.layout import DocumentLayout
from finetune_trainer.engine.planning.plan import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _backends() -> None:
    choose_backends()


def layout_of(lengths: list[int]) -> DocumentLayout:
    documents = samples(lengths)
    return build_packed(documents, range(len(lengths)), seed=0, step=0, device=GPU).layout


def heads(
    tokens: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    sizes = ((8, width), (2, width), (2, value_width))
    return tuple(
        torch.randn(1, n, tokens, w, device=GPU, dtype=dtype, requires_grad=True) for n, w in sizes
    )


def by_document(
    lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Reference: attention of each document alone, in float64."""
    parts = []
    for one in zip(*(x.double().split(lengths, 2) for x in (q, k, v)), strict=True):
        length = one[0].shape[2]
        mask = attention._mask(length, length, window, GPU)
        parts.append(scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(
    ("dtype", "width", "value_width"),
    [
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 192, 128),  # latent attention
        (torch.bfloat16, 20, 20),
        (torch.bfloat16, 256, 256),
        (torch.bfloat16, 512, 512),  # wider than FlashAttention supports
        (torch.float32, 64, 64),
        (torch.float32, 192, 128),
        (torch.float32, 12, 12),
    ],
)
def test_packed_attention_matches_that_of_documents_alone(
    dtype: torch.dtype, width: int, value_width: int, window: int | None
) -> None:
    lengths = [60, 9, 33, 17, 1, 64]
    q, k, v = heads(sum(lengths), width, value_width, dtype)
    found = attention.attend(layout_of(lengths), q, k, v, None, window)
    expected = by_document(lengths, q, k, v, window)
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), expected, **near)
    wanted = torch.randn_like(expected)
    grads = torch.autograd.grad(found, (q, k, v), wanted.to(found.dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), wanted)
    torch.testing.assert_close(grads, theirs, **{**near, "atol": 5 * near["atol"]})


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize(
    ("dtype", "width", "value_width"),
    [(torch.float32, 64, 64), (torch.bfloat16, 512, 512), (torch.bfloat16, 192, 128)],
)
def test_memory_of_attention_is_linear_in_the_length(
    dtype: torch.dtype, width: int, value_width: int, window: int | None
) -> None:
    """Scores of 16,384 tokens and 8 heads would take 4 GiB in 16 bits."""
    tokens = 16_384
    layout = layout_of([tokens])
    q, k, v = heads(tokens, width, value_width, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.attend(layout, q, k, v, None, window).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 24 * q.numel() * q.element_size()


def test_new_lengths_cost_no_more_than_known_ones() -> None:
    """cuDNN would build a graph for each shape; see ``backends``."""
    draw = np.random.default_rng(0)
    layouts = [layout_of(draw.integers(20, 900, 8).tolist()) for _ in range(41)]
    micro_batches = [(one, heads(sum(s.q_len for s in one.spans), 64, 64, torch.bfloat16))
            for one in layouts]  # fmt: skip

    def seconds(numbers: list[int]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in numbers:
            layout, qkv = micro_batches[number]
            attention.attend(layout, *qkv, None, None).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds([40])  # loads the kernels
    new, known = seconds(list(range(40))), seconds(list(range(40)))
    assert new < 3 * known + 0.02, (new, known)


def test_micro_batches_are_copied_while_the_device_computes() -> None:
    """The feed's memory is reused; no copy overwrites a micro-batch that is still being read."""
    lengths = [40] * 64
    documents = samples(lengths)
    plan = Plan(
        np.array(lengths),
        np.array([10] * 64),
        batch_size=8,
        seed=0,
        micro_batch_tokens=160,
        ranks=1,
    )
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    big = torch.randn(4096, 4096, device=GPU)
    sums, waits = [], []
    with Feed(plan, read, rank=0, start=0, end=40, device=GPU) as feed:
        for batch in feed:
            for micro_batch in batch.micro_batches:
                big = (big @ big).clamp(-1, 1)  # the device falls behind the host
                sums.append(micro_batch.input_ids.double().sum() + 0 * big[0, 0])
            waits.append(batch.wait)
            del batch, micro_batch
    torch.cuda.synchronize()
    expected = [
        sum(int(documents[p].ids.sum()) for p in micro_batch)
        for step in range(40)
        for micro_batch in plan.step(step).micro_batches[0]
    ]
    assert torch.stack(sums).tolist() == expected
    seconds = [wait.seconds() for wait in waits]
    assert all(s is not None and s >= 0 for s in seconds)
    assert sum(s or 0.0 for s in seconds[5:]) < 0.05, "a busy device does not wait"


def test_the_device_waits_for_slow_data() -> None:
    lengths = [40] * 16
    documents = samples(lengths)
    plan = Plan(
        np.array(lengths),
        np.array([10] * 16),
        batch_size=4,
        seed=0,
        micro_batch_tokens=160,
        ranks=1,
    )

    def read(positions: list[int]) -> list[object]:
        time.sleep(0.1)
        return [documents[p] for p in positions]

    with Feed(plan, read, rank=0, start=0, end=4, device=GPU) as feed:  # type: ignore[arg-type]
        waits = [batch.wait for batch in feed]
    torch.cuda.synchronize()
    assert 0.25 < sum(wait.seconds() or 0.0 for wait in waits) < 2.0
