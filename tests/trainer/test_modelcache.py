"""The node-local weight cache: one download per node, complete folders only, eviction."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import uuid
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from finetune_trainer.failures import StorageUnavailable, UserError
from finetune_trainer.storage.modelcache import cached
from finetune_trainer.storage.objects import ObjectInfo, ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3

Usage = namedtuple("Usage", "total used free")
MODEL = {"model-1.safetensors": b"a" * 700, "model-2.safetensors": b"b" * 300}


@pytest.fixture(scope="module")
def bucket(s3: EmbeddedS3) -> str:
    s3.ensure_bucket("test-cache")
    return "test-cache"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Downloads per object."""
    seen: Counter[str] = Counter()
    download = ObjectStore.download_into

    def counting(self: ObjectStore, uri: str, file: BinaryIO) -> None:
        seen[uri] += 1
        download(self, uri, file)

    monkeypatch.setattr(ObjectStore, "download_into", counting)
    return seen


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 5,000 bytes: it holds four models of 1,000; a fifth stays free (FREE_SHARE)."""

    def usage(folder: Path) -> Usage:
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        return Usage(5000, used, 5000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def put(store: ObjectStore, bucket: str, files: dict[str, bytes] = MODEL) -> list[ObjectInfo]:
    root = f"s3://{bucket}/{uuid.uuid4().hex[:8]}/"
    for name, data in files.items():
        store.put(root + name, data)
    return list(store.list(root))


def keep(cache: Path, store: ObjectStore, models: list[list[ObjectInfo]]) -> list[Path]:
    """Cache the models and return their folders, unlocked; the first is least recently used."""
    folders = []
    for number, objects in enumerate(models, start=1):
        found = cached(cache, store, objects)
        assert found
        found[1].close()
        os.utime(found[0], (number, number))
        folders.append(found[0])
    return folders


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_fetched_once(
    store: ObjectStore, bucket: str, tmp_path: Path, fetched: Counter[str]
) -> None:
    objects = put(store, bucket)
    found = [cached(tmp_path / "cache", store, objects) for _ in range(3)]
    folders = {one[0] for one in found if one}
    assert len(folders) == 1 and files_of(folders.pop()) == MODEL
    assert set(fetched.values()) == {1} and len(fetched) == 2


def test_processes_of_a_node_wait_for_the_download(
    store: ObjectStore, bucket: str, tmp_path: Path, fetched: Counter[str]
) -> None:
    objects, found = put(store, bucket), []
    threads = [
        threading.Thread(target=lambda: found.append(cached(tmp_path, store, objects)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({one[0] for one in found}) == 1 and set(fetched.values()) == {1}


def test_another_version_is_another_folder(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    objects = put(store, bucket)
    before = cached(tmp_path, store, objects)
    store.put(objects[0].uri, b"c" * 700)
    after = cached(tmp_path, store, list(store.list(objects[0].uri.rpartition("/")[0] + "/")))
    assert before and after and before[0] != after[0]
    assert files_of(after[0])["model-1.safetensors"] == b"c" * 700


def test_an_object_replaced_since_its_listing_is_refused(
    store: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    objects = put(store, bucket)
    store.put(objects[1].uri, b"c" * 300)
    with pytest.raises(UserError) as caught:
        cached(tmp_path, store, objects)
    assert caught.value.reason == "ModelChanged" and objects[1].uri in caught.value.message
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_interrupted_fetch_leaves_no_folder(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fetched: Counter[str],
) -> None:  # fmt: skip
    objects = put(store, bucket)
    head = ObjectStore.head

    def broken(self: ObjectStore, uri: str) -> ObjectInfo | None:
        if uri == objects[1].uri:
            raise StorageUnavailable("StorageUnreachable", "gone")
        return head(self, uri)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "head", broken)
        with pytest.raises(StorageUnavailable):
            cached(tmp_path, store, objects)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    found = cached(tmp_path, store, objects)
    assert found and files_of(found[0]) == MODEL

    # Files left by a killed process are not used as the model.
    found[1].close()
    found[0].rename(found[0].with_suffix(".partial"))
    (found[0].with_suffix(".partial") / "model-1.safetensors").write_bytes(b"half")
    again = cached(tmp_path, store, objects)
    assert again and files_of(again[0]) == MODEL
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [again[0].name]


def test_the_least_recently_used_model_is_evicted(
    store: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    models = [put(store, bucket) for _ in range(6)]
    folders = keep(tmp_path, store, models[:4])
    again = cached(tmp_path, store, models[0])  # used again, and locked
    assert again
    os.utime(again[0], (0, 0))
    assert cached(tmp_path, store, models[4])
    assert [folder.exists() for folder in folders] == [True, False, True, True]


def test_nothing_is_evicted_for_a_model_that_cannot_fit(
    store: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    models = [put(store, bucket) for _ in range(4)]
    folders = keep(tmp_path, store, models)
    held = cached(tmp_path, store, models[3])
    assert cached(tmp_path, store, put(store, bucket, {"m": b"x" * 3100})) is None
    assert all(folder.exists() for folder in folders)
    found = cached(tmp_path, store, put(store, bucket, {"m": b"x" * 3000}))
    assert held and found and [folder.exists() for folder in folders] == [False] * 3 + [True]


class Killed(BaseException):
    """Simulates the death of the process."""


def test_an_interrupted_removal_leaves_no_folder_that_looks_complete(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [put(store, bucket) for _ in range(5)]
    keep(tmp_path, store, models[:4])
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return remove(path, ignore_errors=True)
        (path / "model-1.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            cached(tmp_path, store, models[4])
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(len(files_of(path)) for path in folders) == [1, 2, 2, 2]
    assert [path.suffix for path in folders if len(files_of(path)) == 1] == [".partial"]
    for objects in (models[4], models[0]):  # the leftover is removed first, or refilled
        found = cached(tmp_path, store, objects)
        assert found and files_of(found[0]) == MODEL


@pytest.mark.parametrize("damage", ["short", "missing", "more"])
def test_a_folder_that_differs_from_the_listing_is_refilled(
    store: ObjectStore, bucket: str, tmp_path: Path, damage: str
) -> None:
    objects = put(store, bucket)
    (folder,) = keep(tmp_path, store, [objects])
    path = folder / "model-2.safetensors"
    if damage == "short":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    else:
        (folder / "model-3.safetensors").write_bytes(b"stale")
    found = cached(tmp_path, store, objects)
    assert found and found[0] == folder and files_of(folder) == MODEL


def test_files_are_synced_before_the_folder_is_renamed(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    before: list[dict[int, int]] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(descriptor: int) -> None:
        there = os.fstat(descriptor)
        synced[there.st_ino] = there.st_size
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        before.append(dict(synced))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    found = cached(tmp_path, store, put(store, bucket))
    assert found and len(before) == 1
    for path in (found[0], *found[0].iterdir()):
        assert before[0][path.stat().st_ino] == path.stat().st_size


def test_space_reserved_by_another_process_is_not_free(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (put(store, bucket, {"m": bytes([n]) * 2500}) for n in (1, 2))
    meanwhile: list[Any] = []
    download = ObjectStore.download_into

    def before(self: ObjectStore, uri: str, file: BinaryIO) -> None:
        if uri == one[0].uri:
            meanwhile.append(cached(tmp_path, store, other))
        download(self, uri, file)

    monkeypatch.setattr(ObjectStore, "download_into", before)
    assert cached(tmp_path, store, one) and meanwhile == [None]


def test_one_process_at_a_time_evicts(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, locked = shutil.disk_usage, []

    def looking(folder: Path) -> Any:
        with (tmp_path / "room.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", looking)
    keep(tmp_path, store, [put(store, bucket) for _ in range(5)])
    assert set(locked) == {True}


def test_folders_of_another_user_stay_and_the_cache_still_works(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [put(store, bucket) for _ in range(5)]
    folders = keep(tmp_path, store, models[:4])
    rename, utime = Path.rename, os.utime

    def renaming(self: Path, target: Path) -> Path:
        if self == folders[0]:
            raise PermissionError("sticky")
        return rename(self, target)

    def touching(path: Path) -> None:
        if path == folders[0]:
            raise PermissionError("not the owner")
        utime(path)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(os, "utime", touching)
    assert cached(tmp_path, store, models[4])
    assert [folder.exists() for folder in folders] == [True, False, True, True]
    found = cached(tmp_path, store, models[0])
    assert found and files_of(found[0]) == MODEL


def test_foreign_folders_are_not_evicted(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").write_bytes(bytes(1000))
    os.utime(tmp_path / "photos", (0, 0))
    keep(tmp_path, store, [put(store, bucket) for _ in range(4)])
    assert (tmp_path / "photos" / "cat").exists()


def test_an_unusable_cache_is_skipped(
    store: ObjectStore, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert cached(tmp_path / "cache", store, put(store, bucket)) is None
    assert "without the cache" in caplog.text


def test_a_folder_in_use_is_locked(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    found = cached(tmp_path, store, put(store, bucket))
    assert found
    with found[0].with_suffix(".lock").open("ab") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found[1].close()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
