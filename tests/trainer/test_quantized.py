"""Tuning over a 4-bit base (QLoRA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import write_model
from engine import spec_of
from torch.distributed.checkpoint import FileSystemReader
from tuning import IDS, Tuning, check_published, logits, step_and_resume

from finetune_trainer.engine.checkpointing.dcp import load_weights
from finetune_trainer.engine.model import build_base
from finetune_trainer.engine.parameters import parameter_counts
from finetune_trainer.engine.tuning.methods import apply_method


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True)
    return folder


@pytest.mark.parametrize("dora", [False, True])
def test_qlora_trains_over_a_4_bit_base_and_is_published_on_the_stored_base(
    base: Path, tmp_path: Path, dora: bool
) -> None:
    spec = spec_of({"type": "QLoRA", "lora": {"rank": 4, "useDora": dora}})
    tuning = Tuning(base, spec)
    weights = dict(tuning.model.named_parameters())
    packed_weight = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert weights[packed_weight].dtype == torch.uint8
    assert tuning.trained() == {n for n in weights if ".lora_" in n}
    counts = parameter_counts(tuning.model)
    assert counts == parameter_counts(apply_method(build_base(base, torch.float32), spec))

    resumed = step_and_resume(base, tmp_path, spec, tuning)
    whole = apply_method(build_base(base, torch.float32), spec)
    load_weights(FileSystemReader(tmp_path / "checkpoint"), whole)
    with torch.no_grad():  # not in eval(), which makes a CPU repack the weights for inference
        quantised = tuning.model(input_ids=IDS).logits
    assert (logits(whole) - quantised).abs().max() > 1e-3, "the base was not quantised"
    check_published(base, tmp_path, spec, logits(whole))
    assert resumed.step(3) == tuning.step(3)
