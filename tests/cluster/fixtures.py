"""pytest fixtures for clusters: ``pytest_plugins = ["cluster.fixtures"]``.

``control_plane`` is an API without nodes; ``cluster`` has nodes that run containers. Both have
session scope. With FINETUNE_TEST_USE_KUBECONFIG=1, both are the cluster of KUBECONFIG
(``api.given``).
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
"""Seconds per test on nodes: the first test includes the builds of operator and trainer image."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.timeout(TIMEOUT))


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Api]:
    """An API server with controllers, on loopback; its pods stay Pending."""
    api = given()
    if api:
        yield api
        return
    with ControlPlane() as plane:
        yield plane


@pytest.fixture(scope="session")
def needs_root() -> None:
    """Fail tests that need root instead of skipping them: a run that skips all of them would look
    as if it had passed."""
    if os.geteuid() != 0:
        pytest.fail(NEEDS_ROOT)


@pytest.fixture(scope="session")
def own_cluster(cluster: Api) -> RealCluster:
    """``cluster``, for tests that stop its nodes; skipped on a given cluster."""
    if not isinstance(cluster, RealCluster):
        pytest.skip("the given cluster is not ours to break")
    return cluster


@pytest.fixture(scope="session")
def cluster_images(needs_root: None) -> list[str]:
    """Images for the pods of e2e tests; override this fixture to build others."""
    return [images.base()]


@pytest.fixture(scope="session")
def cluster(cluster_images: list[str]) -> Iterator[Api]:
    """A cluster whose nodes have ``cluster_images``: the given one, one that ``python -m cluster
    up`` started, or a new one with three nodes."""
    api = given()
    if api:
        yield api
        return
    kept = RealCluster.kept()
    if kept and kept.has(*cluster_images):
        yield kept
    elif kept:  # restart with the current images, which takes seconds
        kept.stop()
        renewed = RealCluster(state.claim(NAME, keep=True))
        renewed.start()
        yield renewed
    else:
        with RealCluster(state.claim(NAME)) as own:
            yield own
