"""The cluster with nodes: containers run and reach each other, and failed nodes are detected."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.api import eventually
from cluster.processes import Ended
from cluster.real import NODES, RealCluster

pytestmark = pytest.mark.e2e

NAMESPACE = "selftest"
SERVE = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"


def pod(name: str, node: str, image: str, *command: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name, "gang": "yes"}},
        "spec": {
            "hostname": name,
            "subdomain": "gang",
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000},
            "containers": [{"name": "main", "image": image, "command": list(command)}],
        },
    }


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"ports": [{"port": 8000}], **spec},
    }


@pytest.fixture(scope="module")
def servers(own_cluster: RealCluster, cluster_images: list[str]) -> Iterator[RealCluster]:
    """A web server in a pod on each node, behind two Services."""
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    serve = ("python3", "-c", SERVE)
    names = {f"server-{node}": node for node in NODES}
    own_cluster.apply(space)
    account = "serviceaccount/default"
    eventually("the account", lambda: own_cluster.kubectl("get", account, "-n", NAMESPACE))
    own_cluster.apply(
        service("gang", clusterIP="None", selector={"gang": "yes"}),
        service("one", selector={"app": "server-node-b"}),
        *(pod(name, node, cluster_images[0], *serve) for name, node in names.items()),
    )
    pods = [f"pod/{name}" for name in names]
    own_cluster.kubectl("wait", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=60s", *pods)
    yield own_cluster
    own_cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def test_the_nodes_are_ready(own_cluster: RealCluster) -> None:
    assert own_cluster.ready_nodes() == set(NODES)


def test_logs_and_exec(servers: RealCluster) -> None:
    said = servers.kubectl("exec", "-n", NAMESPACE, "server-node-a", "--", "id", "-u")
    assert said.strip() == "1000"
    servers.kubectl(
        "exec", "-n", NAMESPACE, "server-node-a", "--", "sh", "-c", "echo hello >/proc/1/fd/1"
    )
    eventually(
        "the log",
        lambda: "hello" in servers.kubectl("logs", "-n", NAMESPACE, "server-node-a"),
    )


@pytest.mark.parametrize("host", ["server-node-c.gang", "server-node-a.gang", "one"])
def test_a_pod_reaches_pods_and_services_by_name(servers: RealCluster, host: str) -> None:
    fetch = f"import urllib.request as r; print(r.urlopen('http://{host}:8000', timeout=3).status)"

    def status() -> bool:
        command = ("python3", "-c", fetch)
        return "200" in servers.kubectl("exec", "-n", NAMESPACE, "server-node-a", "--", *command)

    eventually(f"an answer of {host}", status)


def test_a_pod_reaches_the_api_and_trusts_it(servers: RealCluster) -> None:
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    fetch = f"""
import ssl, urllib.request
trust = ssl.create_default_context(cafile="{account}/ca.crt")
print(urllib.request.urlopen("https://kubernetes.default.svc/version", context=trust).status)
"""
    command = ("python3", "-c", fetch)
    assert servers.kubectl("exec", "-n", NAMESPACE, "server-node-a", "--", *command) == "200\n"


def test_the_host_reaches_a_service(servers: RealCluster) -> None:
    address = servers.get("service", "one", "-n", NAMESPACE)["spec"]["clusterIP"]
    with urllib.request.urlopen(f"http://{address}:8000", timeout=5) as answer:
        assert answer.status == 200


def test_external_names_fail_immediately(servers: RealCluster) -> None:
    look = "import socket; socket.getaddrinfo('example.invalid.', 80)"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Name or service not known|exit code 1"):
        servers.kubectl("exec", "-n", NAMESPACE, "server-node-a", "--", "python3", "-c", look)
    assert time.monotonic() - began < 4


def test_a_powered_off_node_becomes_not_ready_and_recovers(servers: RealCluster) -> None:
    node = servers.nodes["node-c"]
    node.power_off()
    eventually("node-c is not ready", lambda: "node-c" not in servers.ready_nodes(), within=30)
    with pytest.raises(Ended, match=r"node-c\.containerd does not run"):
        servers.wait_for_nodes("node-c")
    node.start()
    servers.wait_for_nodes("node-c")


def test_the_node_of_a_frozen_kubelet_becomes_not_ready(servers: RealCluster) -> None:
    node = servers.nodes["node-b"]
    node.freeze_kubelet()
    try:
        eventually("node-b is not ready", lambda: "node-b" not in servers.ready_nodes(), within=30)
        assert node.machine.first_process.alive
    finally:
        node.thaw_kubelet()
    servers.wait_for_nodes("node-b")
