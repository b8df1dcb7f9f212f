"""Gangs that are recreated as the next revision, and failed runs that are retried."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_world import TRAINED, World, at_training

from finetune_api import names
from finetune_operator.world.objects import format_time

LOST = {"class": "NodeFailure", "reason": "ProcessLost", "message": "killed", "retryable": True}


def lose_node(world: World, role: str = "train", index: int = 1) -> dict[str, Any]:
    """The kubelet under a pod dies: 30 s later the pod is to be deleted, and stays Running."""
    name = f"{world.child(role)['metadata']['name']}-{index}-x"
    pod = world.objects["Pod", name]
    world.wait(30)
    time = format_time(world.now)
    pod["metadata"]["deletionTimestamp"] = time
    pod["status"]["conditions"] += [
        {
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "lastTransitionTime": time,
        },
        {"type": "Ready", "status": "False", "lastTransitionTime": time},
    ]  # fmt: skip
    return pod


def test_a_gang_with_a_pod_on_a_lost_node_is_recreated() -> None:
    world = at_training()
    world.report(attempt=1, step=10)
    world.settle()
    world.wait(1)
    lose_node(world)
    world.settle()
    assert world.status["phase"] == "Training" and world.run["revision"] == 1
    assert "node-1 is not reachable" in world.message("Running")
    again = world.plan().requeue_after
    assert again is not None and again.total_seconds() == 45
    world.wait(45)
    plan = world.pass_()
    assert world.run["revision"] == 2
    assert [e.reason for e in plan.events] == ["Restarted", "PodsRecreated"]
    assert "node-1 is not reachable" in plan.events[1].message
    world.settle()
    assert "bot-1-0f9c2-train-2" in world.names("Job"), "the lost gang is not waited for"
    assert "bot-1-0f9c2-train-1" not in world.names("Job")
    assert world.names("Service") == ["bot-1-0f9c2-train-2"]
    (incident,) = world.status["incidents"]
    assert incident["failure"]["class"] == "NodeFailure" and incident["failure"]["node"] == "node-1"
    assert (world.status["restarts"], world.status["faults"]) == (1, 0)
    world.wait(5)
    world.pods("train", 2, running={})
    world.settle()
    assert world.status["phase"] == "Training" and world.run["revision"] == 2


def test_a_gang_that_makes_progress_is_left_alone() -> None:
    world = at_training()
    lose_node(world)
    for step in range(20):
        world.report(attempt=1, step=step)
        world.settle()
        assert world.run["revision"] == 1
        world.wait(30)
    assert "node-1 is not reachable" in world.message("Running")


@pytest.mark.parametrize("role", ["prepare", "publish"])
def test_a_cpu_stage_on_a_lost_node_is_recreated(role: str) -> None:
    world = World() if role == "prepare" else at_training()
    if role == "publish":
        world.finish("train", trained=TRAINED)
    world.settle()
    world.pods(role, running={})
    world.settle()
    lose_node(world, role, 0)
    world.settle()
    world.wait(45)
    world.settle()
    assert f"bot-1-0f9c2-{role}-2" in world.names("Job")
    assert f"bot-1-0f9c2-{role}-1" not in world.names("Job")


def test_a_pod_that_is_drained_from_a_living_node_is_waited_for() -> None:
    world = at_training()
    pod = lose_node(world)
    pod["status"]["conditions"][-1]["status"] = "True"
    world.wait(100)
    world.settle()
    assert world.run["revision"] == 1


def test_pods_that_the_job_would_replace_late_are_recreated() -> None:
    """The Job controller waits 10 s after the first failed pod, and twice as long after each
    more."""
    world = at_training(failurePolicy={"maxRestarts": 20})
    for number in range(3):
        world.report(attempt=number + 1, restarts=number)
        world.wait(60)
        world.fail("train", 20, 1, f"i{number}", **LOST)
        world.objects.pop(("Pod", world.child("train")["metadata"]["name"] + "-1-x"), None)
        world.settle()
        assert world.run["revision"] == 1, number
    world.wait(60)
    world.report(attempt=4, restarts=3)
    world.fail("train", 20, 1, "i3", **LOST)
    plan = world.pass_()
    assert world.run["revision"] == 2
    assert "only after 80 s, as 4 pods have failed" in plan.events[-1].message
    assert world.status["faults"] == 4


def test_a_storage_outage_of_a_large_gang_recreates_it() -> None:
    world = at_training(compute={"nodes": 64})
    world.wait(60)
    away = {"class": "Storage", "reason": "StorageUnreachable", "message": "m", "retryable": True}
    for index in range(64):
        world.fail("train", 21, index, **away)
    plan = world.pass_()
    assert world.run["revision"] == 2 and world.status["faults"] == 1
    assert "only after 600 s, as 64 pods have failed" in plan.events[-1].message


def test_a_retry_keeps_its_fresh_budget_if_status_was_not_written() -> None:
    world = at_training(failurePolicy={"maxRestarts": 0})
    world.wait(20)
    world.fail("train", 20, 1, "y", **LOST)
    world.settle()
    world.condition("train", "Failed", "DeadlineExceeded")
    world.remove_pods()
    world.edit(retryToken="1")
    before = world.job["status"]
    world.pass_()
    assert "bot-1-0f9c2-run-spec-2" in world.names("ConfigMap")
    world.job["status"] = before  # the operator died before it wrote the status
    world.settle()
    assert (world.run["revision"], world.status["faults"]) == (2, 0)


def test_a_sidecar_keeps_no_gang_from_being_restarted() -> None:
    world = at_training()
    world.wait(20)
    pod = world.fail("train", 20, 1, **LOST)
    pod["status"]["phase"] = "Running"
    world.settle()
    assert world.run["revision"] == 1 and world.status["faults"] == 1
    again = world.plan().requeue_after
    assert again is not None and again.total_seconds() == 30
    world.wait(30)
    world.settle()
    assert world.run["revision"] == 2 and world.status["faults"] == 1


def test_a_failed_run_continues_with_another_retry_token() -> None:
    world = at_training(failurePolicy={"maxRestarts": 0})
    world.wait(20)
    world.fail("train", 20, 1, "y", **LOST)
    world.settle()
    assert world.status["phase"] == "Failed"
    world.condition("train", "Failed", "DeadlineExceeded")
    world.remove_pods()
    world.edit(retryToken="node-1 was replaced")
    world.settle()
    assert (world.run["number"], world.run["revision"]) == (1, 2)
    assert "bot-1-0f9c2-train-2" in world.names("Job")
    assert world.condition_of("Prepared") == "True/DataReady", "not prepared again"
    assert world.condition_of("Failed") == "False/Resumed"
    assert (world.status["restarts"], world.status["faults"]) == (1, 0)
    assert world.run["retryToken"] == "node-1 was replaced"
    world.objects.pop(("Job", "bot-1-0f9c2-train-1"), None)
    world.wait(5)
    world.pods("train", 2, running={})
    world.settle()
    world.wait(20)
    world.fail("train", 20, 0, "z", **LOST)
    world.settle()
    assert world.status["phase"] == "Failed" and world.status["faults"] == 1
    world.settle()
    assert world.run["revision"] == 2, "the same token retries once"


def test_a_retry_after_a_failed_publish_publishes_alone() -> None:
    world = at_training()
    world.finish("train", trained=TRAINED)
    world.settle()
    denied = {"class": "Storage", "reason": "AccessDenied", "message": "may not write"}
    world.fail("publish", 12, **denied)
    world.condition("publish", "Failed", "PodFailurePolicy")
    world.settle()
    assert world.status["phase"] == "Failed"
    world.remove_pods()
    world.edit(retryToken="1")
    world.settle()
    jobs = world.names("Job")
    assert "bot-1-0f9c2-publish-2" in jobs and "bot-1-0f9c2-train-2" not in jobs
    assert world.status["phase"] == "Publishing"


def test_a_retry_token_has_no_effect_on_a_run_at_work_or_a_published_one() -> None:
    world = at_training()
    world.edit(retryToken="1")
    world.settle()
    assert world.run["revision"] == 1 and world.run["retryToken"] == "1"
    world.condition("train", "Failed", "PodFailurePolicy")
    world.fail("train", 13, **{"class": "Diverged", "reason": "LossNotFinite", "message": "m"})
    world.settle()
    assert world.status["phase"] == "Failed"
    world.edit(failurePolicy={"maxRestarts": 9})
    world.settle()
    assert world.status["phase"] == "Failed", "the token was seen before the failure"


def test_the_run_spec_of_a_recreated_gang_differs_in_revision_and_restarts_alone() -> None:
    world = at_training()
    world.report(attempt=3, restarts=2)
    lose_node(world)
    world.settle()
    world.wait(50)
    world.settle()
    old, new = (
        json.loads(
            world.objects["ConfigMap", f"bot-1-0f9c2-run-spec-{n}"]["data"][names.RUN_SPEC_KEY]
        )
        for n in (1, 2)
    )
    assert (new.pop("revision"), new.pop("restarts")) == (2, 2)
    assert (old.pop("revision"), old.pop("restarts")) == (1, 0)
    assert old == new
