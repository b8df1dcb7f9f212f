"""Precisions: results are close to FP32 and weights stay float32, with one and several
processes."""

import copy

import pytest
import torch
from engine import CPU, samples, spec_of, tiny_llama
from sharding_worker import tune
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
)
from transformers.models.llama import modeling_llama
from worlds import forked

from finetune_trainer.engine import kernels
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.precision import FP32, Precision, precision_of, use_fp8
from ports import free_port

LORA = {"type": "LoRA", "lora": {"rank": 4}}


def tuned(folder, size, sharding, precision, method) -> dict[str, torch.Tensor]:
    folder.mkdir()
    port = free_port()
    ranks = [
        forked(tune, rank, size, port, method, sharding, str(folder), {"precision": precision})
        for rank in range(size)
    ]
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0] * size
    weights, _ = torch.load(folder / "tuned.pt")
    return weights


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the distance relative to the norm of ``other``. (In Adam's first step, only the signs
    of gradients matter.)"""
    assert one.keys() == other.keys()
    both = [torch.cat([w.flatten() for w in x.values()]) for x in (one, other)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize(
    ("method", "sharding"), [({"type": "Full"}, "NoShard"), (LORA, "FullShard")]
)
def test_bf16_keeps_float32_weights_and_is_close_to_fp32(tmp_path, method, sharding):
    exact = tuned(tmp_path / "exact", 1, "NoShard", "FP32", method)
    alone = tuned(tmp_path / "alone", 1, "NoShard", "BF16", method)
    for name, weight in alone.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), name
    assert apart(alone, exact) < 0.2
    found = tuned(tmp_path / "several", 2, sharding, "BF16", method)
    assert apart(found, alone) < 0.2


@pytest.mark.parametrize(
    ("method", "training", "cuda", "expected"),
    [
        ({"type": "Full"}, {}, False, FP32),
        ({"type": "Full"}, {}, True, Precision(copies=True)),
        ({"type": "Full"}, {"precision": "FP32"}, True, FP32),
        ({"type": "Full"}, {"precision": "BF16"}, False, Precision(copies=True)),
        ({"type": "Full"}, {"precision": "BF16", "optimizer": "Muon"}, True,
         Precision(copies=True)),
        ({"type": "Full"}, {"precision": "BF16", "optimizer": "Adafactor"}, True, Precision()),
        ({"type": "Full"}, {"precision": "FP8", "compile": True}, True,
         Precision(copies=True, fp8=True)),
        (LORA, {"precision": "BF16"}, True, Precision()),
        ({"type": "Partial", "partial": {"lastLayers": 1}}, {"precision": "BF16"}, True,
         Precision()),
        ({"type": "QLoRA", "lora": {"rank": 4}}, {"precision": "BF16"}, True, Precision()),
    ],
)  # fmt: skip
def test_the_precision_follows_from_the_spec(method, training, cuda, expected):
    spec = spec_of(method, **training)
    assert precision_of(spec, cuda) == expected
    assert not (expected.copies and expected.autocast)


def test_fp8_training_follows_the_losses_of_fp32():
    documents = samples([30, 24, 41, 18])

    def losses(model: nn.Module) -> list[float]:
        loss, said = TokenLoss(model), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(20):
            micro_batch = build_packed(documents, range(4), seed=0, step=step, device=CPU)
            with layout_context(micro_batch.layout):
                mean = loss(micro_batch).tokens.mean()
                mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(mean.item())
        return said

    model = tiny_llama()
    coarse = copy.deepcopy(model)
    assert use_fp8(coarse, emulate=True) == 14
    exact, found = losses(model), losses(coarse)
    assert found != exact
    assert found[-1] < 0.5 * found[0]
    assert found == pytest.approx(exact, rel=0.15)
    assert coarse.state_dict().keys() == model.state_dict().keys()


def test_fp8_backward_pass_supports_any_number_of_tokens():
    """Shapes are checked without a GPU, on meta tensors."""
    linear = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16, device="meta"))
    model = nn.Module()
    model.layers = nn.ModuleList([linear])
    assert use_fp8(model) == 1
    model.layers[0](torch.empty(359, 64, dtype=torch.bfloat16, device="meta")).sum().backward()
    assert model.layers[0][0].weight.grad.shape == (32, 64)


def test_layers_with_unsupported_shapes_are_not_converted_to_fp8():
    assert use_fp8(tiny_llama(intermediate_size=72), emulate=True) == 8


@pytest.fixture
def _unfused():
    """Undo Liger's changes to the module of the architecture."""
    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


@pytest.mark.usefixtures("_unfused")
def test_fused_kernels_are_for_a_gpu_and_known_models():
    """The kernels run on a GPU only; replaced modules are checked without one."""
    gpu = torch.device("cuda")
    assert not kernels.use_liger(tiny_llama(), CPU)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1)
    )
    assert not kernels.use_liger(mamba, gpu)
    classifier = AutoModelForSequenceClassification.from_config(tiny_llama().config)
    assert not kernels.use_liger(classifier, gpu)
    model = tiny_llama()
    assert kernels.use_liger(model, gpu)
    kinds = {type(m).__module__ + m.forward.__qualname__ for m in model.modules()}
    assert any("LigerRMSNorm" in kind for kind in kinds)
    assert "Liger" not in model.forward.__qualname__
