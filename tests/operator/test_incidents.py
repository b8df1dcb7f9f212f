"""Incidents of a gang: what is one, what counts against the budget of restarts, and what restores
the budget."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import World, at_training

from finetune_operator.world.objects import format_time

LOST = {"class": "NodeFailure", "reason": "ProcessLost", "message": "killed", "retryable": True}
SAVED = {"class": "Preempted", "reason": "Interrupted", "message": "saved", "retryable": True}
CHECKPOINT = "s3://models/out/run/checkpoints/{}"


def fail(world: World, index: int = 0, suffix: str = "x", code: int = 20, **failure: Any) -> Any:
    """A pod of the gang fails; the time moves on, as it does until a replacement runs."""
    world.wait(20)
    pod = world.fail("train", code, index, suffix, **(failure or LOST))
    world.pass_()
    return pod


def disrupt(pod: dict[str, Any], reason: str) -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
    pod["status"]["conditions"] = [condition]


def incidents(world: World) -> list[tuple[int, bool, str]]:
    return [
        (i["number"], i["fault"], i["failure"]["reason"]) for i in world.status.get("incidents", [])
    ]


def test_an_incident_is_one_however_many_pods_it_ends() -> None:
    world = at_training(compute={"nodes": 8})
    world.report(attempt=1)
    for index in range(8):
        world.wait(1)
        world.fail("train", 20, index, **LOST)
        if index in (0, 2):
            world.settle()  # some fail between two passes
    world.settle()
    assert incidents(world) == [(1, True, "ProcessLost")]
    assert (world.status["restarts"], world.status["faults"]) == (1, 1)
    assert world.status["incidents"][0]["indexes"] == list(range(8))
    assert world.run["revision"] == 2, "the Job would replace the pods after ten minutes only"
    world.remove_pods()
    world.settle()
    world.wait(5)
    world.pods("train", 8, running={})
    world.report(attempt=2, restarts=1)
    fail(world, 5, "y")
    assert [i["number"] for i in world.status["incidents"]] == [2, 1]
    assert [i["indexes"] for i in world.status["incidents"]] == [[5], []]
    assert (world.status["restarts"], world.status["faults"]) == (2, 2)


def test_a_pod_that_fails_again_before_an_attempt_begins_is_a_new_incident() -> None:
    world = at_training(failurePolicy={"maxRestarts": 2})
    for number in range(1, 3):
        fail(world, 0, f"i{number}")
        assert world.status["faults"] == number and world.status["phase"] != "Failed"
    fail(world, 0, "i3")
    assert world.status["phase"] == "Failed"
    assert world.status["failure"]["reason"] == "ProcessLost"
    assert (
        "This was fault 3; failurePolicy.maxRestarts allows 2" in world.status["failure"]["message"]
    )
    assert "spec.retryToken" in world.status["failure"]["message"]
    assert world.child("train")["spec"]["activeDeadlineSeconds"] == 0, "stopped, with its logs"


@pytest.mark.parametrize(
    "reason",
    ["EvictionByEvictionAPI", "PreemptionByScheduler", "DeletionByTaintManager", "DeletionByPodGC"],
)
@pytest.mark.parametrize(("code", "said"), [(23, SAVED), (137, {})])
def test_a_rolling_upgrade_of_all_nodes_costs_no_fault(
    reason: str, code: int, said: dict[str, Any]
) -> None:
    world = at_training(compute={"nodes": 4}, failurePolicy={"maxRestarts": 0})
    for turn in range(12):
        world.wait(40)
        world.report(attempt=turn + 1, restarts=turn)
        pod = world.fail("train", code, turn % 4, f"u{turn}", **said)
        disrupt(pod, reason)
        pod["spec"]["nodeName"] = f"node-{turn}"
        world.pass_()
        assert world.status["phase"] != "Failed"
    assert (world.status["restarts"], world.status["faults"]) == (12, 0)
    assert len(world.status["incidents"]) == 10
    assert not any(incident["fault"] for incident in world.status["incidents"])


def test_an_eviction_for_what_the_pod_itself_uses_is_a_fault() -> None:
    world = at_training()
    pod = fail(world, 1, code=137, **{"class": "Internal", "reason": "r", "message": "m"})
    world.job["status"] |= {"incidents": [], "faults": 0, "restarts": 0}
    pod["status"] |= {"reason": "Evicted", "message": "The node was low on resource: ephemeral"}
    disrupt(pod, "TerminationByKubelet")
    world.pass_()
    assert world.status["faults"] == 1


def test_pods_that_were_stopped_fenced_or_deleted_are_no_faults() -> None:
    world = at_training(failurePolicy={"maxRestarts": 0})
    fail(world, 0, "a", 23, **SAVED)
    fail(world, 0, "b", 16, **{"class": "Internal", "reason": "Fenced", "message": "m"})
    world.wait(20)
    deleted = world.fail("train", 137, 0, "c")
    deleted["metadata"]["deletionTimestamp"] = format_time(world.now)
    world.pass_()
    assert [i["fault"] for i in world.status["incidents"]] == [False, False]
    assert world.status["faults"] == 0 and world.status["phase"] != "Failed"


def test_a_gang_that_never_forms_uses_its_budget_up() -> None:
    world = at_training(failurePolicy={"maxRestarts": 2})
    for number in range(3):
        assert world.status["phase"] != "Failed"
        fail(world, 1, f"n{number}", 20, **{**LOST, "reason": "GangNotFormed"})
    assert world.status["failure"]["reason"] == "GangNotFormed"


def test_the_cause_of_an_incident_is_the_pod_with_the_best_evidence() -> None:
    world = at_training(compute={"nodes": 3})
    disrupted = {"class": "Preempted", "reason": "InterruptedUnsaved", "message": "m"}
    fail(world, 0, code=23, **disrupted)
    fail(world, 1, code=21, **{"class": "Storage", "reason": "Unreachable", "message": "s3"})
    fail(world, 2, code=20, **{**LOST, "reason": "PeerLost"})
    assert incidents(world) == [(1, True, "Unreachable")]
    assert world.status["incidents"][0]["failure"]["node"] == "node-1"


def test_a_pod_that_vanished_is_an_incident() -> None:
    world = at_training()
    world.wait(60)
    name = world.child("train")["metadata"]["name"] + "-1-x"
    gone = world.objects.pop(("Pod", name))
    running = gone["status"]["containerStatuses"][0]["state"]["running"]
    ended = {**running, "finishedAt": "2026-01-01T12:01:00Z", "exitCode": 137}
    gone["status"]["containerStatuses"][0]["state"] = {"terminated": ended}
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T12:01:00Z"
    world.gone = [gone]
    world.settle()
    assert incidents(world) == [(1, False, "PodDeleted")]
    assert world.status["restarts"] == 1


def test_pods_of_a_job_that_was_deleted_by_suspend_are_no_incident() -> None:
    """All within one second, as on a fast cluster."""
    world = at_training()
    old = world.of("Pod")
    world.edit(suspend=True)
    world.settle()
    world.remove_pods()
    for pod in old:
        pod["status"]["containerStatuses"][0]["state"] = {
            "terminated": {"exitCode": 137, "finishedAt": format_time(world.now)}
        }
    world.gone = old
    world.edit(suspend=False)
    world.settle()
    world.pods("train", 2, running={})
    world.settle()
    assert world.status["phase"] == "Training"
    assert (world.status["restarts"], world.status["incidents"]) == (0, [])


def test_half_an_hour_of_training_with_a_new_checkpoint_restores_the_budget() -> None:
    world = at_training(failurePolicy={"maxRestarts": 1})
    world.report(attempt=1, latestCheckpoint=CHECKPOINT.format(10))
    fail(world, 0, "a")
    world.report(attempt=2, restarts=1, latestCheckpoint=CHECKPOINT.format(10))
    world.wait(3600)
    world.settle()
    assert world.status["faults"] == 1, "no checkpoint since: it may fail at the same step again"
    world.report(attempt=2, restarts=1, latestCheckpoint=CHECKPOINT.format(20))
    world.settle()
    assert world.status["faults"] == 0
    fail(world, 0, "b")
    world.report(attempt=3, restarts=2, latestCheckpoint=CHECKPOINT.format(30))
    world.wait(1700)
    world.settle()
    assert world.status["faults"] == 1, "half an hour has not passed"
    assert world.status["restarts"] == 2, "restarts stay"


def test_a_lower_limit_does_not_end_a_run_at_work() -> None:
    world = at_training(failurePolicy={"maxRestarts": 5})
    for number in range(3):
        world.report(attempt=number + 1, restarts=number)
        fail(world, 0, f"i{number}")
    world.pods("train", 2, running={})
    world.edit(failurePolicy={"maxRestarts": 1})
    world.settle()
    assert world.status["phase"] == "Training" and world.status["faults"] == 3
    world.report(attempt=4, restarts=3)
    fail(world, 1, "next")
    assert world.status["phase"] == "Failed", "the next fault counts"


def test_restarts_recorded_in_storage_are_counted_but_are_no_faults() -> None:
    """The operator was away: whatever ended the pods left no evidence."""
    world = at_training(failurePolicy={"maxRestarts": 0})
    world.report(attempt=3, restarts=2)
    world.settle()
    assert world.status["restarts"] == 2 and world.run["attempt"] == 3
    world.progress = None
    world.settle()
    assert (world.status["restarts"], world.status["faults"]) == (2, 0)


def test_the_event_of_a_restart_names_pod_node_and_cause() -> None:
    world = at_training()
    world.wait(20)
    world.fail("train", 20, 1, "y", **LOST)
    (event,) = (e for e in world.pass_().events if e.reason == "Restarted")
    assert "restart 1 of the gang" in event.message
    assert "train-1-1-y on node node-1: ProcessLost: killed" in event.message
