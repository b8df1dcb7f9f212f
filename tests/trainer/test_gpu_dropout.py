"""Keyed-dropout kernel on a GPU, compared with PyTorch operators; skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from engine import samples

from finetune_trainer.engine.packing import dropout
from finetune_trainer.engine.packing.dropout import KeyedDropout, keep_mask, salt_of, token_keys
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.packing.padded import build_padded_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
LENGTHS = [30, 8, 19]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("padded", "shape"),
    [(False, (1, 57, 70)), (False, (57, 64)), (False, (1, 57, 1500)), (True, (3, 35, 33))],
)
def test_the_kernel_matches_operators(
    padded: bool, shape: tuple[int, ...], probability: float, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build = build_padded_tokens if padded else build_packed
    layer = KeyedDropout(probability, layer=5).train().to(GPU)
    x = torch.randn(shape, dtype=dtype, device=GPU, requires_grad=True)
    grad = torch.randn(shape, dtype=dtype, device=GPU)
    micro_batch = build(samples(LENGTHS), range(3), seed=3, step=7, device=GPU)
    found = []
    for by_kernel in (True, False):
        monkeypatch.setattr(dropout, "has_kernel", lambda x, use=by_kernel: use)
        with layout_context(micro_batch.layout):
            out = layer(x)
        found.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one == 0, other == 0)
        torch.testing.assert_close(one, other)


def test_masks_are_the_same_on_gpu_and_cpu() -> None:
    keys = torch.from_numpy(token_keys(1, 2, 3, 1000))
    on_cpu = keep_mask(keys, 500, salt_of(7), 0.3)
    x = torch.ones(1000, 500, device=GPU)
    salt = torch.tensor(salt_of(7), dtype=torch.int32, device=GPU)
    kept = dropout.keyed_dropout(x, keys.to(GPU), salt, 0.3) != 0
    assert torch.equal(kept.cpu(), on_cpu)


def test_dropout_costs_little_more_than_reading_and_writing() -> None:
    """8,192 tokens at the hidden size of a model of 8 billion parameters."""
    keys = torch.from_numpy(token_keys(1, 2, 3, 8192)).to(GPU)
    x = torch.randn(1, 8192, 4096, dtype=torch.bfloat16, device=GPU)
    salt = torch.tensor(salt_of(7), dtype=torch.int32, device=GPU)

    def milliseconds(work: object) -> float:
        assert callable(work)
        for _ in range(3):
            work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 20

    kernel = milliseconds(lambda: dropout.keyed_dropout(x, keys[None], salt, 0.1))
    copy = milliseconds(lambda: x * 0.9)
    print(f"dropout kernel {kernel:.3f} ms, multiplication {copy:.3f} ms")
    assert kernel < 4 * copy


def test_compiled_blocks_drop_the_same_elements() -> None:
    torch.compiler.reset()
    layer = KeyedDropout(0.3, layer=1).train().to(GPU)
    block = torch.nn.Sequential(torch.nn.Linear(64, 64).to(GPU), layer)
    micro_batch = build_packed(samples(LENGTHS), range(3), seed=3, step=7, device=GPU)
    x = torch.randn(1, 57, 64, device=GPU)
    with layout_context(micro_batch.layout):
        plain = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), plain)
    torch.compiler.reset()
