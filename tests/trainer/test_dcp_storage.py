"""torch's distributed checkpoint over a real S3 server: any state, read at any world size."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from checkpoint_worker import SHAPES, Counting, stage_share, work
from engine import tiny_llama
from worlds import forked

from finetune_trainer.engine.checkpointing.dcp import load, load_weights, save_state, state_of
from finetune_trainer.engine.checkpointing.dcp_storage import (
    METADATA,
    CheckpointReader,
    CheckpointWriter,
)
from finetune_trainer.engine.checkpointing.staging import stage
from finetune_trainer.storage import checkpoint_files
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.objects import Credentials, FileInfo
from finetune_trainer.storage.run_head import Checkpoint
from finetune_trainer.storage.s3server import EmbeddedS3
from ports import free_port

PART = 5 << 20


@pytest.fixture
def uri(bucket: str) -> str:
    return f"s3://{bucket}/attempt-1/step-00000001"


@pytest.fixture
def store(s3: EmbeddedS3) -> Counting:
    return Counting(s3.endpoint, credentials=Credentials(s3.access_key, s3.secret_key))


def written(store: Counting, uri: str, state: dict[str, Any]) -> CheckpointReader:
    writer = CheckpointWriter(store, uri)
    save_state(writer, stage(state, None), None)
    checkpoint = Checkpoint(attempt=1, step=1, uri=uri, files=writer.files, created=0.0)
    return CheckpointReader(store, checkpoint, read_file(store, checkpoint, METADATA))


def test_state_of_any_type_survives_a_round_trip(store: Counting, uri: str) -> None:
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {
        "float": torch.randn(3, 5, generator=draw),
        "half": torch.randn(7, generator=draw).bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "long": torch.tensor([-1, 1 << 40]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "across": torch.randn(4, 6, generator=draw).t(),
        "groups": [{"lr": 0.25, "names": ["a", "b"], "betas": (0.9, 0.999), "off": None}],
    }
    reader = written(store, uri, state)
    empty = {k: torch.zeros_like(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    found = empty | {"groups": [{"lr": 0.0, "names": ["", ""], "betas": (0.0, 0.0), "off": 1}]}
    load(reader, found, None)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value


def test_load_weights_does_not_read_the_optimizer_state(
    store: Counting, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "PART_BYTES", PART)
    model = tiny_llama(hidden_size=512, intermediate_size=1024)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reader = written(store, uri, state_of(model, [optimizer]))
    weights = sum(p.nbytes for p in model.parameters())
    other = tiny_llama(seed=1, hidden_size=512, intermediate_size=1024)
    load_weights(reader, other)
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert weights <= store.read < weights + PART


@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_each_rank_stages_only_what_it_writes(size: int, replicas: int) -> None:
    """Single process, DDP, sharded over all ranks, and over half of them: replicated tensors are
    staged once, and each rank stages about as much."""
    told = multiprocessing.get_context("forkserver").Manager().Queue()
    port = free_port()
    processes = [forked(stage_share, rank, size, replicas, port, told) for rank in range(size)]
    for process in processes:
        process.join(90)
    assert [p.exitcode for p in processes] == [0] * size
    bytes_staged = [told.get() for _ in range(size)]
    total = 4 * (sum(torch.Size(shape).numel() for shape in SHAPES.values()) + 5)
    assert total <= sum(bytes_staged) < total + 10_000, "once, plus padding"
    # A shard is not split further; half of seven rows may be a row more than the mean.
    largest = 4 * torch.Size(SHAPES["rows"]).numel() / (size / replicas)
    row = 4 * SHAPES["rows"][1]
    assert max(bytes_staged) < max(largest, total / size) + row + 10_000


Told = list[Any]


def world(
    size: int,
    s3: EmbeddedS3,
    uri: str,
    files: dict[str, FileInfo] | None,
    shards: bool = True,
    copies: bool = False,
) -> Told:
    """Run ``work`` in ``size`` processes; return their reports."""
    told = multiprocessing.get_context("forkserver").Manager().Queue()
    keys = (s3.endpoint, s3.access_key, s3.secret_key)
    port = free_port()
    processes = [
        forked(work, rank, size, port, keys, uri, shards, files, told, copies)
        for rank in range(size)
    ]
    for process in processes:
        process.join(90)
    assert [p.exitcode for p in processes] == [0] * size
    return [told.get() for _ in range(size)]


def written_by_two(s3: EmbeddedS3, uri: str) -> dict[str, FileInfo]:
    files = {name: info for part, _ in world(2, s3, uri, None) for name, info in part.items()}
    assert {"shard-00000", "shard-00001", METADATA} == files.keys()
    return files


def test_ranks_read_their_own_shards_or_rank_0_reads_for_all(s3: EmbeddedS3, uri: str) -> None:
    """At another world size, with and without sharding."""
    total = 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    files = written_by_two(s3, uri)
    in_shards = world(3, s3, uri, files)
    assert [is_same for is_same, _ in in_shards] == [True] * 3
    assert all(read < 0.8 * total for _, read in in_shards), (total, in_shards)
    for copies in (False, True):
        whole = world(2, s3, uri, files, shards=False, copies=copies)
        assert [is_same for is_same, _ in whole] == [True] * 2
        assert sorted(read > 0 for _, read in whole) == [False, True]


@pytest.mark.parametrize("shards", [True, False])
def test_damage_in_the_shard_of_one_rank_is_raised_on_all(
    s3: EmbeddedS3, uri: str, shards: bool
) -> None:
    files, store = written_by_two(s3, uri), s3.store()
    data = bytearray(store.get(f"{uri}/shard-00001"))
    data[0] ^= 1
    store.put(f"{uri}/shard-00001", bytes(data))
    told = world(2, s3, uri, files, shards)
    assert [reason for reason, _ in told] == ["CorruptCheckpoint"] * 2
