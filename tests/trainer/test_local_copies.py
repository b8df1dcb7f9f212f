"""Copies of a checkpoint's files on the node."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.storage.local_copies import LocalCopies

DATA = bytes(range(256)) * 100
URI = "s3://bucket/out/runs/1/attempt-1/step-00000005"


def get(copies: LocalCopies, start: int = 0, stop: int = len(DATA), uri: str = URI) -> bytes | None:
    return copies.get(uri, "shard-00000", start, stop, hashlib.sha256(DATA[start:stop]).digest())


@pytest.fixture
def copies(tmp_path: Path, roomy_disk: None) -> LocalCopies:
    made = LocalCopies(tmp_path / "copies")
    made.keep(URI, {"shard-00000": [memoryview(DATA)[:300], DATA[300:]]})
    return made


def test_a_copy_is_read_by_part_and_counted(copies: LocalCopies) -> None:
    assert get(copies) == DATA
    assert get(copies, 250, 700) == DATA[250:700]
    assert get(copies, uri=f"{URI}0") is None
    assert (copies.read, copies.missed) == (len(DATA) + 450, len(DATA))


def test_what_differs_from_the_checksum_is_not_there(copies: LocalCopies) -> None:
    (path,) = copies.folder.glob("*/shard-00000")
    path.write_bytes(DATA[:200] + b"x" + DATA[201:600])
    assert get(copies, 0, 200) == DATA[:200]
    assert get(copies, 100, 300) is None, "damaged"
    assert get(copies, 500, 700) is None, "too short"


def test_the_copy_of_an_older_checkpoint_is_removed(copies: LocalCopies) -> None:
    copies.keep(f"{URI}0", {"shard-00000": [DATA]})
    assert get(copies) is None
    assert get(copies, uri=f"{URI}0") == DATA
    assert len(list(copies.folder.iterdir())) == 1


def test_a_full_disk_costs_only_the_copy(
    copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [200]

    def write(descriptor: int, data: memoryview, real: Any = os.write) -> int:
        taken = min(left[0], len(data))
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= taken
        return int(real(descriptor, data[:taken]))

    monkeypatch.setattr(os, "write", write)
    copies.keep(f"{URI}0", {"shard-00000": [DATA]})
    assert get(copies, uri=f"{URI}0") is None
    assert not [path for path in copies.folder.rglob("*") if path.is_file()]


def test_a_copy_leaves_a_fifth_of_the_disk_free(
    copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", "total used free")
    for free, kept in ((20_000 + len(DATA), True), (19_999 + len(DATA), False)):
        usage = Usage(100_000, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, found=usage: found)
        copies.keep(f"{URI}{free}", {"shard-00000": [DATA]})
        assert (get(copies, uri=f"{URI}{free}") is not None) is kept
