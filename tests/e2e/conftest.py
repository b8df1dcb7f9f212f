"""Fixtures of the e2e tests: a real cluster with S3, and the operator installed by its chart."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from e2e_platform import (
    KEYS,
    OPERATOR,
    ROOT,
    S3_PORT,
    TRAINER,
    Manifest,
    Platform,
    forwarded,
    install,
    start_empty_registry,
    start_s3,
    wait_for_s3,
)

from cluster import images
from cluster.api import Api, given
from cluster.real import RealCluster
from finetune_trainer.quickstart import make_quickstart
from finetune_trainer.storage.objects import Credentials, ObjectStore
from timings import timed


@pytest.fixture(scope="session")
def cluster_images(request: pytest.FixtureRequest) -> list[str]:
    """Operator and trainer image: built from the released Dockerfiles or, for a given cluster,
    pushed images named by the environment."""
    if given():
        names = ("FINETUNE_E2E_OPERATOR_IMAGE", "FINETUNE_E2E_TRAINER_IMAGE")
        missing = [name for name in names if name not in os.environ]
        if missing:
            pytest.fail(f"a given cluster needs pushed images: set {' and '.join(missing)}")
        return [os.environ[name] for name in names]
    request.getfixturevalue("needs_root")
    torch = importlib.metadata.version("torch").split("+")[0]
    with timed("base images"):
        base, lean = images.base(), images.torch_base(torch)
    with timed("operator image"):
        operator = images.build(
            ROOT, OPERATOR, {"BASE_IMAGE": base}, dockerfile=ROOT / "operator/Dockerfile"
        )
    with timed("trainer image"):
        trainer = images.build(
            ROOT, TRAINER, {"BASE_IMAGE": lean, "TORCH_REQUIREMENT": ""},
            dockerfile=ROOT / "trainer-image/Dockerfile",
        )  # fmt: skip
    return [operator, trainer]


@pytest.fixture(scope="session")
def platform(
    cluster: Api, cluster_images: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Cluster, S3 and operator, and the namespace of a team with its Secret."""
    inputs = tmp_path_factory.mktemp("inputs")
    with timed("quickstart model and data"):
        make_quickstart(inputs)
    operator, trainer = cluster_images
    with ExitStack() as stack:
        with timed("S3 in the cluster"):
            address = start_s3(cluster, trainer)
            if not isinstance(cluster, RealCluster):
                address = stack.enter_context(forwarded(cluster))
            keys = Credentials(KEYS[0], KEYS[1], None, "the tests' keys")
            store = ObjectStore(f"http://{address}:{S3_PORT}", credentials=keys)
            wait_for_s3(store)
            store.create_bucket("input")
            store.create_bucket("output")
            for path in sorted(p for p in inputs.rglob("*") if p.is_file()):
                store.upload(path, f"s3://input/{path.relative_to(inputs)}")
        start_empty_registry(cluster, trainer)
        with timed("helm install"):
            install(cluster, operator, trainer)
        endpoint = f"http://s3.storage.svc.cluster.local:{S3_PORT}"
        yield Platform(cluster, operator, trainer, store, endpoint, inputs)


ManifestOf = Callable[..., Manifest]


@pytest.fixture(scope="session")
def manifest_of(platform: Platform) -> ManifestOf:
    """``manifest_of(name, **spec)``: the cluster quickstart with another name and destination, and
    without few-shot answers of the base model; ``spec`` is merged over its spec."""
    import yaml

    text = (ROOT / "examples/quickstart-cluster.yaml").read_text()

    def make(name: str, **spec: Any) -> Manifest:
        manifest: Manifest = yaml.safe_load(text)
        manifest["metadata"]["name"] = name
        base = manifest["spec"]
        text_of_inputs = json.dumps(base["data"]).replace("s3://quickstart/input/", "s3://input/")
        base["data"] = json.loads(text_of_inputs)
        base["model"]["source"] = "s3://input/model"
        base["output"]["destination"] = f"s3://output/{name}"
        base["storage"]["endpoint"] = platform.endpoint
        base.setdefault("evaluation", {}).setdefault("baselines", {"shots": []})
        base["compute"]["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}}
        for block, value in spec.items():
            if isinstance(value, dict) and isinstance(base.get(block), dict):
                base[block] = {k: v for k, v in (base[block] | value).items() if v is not None}
            else:
                base[block] = value
        return manifest

    return make
