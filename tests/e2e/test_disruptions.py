"""Disruptions by the cluster: a node that dies, and pods that are evicted one after the other. The
run goes on elsewhere, and none of it counts as a fault."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from cluster.api import eventually
from cluster.real import RealCluster

pytestmark = pytest.mark.e2e

SHORT: dict[str, Any] = {
    "training": {"epochs": None, "maxSteps": 60},
    "evaluation": {"maxSamples": 20},
    "checkpoint": {"everySteps": 5},
    "failurePolicy": {"maxRestarts": 0},
}


def nodes_of(platform, namespace: str, *selector: str) -> set[str]:
    pods = platform.cluster.get("pods", "-n", namespace, *selector)["items"]
    return {pod["spec"]["nodeName"] for pod in pods}


def test_a_gang_on_a_node_that_is_powered_off_continues_elsewhere(platform, manifest_of) -> None:
    cluster = platform.cluster
    if not isinstance(cluster, RealCluster):
        pytest.skip("powers a node off")
    storage = nodes_of(platform, "storage", "-l", "app=s3")
    leading = nodes_of(platform, "finetune-system")
    # With an operator on the node that dies, the other one takes over.
    dying = sorted(
        (node for node in cluster.nodes if node not in storage), key=leading.__contains__
    )[-1]
    # One pod on the node that dies, and one beside the storage.
    required = {
        "nodeSelectorTerms": [
            {
                "matchExpressions": [
                    {
                        "key": "kubernetes.io/hostname", "operator": "In",
                        "values": sorted({dying} | storage),
                    }
                ]
            }
        ]
    }  # fmt: skip
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    template = {"spec": {"affinity": affinity}}
    resource = platform.advertise_gpus()
    gpus = {"gpusPerNode": 1, "gpuResourceName": resource}
    compute = {"podTemplate": template, **gpus}
    name = platform.apply(manifest_of("node-off", compute=compute, **SHORT))
    with platform.held_gpu_seconds(name, resource) as held_seconds:
        platform.wait_for_step(name, 10)
        gang = nodes_of(platform, "team-a", "-l", f"finetune-operator.dev/job-name={name}")
        assert gang > {dying}
        began = time.monotonic()
        cluster.nodes[dying].power_off()
        try:
            eventually(
                "the gang is recreated",
                lambda: platform.status(name)["run"]["revision"] == 2,
                within=180,
            )
            made = time.monotonic() - began
            status = platform.wait(name, "Complete")
            # Now: the lost pod holds its GPU until its node returns, the account ends with the run.
            held = held_seconds()
        finally:
            cluster.nodes[dying].start()
            cluster.wait_for_nodes(dying)
    print(f"recreated {made:.0f} s after the power was off, complete after"
          f" {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    assert (status["restarts"], status["faults"]) == (1, 0)
    (incident,) = status["incidents"]
    assert incident["failure"]["reason"] == "DeletionByTaintManager"
    assert incident["failure"]["node"] == dying
    assert status["run"]["attempt"] == 2
    usage = status["usage"]
    print(f"held by the pods' times: {held:.0f} GPU-seconds; {usage}", flush=True)
    spent = usage["gpuSecondsByClass"]
    assert sum(spent.values()) == usage["gpuSeconds"]
    assert min(spent["productive"], spent["recomputed"], spent["idle"]) > 0
    head = json.loads(platform.store.get(f"{run_uri(status, name)}/HEAD.json"))
    assert head["restarts"] == 1 and head["checkpoints"]
    events = platform.kubectl("get", "events", "-o", "json")
    told = [e for e in json.loads(events)["items"] if e["reason"] == "PodsRecreated"]
    assert told and dying in told[0]["message"]


def test_evictions_of_all_pods_in_turn_count_no_fault(platform, manifest_of) -> None:
    resource = platform.advertise_gpus()
    gpus = {"gpusPerNode": 1, "gpuResourceName": resource}
    with platform.held_gpu_seconds("rolling", resource) as held_seconds:
        name = platform.apply(manifest_of("rolling", compute=gpus, **SHORT))
        evict_in_turn(platform, name)
        status = platform.wait(name, "Complete")
        held = held_seconds()
    assert (status["restarts"], status["faults"]) == (2, 0)
    assert [i["fault"] for i in status["incidents"]] == [False, False]
    assert status["run"]["revision"] == 1, "the Job replaced the pods"
    usage = status["usage"]
    print(f"held by the pods' times: {held:.0f} GPU-seconds; {usage}", flush=True)
    pods = 4  # each with times of whole seconds
    assert usage["gpuSeconds"] == pytest.approx(held, rel=0.01, abs=pods)
    assert sum(usage["gpuSecondsByClass"].values()) == usage["gpuSeconds"]


def evict_in_turn(platform, name: str) -> None:
    """Evict rank 0, then rank 1, each while the gang trains."""
    for turn in range(2):
        before = platform.wait_for_step(name, 5)
        (pod,) = (
            p["metadata"]["name"]
            for p in platform.pods(name, "train")
            if p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == str(turn)
            and p["status"]["phase"] == "Running"
        )
        eviction = {
            "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": {"name": pod, "namespace": "team-a"},
        }  # fmt: skip
        platform.kubectl(
            "create", "--raw", f"/api/v1/namespaces/team-a/pods/{pod}/eviction", "-f", "-",
            stdin=json.dumps(eviction),
        )  # fmt: skip
        attempt = before["run"]["attempt"]
        eventually(
            "the next attempt trains",
            lambda attempt=attempt: platform.status(name)["run"]["attempt"] > attempt,
            within=180,
        )


def run_uri(status: dict[str, Any], name: str) -> str:
    return f"s3://output/{name}/.workspace/runs/{name}/{status['run']['id']}"
