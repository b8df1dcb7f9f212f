"""Fixtures of the memory tests: a synthetic memory profile, samples, and a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import tiny_llama

from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.memory.estimate import Activations, ModelProfile, Weights
from finetune_trainer.engine.planning.micro_batch_size import Samples

GIB = 1 << 30
SAMPLES = Samples(np.full(200, 300), np.full(200, 100), 512)


def spec_of(**blocks: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            **blocks,
        }
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a four-layer Llama."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(
        vocab_size=600, hidden_size=64, intermediate_size=192, num_hidden_layers=4
    ).save_pretrained(folder)
    return folder


def profile_of(state: int, activations: int = 0) -> ModelProfile:
    """Profile of a fully tuned model of 100 blocks whose weights, gradients and optimizer take
    ``state`` bytes, and whose activations take ``activations`` bytes for a micro-batch of 1,024
    tokens."""
    numbers = state // 16
    per_token = activations / 1024
    kept = Activations(per_token, 0.0, per_token / 100, per_token / 50, 0.0, 0)
    block = numbers // 100
    weights = Weights(
        held=4 * numbers, numbers=numbers, trained=numbers, optimizer=8 * numbers, anchors=0,
        block=block, block_trained=block, blocks=100 * block, blocks_trained=100 * block,
    )  # fmt: skip
    return ModelProfile(
        weights=weights, activations=kept, layers=100, vocabulary=0, logits_at_once=None,
        plain_head=False, packing="Concatenated", recomputes=True, bf16=False, copies=False,
    )  # fmt: skip
