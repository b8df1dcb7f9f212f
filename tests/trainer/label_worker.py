"""Worker of test_label_likelihoods: log-likelihoods of labels in a small world."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine import spec_of, tiny_llama

from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.padded import build_padded_tokens
from finetune_trainer.engine.precision import FP32
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.world import join
from finetune_trainer.evaluate import label_likelihoods, prompt_batches
from finetune_trainer.evaluate.measure import Evaluator

LABELS = {"a": (5,), "b": (7, 11), "c": (7, 13), "d": (17, 19, 23), "e": (29, 31, 37, 41)}
END = 96
PROMPTS = [
    np.random.default_rng(n).integers(1, 96, n).astype(np.int32) for n in (12, 3, 7, 7, 20, 1, 9)
]


def evaluator(world: Any, loss: Any, virtual_tokens: int = 0) -> Evaluator:
    """An evaluator of one set with LABELS."""
    entry = SimpleNamespace(labels={name: [*ids, END] for name, ids in LABELS.items()})
    data: Any = SimpleNamespace(manifest=SimpleNamespace(sets=[entry], stop_token_ids=[END]))
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    return Evaluator(
        world=world, data=data, loss=loss, tokenizer=tokenizer, micro_batch_tokens=64,
        packing="Padded", build=build_padded_tokens, max_samples=8, max_new_tokens=6,
        virtual_tokens=virtual_tokens,
    )  # fmt: skip


def score(rank: int, size: int, port: int, sharding: Any, folder: str) -> None:
    """Write the log-likelihoods to a file of the rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    prompt_batches.MOST_TOKENS = label_likelihoods.MOST_TOKENS = 40  # type: ignore[misc]
    world = join(spec_of({"type": "Full"}, precision="FP32"))
    loss = TokenLoss(tiny_llama())
    distribute(loss, world, sharding, FP32)
    found = evaluator(world, loss).label_scores(0, PROMPTS, ["LabelAccuracy"])
    assert found is not None
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found.values))
    world.close()
