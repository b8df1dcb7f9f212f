"""Optimizers: which parameters each takes, the size of a step, and complete saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import spec_of, tiny_llama, tiny_mixtral
from sharding_worker import tune
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig
from worlds import forked

from finetune_api.optimizers import OPTIMIZERS, OptimizerName
from finetune_trainer.engine.optimizers import make_optimizers, split, state_bytes, step_if
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError
from ports import free_port

FULL = {"type": "Full"}
LORA = {"type": "LoRA", "lora": {"rank": 4}}


def of_their_own(model: Any, name: OptimizerName) -> set[str]:
    """Names of the parameters that an optimizer takes, those of layer 1 as of layer 0."""
    own, _ = split(model, name)
    return {n.replace(".1.", ".0.") for n, p in model.named_parameters() if p in own}


def test_muon_takes_matrices_of_hidden_layers() -> None:
    model = apply_method(tiny_llama(tie_word_embeddings=False), spec_of(FULL))
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
    assert of_their_own(model, "Muon") == {f"model.layers.0.{name}.weight" for name in layer}
    optimizers = make_optimizers(model, spec_of(FULL, optimizer="Muon"))
    assert [isinstance(o, torch.optim.Muon) for o in optimizers] == [True, False]
    taken = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters()), (
        "each parameter has exactly one optimizer"
    )


def test_muon_takes_the_matrices_of_adapters_and_neither_scales_nor_experts() -> None:
    dora = {"type": "LoRA", "lora": {"useDora": True, "targetModules": ["q_proj"]}}
    kinds = {n.split(".lora_")[1] for n in of_their_own(apply_method(tiny_llama(), spec_of(dora)),
                                                        "Muon")}  # fmt: skip
    assert kinds == {"A.default.weight", "B.default.weight"}
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    experts = apply_method(AutoModelForCausalLM.from_config(config), spec_of(FULL))
    assert not any(".experts." in name for name in of_their_own(experts, "Muon"))


def test_muon_leaves_the_table_of_an_embedding_adapter_to_adamw() -> None:
    lora = {"type": "LoRA", "lora": {"targetModules": ["embed_tokens"]}}
    model = apply_method(tiny_llama(), spec_of(lora))
    assert {n.split(".lora_")[1] for n in of_their_own(model, "Muon")} == {"embedding_B.default"}


def test_muon_leaves_adapters_of_experts_in_one_tensor_to_adamw() -> None:
    lora = {"rank": 4, "targetParameters": ["mlp.experts.down_proj"]}
    both = {"type": "LoRA", "lora": lora | {"targetModules": ["q_proj"]}}
    own = of_their_own(apply_method(tiny_mixtral(), spec_of(both)), "Muon")
    assert {".q_proj." in name for name in own} == {True}
    spec = spec_of({"type": "LoRA", "lora": lora}, optimizer="Muon")
    with pytest.raises(UserError, match=r"not of experts in one tensor"):
        make_optimizers(apply_method(tiny_mixtral(), spec), spec)


def test_biases_of_experts_are_not_matrices() -> None:
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    spec = spec_of(FULL, optimizer="Muon", weightDecay="0.1")
    model = apply_method(AutoModelForCausalLM.from_config(config), spec)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [(o, g) for o in make_optimizers(model, spec) for g in o.param_groups]
    found = {
        names[id(p)].rsplit(".", 1)[-1]: (isinstance(o, torch.optim.Muon), g["weight_decay"])
        for o, g in groups
        for p in g["params"]
        if ".experts." in names[id(p)]
    }
    one, bias = (False, 0.1), (False, 0.0)
    assert found == {"gate_up_proj": one, "down_proj": one,
                     "gate_up_proj_bias": bias, "down_proj_bias": bias}  # fmt: skip


def test_moments_of_embeddings_stay_in_float32() -> None:
    model = apply_method(tiny_llama(tie_word_embeddings=False), spec_of(FULL))
    everything = {n.replace(".1.", ".0.") for n, _ in model.named_parameters()}
    assert everything - of_their_own(model, "AdamW8bit") == {"model.embed_tokens.weight"}


def test_muon_without_a_matrix_is_refused() -> None:
    spec = spec_of({"type": "Partial", "partial": {"norms": True}}, optimizer="Muon")
    with pytest.raises(UserError, match=r"training\.optimizer: Muon .* set .*: AdamW") as caught:
        make_optimizers(apply_method(tiny_llama(), spec), spec)
    assert caught.value.reason == "NoMatrices"


class Course:
    """A model that an optimizer updates with random gradients."""

    def __init__(self, name: OptimizerName, **training: Any) -> None:
        spec = spec_of(FULL, optimizer=name, **training)
        self.model = apply_method(tiny_llama(hidden_size=128, intermediate_size=256), spec)
        self.optimizers = make_optimizers(self.model, spec)
        self._generator = torch.Generator().manual_seed(0)

    def step(self, rate: float, taken: bool = True, bad: bool = False) -> None:
        for parameter in self.model.parameters():
            drawn = torch.randn(parameter.shape, generator=self._generator)
            parameter.grad = torch.full_like(parameter, torch.nan) if bad else drawn
        step_if(self.optimizers, rate, torch.tensor(taken))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> list[Any]:
        found = [v for o in self.optimizers for s in o.state.values() for v in s.values()]
        return [v.clone() if isinstance(v, torch.Tensor) else v for v in found]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_means_the_same_for_each_optimizer(name: OptimizerName) -> None:
    course = Course(name)
    course.step(1e-3)
    before = course.weights()
    course.step(1e-3)
    for key, weight in course.weights().items():
        size = (weight - before[key]).square().mean().sqrt().item()
        assert 0.15e-3 < size < 1.1e-3, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled_from_the_gradient(name: OptimizerName) -> None:
    plain, decaying = Course(name, weightDecay="0"), Course(name, weightDecay="0.5")
    before = plain.weights()
    for course in (plain, decaying):
        course.step(1e-2)
    after = plain.weights()
    for key, weight in decaying.weights().items():
        decay = 0.005 if weight.ndim == 2 else 0.0
        torch.testing.assert_close(weight, after[key] - decay * before[key], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_state(name: OptimizerName) -> None:
    course = Course(name, weightDecay="0.1")
    course.step(1e-2)
    weights, state = course.weights(), course.state()
    course.step(1e-2, taken=False, bad=True)
    assert all(torch.equal(w, weights[key]) for key, w in course.weights().items())
    for before, after in zip(state, course.state(), strict=True):
        assert torch.equal(torch.as_tensor(after), torch.as_tensor(before))
    course.step(1e-2)
    assert not any(torch.equal(w, weights[key]) for key, w in course.weights().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_the_size_in_the_table(name: OptimizerName) -> None:
    course = Course(name)
    course.step(1e-3)
    held = sum(
        v.numel() * v.element_size()
        for optimizer in course.optimizers
        for state in optimizer.state.values()
        for key, v in state.items()
        if isinstance(v, torch.Tensor) and v.ndim and not key.startswith("qmap")
    )
    said = state_bytes(course.model, name)
    if name == "Adafactor":  # the table holds for narrow matrices, as of LoRA
        assert said / 20 < held < said
    else:
        assert held == pytest.approx(said, rel=1e-3)


def went(
    folder: Path, name: str, method: dict[str, Any], size: int, sharding: str,
    steps: tuple[int, int], checkpoint: Path | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the weights of a world after some steps."""
    folder.mkdir()
    port = free_port()
    ranks = [
        forked(tune, rank, size, port, method, sharding, str(folder), {"optimizer": name}, *steps,
               str(checkpoint) if checkpoint else None)
        for rank in range(size)
    ]  # fmt: skip
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0] * size
    weights: dict[str, torch.Tensor] = torch.load(folder / "tuned.pt")[0]
    return weights


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[k] - w).norm() / w.norm()).item() for k, w in expected.items())


