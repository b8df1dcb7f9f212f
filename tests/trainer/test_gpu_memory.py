"""The memory estimate against the peak of a GPU's allocator, in six settings. On a CPU, which has
no peak statistics, the tests run but skip the comparison."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import leave_world, samples, tiny_llama

from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.memory.estimate import Placement, estimate
from finetune_trainer.engine.memory.profiling import profile_model
from finetune_trainer.engine.model import TEXT
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing.feed import Feed, build_packed
from finetune_trainer.engine.planning.micro_batch_size import MicroBatchSize
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.world import join
from finetune_trainer.storage.published import Base
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.tuned import open_model

CUDA = torch.cuda.is_available()
MIB = 1 << 20
# On a GPU: large enough that workspaces of libraries are negligible.
SHAPE: dict[str, Any] = (
    {
        "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
    if CUDA
    else {}
)  # fmt: skip
LENGTHS = [512, 1024, 256, 256, 1024, 512, 384, 128] if CUDA else [30, 24, 41, 18]
TOKENS = sum(LENGTHS)
NO_STORES: Any = None
"""The model is in a local folder."""
SETTINGS = [
    ("Full", "BF16", "AdamW", "Never"),
    ("Full", "BF16", "AdamW", "Always"),
    ("Full", "BF16", "Adafactor", "Never"),  # with autocast
    ("Full", "FP32", "AdamW", "Never"),
    ("LoRA", "BF16", "AdamW", "Never"),
    ("LoRA", "BF16", "AdamW", "Always"),
]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    leave_world()
    yield
    leave_world()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SHAPE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("method", "precision", "optimizer", "again"), SETTINGS)
def test_the_estimate_is_within_a_tenth_of_the_peak(
    method: str,
    precision: str,
    optimizer: str,
    again: str,
    base: Path,
    record_property: Callable[..., None],
) -> None:
    spec = parse_spec(
        {
            "model": {"source": "s3://models/base"},
            "data": {"train": [{"source": "s3://data/a.jsonl"}]},
            "output": {"destination": "s3://models/tuned"},
            "compute": {"gpusPerNode": 1},
            "method": {"type": method},
            "training": {
                "precision": precision, "optimizer": optimizer, "gradientCheckpointing": again,
                "batchSize": len(LENGTHS),
            },
        }
    )  # fmt: skip
    placement = Placement("NoShard", again == "Always")
    documents = samples(LENGTHS)
    supervised = np.array([int(s.supervised.sum()) for s in documents])
    profile = profile_model(base, spec, max(LENGTHS))
    parts = estimate(profile, spec, MicroBatchSize(TOKENS, int(supervised.sum())), placement)
    expected = sum(n for part, n in parts.items() if part not in ("reserve", "checkpoint"))

    gc.collect()
    before = 0
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    world = join(spec)
    opened = open_model(
        spec, BaseFiles(Base(spec.model, ()), base, None), NO_STORES, world, placement,
        precision_of(spec, CUDA), TEXT, profile.plain_head,
    )  # fmt: skip
    plan = Plan(
        np.array(LENGTHS),
        supervised,
        batch_size=len(LENGTHS),
        seed=0,
        micro_batch_tokens=TOKENS,
        ranks=1,
    )
    session: Any = SimpleNamespace(
        world=world, plan=plan, spec=spec, module=opened.module,
        trained=[p for p in opened.model.parameters() if p.requires_grad],
        optimizers=make_optimizers(opened.model, spec), output_anchor=None, weight_anchor=None,
        guard=Guard(spec.training.guard, world.device),
    )  # fmt: skip
    with Feed(
        plan, lambda positions: [documents[p] for p in positions], rank=0, start=0, end=3,
        device=world.device, build=partial(build_packed, shape=None),
    ) as feed:  # fmt: skip
        for batch in feed:
            sums, *_ = optimizer_step(session, batch, 1e-3)
    assert torch.isfinite(sums).all()
    assert expected > sum(p.nbytes for p in opened.model.parameters())
    record_property("estimated MiB", round(expected / MIB))
    if not CUDA:
        pytest.skip("no peak statistics on a CPU")
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak MiB", round(peak / MIB))
    record_property("ratio", round(expected / peak, 3))
    assert 0.9 < expected / peak < 1.1
