"""What is done after failures: rules of ``failurePolicy``, and nodes that a run avoids."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from operator_world import World, at_training, train

from finetune_operator.children.overlay import without_nodes
from finetune_operator.world.objects import format_time, parse_time

FAULT = {"class": "NodeFailure", "reason": "DeviceFault", "message": "ECC", "retryable": True}
DIVERGED = {"class": "Diverged", "reason": "LossNotFinite", "message": "loss is NaN"}
AWAY = {"class": "Storage", "reason": "StorageUnreachable", "message": "no answer"}


def policy(action: str, failure_class: str, reason: str | None = None, **more: Any) -> Any:
    rule = {"class": failure_class, "action": action} | ({"reason": reason} if reason else {})
    return {"failurePolicy": {"rules": [rule], **more}}


def fail_job(world: World, code: int, role: str = "train", index: int = 0, **said: Any) -> None:
    """A pod ends with a final exit code, so its Job has failed."""
    world.wait(30)
    world.fail(role, code, index, **said)
    world.condition(role, "Failed", "PodFailurePolicy")
    world.settle()


def newest_job(world: World) -> Any:
    """The gang's newest Job, once the pods of earlier ones are gone."""
    world.remove_pods()
    world.settle()
    for job in world.of("Job"):
        if job["metadata"]["name"] != f"bot-1-0f9c2-train-{world.run['revision']}":
            world.objects.pop(("Job", job["metadata"]["name"]))
    return world.child("train")


def test_a_rule_continues_a_run_that_would_have_failed_until_the_budget_is_spent() -> None:
    world = at_training(**policy("Gang", "Diverged", maxRestarts=2))
    for number in (1, 2):
        world.report(attempt=number, step=10 * number)
        world.settle()
        fail_job(world, 13, **DIVERGED)
        assert world.run["revision"] == number + 1
        incident = world.status["incidents"][0]
        assert (incident["number"], incident["fault"]) == (number, True)
        assert (incident["action"], incident["step"]) == ("Gang", 10 * number)
        assert incident["failure"]["reason"] == "LossNotFinite"
        newest_job(world)
        world.pods("train", 2, running={})
        world.settle()
        assert world.status["phase"] == "Training"
    fail_job(world, 13, **DIVERGED)
    assert world.status["phase"] == "Failed"
    assert "This was fault 3; failurePolicy.maxRestarts allows 2" in world.message("Failed")


def test_without_a_rule_the_run_ends() -> None:
    world = at_training(**policy("Gang", "Diverged", "LossSpike"))
    fail_job(world, 13, **DIVERGED)
    assert world.status["phase"] == "Failed", "the rule is for another reason"


def test_a_rule_ends_a_run_at_a_failure_that_would_be_retried() -> None:
    world = at_training(**policy("End", "OutOfMemory"))
    pod = world.pod(world.child("train"), 1, terminated={"exitCode": 137, "reason": "OOMKilled"})
    world.settle()
    assert world.status["failure"]["reason"] == "HostOutOfMemory"
    assert world.status["failure"]["pod"] == pod["metadata"]["name"]
    assert world.child("train")["spec"]["activeDeadlineSeconds"] == 0, "its pods are stopped"
    world.settle()
    assert world.status["phase"] == "Failed"


def test_a_rule_applies_to_a_gang_at_work() -> None:
    """The pods of a revision are frozen; what follows a failure is not."""
    world = at_training()
    world.edit(**policy("Gang", "NodeFailure"))
    world.settle()
    assert world.run["revision"] == 1
    world.fail("train", 20, 1, **FAULT)
    world.settle()
    assert world.run["revision"] == 2
    assert newest_job(world)["metadata"]["name"] == "bot-1-0f9c2-train-2"
    assert world.status["incidents"][0]["action"] == "Gang"


@pytest.mark.parametrize("role", ["prepare", "train"])
def test_a_rule_waits_for_storage_and_counts_no_fault(role: str) -> None:
    world = World(**policy("Wait", "Storage", maxRestarts=0))
    world.settle()
    if role == "train":
        train(world)
    code = 12 if role == "prepare" else 21
    world.pods(role, running={})
    world.fail(role, code, **AWAY)
    if role == "prepare":
        world.condition(role, "Failed", "PodFailurePolicy")
    world.settle()
    assert world.status["phase"] == "Queued"
    queue = world.status["queue"]
    assert (queue["reason"], queue["tries"]) == ("StorageUnreachable", 1)
    assert "no answer" in world.message("Ready") and "nodes are given back" in world.message(
        "Ready"
    )
    assert (world.status["restarts"], world.status["faults"]) == (1, 0)
    again = parse_time(queue["nextTryTime"])
    assert again is not None
    pause = again - world.now
    assert timedelta(seconds=30) <= pause <= timedelta(seconds=90)
    assert world.plan().requeue_after == pause
    assert f"bot-1-0f9c2-{role}-2" not in world.names("Job")
    world.now = again
    world.settle()
    assert f"bot-1-0f9c2-{role}-2" in world.names("Job")


