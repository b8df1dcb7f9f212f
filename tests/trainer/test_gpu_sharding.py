"""FSDP on a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine import leave_world, spec_of, tiny_llama
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from finetune_trainer.engine.placeholders import placeholder, replace_parameters
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.world import join

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    leave_world()


def test_placeholders_are_allocated_on_the_device() -> None:
    spec = spec_of({"type": "Full"}, precision="BF16")
    world = join(spec)
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    replace_parameters(model, lambda _, p: torch.nn.Parameter(placeholder(p.shape, p.dtype)))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        module = distribute(model, world, "FullShard", precision_of(spec, True))
        torch.cuda.synchronize()
    copied = [e for e in seen.events() if "HtoD" in e.name]
    assert len(copied) < 8, [e.name for e in copied][:20]
    assert all(p.device.type == "cuda" for p in module.parameters())
    assert not any(p.to_local().any() for p in module.parameters())


@pytest.mark.parametrize("gathered", [False, True])
def test_blocks_stay_gathered_on_request(gathered: bool) -> None:
    spec = spec_of({"type": "Full"}, precision="BF16")
    world = join(spec)
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    precision = precision_of(spec, True)
    module = distribute(model, world, "FullShard", precision, gathered)
    ids = torch.zeros(1, 8, dtype=torch.long, device=world.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = module(ids).logits.sum()
    torch.cuda.synchronize()
    more = torch.cuda.memory_allocated() - before
    blocks = sum(p.numel() for n, p in module.named_parameters() if ".layers." in n)
    assert isinstance(module, FSDPModule)
    assert more >= 2 * blocks if gathered else more < blocks
    out.backward()
