"""Run specs for tests, on the embedded S3 server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.names import storage_env
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec
from finetune_api.spec import parse_spec
from finetune_trainer.storage.s3server import EmbeddedS3

RunSpecFor = Callable[..., RunSpec]


def run_specs(s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> RunSpecFor:
    """Return ``run_spec_for`` of a bucket, for fixtures of a wider scope."""

    def make(*, run: str = "1-abcde", job: str = "job", **spec: Any) -> RunSpec:
        storage = {"endpoint": s3.endpoint, **spec.pop("storage", {})}
        raw = {
            "model": {"source": f"s3://{bucket}/model"},
            "data": {"train": [{"source": f"s3://{bucket}/train.jsonl"}]},
            "output": {"destination": f"s3://{bucket}/out"},
            **spec,
            "storage": storage,
        }
        run_spec = RunSpec(
            version=CONTRACT_VERSION,
            job=JobIdentity(namespace="default", name=job, uid="abcde-0000"),
            run=run,
            spec=parse_spec(raw),
        )
        for profile in range(len(run_spec.storage_profiles)):
            keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
            for key, value in keys.items():
                monkeypatch.setenv(storage_env(profile, key), value)
        return run_spec

    return make