def test_a_wait_ends_at_the_start_deadline_unless_a_checkpoint_was_saved() -> None:
    world = at_training(**policy("Wait", "Storage"), scheduling={"startDeadlineSeconds": 900})
    tries = []
    for number in range(1, 12):
        world.report(attempt=number, step=5, latestCheckpoint="s3://b/1")
        world.settle()
        world.wait(60)
        world.fail("train", 21, 1, **AWAY)
        world.settle()
        if world.status["phase"] == "Failed":
            break
        tries.append(world.status["queue"]["tries"])
        again = parse_time(world.status["queue"]["nextTryTime"])
        assert again is not None
        world.now = again
        world.settle()
        newest_job(world)
        world.pods("train", 2, running={})
        world.settle()
        assert "queue" in world.status, "the row of failures goes on until there is a checkpoint"
    assert tries == [1, 2, 3, 4][: len(tries)] and len(tries) >= 3
    assert world.status["failure"]["reason"] == "StorageUnreachable"

    world = at_training(**policy("Wait", "Storage"))
    world.fail("train", 21, 1, **AWAY)
    world.settle()
    world.now = parse_time(world.status["queue"]["nextTryTime"])  # type: ignore[assignment]
    world.settle()
    newest_job(world)
    world.pods("train", 2, running={})
    world.report(attempt=2, step=9, latestCheckpoint="s3://b/2")
    world.settle()
    assert "queue" not in world.status


def test_a_rule_waits_for_an_image() -> None:
    world = World(**policy("Wait", "ImagePull"), scheduling={"startDeadlineSeconds": 3600})
    world.settle()
    world.pods("prepare", waiting={"reason": "ErrImagePull", "message": "manifest not found"})
    world.settle()
    world.wait(3599)
    world.settle()
    assert world.status["phase"] == "Pending"
    world.wait(1)
    world.settle()
    assert world.status["failure"]["class"] == "ImagePull"


def test_a_rule_ends_a_run_without_nodes_at_once() -> None:
    world = World(**policy("End", "Unschedulable"))
    world.settle()
    (pod,) = world.pods("prepare")
    del pod["spec"]["nodeName"]
    scheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
    pod["status"]["conditions"] = [scheduled]
    world.settle()
    assert world.status["failure"]["reason"] == "Unschedulable"


# --- incidents ---------------------------------------------------------------------------------


def test_an_incident_has_the_time_until_the_next_step() -> None:
    world = at_training()
    world.report(attempt=1, step=7)
    world.settle()
    world.wait(10)
    world.fail("train", 20, 1, **FAULT)
    world.settle()
    incident = world.status["incidents"][0]
    assert (incident["action"], incident["step"]) == ("Pod", 7)
    assert "recoverySeconds" not in incident
    world.wait(50)
    world.pod(world.child("train"), 1, "y", running={})
    startup = {"seconds": {"step": 1.0}, "fromStep": 5, "firstStep": world.now.timestamp() - 8}
    world.report(attempt=2, step=6, startup=startup)
    world.settle()
    assert world.status["incidents"][0]["recoverySeconds"] == 42


# --- avoided nodes -----------------------------------------------------------------------------


def fail_twice(world: World) -> None:
    """The pods on node-1 fail twice for a cause that may be the node's."""
    for number in (1, 2):
        world.report(attempt=number, step=number)
        world.settle()
        world.wait(60)
        world.fail("train", 20, 1, f"i{number}", **FAULT)
        world.settle()


def avoided_in(world: World) -> list[Any]:
    """Fields that the newest gang's pods require of nodes."""
    affinity = newest_job(world)["spec"]["template"]["spec"].get("affinity", {})
    required = affinity.get("nodeAffinity", {})
    terms = required.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [term["matchFields"] for term in terms.get("nodeSelectorTerms", [])]


NOT_NODE_1 = [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]


def test_a_node_on_which_the_run_failed_twice_is_avoided() -> None:
    world = at_training()
    fail_twice(world)
    assert world.run["revision"] == 2
    (avoided,) = world.status["avoidedNodes"]
    assert avoided["node"] == "node-1" and "DeviceFault: ECC" in avoided["message"]
    assert avoided["until"] == format_time(world.now + timedelta(hours=4))
    assert [i["action"] for i in world.status["incidents"]] == ["Elsewhere", "Pod"]
    assert avoided_in(world) == [NOT_NODE_1]
    world.wait(4 * 3600)
    world.settle()
    assert "avoidedNodes" not in world.status or world.status["avoidedNodes"] == []


def test_a_node_is_avoided_at_once_by_a_rule() -> None:
    world = at_training(**policy("Elsewhere", "NodeFailure", "DeviceFault"))
    world.fail("train", 20, 1, **FAULT)
    world.settle()
    assert avoided_in(world) == [NOT_NODE_1]


def test_failures_that_are_not_the_nodes_leave_it_in_use() -> None:
    world = at_training()
    for number in (1, 2):
        world.report(attempt=number)
        world.wait(60)
        world.fail("train", 21, 1, f"i{number}", **AWAY)
        world.settle()
    assert world.run["revision"] == 1 and not world.status.get("avoidedNodes")


def test_a_gang_that_finds_no_other_node_uses_it_again() -> None:
    world = at_training()
    fail_twice(world)
    newest_job(world)
    for pod in world.pods("train", 2):
        del pod["spec"]["nodeName"]
        no = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes: affinity"}
        pod["status"]["conditions"] = [no]
    world.settle()
    assert world.plan().requeue_after == timedelta(minutes=2)
    world.wait(120)
    plan = world.pass_()
    assert "node-1, which is used again" in plan.events[-1].message
    world.settle()
    assert world.run["revision"] == 3 and not world.status.get("avoidedNodes")
    assert avoided_in(world) == []


def test_terms_of_the_template_are_kept() -> None:
    gpu = {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200"]}]}
    other = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = {"nodeAffinity": {required: {"nodeSelectorTerms": [gpu, other]}}, "podAffinity": {}}
    laid = without_nodes({"spec": {"affinity": affinity}}, ["node-1"])["spec"]["affinity"]
    assert laid["podAffinity"] == {}
    assert laid["nodeAffinity"][required]["nodeSelectorTerms"] == [
        {**gpu, "matchFields": NOT_NODE_1},
        {"matchFields": [*other["matchFields"], *NOT_NODE_1]},
    ]
