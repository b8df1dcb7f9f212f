"""Tests of the engine on a GPU. Most also run on a CPU, so that mistakes in them are found without
a GPU; tests that are meaningless there are skipped.

``make gpu`` runs them, without the fixtures of other tests and without a network.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine import leave_world, samples, session_of, spec_of, tiny_llama
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.fsdp import FSDPModule
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._pytree import tree_leaves

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import compilation, kernels
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.checkpointing.dcp import load_state, save_state, state_of
from finetune_trainer.engine.checkpointing.staging import stage
from finetune_trainer.engine.chunked_head import ChunkedHead, has_plain_head
from finetune_trainer.engine.dtensors import local_tensor
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory.estimate import Placement
from finetune_trainer.engine.memory.requirements import check_device
from finetune_trainer.engine.model import TEXT
from finetune_trainer.engine.muon import orthogonalise
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing import attention
from finetune_trainer.engine.packing.feed import Feed, StaticShape, build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import precision_of, use_fp8
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.engine.world import join
from finetune_trainer.failures import failure_of
from finetune_trainer.storage.published import Base
from finetune_trainer.train.step import generator_seed, optimizer_step
from finetune_trainer.train.tuned import TunedModel, open_model

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]
TOKENS = 128
# Matrices large enough for bitsandbytes to use 8-bit state.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}

on_gpu = pytest.mark.skipif(GPU.type != "cuda", reason="needs a GPU")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A new process group for each test: accelerate refuses to change the precision."""
    leave_world()
    yield
    leave_world()


@pytest.fixture
def _strict() -> Iterator[None]:
    """Reset the mode in which waiting for the device is an error, after a test has set it."""
    yield
    watch_waits("default")


def watch_waits(mode: str) -> None:
    if GPU.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


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
    """Neither does the feed thread, which is still running when waiting becomes an error."""
    spec = spec_of(
        {"type": method}, precision="BF16", dropout="0.1", anchor=anchor,
        guard={"spikeDeviations": "6"},
    )  # fmt: skip
    model = apply_method(tiny_llama(), spec)
    kl = bool(anchor)
    documents = samples(LENGTHS)
    supervised = np.array([int(s.supervised.sum()) for s in documents])
    plan = Plan(
        np.array(LENGTHS), supervised, batch_size=4, seed=0, micro_batch_tokens=TOKENS, ranks=1,
        sources=np.arange(len(LENGTHS)) % 2,
    )  # fmt: skip
    session = session_of(model, spec, plan, tiny_llama() if kl and method == "Full" else None)
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    with Feed(
        plan, read, rank=0, start=0, end=12, device=session.world.device, replay=[False, kl]
    ) as feed:  # fmt: skip
        for batch in feed:
            if batch.plan.number == 2:  # the first steps make kernels and state
                watch_waits("error")
            optimizer_step(session, batch, 1e-3)
        watch_waits("default")


@on_gpu
@pytest.mark.parametrize("window", [None, 16])
def test_flash_attention_agrees_with_padded_groups(window: int | None) -> None:
    layout = build_packed(samples(LENGTHS), range(8), seed=0, step=0, device=GPU).layout
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(LENGTHS), 32, device=GPU, dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    )
    assert attention.has_kernel(q, v)
    by_kernel = attention._by_cu_seqlens(layout, q, k, v, None, window)
    by_group = attention._by_group(layout, q, k, v, None, window)
    torch.testing.assert_close(by_kernel, by_group, rtol=2e-2, atol=2e-2)


def losses(model: Any) -> torch.Tensor:
    micro_batch = build_packed(samples(LENGTHS), range(8), seed=0, step=0, device=GPU)
    with (
        torch.no_grad(),
        layout_context(micro_batch.layout),
        torch.autocast(GPU.type, torch.bfloat16),
    ):
        return TokenLoss(model).eval()(micro_batch).tokens


