"""Kueue's words about a gang in its queue. Kueue itself is not there: its Workloads are written by
hand, on a real API server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from operator_world import UID, World
from test_not_started import store_of

from cluster.api import Api, eventually
from finetune_operator.cluster import ApiError, Cluster, load_credentials
from finetune_operator.warning_reader import WarningReader, late_objects
from finetune_operator.world.workloads import workload_message

LACKS = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu"


def condition(type_: str, status: str, message: str, reason: str = "Pending") -> dict[str, str]:
    return {"type": type_, "status": status, "message": message, "reason": reason}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({}, ""),
        ({"conditions": [condition("QuotaReserved", "False", LACKS)]}, LACKS),
        (
            {
                "conditions": [
                    condition("QuotaReserved", "False", LACKS),
                    condition("Evicted", "True", "by a higher priority", "Preempted"),
                ]
            },
            f"evicted (Preempted): by a higher priority; {LACKS}",
        ),
        (
            {
                "conditions": [condition("QuotaReserved", "True", "Quota reserved")],
                "admissionChecks": [
                    {"name": "capacity", "state": "Pending", "message": "no nodes yet"},
                    {"name": "budget", "state": "Ready", "message": "ok"},
                ],
            },
            "quota is reserved; capacity (Pending): no nodes yet",
        ),
    ],
)
def test_the_words_of_a_workload(status: dict[str, Any], words: str) -> None:
    assert workload_message({"status": status}) == words


class Queues:
    """A cluster with Kueue's words about every Job, or a refusal."""

    def __init__(self, words: str | ApiError) -> None:
        self.words, self.asked = words, 0

    async def queue_message(self, namespace: str, uid: str) -> str | None:
        self.asked += 1
        if isinstance(self.words, ApiError):
            raise self.words
        return self.words


def queued() -> World:
    world = World(scheduling={"queueName": "team-a"})
    world.settle()
    world.finish("prepare")
    world.settle()
    return world


def test_the_words_are_in_the_message() -> None:
    world = queued()
    assert world.message("Running") == "waiting in queue team-a"
    store, cluster = store_of(world), Queues(LACKS)
    (late,) = late_objects(store, world.now)
    assert late.queued
    told: list[str] = []
    reader = WarningReader(store, cluster, lambda uid, seconds: told.append(uid))  # type: ignore[arg-type]
    asyncio.run(reader.look(world.now))
    assert told == [UID] and cluster.asked == 1
    world.warnings = {late.uid: LACKS}
    world.settle()
    assert world.status["phase"] == "Queued"
    assert world.message("Running") == f"waiting in queue team-a: {LACKS}"


@pytest.mark.parametrize("code", [403, 404])
def test_without_kueue_or_the_right_it_is_not_asked_again_soon(code: int) -> None:
    world = queued()
    cluster = Queues(ApiError("GET", "/apis/kueue.x-k8s.io", code, "no"))
    reader = WarningReader(store_of(world), cluster, lambda uid, seconds: None)  # type: ignore[arg-type]
    asyncio.run(reader.look(world.now))
    reader._read_at.clear()
    asyncio.run(reader.look(world.now))
    assert cluster.asked == 1


WORKLOADS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "workloads.kueue.x-k8s.io"},
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"plural": "workloads", "singular": "workload", "kind": "Workload"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


def test_the_workload_of_a_job_is_found_on_an_api_server(control_plane: Api) -> None:
    place = ("-n", "default")
    configuration, _ = load_credentials(str(control_plane.kubeconfig), None)

    async def ask(uid: str) -> str | None:
        async with Cluster(configuration) as cluster:
            return await cluster.queue_message("default", uid)

    with pytest.raises(ApiError, match="404"):
        asyncio.run(ask("job-1"))
    control_plane.apply(WORKLOADS)
    eventually("workloads are served", lambda: control_plane.get("workloads", *place))
    try:
        for number in (1, 2):
            name = f"job-{number}"
            control_plane.apply(
                {
                    "apiVersion": "kueue.x-k8s.io/v1beta1",
                    "kind": "Workload",
                    "metadata": {
                        "name": name,
                        "namespace": "default",
                        "labels": {"kueue.x-k8s.io/job-uid": name},
                    },
                    "status": {
                        "conditions": [condition("QuotaReserved", "False", f"lacks {name}")]
                    },
                }
            )
        assert asyncio.run(ask("job-2")) == "lacks job-2"
        assert asyncio.run(ask("job-3")) is None
    finally:
        control_plane.kubectl("delete", "crd", "workloads.kueue.x-k8s.io")
