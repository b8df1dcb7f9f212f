"""Gang scheduling by Kubernetes: the Job controller makes a PodGroup for each gang, and the real
scheduler places all of its pods at once, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_job import Job
from operator_process import OperatorProcess
from operator_world import PREPARED

from cluster.api import eventually
from cluster.control_plane import ControlPlane

CRD = Path(__file__).parents[2] / "crds" / "finetunejob.crd.yaml"
GATES = "--feature-gates=GenericWorkload=true,GangScheduling=true,WorkloadWithJob=true"
GPU = "example.com/gpu"


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    flags = {
        "kube-apiserver": [GATES, "--runtime-config=scheduling.k8s.io/v1alpha2=true"],
        "kube-controller-manager": [GATES],
        "kube-scheduler": [GATES],
    }
    with ControlPlane(kwok_nodes=3, flags=flags) as plane:
        plane.kubectl("apply", "--server-side", "-f", CRD)
        yield plane


@pytest.fixture
def operator(plane: ControlPlane, tmp_path: Path) -> Iterator[OperatorProcess]:
    arguments = ("--leader-election", "false")
    with OperatorProcess(plane.kubeconfig, tmp_path / "log", *arguments) as process:
        yield process


def give_gpus(plane: ControlPlane, node: int, count: int) -> None:
    patch = json.dumps(
        {"status": {"capacity": {GPU: str(count)}, "allocatable": {GPU: str(count)}}}
    )
    plane.kubectl(
        "patch", "node", f"kwok-{node}", "--subresource=status", "--type=merge", "-p", patch
    )


def test_a_gang_gets_all_its_nodes_or_none(plane: ControlPlane, operator: OperatorProcess) -> None:
    for node in range(3):
        give_gpus(plane, node, 1)
    job = Job(plane, "whole", within=90)
    job.apply(compute={"nodes": 4, "gpusPerNode": 1, "gpuResourceName": GPU})
    job.end("prepare", prepared=PREPARED)

    def explained() -> str:
        (running,) = (c for c in job.status["conditions"] if c["type"] == "Running")
        return str(running["message"]) if "PodGroup" in running["message"] else ""

    message = eventually("the wait is explained", explained, within=90)
    print(message)
    gang = train_pods(job)
    assert len(gang) == 4
    assert not any("nodeName" in pod["spec"] for pod in gang), "3 of 4 would fit"
    (group,) = plane.get("podgroups.scheduling.k8s.io", "-n", job.namespace)["items"]
    assert group["metadata"]["name"] in message
    assert group["spec"]["schedulingPolicy"]["gang"]["minCount"] == 4
    give_gpus(plane, 0, 2)
    job.running("train", 4)
    job.reach("Training")
    plane.kubectl("delete", "ftj", "bot", "-n", job.namespace)

    def left() -> list[Any]:
        found: list[Any] = plane.get("podgroups.scheduling.k8s.io", "-n", job.namespace)["items"]
        return found

    eventually("the PodGroup is deleted with its Job", lambda: not left(), within=60)


def train_pods(job: Job) -> list[Any]:
    return [p for p in job.all("pods") if "train" in p["metadata"]["name"]]