ONE, TWO, SHARDS = (1, "NoShard"), (2, "NoShard"), (2, "FullShard")
MOVES = [(ONE, ONE), (ONE, TWO), (TWO, ONE), (ONE, SHARDS), (SHARDS, ONE)]
# Muon scales all directions of an update to one size. A direction without a gradient in a batch has
# only rounding errors, which become visible.
LOOSE = 3e-2


@pytest.mark.parametrize(
    ("name", "method", "near"),
    [("AdamW", FULL, 2e-5), ("AdamW8bit", FULL, 2e-5), ("Adafactor", FULL, 2e-5),
     ("Muon", LORA, 2e-4), ("Muon", FULL, LOOSE)],
)  # fmt: skip
def test_resume_with_another_world_size_and_another_sharding(
    name: OptimizerName, method: dict[str, Any], near: float, tmp_path: Path
) -> None:
    whole = went(tmp_path / "whole", name, method, *ONE, (0, 4))
    for before, after in MOVES:
        if SHARDS in (before, after) and not OPTIMIZERS[name].shards:
            continue
        half = tmp_path / f"{before}"
        if not half.exists():
            assert distance(went(half, name, method, *before, (0, 2)), whole) > 3 * near
        found = went(
            tmp_path / f"{before}-{after}", name, method, *after, (2, 4), half / "checkpoint"
        )
        assert distance(found, whole) < near, (before, after)
        assert before != after or distance(found, whole) == 0