@on_gpu
@needs("liger_kernel")
def test_fused_kernels_give_the_same_losses() -> None:
    plain = losses(tiny_llama().to(GPU))
    model = tiny_llama().to(GPU)
    assert kernels.use_liger(model, GPU)
    torch.testing.assert_close(losses(model), plain, rtol=2e-2, atol=2e-2)


@on_gpu
@needs("torchao")
def test_fp8_losses_are_close_to_bf16() -> None:
    check_device(spec_of({"type": "Full"}, precision="FP8", compile=True), GPU)
    model = tiny_llama().to(GPU, torch.bfloat16)
    plain = losses(model)
    assert use_fp8(model) > 0
    torch.testing.assert_close(losses(model), plain, rtol=0.1, atol=0.1)


NO_STORES: Any = None
"""The model is in a local folder."""


class Course:
    """A training of a few steps; the model is opened as in a run."""

    def __init__(self, folder: Path, spec: FineTuneJobSpec, **changes: object) -> None:
        if not folder.exists():
            tiny_llama(**changes).save_pretrained(folder)
        files = BaseFiles(Base(spec.model, ()), folder, None)
        self.spec, self.world = spec, join(spec)
        self.opened: TunedModel = open_model(
            spec, files, NO_STORES, self.world, Placement("NoShard", False),
            precision_of(spec, GPU.type == "cuda"), TEXT, True,
        )  # fmt: skip
        self.optimizers = make_optimizers(self.opened.model, spec)

    def losses(self, steps: int, start: int = 0) -> list[float]:
        """Train and return the loss of each step; every step has all samples."""
        documents = samples(LENGTHS)
        supervised = np.array([int(s.supervised.sum()) for s in documents])
        plan = Plan(
            np.array(LENGTHS), supervised, batch_size=8, seed=0, micro_batch_tokens=TOKENS, ranks=1
        )
        session: Any = SimpleNamespace(
            world=self.world, plan=plan, spec=self.spec, module=self.opened.module,
            trained=[p for p in self.opened.model.parameters() if p.requires_grad],
            optimizers=self.optimizers, output_anchor=None, weight_anchor=None,
            guard=Guard(self.spec.training.guard, self.world.device),
        )  # fmt: skip
        shape = StaticShape(TOKENS, max(LENGTHS)) if self.spec.training.compile else None
        found = []
        with Feed(
            plan, lambda positions: [documents[p] for p in positions], rank=0, start=start,
            end=start + steps, device=self.world.device, build=partial(build_packed, shape=shape),
        ) as feed:  # fmt: skip
            for batch in feed:
                sums, *_ = optimizer_step(session, batch, 1e-2)
                found.append(float(sums[0]))
                self.seed = generator_seed(session, batch, len(batch.micro_batches) - 1)
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.opened.model.named_parameters()}

    def state(self) -> list[Any]:
        """Return a copy of everything that a checkpoint holds."""
        leaves = tree_leaves(state_of(self.opened.model, self.optimizers))
        return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]


COURSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Full": ({"type": "Full"}, {"precision": "BF16"}),
    "LoRA": ({"type": "LoRA", "lora": {"rank": 4}}, {"precision": "BF16", "dropout": "0.1"}),
    "Muon": ({"type": "Full"}, {"precision": "BF16", "optimizer": "Muon"}),
    "AdamW8bit": ({"type": "Full"}, {"precision": "BF16", "optimizer": "AdamW8bit"}),
    "QLoRA": ({"type": "QLoRA", "lora": {"rank": 4}}, {"precision": "BF16"}),
}
PACKAGES = {"AdamW8bit": "bitsandbytes", "QLoRA": "bitsandbytes"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[needs(PACKAGES[n])] if n in PACKAGES else []) for n in COURSES],
)
def test_resumed_training_continues_identically(name: str, tmp_path: Path) -> None:
    """The state is the same to the bit; losses differ only by the order of atomic sums."""
    method, training = COURSES[name]
    spec, base = spec_of(method, **training), tmp_path / "base"
    course = Course(base, spec, **WIDE)
    course.losses(3)
    control = course.world.control
    save_state(
        FileSystemWriter(tmp_path / "saved"),
        stage(state_of(course.opened.model, course.optimizers), control), control,
    )  # fmt: skip
    expected, whole = course.state(), course.losses(3, start=3)
    del course
    leave_world()
    other = Course(base, spec)
    reader = FileSystemReader(tmp_path / "saved")
    load_state(reader, other.opened.model, other.optimizers, other.world.control)
    for found, was in zip(other.state(), expected, strict=True):
        assert torch.equal(found, was) if isinstance(was, torch.Tensor) else found == was
    assert other.losses(3, start=3) == pytest.approx(whole, rel=2e-2)


