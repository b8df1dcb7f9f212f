"""The same gradient in a world of any size: 1 rank × 4 micro-batches, 2 × 2, and more ranks than
micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import gradient
from worlds import forked

from ports import free_port


def run(
    size: int,
    micro_batch_tokens: int,
    count: int,
    folder: Path,
    sharding: str = "NoShard",
    *how: Any,
) -> tuple[torch.Tensor, list[float], int]:
    folder.mkdir()
    port = free_port()
    ranks = [
        forked(gradient, rank, size, port, micro_batch_tokens, count, str(folder), sharding, *how)
        for rank in range(size)
    ]
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0] * size
    return torch.load(folder / "gradient.pt")


@pytest.fixture(scope="module")
def one_by_four(tmp_path_factory):
    return run(1, 100, 8, tmp_path_factory.mktemp("one") / "g")


@pytest.mark.parametrize(
    ("size", "micro_batch_tokens", "micro_batches", "sharding"),
    [
        (2, 100, 2, "NoShard"), (3, 400, 1, "NoShard"),
        (2, 100, 2, "FullShard"), (3, 400, 1, "FullShard"), (4, 100, 1, "HybridShard"),
    ],
)  # fmt: skip
def test_gradients_agree(one_by_four, tmp_path, size, micro_batch_tokens, micro_batches, sharding):
    expected, loss, expected_rows = one_by_four
    found, other_loss, found_rows = run(size, micro_batch_tokens, 8, tmp_path / "g", sharding)
    assert (expected_rows, found_rows) == (4, micro_batches)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert other_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("sharding", ["NoShard", "FullShard"])
def test_ranks_without_documents_take_part(tmp_path, sharding):
    expected, expected_loss, _ = run(1, 400, 2, tmp_path / "one")
    found, loss, micro_batches = run(3, 400, 2, tmp_path / "three", sharding)
    assert micro_batches == 1
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert loss == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("anchor", ["copy", "adapter"])
def test_gradients_agree_with_an_anchor(tmp_path, anchor):
    """Also if a rank has no replay document (3 ranks have 2 documents), and with context
    parallelism."""
    many, few = (2, 100, "NoShard", 1), (3, 64, "NoShard", 1)
    worlds = {
        8: [many, (2, 100, "FullShard", 1), (2, 100, "NoShard", 2)],
        2: [few, (3, 64, "FullShard", 1)],
    }
    for count, places in worlds.items():
        expected, (loss, drift, *more), _ = run(
            1, 100, count, tmp_path / f"{count}", "NoShard", 1, anchor
        )
        assert drift > 0
        if anchor == "copy":
            plain, (alone, none, *_), _ = run(1, 100, count, tmp_path / f"{count}-plain")
            assert none == 0
            assert alone == pytest.approx(loss, rel=1e-6), "the reported loss excludes the anchor"
            assert (plain - expected).norm() / plain.norm() > 0.01
        for place in places:
            size, micro_batch_tokens, sharding, sharing = place
            folder = tmp_path / f"{count}-{place}"
            found, told, _ = run(size, micro_batch_tokens, count, folder, sharding, sharing, anchor)
            assert (found - expected).norm() / expected.norm() < 1e-6, place
            assert told == pytest.approx([loss, drift, *more], rel=1e-6)


@pytest.mark.parametrize("sharding", ["NoShard", "FullShard"])
def test_gradients_agree_with_chunked_logits(one_by_four, tmp_path, sharding):
    expected, loss, _ = one_by_four
    found, other_loss, _ = run(2, 100, 8, tmp_path / "g", sharding, 1, "", 5)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert other_loss == pytest.approx(loss, rel=1e-6)
