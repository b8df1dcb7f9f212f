"""Fixtures of the trainer's tests: a real S3 server, fresh buckets, and run specs that use them."""

from __future__ import annotations

import shutil
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, write_model
from fixtures_loading import model_of, root, shared_bucket
from fixtures_memory import llama
from fixtures_quickstart import tiny_base
from run_specs import RunSpecFor, run_specs
from supervisors import nodes
from worlds import start_fork_server

from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3

__all__ = ["llama", "model_of", "nodes", "root", "shared_bucket", "tiny_base"]


@pytest.fixture(scope="session", autouse=True)
def find_profile() -> Iterator[Callable[..., Any]]:
    """Cache memory profiles across tests: profiling takes half of the time of a small prepare, and
    most tests use the same model. Yields the method that is replaced."""
    made: dict[str, Any] = {}
    find = ProfileCache._find

    def find_once(self: ProfileCache, key: str, spec: FineTuneJobSpec) -> Any:
        if key not in made:
            made[key] = find(self, key, spec)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfileCache, "_find", find_once)
        yield find


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    start_fork_server()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """A running S3 server: ``.endpoint``, ``.access_key``, ``.secret_key``, ``.store()``."""
    with EmbeddedS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def store(s3: EmbeddedS3) -> ObjectStore:
    """The server's object store client."""
    return s3.store()


@pytest.fixture
def bucket(store: ObjectStore) -> str:
    """Name of a new bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    store.create_bucket(name)
    return name


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with free space, however full this machine's disk is: caches keep a share free."""
    usage = namedtuple("Usage", "total used free")(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread: small matrix products only lose time on thread synchronization."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_spec_for(s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> RunSpecFor:
    """``run_spec_for(**spec)``: a run spec on the test's bucket; puts its credentials into the
    environment.

    Blocks in ``spec`` replace those of a minimal spec: model ``s3://<bucket>/model``, training data
    ``s3://<bucket>/train.jsonl``, output ``s3://<bucket>/out``. ``run`` and ``job`` name the run.
    """

    return run_specs(s3, bucket, monkeypatch)


@pytest.fixture
def run_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunSpec], Path]:
    """``run_spec_file(run_spec)``: writes run-spec.json and sets the environment variables for the
    run spec, the termination message and the scratch folder."""

    def write(run_spec: RunSpec) -> Path:
        path = tmp_path / "run-spec.json"
        path.write_text(run_spec.to_text())
        monkeypatch.setenv("FINETUNE_RUN_SPEC", str(path))
        monkeypatch.setenv("FINETUNE_TERMINATION", str(tmp_path / "termination" / "message"))
        monkeypatch.setenv("FINETUNE_SCRATCH", str(tmp_path / "scratch"))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Llama."""
    folder = tmp_path_factory.mktemp("tiny-model")
    write_model(folder)
    return folder


@pytest.fixture
def bench(
    run_spec_for: RunSpecFor, s3: EmbeddedS3, bucket: str, tiny_model: Path, tmp_path: Path
) -> Bench:
    """A job on the test's bucket with ``tiny_model``."""
    return Bench(run_spec_for, s3, bucket, tiny_model, tmp_path)