def test_training_draws_nothing_from_the_device_generator(tmp_path: Path) -> None:
    method, training = COURSES["LoRA"]
    course = Course(tmp_path / "base", spec_of(method, **training, neftuneAlpha="5"), **WIDE)
    course.losses(2)
    expected = torch.Generator(GPU).manual_seed(course.seed).get_state()
    state = torch.cuda.get_rng_state() if GPU.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, expected)


def test_a_checkpoint_is_copied_to_pinned_memory(tmp_path: Path) -> None:
    course = Course(tmp_path / "base", spec_of({"type": "Full"}, precision="BF16"), **WIDE)
    course.losses(1)
    state = state_of(course.opened.model, course.optimizers)
    staged = stage(state, course.world.control)
    items = staged.create_local_plan().items
    held = [staged.resolve_data(i) for i in items if i.tensor_data is not None]
    leaves = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in leaves) == sum(x.nbytes for x in held if torch.is_tensor(x))
    name = next(n for n in state["model"] if n.endswith("q_proj.weight"))
    item = next(i for i in items if i.index.fqn == f"model.{name}")
    copy = staged.resolve_data(item)
    weight = local_tensor(state["model"][name]).cpu()
    assert isinstance(copy, torch.Tensor) and torch.equal(copy, weight)
    assert copy.is_pinned() == (GPU.type == "cuda")


def test_collectives_of_a_world_of_one_process() -> None:
    """More processes would need more GPUs: NCCL refuses two processes on one."""
    backend, store = ("nccl" if GPU.type == "cuda" else "gloo"), dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    values = torch.arange(6, device=GPU, dtype=torch.bfloat16)
    dist.all_reduce(values)
    dist.broadcast(values, src=0)
    raw, into = values.view(torch.uint8), torch.empty(12, device=GPU, dtype=torch.uint8)
    dist.all_to_all_single(into, raw, [12], [12])
    gathered = torch.empty(6, device=GPU, dtype=torch.bfloat16)
    dist.all_gather_into_tensor(gathered, into.view(torch.bfloat16))
    assert gathered.tolist() == [0, 1, 2, 3, 4, 5]


