"""Images are built without a registry, and their PyTorch works without NVIDIA's packages."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

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
assert total.sum().item() == 8
query = torch.randn(1, 2, 8, 4, requires_grad=True)
F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
assert torch.linalg.inv(torch.eye(3)).equal(torch.eye(3))
assert os.getuid() == 1000
"""
TRY_TORCH = """
ARG BASE
FROM ${BASE}
COPY try.py /
USER 1000
RUN python3 /try.py
RUN pip install --dry-run torch | (! grep -i nvidia)
"""
DOCKERFILE = """
ARG BASE
FROM ${BASE}
ARG TOLD
RUN pip install --quiet iniconfig && echo "$TOLD" >/told
USER 1000
CMD ["cat", "/told"]
"""


def test_a_dockerfile_becomes_an_image_on_running_nodes(
    own_cluster: RealCluster, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    told = os.urandom(4).hex()
    image = images.build(tmp_path, "fto/selftest:1", {"BASE": images.base(), "TOLD": told})
    own_cluster.provide(image)
    own_cluster.kubectl("run", "told", f"--image={image}", "--restart=Never")
    try:
        log = eventually("the log", lambda: own_cluster.kubectl("logs", "told"))
    finally:
        own_cluster.kubectl("delete", "pod", "told", "--wait=false")
    assert log == f"{told}\n"


def test_torch_works_without_nvidia_packages(needs_root: None, tmp_path: Path) -> None:
    try:
        version = importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torch is not installed: no version to test")
    (tmp_path / "try.py").write_text(TORCH)
    (tmp_path / "Dockerfile").write_text(TRY_TORCH)
    images.build(tmp_path, "fto/selftest-torch:1", {"BASE": images.torch_base(version)})
