"""pytest's way to a cluster: ``pytest_plugins = ["cluster.fixtures"]``.

``control_plane`` is an API without nodes, ``cluster`` one with nodes that run containers, each
for all tests of the session.

With FINETUNE_TEST_USE_KUBECONFIG=1, ``control_plane`` is the cluster of KUBECONFIG. KUBECONFIG
alone does not say so: it usually names the cluster that somebody works with, and tests make and
delete things.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import images, state
from cluster.api import Api
from cluster.control_plane import ControlPlane
from cluster.real import NAME, RealCluster

TIMEOUT = 3600
"""Seconds for a test on a cluster: the first one waits until its binaries and images are built."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        on_cluster = "control_plane" in getattr(item, "fixturenames", ())
        if on_cluster or item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.timeout(TIMEOUT))


def given() -> Api | None:
    """The cluster that the environment gives the tests to use."""
    if os.environ.get("FINETUNE_TEST_USE_KUBECONFIG") != "1":
        return None
    if "KUBECONFIG" not in os.environ:
        pytest.exit("FINETUNE_TEST_USE_KUBECONFIG=1 needs KUBECONFIG, a file's path", 2)
    return Api(Path(os.environ["KUBECONFIG"]))


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Api]:
    """An API with its controllers, on loopback; pods in it stay Pending."""
    api = given()
    if api:
        yield api
        return
    with ControlPlane() as plane:
        yield plane


@pytest.fixture(scope="session")
def needs_root() -> None:
    """Fails the tests that make nodes or images where that is not allowed: a run that skipped them
    all would look like one that passed."""
    if os.geteuid() != 0:
        pytest.fail(
            "nodes and image builds need root on Linux; or give a cluster by KUBECONFIG and"
            " FINETUNE_TEST_USE_KUBECONFIG=1 (see README, Development)"
        )


@pytest.fixture(scope="session")
def own_cluster(cluster: Api) -> RealCluster:
    """``cluster``, for tests that switch its nodes off; skipped on a given one."""
    if not isinstance(cluster, RealCluster):
        pytest.skip("the given cluster is not ours to break")
    return cluster


@pytest.fixture(scope="session")
def cluster_images(needs_root: None) -> list[str]:
    """The images that the pods of e2e tests run; override it to build more of them."""
    return [images.base()]


@pytest.fixture(scope="session")
def cluster(cluster_images: list[str]) -> Iterator[Api]:
    """A cluster with nodes that have these images: the given one, the one kept up, or three nodes
    of our own."""
    api = given()
    if api:
        yield api
        return
    kept = RealCluster.kept()
    if kept and kept.has(*cluster_images):
        yield kept
    elif kept:  # made anew with the images as they are now, which is a matter of seconds
        kept.stop()
        renewed = RealCluster(state.claim(NAME, keep=True))
        renewed.start()
        yield renewed
    else:
        with RealCluster(state.claim(NAME)) as own:
            yield own