def chunked(loss: TokenLoss, model: Any, tokens: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of a micro-batch and their gradient, with the logits of ``tokens`` tokens
    at a time; None: of all tokens."""
    micro_batch = build_packed(samples(LENGTHS), range(8), seed=0, step=0, device=GPU)
    if tokens is not None:
        loss._chunks = ChunkedHead(model, limit=4 * 97 * tokens, plain=loss.plain_head)
        assert loss._chunks.applies(len(micro_batch.labels))
    loss.zero_grad()
    with layout_context(micro_batch.layout):
        with torch.autocast(GPU.type, torch.bfloat16):
            found = loss(micro_batch).tokens
        found.mean().backward()
    grown = [p.grad.flatten().float() for p in loss.parameters() if p.grad is not None]
    return found.detach(), torch.cat(grown)


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=[on_gpu, needs("liger_kernel")])]
)
def test_chunked_logits_give_the_same_losses_and_gradients(fused: bool) -> None:
    """Also if Liger has changed the classes that ``has_plain_head`` would run."""
    model = tiny_llama().to(GPU)
    plain = has_plain_head(model)
    assert plain
    if fused:
        assert kernels.use_liger(model, GPU)
    loss = TokenLoss(model, plain_head=plain).train()
    expected, gradient = chunked(loss, model, None)
    found, other = chunked(loss, model, 7)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert (other - gradient).norm() / gradient.norm() < 2e-2


def test_matrices_are_orthogonalised_as_torch_does() -> None:
    torch.manual_seed(0)
    shapes = [(64, 256), (256, 64), (64, 256), (128, 128)]
    matrices = [torch.randn(shape, device=GPU).bfloat16() for shape in shapes]
    coefficients = (3.4445, -4.7750, 2.0315)
    for matrix, found in zip(matrices, orthogonalise(matrices, coefficients, 5, 1e-7), strict=True):
        expected = _zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7).float()
        assert (found.float() - expected).norm() / expected.norm() < 3e-2


@on_gpu
def test_out_of_memory_errors_are_recognised() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=GPU)
    assert failure_of(caught.value).reason == "DeviceOutOfMemory"


@on_gpu
@needs("bitsandbytes")
def test_qlora_trains_only_the_adapter_of_4_bit_weights(tmp_path: Path) -> None:
    spec = spec_of({"type": "QLoRA", "lora": {"rank": 4}}, precision="BF16")
    course = Course(tmp_path / "base", spec, **WIDE)
    before = course.weights()
    packed = [n for n, w in before.items() if w.dtype == torch.uint8]
    assert len(packed) == 2 * 7 and all(before[n].device.type == GPU.type for n in packed)
    losses = course.losses(12)
    assert losses[-1] < 0.9 * losses[0]
    after = course.weights()
    assert {n for n in after if not torch.equal(before[n], after[n])} == {
        n for n in after if ".lora_" in n
    }


@on_gpu
@needs("bitsandbytes")
def test_adamw_with_8_bit_state_reduces_the_loss(tmp_path: Path) -> None:
    spec = spec_of({"type": "Full"}, precision="BF16", optimizer="AdamW8bit")
    course = Course(tmp_path / "base", spec, **WIDE)
    losses = course.losses(12)
    assert losses[-1] < 0.5 * losses[0]
    own, rest = course.optimizers
    assert {type(o).__name__ for o in (own, rest)} == {"AdamW8bit", "AdamW"}
    matrices = [p for group in own.param_groups for p in group["params"] if p.ndim == 2]
    assert matrices
    assert all(own.state[p]["state1"].dtype == torch.uint8 for p in matrices)


def test_bfloat16_copies_train_float32_weights(tmp_path: Path) -> None:
    course = Course(tmp_path / "base", spec_of({"type": "Full"}, precision="BF16"))
    assert isinstance(course.opened.module, FSDPModule)
    losses = course.losses(12)
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in course.weights().items():
        assert weight.dtype == torch.float32, name


@on_gpu
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("method", [{"type": "Full"}, {"type": "LoRA"}])
def test_an_opened_model_takes_the_memory_of_its_parameters(
    method: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    """No copy of the base is left; the allocator rounds each tensor up to 512 bytes."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    course = Course(
        tmp_path / "base", spec_of(method, precision=precision), hidden_size=512,
        intermediate_size=2048, num_hidden_layers=4,
    )  # fmt: skip
    gc.collect()
    taken = torch.cuda.memory_allocated() - before
    size = sum(p.numel() * p.element_size() for p in course.opened.model.parameters())
    assert size > 2**24
    assert size <= taken < 1.05 * size


@on_gpu
def test_a_run_compiles_once_for_the_device(tmp_path: Path) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    course = Course(tmp_path / "base", spec_of({"type": "Full"}, precision="BF16", compile=True))
    course.losses(1)
    first = compilation.compilations()
    assert first > 0
    losses = course.losses(12)
    assert compilation.compilations() == first
    assert losses[-1] < 0.6 * losses[0]
    torch.compiler.reset()
