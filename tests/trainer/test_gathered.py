"""Weights that FSDP keeps gathered until the backward pass are never stale; placeholders are
materialized on a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import CPU, leave_world, samples, spec_of, tiny_llama
from torch import nn
from worlds import forked, free_port

from finetune_trainer.engine.dtensors import local_tensor
from finetune_trainer.engine.loss import TokenLoss, evaluating, micro_batch_losses
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.placeholders import (
    is_placeholder,
    materialize,
    placeholder,
    replace_parameters,
)
from finetune_trainer.engine.precision import FP32, Precision
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.world import World, join

PACKED = build_packed(samples([30, 24]), range(2), seed=0, step=0, device=CPU)


@pytest.fixture
def world() -> Iterator[World]:
    yield join(spec_of({"type": "Full"}, precision="BF16"))
    leave_world()


def sharded(world: World, gathered: bool) -> nn.Module:
    return distribute(
        TokenLoss(tiny_llama()), world, "NoShard", Precision(copies=True), gathered=gathered
    )


def test_losses_and_gradients_are_the_same_gathered_or_not(world: World) -> None:
    found = []
    for gathered in (False, True):
        module = sharded(world, gathered)
        with layout_context(PACKED.layout):
            losses = module(PACKED).tokens
            losses.sum().backward()
        found.append((losses.detach(), [local_tensor(p.grad) for p in module.parameters()]))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("gathered", [False, True])
def test_weights_that_change_after_an_evaluation_are_used(tmp_path: Path, gathered: bool) -> None:
    """A rollback may load a checkpoint right after an evaluation."""
    port = free_port()
    processes = [forked(halve_after_evaluation, i, port, str(tmp_path), gathered) for i in range(2)]
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    before, after, expected = torch.load(tmp_path / "losses.pt")
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def halve_after_evaluation(rank: int, port: int, folder: str, gathered: bool) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    world = join(spec_of({"type": "Full"}, precision="FP32"))
    module = distribute(TokenLoss(tiny_llama()), world, "FullShard", FP32, gathered)
    with evaluating(module):
        before = micro_batch_losses(module, PACKED)
    with torch.no_grad():
        for parameter in module.parameters():
            local_tensor(parameter).mul_(0.5)
    after = micro_batch_losses(module, PACKED)
    plain = TokenLoss(tiny_llama())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)
    if rank == 0:
        torch.save((before, after, micro_batch_losses(plain, PACKED)), Path(folder) / "losses.pt")
    world.close()


def test_only_placeholders_are_materialized() -> None:
    """Parameters that a method has initialized stay, and tied weights stay tied."""
    model = tiny_llama()
    drawn = nn.Parameter(torch.ones(3))
    replace_parameters(
        model, lambda _, p: nn.Parameter(placeholder(p.shape, p.dtype), requires_grad=False)
    )
    model.register_parameter("drawn", drawn)
    materialize(model, torch.device("meta"), only=is_placeholder)
    assert model.drawn is drawn and drawn.device.type == "cpu"
    others = [p for n, p in model.named_parameters() if n != "drawn"]
    assert all(p.device.type == "meta" and not p.requires_grad for p in others)
    assert model.lm_head.weight is model.model.embed_tokens.weight
