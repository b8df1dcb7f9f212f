"""A bucket with a model, a separate prefix for each test, and prepare jobs over its objects."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.run_spec import RunSpec
from finetune_trainer.prepare.mapping import reader, writer
from finetune_trainer.prepare.reading import inputsplits
from finetune_trainer.prepared import dataset
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3
from trainer.map_reduce_helpers import PrepareJob
from trainer.prepare_helpers import CHATML, Workplace, make_tokenizer, save_model


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), make_tokenizer(bos=True, chat=CHATML))


@pytest.fixture(scope="package")
def bucket(s3: EmbeddedS3, store: ObjectStore, model_folder: Path) -> str:
    """One bucket with the model for all tests, since creating a bucket is slow."""
    s3.ensure_bucket("test-prepare")
    for path in model_folder.iterdir():
        store.upload(path, f"s3://test-prepare/model/{path.name}")
    return "test-prepare"


@pytest.fixture
def at(
    store: ObjectStore, bucket: str, run_spec_for: Callable[..., RunSpec], tmp_path: Path
) -> Workplace:
    root = f"s3://{bucket}/{uuid.uuid4().hex[:8]}"
    return Workplace(root, store, run_spec_for, (tmp_path / str(i) for i in range(99)))


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make input splits, batches, shards and pieces small, so that small data has several."""
    monkeypatch.setattr(inputsplits, "SPLIT_BYTES", 1500)
    monkeypatch.setattr(writer, "SHARD_TOKENS", 300)
    monkeypatch.setattr(reader, "BATCH_RECORDS", 7)
    monkeypatch.setattr(dataset, "PIECE_TOKENS", 50)


@pytest.fixture
def job(
    store: ObjectStore,
    bucket: str,
    run_spec_for: Callable[..., RunSpec],
    tmp_path: Path,
    small_splits: None,
) -> PrepareJob:
    """A prepare job with small input splits."""
    root = f"s3://{bucket}/{uuid.uuid4().hex[:8]}"
    return PrepareJob(store, run_spec_for, (tmp_path / str(i) for i in range(999)), root)
