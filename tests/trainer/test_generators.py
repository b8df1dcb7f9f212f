"""Random draws of a model itself: seeded by run seed, step and sample, so that checkpoints hold no
generator state."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from engine import CPU, samples, session_of, spec_of, tiny_llama
from torch import Tensor, nn

from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.engine.tuning.methods import apply_method, checkpoint_activations
from finetune_trainer.train.step import generator_seed, optimizer_step

LENGTHS = [30, 24, 41, 18, 33, 27]
DOCUMENTS = samples(LENGTHS)


def plan_of(ranks: int = 1) -> Plan:
    supervised = np.array([int(s.supervised.sum()) for s in DOCUMENTS])
    return Plan(
        np.array(LENGTHS), supervised, batch_size=3, seed=0, micro_batch_tokens=45, ranks=ranks,
        packing="Unpacked",
    )  # fmt: skip


class Drawing(nn.Module):
    """A feed-forward block that draws from torch's generator, as some routers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.inner(hidden)
        return made * torch.rand_like(made) if self.training else made


def drawing_model() -> Any:
    model: Any = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Drawing(layer.mlp)
    return model


def losses(session: Any, start: int, end: int) -> list[float]:
    read = lambda positions: [DOCUMENTS[p] for p in positions]  # noqa: E731
    with Feed(session.plan, read, rank=0, start=start, end=end, device=CPU) as feed:
        return [float(optimizer_step(session, batch, 1e-2)[0][0]) for batch in feed]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_random_draws_resumes_identically(checkpointing: bool) -> None:
    spec = spec_of({"type": "Full"}, precision="FP32")
    model = drawing_model()
    if checkpointing:
        checkpoint_activations(model)
    session = session_of(model, spec, plan_of())
    torch.manual_seed(1)
    losses(session, 0, 2)
    kept = copy.deepcopy((model.state_dict(), [o.state_dict() for o in session.optimizers]))
    whole = losses(session, 2, 4)
    model.load_state_dict(kept[0])
    for optimizer, state in zip(session.optimizers, kept[1], strict=True):
        optimizer.load_state_dict(state)
    torch.manual_seed(2)  # as in a new process, with another generator state
    assert losses(session, 2, 4) == whole
    model.load_state_dict(kept[0])
    session.plan.seed += 1
    assert losses(session, 2, 3) != whole[:1], "draws affect the loss"


def test_generator_seeds_are_the_same_at_any_number_of_ranks() -> None:
    def seeds(ranks: int, size: int) -> dict[int, int]:
        """Return the generator seed of each sample of step 1, in a world of ``size`` processes."""
        plan, found = plan_of(ranks), {}
        for rank in range(size):
            world: Any = type("World", (), {"rank": rank, "size": size})
            session: Any = type("Session", (), {"world": world, "plan": plan})
            batch: Any = type("Batch", (), {"plan": plan.step(1)})
            for turn, micro_batch in enumerate(batch.plan.micro_batches[rank * ranks // size]):
                if micro_batch:
                    found[micro_batch[0]] = generator_seed(session, batch, turn)
        return found

    alone = seeds(1, 1)
    assert len(set(alone.values())) == len(alone) == 3
    assert seeds(3, 3) == alone
    assert seeds(2, 4) == alone, "two processes share a micro-batch"


@pytest.mark.parametrize("method", [{"type": "Full"}, {"type": "LoRA", "lora": {"dropout": "0.1"}}])
def test_dropout_and_noise_use_no_generator(method: dict[str, Any]) -> None:
    spec = spec_of(method, precision="FP32", dropout="0.1", neftuneAlpha="5", optimizer="Muon")
    session = session_of(apply_method(tiny_llama(), spec), spec, plan_of())
    read = lambda positions: [DOCUMENTS[p] for p in positions]  # noqa: E731
    with Feed(session.plan, read, rank=0, start=0, end=2, device=CPU) as feed:
        for batch in feed:
            optimizer_step(session, batch, 1e-2)
            last = generator_seed(session, batch, len(batch.micro_batches) - 1)
            after = torch.get_rng_state()
            assert torch.equal(after, torch.Generator().manual_seed(last).get_state())
