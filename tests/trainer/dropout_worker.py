"""Keyed-dropout kernel in Triton's interpreter, on a CPU; TRITON_INTERPRET must be set."""

from __future__ import annotations

import sys
from typing import Any

import torch
from engine import CPU, samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune_trainer.engine.packing import dropout
from finetune_trainer.engine.packing.dropout import KeyedDropout
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.fuseddropout import keyed_dropout
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.packing.padded import build_padded_tokens

LENGTHS = [30, 8, 19]


def both(work: Any) -> tuple[Any, Any]:
    """Return the results of ``work`` by PyTorch operators, and by the kernel."""
    dropout.has_kernel = lambda x: False
    plain = work()
    dropout.has_kernel = lambda x: True
    try:
        return plain, work()
    finally:
        dropout.has_kernel = lambda x: False


def micro_batch_of(kind: str) -> Any:
    build = build_packed if kind == "packed" else build_padded_tokens
    return build(samples(LENGTHS), range(3), seed=3, step=7, device=CPU)


def check(kind: str, shape: tuple[int, ...], dtype: torch.dtype, probability: float) -> None:
    """Check that the same elements are dropped, and that outputs and gradients are equal."""
    layer = KeyedDropout(probability, layer=5).train()
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    grad = torch.randn(shape, dtype=dtype)

    def work() -> tuple[Tensor, Tensor]:
        with layout_context(micro_batch_of(kind).layout):
            out = layer(x)
        (back,) = torch.autograd.grad(out, x, grad)
        return out.detach(), back

    plain, kernel = both(work)
    for one, other in zip(plain, kernel, strict=True):
        assert torch.equal(one == 0, other == 0), (kind, shape, dtype)
        torch.testing.assert_close(one, other)
    assert 0 < (kernel[0] == 0).sum() < x.numel()


def check_saved() -> None:
    """Check that no tensor of the input's size is saved for the backward pass."""
    x = torch.randn(1, 57, 64, requires_grad=True)
    kept: list[int] = []
    layer = KeyedDropout(0.3, layer=2).train()
    with (
        layout_context(micro_batch_of("packed").layout),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
    ):
        dropout.has_kernel = lambda x: True
        layer(x)
    dropout.has_kernel = lambda x: False
    assert sorted(kept) == [1, 57], kept


def check_compiled_and_recomputed() -> None:
    """Check a block with dropout, compiled, and under gradient checkpointing."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 64), KeyedDropout(0.4, layer=1)).train()
    x = torch.randn(1, 57, 64, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)

    def gradients(call: Any) -> tuple[Tensor, ...]:
        with layout_context(micro_batch_of("packed").layout):
            out = call(x)
            return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])

    plain, kernel = both(lambda: gradients(block))
    torch.testing.assert_close(plain, kernel)
    dropout.has_kernel = lambda x: True
    torch.testing.assert_close(gradients(compiled), kernel)
    again = gradients(lambda x: checkpoint(block, x, use_reentrant=False))
    torch.testing.assert_close(again, kernel)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for probability in (0.1, 0.5):
            check("packed", (1, 57, 70), dtype, probability)
            check("packed", (57, 64), dtype, probability)
            check("padded", (3, 30, 33), dtype, probability)
            check("padded", (3, 35, 33), dtype, probability)  # five virtual tokens
    check("packed", (1, 57, 1500), torch.float32, 0.2)
    check_saved()
    check_compiled_and_recomputed()
    empty = keyed_dropout(torch.ones(0, 8), torch.ones(0, dtype=torch.int32), torch.tensor(0), 0.5)
    assert empty.shape == (0, 8)
    print("the same")


if __name__ == "__main__":
    sys.exit(main())
