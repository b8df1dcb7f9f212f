"""What only a GPU can show; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import samples, tiny_llama

from finetune_api.spec import parse_spec
from finetune_trainer.engine import attention, kernels
from finetune_trainer.engine.feed import Feed, build_row
from finetune_trainer.engine.gang import join
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.layout import row_context
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.methods import apply_method
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.plan import Plan
from finetune_trainer.engine.precision import check_fp8, use_fp8
from finetune_trainer.train.step import optimizer_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]


@pytest.fixture
def _strict() -> Iterator[None]:
    """Waiting for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("method", [{"type": "Full"}, {"type": "LoRA"}])
def test_no_step_waits_for_the_device(method: dict[str, Any]) -> None:
    spec = parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"precision": "BF16", "dropout": "0.1"},
        }
    )
    gang = join(spec.training)
    model = apply_method(tiny_llama(), spec).to(gang.device)
    documents = samples(LENGTHS)
    supervised = np.array([int(s.supervised.sum()) for s in documents])
    plan = Plan(np.array(LENGTHS), supervised, batch_size=4, seed=0, row_tokens=128, ranks=1)
    session: Any = SimpleNamespace(
        gang=gang, plan=plan, spec=spec, module=TokenLoss(model).train(),
        trained=[p for p in model.parameters() if p.requires_grad],
        optimizers=make_optimizers(model, spec), output_anchor=None, weight_anchor=None,
        guard=Guard(spec.training.guard, gang.device),
    )  # fmt: skip
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    with Feed(plan, read, rank=0, start=0, end=6, device=gang.device) as feed:
        for batch in feed:
            if batch.plan.number == 2:  # the first ones make kernels and state
                torch.cuda.set_sync_debug_mode("error")
            optimizer_step(session, batch, 1e-3)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_agrees_with_groups(window: int | None) -> None:
    layout = build_row(samples(LENGTHS), range(8), seed=0, step=0, device=GPU).layout
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(LENGTHS), 32, device=GPU, dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    )
    assert attention.has_kernel(q, v)
    by_kernel = attention._by_offsets(layout, q, k, v, None, window)
    by_group = attention._by_group(layout, q, k, v, None, window)
    torch.testing.assert_close(by_kernel, by_group, rtol=2e-2, atol=2e-2)


def losses(model: Any) -> torch.Tensor:
    row = build_row(samples(LENGTHS), range(8), seed=0, step=0, device=GPU)
    with torch.no_grad(), row_context(row.layout), torch.autocast("cuda", torch.bfloat16):
        return TokenLoss(model).eval()(row).tokens


def test_fused_kernels_give_the_same_losses() -> None:
    plain = losses(tiny_llama().to(GPU))
    model = tiny_llama().to(GPU)
    assert kernels.use_liger(model, GPU)
    torch.testing.assert_close(losses(model), plain, rtol=2e-2, atol=2e-2)


def test_eight_bits_are_near() -> None:
    check_fp8(GPU)
    model = tiny_llama().to(GPU, torch.bfloat16)
    plain = losses(model)
    assert use_fp8(model) > 0
    torch.testing.assert_close(losses(model), plain, rtol=0.1, atol=0.1)
