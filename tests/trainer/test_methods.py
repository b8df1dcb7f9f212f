"""Every tuning method: what it trains, that a resume goes on where it was, and that what is
published is the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import CPU, samples, tiny_llama
from peft import PeftModel
from test_training import write_model
from transformers import AutoModelForCausalLM

from finetune_api.order import CONTRACT_VERSION, JobIdentity, RunOrder
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.dcp import load_state, save_state
from finetune_trainer.engine.feed import build_row
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.methods import apply_method
from finetune_trainer.engine.model import load_base, load_tokenizer
from finetune_trainer.engine.packed import row_context
from finetune_trainer.engine.parameters import optimizer_groups
from finetune_trainer.failures import UserError
from finetune_trainer.publish.weights import tuned_model, write_adapter, write_merged

IDS = torch.arange(1, 25)[None]


def spec_of(method: dict[str, Any], **training: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "method": method,
            "training": {"weightDecay": "0.01"} | training,
        }
    )


class Tuning:
    """A model under tuning, as a training process has it."""

    def __init__(self, folder: Path, spec: FineTuneJobSpec) -> None:
        self.model: Any = apply_method(load_base(folder, torch.float32), spec)
        self.loss = TokenLoss(self.model).train()
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, spec))

    def step(self, number: int) -> float:
        row = build_row(samples([18], seed=number), [0], seed=0, step=number, device=CPU)
        self.model.train()
        with row_context(row.layout):
            total = self.loss(row).sum()
            total.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 * group["rate_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total.detach())

    def trained(self) -> set[str]:
        return {n for n, p in self.model.named_parameters() if p.requires_grad}

    def values(self) -> dict[str, torch.Tensor]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


def logits(model: Any) -> torch.Tensor:
    """Logits of the real tokens: virtual ones stand before them."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True)
    return folder


METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "full": ({"type": "Full"}, lambda name: True),
    "last layer and head": (
        {"type": "Partial", "partial": {"lastLayers": 1, "parameters": ["model.embed_*"]}},
        lambda name: ".layers.1." in name or "embed_tokens" in name,
    ),
    "biases and norms": (
        {"type": "Partial", "partial": {"biases": True, "norms": True}},
        lambda name: name.endswith(".bias") or "norm" in name,
    ),
    "lora": (
        {"type": "LoRA", "lora": {"rank": 4, "dropout": "0.1"}},
        lambda name: ".lora_A." in name or ".lora_B." in name,
    ),
    "rslora, lora+": (
        {"type": "LoRA", "lora": {"rank": 4, "useRslora": True, "loraPlusRatio": "8"}},
        lambda name: ".lora_A." in name or ".lora_B." in name,
    ),
    "dora": (
        {"type": "LoRA", "lora": {"rank": 4, "useDora": True, "dropout": "0.1"}},
        lambda name: ".lora_" in name,
    ),
}


@pytest.mark.parametrize(("method", "expected"), METHODS.values(), ids=METHODS)
def test_a_method_trains_its_part_resumes_and_is_published(
    base: Path, tmp_path: Path, method: dict[str, Any], expected: Any
) -> None:
    spec = spec_of(method)
    tuning = Tuning(base, spec)
    trained = tuning.trained()
    assert trained == {n for n, _ in tuning.model.named_parameters() if expected(n)}
    assert trained

    before = tuning.values()
    for number in range(3):
        tuning.step(number)
    after = tuning.values()
    assert {n for n in after if not torch.equal(before[n], after[n])} == trained

    save_state(tmp_path / "commit", tuning.model, tuning.optimizer, None)
    resumed = Tuning(base, spec)
    load_state(tmp_path / "commit", resumed.model, resumed.optimizer, None)
    assert all(torch.equal(value, after[name]) for name, value in resumed.values().items())
    expected_logits = logits(tuning.model)
    check_published(base, tmp_path, spec, expected_logits)
    assert resumed.step(3) == tuning.step(3)
    ours, theirs = resumed.values(), tuning.values()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def check_published(
    base: Path, folder: Path, spec: FineTuneJobSpec, expected: torch.Tensor
) -> None:
    """What is written of a commit has the tuned model's logits in plain transformers and peft."""
    order = RunOrder(
        version=CONTRACT_VERSION, job=JobIdentity(namespace="default", name="job", uid="abcde"),
        run="1-abcde", spec=spec,
    )  # fmt: skip
    tokenizer = load_tokenizer(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(plain), expected, atol=1e-3)
    if "Adapter" in spec.method.kind.formats:
        model = tuned_model(base, folder / "commit", spec, whole=False)
        write_adapter(model, tokenizer, order, folder / "adapter")
        adapted = PeftModel.from_pretrained(plain, str(folder / "adapter"))
        torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    if "Merged" in spec.method.kind.formats:
        model = tuned_model(base, folder / "commit", spec, whole=True)
        write_merged(model, tokenizer, base, [128], folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_groups_of_the_optimizer(base: Path) -> None:
    lora = {"type": "LoRA", "lora": {"loraPlusRatio": "16", "useDora": True}}
    tuning = Tuning(base, spec_of(lora))
    names = {id(p): n for n, p in tuning.model.named_parameters()}
    found = {
        names[id(p)].split(".lora_")[1].split(".")[0]: (group["weight_decay"], group["rate_factor"])
        for group in tuning.optimizer.param_groups
        for p in group["params"]
    }
    assert found == {"A": (0.01, 1.0), "B": (0.01, 16.0), "magnitude_vector": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("partial", "named"),
    [
        ({"parameters": ["model.layers.*", "lm_head.*"]}, "parameters: lm_head.*"),
        ({"lastLayers": 3}, "more than the 2 decoder blocks"),
        ({"biases": True, "norms": True}, "partial.biases fits no parameter"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(partial: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_method(tiny_llama(), spec_of({"type": "Partial", "partial": partial}))
    assert caught.value.reason == "NoSuchParameters"
    assert named in caught.value.message
    if "fits no" in caught.value.message:
        assert "model.layers.*.self_attn.q_proj.weight" in caught.value.message
