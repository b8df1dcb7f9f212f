"""Images are built without a registry, and the PyTorch in them works without NVIDIA's packages."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import images
from cluster.api import eventually
from cluster.real import RealCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TORCH = """
import os, torch, torch.distributed as dist, torch.nn.functional as F
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
total = torch.ones(2, 2) @ torch.ones(2, 2)
dist.all_reduce(total)
query = torch.randn(1, 2, 8, 4, requires_grad=True)
F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
assert torch.linalg.inv(torch.eye(3)).equal(torch.eye(3))
print("product", total.sum().item(), "user", os.getuid())
"""
DOCKERFILE = """
ARG BASE
FROM ${BASE}
ARG TOLD
RUN pip install --quiet iniconfig && echo "$TOLD" >/told
USER 1000
CMD ["cat", "/told"]
"""


def run(cluster: RealCluster, name: str, image: str, *command: str) -> str:
    """The log of a pod that has run to its end."""
    container: dict[str, Any] = {"name": "main", "image": image}
    if command:
        container["command"] = list(command)
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "restartPolicy": "Never",
                "securityContext": {"runAsNonRoot": True, "runAsUser": 1000},
                "containers": [container],
            },
        }
    )
    phase = "jsonpath={.status.phase}"

    def ended() -> str:
        said = cluster.kubectl("get", "pod", name, "-o", phase)
        return said if said in ("Succeeded", "Failed") else ""

    try:
        outcome = eventually(f"pod {name} ended", ended, within=120)
        log = cluster.kubectl("logs", name)
    finally:
        cluster.kubectl("delete", "pod", name, "--wait=false")
    assert outcome == "Succeeded", log
    return log


def test_a_dockerfile_becomes_an_image_on_running_nodes(
    cluster: RealCluster, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    told = os.urandom(4).hex()
    image = images.build(tmp_path, "fto/selftest:1", {"BASE": images.base(), "TOLD": told})
    cluster.provide(image)
    assert run(cluster, "told", image) == f"{told}\n"


def test_torch_works_without_nvidia_packages(cluster: RealCluster) -> None:
    try:
        version = importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no torch here whose version to try")
    image = images.torch_base(version)
    cluster.provide(image)
    log = run(cluster, "torch", image, "python3", "-W", "error", "-c", TORCH)
    assert "product 8.0 user 1000" in log
