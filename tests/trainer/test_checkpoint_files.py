"""Files of a checkpoint on a real S3 server: streamed, read by parts, verified."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.failures import StorageUnavailable
from finetune_trainer.storage import checkpoint_files
from finetune_trainer.storage.checkpoint_files import (
    PartSums,
    read_file,
    read_parts,
    stream_file,
    write_file,
)
from finetune_trainer.storage.objects import Credentials, FileInfo, ObjectStore
from finetune_trainer.storage.run_head import Checkpoint, CorruptCheckpoint
from finetune_trainer.storage.s3server import EmbeddedS3

PART = 5 << 20
"""Minimum part size of S3."""
PARALLEL = 2


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "PART_BYTES", PART)
    monkeypatch.setattr(checkpoint_files, "PARALLEL", PARALLEL)


@pytest.fixture
def uri(bucket: str) -> str:
    return f"s3://{bucket}/attempt-1/step-00000001"


def commit(uri: str, **files: FileInfo) -> Checkpoint:
    return Checkpoint(attempt=1, step=1, uri=uri, files=files, created=0.0)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def pieces(data: bytes, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield memoryview(data)[start : start + size]


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 4 * PART + 7])
@pytest.mark.parametrize("piece", [333_333, 2 * PART])
def test_streamed_file_is_read_by_parts(s3: EmbeddedS3, uri: str, size: int, piece: int) -> None:
    store, data = s3.store(), noise(size)
    sums = stream_file(store, f"{uri}/shard", pieces(data, piece), size)
    assert store.get(f"{uri}/shard") == data
    assert sums.size == size
    cut = [data[start : start + PART] for start in range(0, size, PART)] or [b""]
    digests = [hashlib.sha256(part).digest() for part in cut]
    assert sums.info == FileInfo(size, hashlib.sha256(b"".join(digests)).hexdigest())
    made = commit(uri, shard=sums.info)
    wanted = [("shard", number) for number in sums.parts(0, size)]
    assert [part for _, _, part in read_parts(store, made, {"shard": sums}, wanted)] == (
        cut if size else []
    )


def test_parts_of_a_range() -> None:
    sums = PartSums(2500, 1000, (b"", b"", b""))
    assert list(sums.parts(0, 1000)) == [0]
    assert list(sums.parts(999, 1001)) == [0, 1]
    assert list(sums.parts(2000, 2500)) == [2]


def test_a_file_has_no_more_parts_than_s3_allows(
    s3: EmbeddedS3, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "MOST_PARTS", 2)
    size = 3 * PART + 1
    sums = stream_file(s3.store(), f"{uri}/shard", pieces(noise(size), 1 << 20), size)
    assert (len(sums.sha256s), sums.part_bytes) == (2, size // 2 + 1)


class Broken(ObjectStore):
    """Object store that refuses one part."""

    def __init__(self, s3: EmbeddedS3, part: int) -> None:
        super().__init__(s3.endpoint, credentials=Credentials(s3.access_key, s3.secret_key))
        self._part = part

    def put_part(self, uri: str, upload: str, number: int, data: bytes) -> str:
        if number == self._part:
            raise StorageUnavailable("StorageUnreachable", "gone")
        return super().put_part(uri, upload, number, data)


@pytest.mark.parametrize("part", [1, 3, 5])
def test_failed_upload_leaves_nothing(s3: EmbeddedS3, uri: str, part: int) -> None:
    store = Broken(s3, part)
    with pytest.raises(StorageUnavailable):
        stream_file(store, f"{uri}/shard", pieces(noise(4 * PART + 7), 1 << 20), 4 * PART)
    assert store.head(f"{uri}/shard") is None
    assert list(store.open_parts(uri)) == []


def test_failed_data_source_leaves_nothing(s3: EmbeddedS3, uri: str) -> None:
    def failing() -> Iterator[bytes]:
        yield noise(3 * PART)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        stream_file(s3.store(), f"{uri}/shard", failing(), 9 * PART)
    assert s3.store().head(f"{uri}/shard") is None
    assert list(s3.store().open_parts(uri)) == []


def test_data_is_pulled_only_when_an_upload_slot_is_free(s3: EmbeddedS3, uri: str) -> None:
    """While all uploads are blocked, at most ``PARALLEL`` + 1 parts are in memory."""
    store: Any = s3.store()
    gate, taken, put_part = threading.Event(), threading.Semaphore(0), store.put_part
    drawn, data = 0, noise(PART)

    def slow(*arguments: Any) -> str:
        taken.release()
        assert gate.wait(30)
        return str(put_part(*arguments))

    def counted() -> Iterator[bytes]:
        nonlocal drawn
        for _ in range(8):
            drawn += 1
            yield data

    store.put_part = slow
    upload = threading.Thread(target=stream_file, args=(store, f"{uri}/s", counted(), 8 * PART))
    upload.start()
    for _ in range(PARALLEL):
        assert taken.acquire(timeout=30)
    assert drawn <= PARALLEL + 1
    gate.set()
    upload.join(30)
    assert store.head(f"{uri}/s").size == 8 * PART


def test_damage_is_detected_in_the_damaged_part_only(s3: EmbeddedS3, uri: str) -> None:
    store, data = s3.store(), noise(3 * PART + 5)
    sums = stream_file(store, f"{uri}/shard", [data], len(data))
    made = commit(uri, shard=sums.info)

    def read(number: int) -> bytes:
        return next(read_parts(store, made, {"shard": sums}, [("shard", number)]))[2]

    spoilt = bytearray(data)
    spoilt[2 * PART] ^= 1
    store.put(f"{uri}/shard", bytes(spoilt))
    assert read(1) == data[PART : 2 * PART]
    with pytest.raises(CorruptCheckpoint, match=f"bytes {2 * PART} to {3 * PART} of shard"):
        read(2)
    for cut in (2 * PART, 2 * PART + 1):  # the part is missing, or truncated
        store.put(f"{uri}/shard", data[:cut])
        with pytest.raises(CorruptCheckpoint):
            read(2)
    store.delete([f"{uri}/shard"])
    with pytest.raises(CorruptCheckpoint, match="shard is missing"):
        read(0)


def test_part_checksums_must_match_head(s3: EmbeddedS3, uri: str) -> None:
    store = s3.store()
    sums = stream_file(store, f"{uri}/shard", [b"one"], 3)
    other = stream_file(store, f"{uri}/other", [b"another"], 7)
    with pytest.raises(CorruptCheckpoint, match="not the file that HEAD names"):
        read_parts(store, commit(uri, shard=other.info), {"shard": sums}, [("shard", 0)])


def test_small_files_are_verified_as_a_whole(s3: EmbeddedS3, uri: str) -> None:
    store = s3.store()
    made = commit(uri, state=write_file(store, f"{uri}/state", b"{}"))
    assert read_file(store, made, "state") == b"{}"
    with pytest.raises(CorruptCheckpoint, match="it has no other"):
        read_file(store, made, "other")
    store.put(f"{uri}/state", b"[]")
    with pytest.raises(CorruptCheckpoint, match="state has 2 bytes"):
        read_file(store, made, "state")
