"""One optimizer step, from the rows of a global batch to changed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune_trainer.engine.feed import StepTensors
from finetune_trainer.engine.layout import row_context
from finetune_trainer.engine.sharding import synchronise, whole
from finetune_trainer.train.session import Session


def optimizer_step(session: Session, batch: StepTensors, rate: float) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on a global batch, if the guard lets it.

    Returns:
        What this rank adds to ``LoopState.pending`` (float64, on the device, shape
        [2 + 2 * sources]), and the norm of the gradient before clipping. Neither has been waited
        for.
    """
    gang, sources = session.gang, session.plan.source_count
    loss = torch.zeros(1, dtype=torch.float64, device=gang.device)
    by_source = torch.zeros(2, sources, dtype=torch.float64, device=gang.device)
    for i, row in enumerate(batch.rows):
        last = i == len(batch.rows) - 1
        synchronise(session.module, last)
        with row_context(row.layout):
            with gang.autocast():
                losses = session.module(row)
            # Gradients are averaged over ranks: the size of the gang makes the average a sum.
            share = losses.sum() / max(1, batch.plan.supervised)
            (share * gang.size).backward()
        loss += share.detach()
        if row.labels.numel():
            each = losses.detach().double()
            by_source[0].index_add_(0, row.sources, each)
            by_source[1].index_add_(0, row.sources, torch.ones_like(each))
    limit = float(session.spec.training.max_grad_norm) or float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(session.trained, limit))
    # Summed with the loss, so that every rank judges by the same bits.
    found = gang.sum_on_device(torch.stack([loss[0], norm.double() / gang.size]))
    taken = session.guard.judge(batch.plan.number, found[0], found[1])
    for group in session.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    step_if(session.optimizer, taken)
    session.optimizer.zero_grad(set_to_none=True)
    steps = torch.full_like(loss, 1 / gang.size)
    sums = torch.cat([loss, steps, by_source.flatten()])
    return torch.where(taken, sums, torch.zeros_like(sums)), norm


def step_if(optimizer: torch.optim.Optimizer, taken: Tensor) -> None:
    """Let the optimizer make its step where ``taken`` is true: in its own kernel where that can be
    told so, else after waiting for the word."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif taken.item():
        optimizer.step()
