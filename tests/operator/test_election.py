"""Leader election: one process leads, the other is on stand-by, and a leader that may have been
replaced does not write."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_process import OperatorProcess
from operator_world import spec

from cluster.api import eventually
from cluster.control_plane import ControlPlane
from finetune_operator.controller import SETTLE_SECONDS

CRD = Path(__file__).parents[2] / "crds" / "finetunejob.crd.yaml"


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as plane:
        plane.kubectl("apply", "--server-side", "-f", CRD)
        yield plane


def holder(plane: ControlPlane) -> str:
    return str(plane.get("lease", "finetune-operator")["spec"]["holderIdentity"])


def make(plane: ControlPlane, name: str) -> None:
    plane.apply(
        {
            "apiVersion": "finetune-operator.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": "default"},
            "spec": spec(),
        }
    )


def phase(plane: ControlPlane, name: str) -> str:
    return str(plane.get("ftj", name).get("status", {}).get("phase", ""))


def resting(plane: ControlPlane, name: str) -> dict[str, Any] | None:
    """The job once its leader has nothing more to write to it; None before."""
    before = plane.get("ftj", name)
    time.sleep(2 * SETTLE_SECONDS)
    return before if plane.get("ftj", name) == before else None


@pytest.mark.slow
def test_hand_over_and_fencing(plane: ControlPlane, tmp_path: Path) -> None:
    with OperatorProcess(plane.kubeconfig, tmp_path / "first") as first:
        one = eventually("the first leads", lambda: holder(plane))
        make(plane, "a")
        eventually("a is worked on", lambda: phase(plane, "a"))
        with OperatorProcess(plane.kubeconfig, tmp_path / "second") as second:
            assert holder(plane) == one
            assert first.stop() == 0
            two = eventually(
                "handed over", lambda: holder(plane) not in ("", one) and holder(plane)
            )
            make(plane, "b")
            eventually("b is worked on", lambda: phase(plane, "b"))
            second.pause()
            first.start()
            eventually("overtaken", lambda: holder(plane) not in ("", two), within=60)
            make(plane, "c")
            eventually("c is worked on", lambda: phase(plane, "c"))
            before = eventually("c rests", lambda: resting(plane, "c"), within=60)
            second.go_on()
            assert second.wait(30) == 1, "a process that lost its Lease exits"
            assert "is lost: writing stops" in second.log()
            assert plane.get("ftj", "c") == before
            second.start()


def with_token(plane: ControlPlane, path: Path) -> Path:
    """A kubeconfig for the service account, with a token as in a pod."""
    token = plane.kubectl("create", "token", "operator", "-n", "team-a").strip()
    shutil.copy(plane.kubeconfig, path)
    edit = ["config", f"--kubeconfig={path}"]
    plane.kubectl(*edit, "set-credentials", "operator", f"--token={token}")
    plane.kubectl(*edit, "set-context", "--current", "--user=operator")
    return path


def test_one_namespace_with_minimal_rbac(plane: ControlPlane, tmp_path: Path) -> None:
    """The operator needs no right outside its namespace, and none to read Secrets, ConfigMaps of
    other namespaces or nodes."""
    plane.kubectl("create", "namespace", "team-a")
    plane.kubectl("create", "namespace", "team-b")
    rules = [
        (["finetune-operator.dev"], ["finetunejobs"], ["list", "watch"]),
        (["finetune-operator.dev"], ["finetunejobs/status"], ["patch"]),
        ([""], ["configmaps"], ["get", "list", "watch", "create", "patch", "delete"]),
        ([""], ["services"], ["get", "list", "watch", "create", "delete"]),
        (["batch"], ["jobs"], ["get", "list", "watch", "create", "patch", "delete"]),
        (
            ["networking.k8s.io"],
            ["networkpolicies"],
            ["get", "list", "watch", "create", "patch", "delete"],
        ),
        ([""], ["pods"], ["list", "watch"]),
        ([""], ["pods/proxy"], ["get"]),
        (["events.k8s.io"], ["events"], ["create"]),
        (["coordination.k8s.io"], ["leases"], ["get", "create", "update"]),
    ]
    plane.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "finetune-operator", "namespace": "team-a"},
            "rules": [{"apiGroups": g, "resources": r, "verbs": v} for g, r, v in rules],
        }
    )
    account = ["--serviceaccount=team-a:operator", "--role=finetune-operator"]
    plane.kubectl("create", "serviceaccount", "operator", "-n", "team-a")
    plane.kubectl("create", "rolebinding", "finetune-operator", "-n", "team-a", *account)
    kubeconfig = with_token(plane, tmp_path / "kubeconfig")
    options = ["--namespaces", "team-a", "--lease-namespace", "team-a"]
    with OperatorProcess(kubeconfig, tmp_path / "log", *options) as process:
        for namespace in ("team-b", "team-a"):
            plane.apply(
                {
                    "apiVersion": "finetune-operator.dev/v1alpha1",
                    "kind": "FineTuneJob",
                    "metadata": {"name": "bot", "namespace": namespace},
                    "spec": spec(),
                }
            )
        eventually("pods are made", lambda: plane.get("pods", "-n", "team-a")["items"])
        status = eventually("status", lambda: plane.get("ftj", "bot", "-n", "team-a")["status"])
        assert status["run"]["number"] == 1
        assert "status" not in plane.get("ftj", "bot", "-n", "team-b")
        assert process.get("healthz") == (200, "ok")
        assert "orbidden" not in process.log()
