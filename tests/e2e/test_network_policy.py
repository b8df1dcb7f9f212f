"""NetworkPolicies of a run, enforced: the gang trains, the operator reads its progress, and other
pods reach neither the gang nor prepare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from e2e_platform import S3_PORT, TEAM, Platform

from cluster.api import eventually
from cluster.policies import enforced
from cluster.real import RealCluster
from finetune_api.names import METRICS_PORT, RENDEZVOUS_PORT

pytestmark = pytest.mark.e2e

PORT = 7000
LISTEN = f"import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={PORT})"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"


def apply_pod(platform: Platform, name: str, namespace: str, labels: dict[str, str]) -> str:
    """Start a pod that listens on PORT. Returns its address."""
    security = {
        "runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container = {
        "name": "main", "image": platform.trainer, "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", LISTEN],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    platform.cluster.apply(
        {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "containers": [container], "securityContext": security,
                "terminationGracePeriodSeconds": 0,
            },
        }
    )  # fmt: skip

    def address() -> str | None:
        pod = platform.cluster.get("pod", name, "-n", namespace)
        return pod["status"].get("podIP") if pod["status"]["phase"] == "Running" else None

    return eventually(f"{name} runs", address, within=60)


def reaches(platform: Platform, where: str, pod: str, address: str, port: int) -> bool:
    """Whether a process in a pod can connect."""
    command = ("exec", "-n", where, pod, "--", "python3", "-c", CONNECT, address, str(port))
    try:
        platform.cluster.kubectl(*command)
    except RuntimeError as error:
        if "create_connection" not in str(error):
            raise
        return False
    return True


@pytest.fixture
def limited(platform: Platform) -> Iterator[RealCluster]:
    """The operator with stated egress: DNS, which is on the host, and object storage."""
    cluster = platform.cluster
    if not isinstance(cluster, RealCluster):
        pytest.skip("enforces NetworkPolicies on the nodes")
    storage = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "storage"}}}
    dns = {"ipBlock": {"cidr": f"{cluster.address}/32"}}
    rules = [{"to": [dns], "ports": [{"port": 53, "protocol": "UDP"}]}, {"to": [storage]}]
    platform.install("--set-json", f"networkPolicy.egress={json.dumps(rules)}")
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}})
    yield cluster
    cluster.kubectl("delete", "namespace", "other", "--wait=false")
    cluster.kubectl("delete", "pod", "inside", "-n", TEAM, "--ignore-not-found", "--wait=false")
    platform.install()


def test_other_pods_reach_neither_a_gang_nor_prepare(
    platform: Platform, manifest_of: Any, limited: RealCluster
) -> None:
    foreign = apply_pod(platform, "foreign", "other", {})
    (s3,) = (
        p["status"]["podIP"] for p in limited.get("pods", "-n", "storage", "-l", "app=s3")["items"]
    )
    with enforced(limited):
        steps = {"training": {"epochs": None, "maxSteps": 400}, "evaluation": {"maxSamples": 20}}
        name = platform.apply(manifest_of("isolated", **steps))
        platform.wait_for_step(name, 2, committed=False)  # read by the operator, across the policy
        gang = platform.pods(name, "train")
        first = next(p for p in gang if p["metadata"]["name"].rsplit("-", 2)[1] == "0")
        pod, address = first["metadata"]["name"], first["status"]["podIP"]
        # Same labels as prepare's pod, which listens on no port and ends soon.
        (prepare,) = platform.pods(name, "prepare")
        inside = apply_pod(platform, "inside", TEAM, prepare["metadata"]["labels"])
        eventually(
            "the pod is isolated", lambda: not reaches(platform, "other", "foreign", inside, PORT)
        )
        for port in (RENDEZVOUS_PORT, METRICS_PORT):
            assert not reaches(platform, "other", "foreign", address, port)
        # Pods of one run are not tried among each other: kube-router applies a policy's rules for
        # egress to connections that arrive, too, where both pods are the policy's.
        assert not reaches(platform, TEAM, pod, foreign, PORT), "egress"
        assert reaches(platform, "other", "foreign", s3, S3_PORT)
        assert reaches(platform, TEAM, pod, s3, S3_PORT)
        before = platform.status(name)["progress"]["step"]
        platform.wait_for_step(name, before + 1, committed=False)
    # Only the policies kept the pods apart.
    for port in (RENDEZVOUS_PORT, METRICS_PORT):
        assert reaches(platform, "other", "foreign", address, port)
    assert reaches(platform, "other", "foreign", inside, PORT)
    platform.delete(name)
