"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from engine import samples, session_of, spec_of, tiny_llama
from torch.distributed.fsdp import FSDPModule

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import compilation, kernels
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.gang import join
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory.estimate import Placement
from finetune_trainer.engine.memory.requirements import check_device
from finetune_trainer.engine.model import TEXT
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import precision_of, use_fp8
from finetune_trainer.engine.rows import attention
from finetune_trainer.engine.rows.feed import Feed, StaticShape, build_row
from finetune_trainer.engine.rows.layout import row_context
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.storage.published import Base
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.tuned import TunedModel, open_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]
ROW = 128
# Matrices that bitsandbytes finds worth 8 bits.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A gang of one for each test: of another precision, accelerate would refuse it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def _strict() -> Iterator[None]:
    """Waiting for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize(
    ("method", "anchor"),
    [
        ("Full", {}),
        ("LoRA", {}),
        ("Full", {"klCoefficient": "0.5", "l2Coefficient": "5"}),
        ("LoRA", {"klCoefficient": "0.5"}),
    ],
)
def test_no_step_waits_for_the_device(method: str, anchor: dict[str, str]) -> None:
    """Nor does the thread that feeds it, which is still at work when it becomes an error."""
    spec = spec_of(
        {"type": method}, precision="BF16", dropout="0.1", anchor=anchor,
        guard={"spikeDeviations": "6"},
    )  # fmt: skip
    model = apply_method(tiny_llama(), spec)
    kl = bool(anchor)
    documents = samples(LENGTHS)
    supervised = np.array([int(s.supervised.sum()) for s in documents])
    plan = Plan(
        np.array(LENGTHS), supervised, batch_size=4, seed=0, row_tokens=ROW, ranks=1,
        sources=np.arange(len(LENGTHS)) % 2,
    )  # fmt: skip
    session = session_of(model, spec, plan, tiny_llama() if kl and method == "Full" else None)
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    with Feed(
        plan, read, rank=0, start=0, end=12, device=session.gang.device, replay=[False, kl]
    ) as feed:  # fmt: skip
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
    check_device(spec_of({"type": "Full"}, precision="FP8"), GPU)
    model = tiny_llama().to(GPU, torch.bfloat16)
    plain = losses(model)
    assert use_fp8(model) > 0
    torch.testing.assert_close(losses(model), plain, rtol=0.1, atol=0.1)


NO_STORES: Any = None
"""The model lies in a folder."""


class Course:
    """A few steps of a model that is opened as the gang does."""

    def __init__(self, folder: Path, spec: FineTuneJobSpec, **changes: object) -> None:
        tiny_llama(**changes).save_pretrained(folder)
        files = BaseFiles(Base(spec.model, ()), folder, None)
        self.spec, self.gang = spec, join(spec.training)
        self.opened: TunedModel = open_model(
            spec, files, NO_STORES, self.gang, Placement("NoShard", False),
            precision_of(spec.training, True), TEXT, True,
        )  # fmt: skip
        self.optimizers = make_optimizers(self.opened.model, spec)

    def losses(self, steps: int) -> list[float]:
        """The training loss at each step; every one has all samples."""
        documents = samples(LENGTHS)
        supervised = np.array([int(s.supervised.sum()) for s in documents])
        plan = Plan(np.array(LENGTHS), supervised, batch_size=8, seed=0, row_tokens=ROW, ranks=1)
        session: Any = SimpleNamespace(
            gang=self.gang, plan=plan, spec=self.spec, module=self.opened.module,
            trained=[p for p in self.opened.model.parameters() if p.requires_grad],
            optimizers=self.optimizers, output_anchor=None, weight_anchor=None,
            guard=Guard(self.spec.training.guard, self.gang.device),
        )  # fmt: skip
        shape = StaticShape(ROW, max(LENGTHS)) if self.spec.training.compile else None
        found = []
        with Feed(
            plan, lambda positions: [documents[p] for p in positions], rank=0, start=0, end=steps,
            device=self.gang.device, build=partial(build_row, shape=shape),
        ) as feed:  # fmt: skip
            for batch in feed:
                sums, _ = optimizer_step(session, batch, 1e-2)
                found.append(float(sums[0]))
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.opened.model.named_parameters()}


def test_qlora_trains_over_four_bits(tmp_path: Path) -> None:
    spec = spec_of({"type": "QLoRA", "lora": {"rank": 4}}, precision="BF16")
    course = Course(tmp_path, spec, **WIDE)
    before = course.weights()
    packed = [n for n, w in before.items() if w.dtype == torch.uint8]
    assert len(packed) == 2 * 7 and all(before[n].device.type == GPU.type for n in packed)
    losses = course.losses(12)
    assert losses[-1] < 0.9 * losses[0]
    after = course.weights()
    assert {n for n in after if not torch.equal(before[n], after[n])} == {
        n for n in after if ".lora_" in n
    }


def test_moments_in_eight_bits_learn(tmp_path: Path) -> None:
    spec = spec_of({"type": "Full"}, precision="BF16", optimizer="AdamW8bit")
    course = Course(tmp_path, spec, **WIDE)
    losses = course.losses(12)
    assert losses[-1] < 0.5 * losses[0]
    own, rest = course.optimizers
    assert {type(o).__name__ for o in (own, rest)} == {"AdamW8bit", "AdamW"}
    matrices = [p for group in own.param_groups for p in group["params"] if p.ndim == 2]
    assert matrices
    assert all(own.state[p]["state1"].dtype == torch.uint8 for p in matrices)


def test_copies_in_bfloat16_train_weights_of_32_bits(tmp_path: Path) -> None:
    course = Course(tmp_path, spec_of({"type": "Full"}, precision="PureBF16"))
    assert isinstance(course.opened.module, FSDPModule)
    losses = course.losses(12)
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in course.weights().items():
        assert weight.dtype == torch.float32, name


@pytest.mark.parametrize("precision", ["FP32", "BF16", "PureBF16"])
@pytest.mark.parametrize("method", [{"type": "Full"}, {"type": "LoRA"}])
def test_an_opened_model_takes_the_memory_of_its_parameters(
    method: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    """No copy of the base is left; the allocator rounds each tensor up to 512 bytes."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    course = Course(
        tmp_path, spec_of(method, precision=precision), hidden_size=512, intermediate_size=2048,
        num_hidden_layers=4,
    )  # fmt: skip
    gc.collect()
    taken = torch.cuda.memory_allocated() - before
    size = sum(p.numel() * p.element_size() for p in course.opened.model.parameters())
    assert size > 2**24
    assert size <= taken < 1.05 * size


def test_a_run_compiles_once_for_the_device(tmp_path: Path) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    course = Course(tmp_path, spec_of({"type": "Full"}, precision="BF16", compile=True))
    course.losses(1)
    first = compilation.compilations()
    assert first > 0
    losses = course.losses(12)
    assert compilation.compilations() == first
    assert losses[-1] < 0.6 * losses[0]
    torch.compiler.reset()
