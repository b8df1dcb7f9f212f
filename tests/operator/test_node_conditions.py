"""A gang avoids a node on which it failed and whose conditions tell of a problem."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from operator_world import UID, World, at_training
from test_not_started import store_of

from finetune_operator.cluster import ApiError
from finetune_operator.warning_reader import SUSPECTED, WarningReader, failed_pods
from finetune_operator.world.nodes import node_problems

TYPES = ("Gpu*", "KernelDeadlock")
XID = "GpuXid (79): GPU has fallen off the bus"
FAILURE = {
    "class": "NodeFailure",
    "reason": "ProcessKilled",
    "message": "killed",
    "retryable": True,
}


def condition(type_: str, status: str, reason: str = "", message: str = "") -> dict[str, str]:
    return {"type": type_, "status": status, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([], ""),
        ([condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")], ""),
        ([condition("GpuXid", "False"), condition("KernelDeadlock", "False")], ""),
        ([condition("GpuXid", "True", "79", "GPU has fallen off the bus")], XID),
        (
            [condition("GpuXid", "True", "79", "GPU has fallen off the bus"),
             condition("KernelDeadlock", "True", "DockerHung")],
            f"{XID}; KernelDeadlock (DockerHung): no message",
        ),
    ],
)  # fmt: skip
def test_problems_of_a_node(conditions: list[dict[str, str]], words: str) -> None:
    assert node_problems({"status": {"conditions": conditions}}, TYPES) == words
    assert node_problems({}, TYPES) == ""


class Nodes:
    """A cluster with one answer about every node."""

    def __init__(self, words: str | ApiError | None) -> None:
        self.words, self.asked = words, list[str]()

    async def node_problems(self, node: str, types: Any) -> str | None:
        self.asked.append(node)
        if isinstance(self.words, ApiError):
            raise self.words
        return self.words


def failed() -> World:
    world = at_training()
    world.fail("train", 20, index=1, **FAILURE)
    world.settle()
    assert world.status["incidents"][0]["action"] == "Pod"
    return world


def read(world: World, cluster: Nodes) -> list[str]:
    """Let a reader look once; what it read reaches the world. Returns the jobs that it told."""
    told: list[str] = []
    store = store_of(world)
    reader = WarningReader(store, cluster, lambda uid, seconds: told.append(uid), TYPES)  # type: ignore[arg-type]
    asyncio.run(reader.look(world.now))
    world.node_problems = dict(store._node_problems)
    return told


def test_the_gang_is_recreated_elsewhere() -> None:
    world = failed()
    cluster = Nodes(XID)
    assert read(world, cluster) == [UID]
    assert cluster.asked == ["node-1"]
    world.settle()
    (incident,) = world.status["incidents"]
    assert incident["action"] == "Elsewhere"
    assert incident["failure"]["message"] == f"killed. Its node node-1 has a problem: {XID}"
    (avoided,) = world.status["avoidedNodes"]
    assert avoided["node"] == "node-1" and XID in avoided["message"]
    assert (world.status["faults"], world.run["revision"]) == (1, 2)
    world.remove_pods()
    world.settle()
    affinity = world.child("train")["spec"]["template"]["spec"]["affinity"]
    assert "node-1" in str(affinity)


def test_a_healthy_node_is_kept() -> None:
    world = failed()
    assert read(world, Nodes(None)) == []
    world.settle()
    assert world.run["revision"] == 1 and not world.status.get("avoidedNodes")


def test_a_missing_right_is_not_asked_for_again_and_again() -> None:
    world, cluster = failed(), Nodes(ApiError("GET", "/api/v1/nodes/node-1", 403, "no"))
    store = store_of(world)
    reader = WarningReader(store, cluster, lambda uid, seconds: None, TYPES)  # type: ignore[arg-type]
    for _ in range(3):
        reader._read_at.clear()
        asyncio.run(reader.look(world.now))
    assert cluster.asked == ["node-1"]


def test_a_node_is_looked_at_for_a_while() -> None:
    world = failed()
    store = store_of(world)
    assert len(list(failed_pods(store, world.now))) == 1
    later = world.now + SUSPECTED + timedelta(seconds=1)
    assert list(failed_pods(store, later)) == []


def test_a_warning_from_before_its_start_is_no_problem_of_the_node() -> None:
    world = failed()
    world.warnings = {p["metadata"]["name"]: "volume not mounted" for p in world.of("Pod")}
    world.settle()
    assert world.run["revision"] == 1
