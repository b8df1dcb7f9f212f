"""The chart on a real API server: helm installs it, and its RBAC permissions are minimal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chart.conftest import CHART, helm, one, render
from cluster.api import Api, eventually
from cluster.control_plane import ControlPlane
from finetune_api.names import API_VERSION, KIND
from ports import free_port

NAMESPACE = "finetune-system"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:rel-finetune-operator"
NAMESPACED = ("replicas=2", "watchNamespaces={team-a,team-b}")
RERUN = json.dumps({"spec": {"rerunToken": "again"}})
SUSPEND = json.dumps({"spec": {"suspend": True}})
SPEC = {
    "model": {"source": "s3://models/base"},
    "data": {"train": [{"source": "s3://data/train.jsonl"}]},
    "output": {"destination": "s3://models/tuned"},
}


@pytest.fixture(scope="module")
def namespaces(plane: ControlPlane) -> ControlPlane:
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name, labels in ((NAMESPACE, restricted), ("team-a", {}), ("team-b", {}), ("other", {})):
        metadata = {"name": name, "labels": labels}
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    return plane


@pytest.fixture(scope="module", params=[(), NAMESPACED], ids=["cluster-wide", "namespaced"])
def release(
    request: pytest.FixtureRequest, namespaces: ControlPlane
) -> Iterator[tuple[ControlPlane, bool]]:
    """The control plane with the installed chart, and whether the operator is cluster-wide."""
    place = ["--kubeconfig", str(namespaces.kubeconfig), "--namespace", NAMESPACE]
    values = [part for value in request.param for part in ("--set", value)]
    told = helm("install", "rel", CHART, *place, *values)
    assert "kubectl get finetunejobs --watch" in told
    helm("upgrade", "rel", CHART, *place, *values)
    yield namespaces, not request.param
    helm("uninstall", "rel", *place)
    assert namespaces.get("crd", "finetunejobs.finetune-operator.dev"), "crds.keep is the default"


def may(plane: Api, verb: str, resource: str, namespace: str) -> bool:
    try:
        answer = plane.kubectl("auth", "can-i", verb, resource, "-n", namespace, "--as", ACCOUNT)
    except RuntimeError:  # kubectl exits with 1 for "no"
        return False
    return answer.strip() == "yes"


def test_permissions(release: tuple[ControlPlane, bool]) -> None:
    plane, clusterwide = release
    for verb, resource in (
        ("watch", "finetunejobs.finetune-operator.dev"),
        ("create", "jobs.batch"),
        ("delete", "configmaps"),
        ("create", "events.events.k8s.io"),
        ("list", "events"),
    ):
        assert may(plane, verb, resource, "team-a")
        assert may(plane, verb, resource, "other") == clusterwide
    assert may(plane, "update", "leases.coordination.k8s.io/rel-finetune-operator", NAMESPACE)
    for verb, resource, namespace in (
        ("get", "secrets", "team-a"),
        ("list", "secrets", NAMESPACE),
        ("create", "pods", "team-a"),
        ("get", "pods/proxy", "team-a"),
        ("create", "pods/exec", "team-a"),
        ("update", "finetunejobs.finetune-operator.dev", "team-a"),
        ("update", "leases.coordination.k8s.io/another", NAMESPACE),
        ("get", "nodes", "team-a"),
    ):
        assert not may(plane, verb, resource, namespace), f"{verb} {resource}"


def test_permissions_suffice_for_server_side_apply(release: tuple[ControlPlane, bool]) -> None:
    """Server-side apply of a new object needs the verbs create and patch."""
    plane, _ = release
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "run-spec", "namespace": "team-a"},
        "data": {"run-spec.json": "{}"},
    }
    arguments = ("apply", "--server-side", "--dry-run=server", "--as", ACCOUNT, "-f", "-")
    plane.kubectl(*arguments, stdin=json.dumps(config))


def test_the_operator_works_with_the_charts_permissions(
    release: tuple[ControlPlane, bool], tmp_path: Path
) -> None:
    """The real operator, with the chart's service account and arguments, advances a job as far as
    possible without nodes."""
    plane, clusterwide = release
    sets = () if clusterwide else NAMESPACED
    (container,) = one(render(*sets), "Deployment")["spec"]["template"]["spec"]["containers"]
    arguments = [a for a in container["args"] if not a.startswith("--port")]
    as_account = plane.kubeconfig_of("operator", ACCOUNT)
    command = [sys.executable, "-m", "finetune_operator", *arguments, "--host=127.0.0.1"]
    command += [f"--port={free_port()}", f"--kubeconfig={as_account}", "--progress=direct"]
    job = {"apiVersion": API_VERSION, "kind": KIND, "spec": SPEC}
    job["metadata"] = {"name": "bot", "namespace": "team-a"}
    log = tmp_path / "log"
    with log.open("w") as output:
        operator = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        plane.apply(job)
        eventually("prepare's pod", lambda: plane.get("pods", "-n", "team-a")["items"])
        found = eventually("a status", lambda: plane.get("ftj", "bot", "-n", "team-a")["status"])
        assert found["phase"] in ("Pending", "Preparing")
        plane.kubectl("patch", "ftj", "bot", "-n", "team-a", "--type=merge", "-p", RERUN)
        events = ("get", "events", "-n", "team-a", "-o", "name")
        eventually("an event", lambda: "bot." in plane.kubectl(*events))
        plane.kubectl("patch", "ftj", "bot", "-n", "team-a", "--type=merge", "-p", SUSPEND)
        eventually("the Job is deleted", lambda: not plane.get("jobs", "-n", "team-a")["items"])
    finally:
        operator.terminate()
        assert operator.wait(timeout=30) == 0, log.read_text()
        plane.kubectl("delete", "ftj", "bot", "-n", "team-a", "--cascade=foreground")
    assert "forbidden" not in log.read_text().lower(), log.read_text()


def test_the_pod_meets_the_restricted_pod_security_standard(
    release: tuple[ControlPlane, bool],
) -> None:
    plane, _ = release
    template = one(render(namespace=NAMESPACE), "Deployment")["spec"]["template"]
    metadata = {**template["metadata"], "name": "probe", "namespace": NAMESPACE}
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    plane.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))
    made["spec"] = {**made["spec"], "hostNetwork": True}
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        plane.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))


@pytest.mark.parametrize("sets", [(), NAMESPACED], ids=["cluster-wide", "namespaced"])
def test_every_object_is_valid(namespaces: Api, sets: tuple[str, ...]) -> None:
    """The API server validates strictly: no object has an unknown field."""
    manifest = {"apiVersion": "v1", "kind": "List", "items": render(*sets)}
    namespaces.kubectl(
        *("apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts"),
        *("--field-manager", "test", "-f", "-"),
        stdin=json.dumps(manifest),
    )
