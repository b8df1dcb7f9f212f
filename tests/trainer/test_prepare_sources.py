"""Objects of a source and files of a model: in S3, on claims, and in the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from finetune_api.names import ENV_PVC_ROOT
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import DataError, StorageDenied, UserError
from finetune_trainer.prepare.reading.records import SUFFIXES, read_records
from finetune_trainer.prepare.reading.sources import resolve
from finetune_trainer.storage.modelfiles import fetch_model, fetch_tokenizer, read_limits
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.s3server import EmbeddedS3
from trainer.prepare_helpers import make_tokenizer, save_model

NAMES = ["a.jsonl", "b.jsonl.gz", "notes.txt", "part/c.jsonl", "part/deep/d.parquet", "x.jsonl.old"]


@pytest.fixture(scope="module")
def bucket(s3: EmbeddedS3, store: ObjectStore) -> str:
    s3.ensure_bucket("test-sources")
    for name in NAMES:
        store.put(f"s3://test-sources/data/{name}", name.encode())
    return "test-sources"


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("claims")
    for name in NAMES:
        path = root / "claim" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return {ENV_PVC_ROOT: str(root)}


MATCHES = [
    ("data/a.jsonl", ["a.jsonl"]),
    ("data/*.jsonl", ["a.jsonl"]),
    ("data/*", ["a.jsonl", "b.jsonl.gz", "notes.txt", "x.jsonl.old"]),
    ("data/**/*.jsonl", ["a.jsonl", "part/c.jsonl"]),
    ("data/**.parquet", ["part/deep/d.parquet"]),
    ("data/p*/*", ["part/c.jsonl"]),
    ("data/", ["a.jsonl", "b.jsonl.gz", "part/c.jsonl", "part/deep/d.parquet"]),
]


@pytest.mark.parametrize(("path", "found"), MATCHES)
@pytest.mark.parametrize("root", ["s3://test-sources", "pvc://claim"])
def test_objects_are_resolved_by_name_pattern_and_prefix(
    store: ObjectStore, bucket: str, claims: dict[str, str], root: str, path: str,
    found: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENV_PVC_ROOT, claims[ENV_PVC_ROOT])
    objects = resolve(f"{root}/{path}", store, claims)
    assert [o.uri.removeprefix(f"{root}/data/") for o in objects] == found
    for item, name in zip(objects, found, strict=True):
        with item.open() as stream:
            assert stream.read() == name.encode()
        assert item.size == len(name) and item.etag


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data/*.csv", ["a.jsonl", "b.jsonl.gz", ".parquet"]),
        ("data/part", ["folder", "/data/part/"]),
        ("data/z.jsonl", ["a.jsonl", "and 1 more"]),
        ("nowhere/*.jsonl", ["nothing below", "/nowhere/"]),
    ],
)
@pytest.mark.parametrize("root", ["s3://test-sources", "pvc://claim"])
def test_an_address_without_objects_is_refused_with_existing_objects(
    store: ObjectStore, bucket: str, claims: dict[str, str], root: str, path: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(f"{root}/{path}", store, claims)
    assert caught.value.reason == "NoObjects"
    for word in [f"{root}/{path}", *words]:
        assert word in caught.value.message


def test_a_missing_bucket_is_distinguished_from_missing_data(store: ObjectStore) -> None:
    with pytest.raises(StorageDenied, match="test-nowhere") as caught:
        resolve("s3://test-nowhere/data/", store)
    assert caught.value.reason == "BucketNotFound"


def test_a_path_may_not_leave_its_claim(store: ObjectStore, claims: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"'\.\.'"):
        resolve("pvc://claim/../secrets.jsonl", store, claims)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_object_that_is_replaced_before_it_is_read_is_refused(
    store: ObjectStore, bucket: str, suffix: str
) -> None:
    uri = f"s3://{bucket}/changing/a{suffix}"
    store.put(uri, b"one")
    (item,) = resolve(uri, store)
    store.put(uri, b"other")
    with pytest.raises(DataError) as caught, item.open() as stream:
        list(read_records(uri, stream))
    assert caught.value.reason == "ObjectChanged"


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are in several files."""
    return save_model(
        tmp_path_factory.mktemp("model"), make_tokenizer(bos=True), max_shard_size="5KB"
    )


def put_model(store: ObjectStore, folder: Path, uri: str, *leave_out: str) -> None:
    for path in folder.iterdir():
        if path.name not in leave_out:
            store.put(f"{uri}/{path.name}", path.read_bytes())


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


