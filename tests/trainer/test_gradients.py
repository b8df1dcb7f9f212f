"""The same gradient at any number of processes: 1 × 4 rows, 2 × 2, and more ranks than rows."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from engine import CPU, samples, tiny_llama
from torch.nn.parallel import DistributedDataParallel

from finetune_api.spec import Training
from finetune_trainer import gang as gangs
from finetune_trainer.feed import Feed
from finetune_trainer.loop import optimizer_step
from finetune_trainer.loss import TokenLoss
from finetune_trainer.plan import Plan

LENGTHS = [60, 50, 55, 45, 30, 20, 64, 35]


def gradient(
    rank: int, size: int, port: int, row_tokens: int, count: int, folder: str
) -> None:
    """One optimizer step's gradient, as the loop computes it, to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    gang = gangs.join(Training.model_validate({"precision": "FP32"}))
    documents = samples(LENGTHS)[:count]
    lengths = torch.tensor(LENGTHS[:count]).numpy()
    supervised = torch.tensor([int(s.supervised.sum()) for s in documents]).numpy()
    plan = Plan(
        lengths, supervised, batch_size=count, seed=0, row_tokens=row_tokens, ranks=size
    )
    loss = TokenLoss(tiny_llama()).train()
    module = DistributedDataParallel(loss) if size > 1 else loss
    parameters = list(loss.parameters())
    kept: list[torch.Tensor] = []

    class Keep(torch.optim.SGD):
        """An optimizer that keeps the gradient instead of using it."""

        def step(self, closure=None):
            kept.append(torch.cat([p.grad.flatten() for p in parameters]))

    session = SimpleNamespace(
        gang=gang, module=module, trained=parameters, optimizer=Keep(parameters, lr=0.0),
        spec=SimpleNamespace(training=Training.model_validate({"maxGradNorm": "0"})),
    )  # fmt: skip
    read = lambda positions: [documents[p] for p in positions]  # noqa: E731
    with Feed(plan, read, rank=rank, start=0, end=1, device=CPU) as feed:
        for batch in feed:
            local, _ = optimizer_step(session, batch, 0.0)
    total = gang.sum(local.reshape(1).clone())
    if rank == 0:
        rows = len(batch.rows)
        torch.save((kept[0], total.item(), rows), Path(folder) / "gradient.pt")
    gang.close()


def run(size: int, row_tokens: int, count: int, folder: Path) -> tuple[torch.Tensor, float, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    mp.spawn(gradient, (size, port, row_tokens, count, str(folder)), nprocs=size)
    return torch.load(folder / "gradient.pt")


@pytest.fixture(scope="module")
def one_by_four(tmp_path_factory):
    return run(1, 100, 8, tmp_path_factory.mktemp("one") / "g")


@pytest.mark.parametrize(("size", "row_tokens", "rows"), [(2, 100, 2), (3, 400, 1)])
def test_gradients_agree(one_by_four, tmp_path, size, row_tokens, rows):
    expected, loss, expected_rows = one_by_four
    found, other_loss, found_rows = run(size, row_tokens, 8, tmp_path / "g")
    assert (expected_rows, found_rows) == (4, rows)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert other_loss == pytest.approx(loss, rel=1e-6)


def test_ranks_without_rows_take_part(tmp_path):
    expected, expected_loss, _ = run(1, 400, 2, tmp_path / "one")
    found, loss, rows = run(3, 400, 2, tmp_path / "three")
    assert rows == 1
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert loss == pytest.approx(expected_loss, rel=1e-6)
