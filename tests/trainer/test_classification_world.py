"""Distributed classification: the same result with any world size, micro-batches and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_decoder, write_encoder
from classify_worker import classify
from test_classification import METHODS_HERE
from worlds import forked

from ports import free_port
from variants import beyond

pytestmark = pytest.mark.slow

Found = tuple[dict[str, torch.Tensor], list[float], list[list[tuple[int, int]]]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def train(
    base: Path, folder: Path, size: int, sharding: str = "NoShard", micro_batch_tokens: int = 90,
    method: dict[str, Any] | None = None,
) -> Found:  # fmt: skip
    folder.mkdir()
    port, method = free_port(), method or {"type": "Full"}
    ranks = [
        forked(
            classify, rank, size, port, str(base), method, sharding, micro_batch_tokens, str(folder)
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0] * size
    found: Found = torch.load(folder / "tuned.pt")
    return found


def check_alike(found: Found, expected: Found) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, weight in expected[0].items():
        torch.testing.assert_close(found[0][name], weight, atol=2e-6, rtol=1e-5, msg=name)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_micro_batches_and_ranks_do_not_change_the_result(
    encoder: Path, tmp_path: Path, kind: str
) -> None:
    base = encoder if kind == "encoder" else write_decoder(tmp_path / "base")
    alone = train(base, tmp_path / "alone", 1, micro_batch_tokens=45)
    assert all(len(micro_batches) >= 3 for micro_batches in alone[2])
    for size, micro_batch_tokens in ((1, 1000), (2, 90), (3, 1000)):
        found = train(
            base,
            tmp_path / f"{size}-{micro_batch_tokens}",
            size,
            micro_batch_tokens=micro_batch_tokens,
        )
        assert all(
            n * longest <= micro_batch_tokens
            for micro_batches in found[2]
            for n, longest in micro_batches
        )
        check_alike(found, alone)


@pytest.mark.parametrize(
    ("name",), beyond(((name,) for name in METHODS_HERE), lambda name: name in ("Full", "LoRA"))
)
def test_a_method_gives_the_same_weights_when_sharded(
    encoder: Path, tmp_path: Path, name: str
) -> None:
    method = METHODS_HERE[name][0]
    alone = train(encoder, tmp_path / "alone", 1, method=method)
    # Five ranks for four documents a step: some take part with an empty micro-batch.
    for size, sharding in ((2, "FullShard"), (5, "FullShard"), (4, "HybridShard"), (2, "NoShard")):
        found = train(encoder, tmp_path / f"{sharding}-{size}", size, sharding, method=method)
        check_alike(found, alone)