def test_model_files_in_object_storage_are_fetched_once_and_weights_listed(
    store: ObjectStore, bucket: str, run_spec_for: Callable[..., RunSpec], model_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    put_model(store, model_folder, f"s3://{bucket}/whole")
    run_spec = run_spec_for(model={"source": f"s3://{bucket}/whole"})
    stores = Stores(run_spec)
    folder = fetch_tokenizer(run_spec.base_model, stores, tmp_path / "model")
    assert not list(folder.glob("*.safetensors"))
    assert read_limits(folder, "m").max_length == 256
    weights = fetch_model(run_spec.base_model, stores, folder)
    found = sorted(model_folder.glob("*.safetensors"))
    assert [info.uri.rpartition("/")[2] for info in weights] == [path.name for path in found]
    assert [info.size for info in weights] == [path.stat().st_size for path in found]
    assert len(weights) > 1 and not list(folder.glob("*.safetensors"))
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    fetch_model(run_spec.base_model, stores, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_model_with_a_missing_weights_file_is_refused(
    store: ObjectStore, bucket: str, run_spec_for: Callable[..., RunSpec], model_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    part = next(p.name for p in model_folder.glob("*-00002-of-*"))
    put_model(store, model_folder, f"s3://{bucket}/partly", part)
    run_spec = run_spec_for(model={"source": f"s3://{bucket}/partly"})
    with pytest.raises(UserError, match=part) as caught:
        fetch_tokenizer(run_spec.base_model, Stores(run_spec), tmp_path / "model")
    assert caught.value.reason == "ModelNotFound"


@pytest.mark.parametrize("source", ["s3://test-sources/no/model", "pvc://claim/no/model"])
def test_a_missing_model_is_named_with_the_required_files(
    bucket: str, run_spec_for: Callable[..., RunSpec], claims: dict[str, str], source: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENV_PVC_ROOT, claims[ENV_PVC_ROOT])
    run_spec = run_spec_for(model={"source": source})
    for fetch in (fetch_tokenizer, fetch_model):
        with pytest.raises(UserError) as caught:
            fetch(run_spec.base_model, Stores(run_spec), tmp_path / "model")
        assert caught.value.reason == "ModelNotFound"
        for word in (source, "config.json", "model.safetensors", "tokenizer.json"):
            assert word in caught.value.message


def test_a_model_on_a_claim_is_used_in_place(
    bucket: str, run_spec_for: Callable[..., RunSpec], model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENV_PVC_ROOT, str(model_folder.parent))
    run_spec = run_spec_for(model={"source": f"pvc://{model_folder.name}/"})
    folder = tmp_path / "model"
    for fetch in (fetch_tokenizer, fetch_model):
        fetch(run_spec.base_model, Stores(run_spec), folder)
        assert folder.resolve() == model_folder.resolve()


def test_a_hub_model_is_read_from_the_cache(
    bucket: str, run_spec_for: Callable[..., RunSpec], model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The hub's loader on its own cache layout, offline.
    cache = tmp_path / "hub"
    checkpoint = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--acme--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / checkpoint).symlink_to(model_folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(checkpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_spec = run_spec_for(model={"source": "hf://acme/tiny@v1"})
    folder = tmp_path / "model"
    for fetch in (fetch_tokenizer, fetch_model):
        fetch(run_spec.base_model, Stores(run_spec), folder)
        assert same_files(folder, model_folder)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(UserError, match=r"s3://b/m/config\.json") as caught:
        read_limits(tmp_path, "s3://b/m")
    assert caught.value.reason == "UnsupportedModel"


# --- claims that others write to -----------------------------------------------------------------


def test_a_link_out_of_a_claim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod's files hold its credentials; links within the claim are followed."""
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path))
    folder = tmp_path / "claim" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    (folder / "a.jsonl").write_text('{"text": "a"}')
    (folder / "b.jsonl").symlink_to("a.jsonl")
    (folder / "c.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "d.jsonl").symlink_to("../../secret.jsonl")
    found = resolve("pvc://claim/data/", Mock())
    assert [item.open().read() for item in found[:2]] == [b'{"text": "a"}'] * 2
    for item in found[2:]:
        with pytest.raises(UserError, match="leads out of the claim") as caught:
            item.open()
        assert caught.value.reason == "OutsideClaim" and item.uri in caught.value.message
    assert len(found) == 4
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "claim").symlink_to(tmp_path / "claim")  # as `finetune run` does
    assert resolve("pvc://claim/data/d.jsonl", Mock())[0].open().read() == b'{"text": "secret"}'


def test_pipes_and_devices_of_a_claim_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_PVC_ROOT, str(tmp_path))
    folder = tmp_path / "claim"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}')
    os.mkfifo(folder / "b.jsonl")
    (folder / "c.jsonl").symlink_to("/dev/zero")
    (folder / "d.jsonl").symlink_to("d.jsonl")
    (found,) = resolve("pvc://claim/", Mock())
    assert found.uri == "pvc://claim/a.jsonl"
    (folder / "a.jsonl").unlink()
    os.mkfifo(folder / "a.jsonl")
    with pytest.raises(DataError, match="replaced"):  # at once: a read would wait for a writer
        found.open()


@pytest.mark.parametrize(
    "name", ["a%2Fb", "a b", "é", "e\u0301", "a\u202eb", "x" * 200, "..", "a\x01b"]
)
def test_keys_with_tricks_are_read_as_they_are_named(
    store: ObjectStore, root: str, name: str
) -> None:
    key = f"{root}/{name}.jsonl"
    store.put(key, b"not JSON")
    (found,) = resolve(f"{root}/*.jsonl", store)
    assert found.uri == key
    with found.open() as stream, pytest.raises(DataError) as caught:
        list(read_records(found.uri, stream))
    assert caught.value.message.isprintable() and "line 1" in caught.value.message
