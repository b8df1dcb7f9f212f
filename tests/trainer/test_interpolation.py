"""Points between base and tuned weights are exactly those: by every method that mixes, sharded or
not; the ends keep every bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bench import write_model
from engine import CPU, samples, spec_of
from peft import PeftModel
from sharding_worker import NO_STORES
from torch import Tensor, nn
from tuning import Tuning, logits
from worlds import forked

from finetune_api.methods import METHODS
from finetune_api.remedy import Scan
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.dtensors import put, whole
from finetune_trainer.engine.loading import fill_shards
from finetune_trainer.engine.loss import TokenLoss, evaluating, micro_batch_losses
from finetune_trainer.engine.memory.estimate import Placement
from finetune_trainer.engine.model import TEXT, build_base
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.pissa import INITIAL
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import reshard
from finetune_trainer.engine.tuning.interpolation import check_scan, line_of, own_weights
from finetune_trainer.engine.world import join
from finetune_trainer.failures import UserError
from finetune_trainer.storage.published import Base
from finetune_trainer.storage.weight_reader import Weights
from finetune_trainer.train.tuned import open_model
from ports import free_port
from variants import beyond

pytestmark = pytest.mark.usefixtures("one_thread")

SPECS: dict[str, FineTuneJobSpec] = {
    name: spec_of(method)
    for name, method in {
        "full": {"type": "Full"},
        "partial": {"type": "Partial", "partial": {"lastLayers": 1, "norms": True, "biases": True}},
        "lora": {"type": "LoRA", "lora": {"rank": 4}},
        "lora of embeddings": {
            "type": "LoRA", "lora": {"rank": 4, "targetModules": ["embed_tokens", "q_proj"]},
        },
        "rslora of a parameter": {
            "type": "LoRA", "lora": {"useRslora": True, "targetParameters": ["q_proj.weight"]},
        },
        "pissa": {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA"}},
        "ia3": {"type": "IA3"},
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True, num_hidden_layers=3, tie_word_embeddings=False)
    return folder


def test_every_method_that_mixes_is_tested() -> None:
    tested = {spec.method.type for spec in SPECS.values()} | {"QLoRA"}  # an adapter as LoRA's
    assert tested == {name for name, kind in METHODS.items() if kind.mixes}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain(model: Any) -> dict[str, Tensor]:
    """The weights of a model as one without an adapter."""
    if not isinstance(model, PeftModel):
        return values(model)
    merging: Any = copy.deepcopy(model)
    active = ["default", INITIAL] if INITIAL in model.peft_config else None
    return values(merging.merge_and_unload(adapter_names=active))


def mixture(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], scan: Scan, point: float
) -> dict[str, Tensor]:
    """The formulas of the papers, for the plain weights of a model of three blocks."""

    def factor(name: str) -> float:
        first = name.startswith(("model.layers.0.", "model.embed_tokens."))
        if scan == "Interpolation" or first:
            return point
        return (point + 1) / 2 if name.startswith("model.layers.1.") else 1.0

    return {n: value + factor(n) * (tuned[n] - value) for n, value in base.items()}


@pytest.mark.parametrize(
    ("name", "scan"),
    beyond(
        [(name, scan) for name in SPECS for scan in get_args(Scan)],
        lambda name, scan: scan == "Interpolation" or name in ("full", "lora"),
    ),
)
def test_a_point_is_the_mixture_of_the_plain_models(base: Path, name: str, scan: Scan) -> None:
    tuning = Tuning(base, SPECS[name])
    for number in range(3):
        tuning.step(number)
    model, kept = tuning.model, values(tuning.model)
    original, tuned = values(build_base(base, torch.float32)), plain(model)
    assert original.keys() == tuned.keys()
    named = {f"model.{name}": name for name in original}
    own = own_weights(model, lambda: fill_shards(tuning.loss, named, base, Weights.of_folder(base)))
    assert all(torch.equal(value, original[n]) for n, value in own.items())
    assert own.keys() == (set() if SPECS[name].method.kind.adapts else tuning.trained())
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            parameter.copy_(kept[each])
    line = line_of(model, scan, own)
    line.move(1.0)
    assert all(torch.equal(p, kept[each]) for each, p in model.named_parameters()), "every bit"
    expected = build_base(base, torch.float32)
    for point in (0.7, 0.25):
        line.move(point)
        expected.load_state_dict(mixture(original, tuned, scan, point))
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain(model), mixture(original, tuned, scan, point))
    assert (logits(model) - logits(build_base(base))).abs().max() > 1e-4
    if scan == "LayerLinear":
        top = [n for n in kept if ".layers.2." in n]
        assert top and all(torch.equal(model.get_parameter(n), kept[n]) for n in top)
    line.move(0.0)
    torch.testing.assert_close(plain(model), original)


def test_a_model_without_blocks_has_no_depth() -> None:
    spec = spec_of({"type": "Full"})
    raw = {"remedy": {"scan": "LayerLinear"}}
    evaluation = spec.evaluation.model_validate(raw)
    with pytest.raises(UserError, match=r"remedy\.scan: LayerLinear.* set scan: Interpolation"):
        check_scan(nn.Linear(2, 2), spec.model_copy(update={"evaluation": evaluation}))


PACKED = build_packed(samples([30, 24], vocabulary=130), range(2), seed=0, step=0, device=CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "precision"), [("FullShard", "FP32"), ("NoShard", "FP32"), ("NoShard", "BF16")]
)
def test_a_world_moves_its_shards(
    base: Path, tmp_path: Path, sharding: str, precision: str
) -> None:
    """By FSDP, DDP and FSDP's copies: also after an evaluation, which may leave weights gathered.
    Replicas do not all read the base model."""
    port = free_port()
    ranks = [
        forked(move, rank, port, str(base), sharding, precision, str(tmp_path)) for rank in range(2)
    ]
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0, 0]
    original = values(build_base(base, torch.float32))
    tuned = {name: disturbed(value) for name, value in original.items()}
    expected = mixture(original, tuned, "LayerLinear", 0.4)
    model = build_base(base, torch.float32)
    model.load_state_dict(expected)
    losses = micro_batch_losses(TokenLoss(model).eval(), PACKED)
    for rank in range(2):
        found, loss = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected)
        close = 1e-5 if precision == "FP32" else 0.1
        torch.testing.assert_close(loss.float(), losses, atol=close, rtol=close)


def disturbed(value: Tensor) -> Tensor:
    """Tuned weights, made up."""
    return value + 0.05 * torch.sin(torch.arange(value.numel())).view(value.shape)


def move(rank: int, port: int, base: str, sharding: Any, precision: str, folder: str) -> None:
    """Move a model in a world of two; write its whole weights and losses."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    spec = spec_of({"type": "Full"}, precision=precision)
    world = join(spec)
    files = BaseFiles(Base(spec.model, ()), Path(base), None)
    opened = open_model(
        spec, files, NO_STORES, world, Placement(sharding, False),
        precision_of(spec, cuda=False), TEXT, True,
    )  # fmt: skip
    model: Any = opened.model
    parameters = dict(model.named_parameters())

    def tune() -> None:
        reshard(opened.loss)
        for parameter in parameters.values():
            put(parameter, disturbed(values_of[parameter]))

    values_of = {p: whole(p.detach()).clone() for p in parameters.values()}
    tune()
    with evaluating(opened.loss), world.autocast():
        micro_batch_losses(opened.loss, PACKED)
    reshard(opened.loss)
    own = own_weights(model, opened.read_base)
    tune()
    line = line_of(model, "LayerLinear", own)
    for point in (1.0, 0.7, 0.4):
        reshard(opened.loss)
        line.move(point)
        with evaluating(opened.loss), world.autocast():
            loss = micro_batch_losses(opened.loss, PACKED)
    reshard(opened.loss)
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    torch.save((found, loss), f"{folder}/{rank}.pt")
    world.close()
