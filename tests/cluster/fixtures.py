"""pytest's way to a cluster: ``pytest_plugins = ["cluster.fixtures"]``.

``control_plane`` is an API without nodes, ``cluster`` one with nodes that run containers, each
for all tests of the session.

With FINETUNE_TEST_USE_KUBECONFIG=1, both are the cluster of KUBECONFIG (``api.given``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster import images, state
from cluster.api import NEEDS_ROOT, Api, given
from cluster.control_plane import ControlPlane
from cluster.real import NAME, RealCluster

TIMEOUT = 1800
"""Seconds for a test on nodes: the first one waits for the images of operator and trainer."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.timeout(TIMEOUT))


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
        pytest.fail(NEEDS_ROOT)


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
