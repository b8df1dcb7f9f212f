"""Causes of a failed run: from termination messages, from Kubernetes' reports of pods, from
obstacles."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
from operator_world import World, at_training

from finetune_operator.config import ANNOTATION_OUTCOME
from finetune_operator.world.objects import format_time
from finetune_operator.world.observe import Refusal


def preparing() -> World:
    world = World()
    world.settle()
    return world


def test_the_termination_message_is_the_failure() -> None:
    world = preparing()
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "train.jsonl line 3"}
    world.fail("prepare", 11, **said)
    world.condition("prepare", "Failed", "PodFailurePolicy")
    plan = world.pass_()
    assert world.status["failure"] == {
        **said,
        "pod": "bot-1-0f9c2-prepare-1-0-x",
        "node": "node-0",
        "exitCode": 11,
    }
    assert world.condition_of("Failed") == "True/MalformedRecord"
    assert world.condition_of("Prepared") == "False/MalformedRecord"
    assert world.run["outcome"] == "Failed"
    assert [(e.type, e.reason) for e in plan.events] == [("Warning", "MalformedRecord")]
    world.settle()


def test_an_old_cause_does_not_explain_a_new_failure() -> None:
    world = preparing()
    world.pod(
        world.child("prepare"), suffix="a", terminated={"exitCode": 137, "reason": "OOMKilled"}
    )
    world.wait(3600)
    said = {"class": "Storage", "reason": "Unreachable", "message": "s3://data: timed out"}
    world.fail("prepare", 21, suffix="b", **said)
    world.condition("prepare", "Failed", "BackoffLimitExceeded")
    world.settle()
    assert world.status["failure"]["reason"] == "Unreachable"


def test_the_runtimes_error_of_a_container_that_could_not_start_is_shown() -> None:
    world = preparing()
    text = 'failed to create containerd task: exec: "python": executable file not found in $PATH'
    ended = {"exitCode": 128, "reason": "StartError", "message": text}
    world.pod(world.child("prepare"), terminated=ended)
    world.condition("prepare", "Failed", "BackoffLimitExceeded")
    world.settle()
    assert text in world.status["failure"]["message"]
    assert "exit code 128 (StartError)" in world.status["failure"]["message"]


def test_the_outcome_is_recorded_after_the_status_that_explains_it() -> None:
    """An operator that dies between two writes must not lose the cause."""
    world = preparing()
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "train.jsonl line 3"}
    world.fail("prepare", 11, **said)
    world.condition("prepare", "Failed", "PodFailurePolicy")
    (first,) = world.of("ConfigMap")
    world.pass_()
    assert world.run["outcome"] == "Failed"
    assert ANNOTATION_OUTCOME not in first["metadata"]["annotations"]
    world.pass_()
    (second,) = world.of("ConfigMap")
    assert second["metadata"]["annotations"][ANNOTATION_OUTCOME] == "Failed"


def test_a_failed_worker_outranks_stopped_workers() -> None:
    world = World(prepare={"workers": 3})
    world.settle()
    world.pods("map", 3, running={})
    said = {"class": "Storage", "reason": "AccessDenied", "message": "may not read s3://data"}
    world.fail("map", 12, index=1, **said)
    world.wait(5)
    stopped = {"class": "Preempted", "reason": "Interrupted", "message": "stopped by SIGTERM"}
    for index in (0, 2):
        world.fail("map", 23, index=index, **stopped)
    world.condition("map", "Failed", "PodFailurePolicy")
    world.pass_()
    assert world.status["failure"]["reason"] == "AccessDenied"
    assert world.status["failure"]["pod"] == "bot-1-0f9c2-map-1-1-x"


@pytest.mark.parametrize(
    ("ended", "pod_status", "expected"),
    [
        ({"exitCode": 137, "reason": "OOMKilled"}, {}, ("OutOfMemory", "HostOutOfMemory")),
        ({"exitCode": 10}, {}, ("UserError", "UserError")),
        ({"exitCode": 12}, {}, ("Storage", "StorageDenied")),
        ({"exitCode": 13}, {}, ("Diverged", "Diverged")),
        ({"exitCode": 14}, {}, ("OutOfMemory", "OutOfMemory")),
        ({"exitCode": 1, "message": "not json"}, {}, ("Internal", "ContainerFailed")),
        ({"exitCode": 137}, {"reason": "Evicted", "message": "disk"}, ("Preempted", "Evicted")),
        (
            {"exitCode": 137},
            {
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "DeletionByTaintManager",
                    }
                ]
            },
            ("NodeFailure", "DeletionByTaintManager"),
        ),
        (
            {"exitCode": 137},
            {
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                    }
                ]
            },
            ("Preempted", "PreemptionByScheduler"),
        ),
        *(
            (
                {"exitCode": 137},
                {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason}]},
                ("NodeFailure", reason),
            )
            for reason in ("DeletionByPodGC", "DeletionByTaintManager")
        ),
        (
            {"exitCode": 137},
            {"reason": "UnexpectedAdmissionError", "message": "no device plugin"},
            ("NodeFailure", "UnexpectedAdmissionError"),
        ),
        ({"exitCode": 137}, {"reason": "OutOfcpu"}, ("NodeFailure", "PodRejected")),
        (
            {"exitCode": 137},
            {
                "reason": "Terminated",
                "conditions": [
                    {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
                ],
            },
            ("Preempted", "Terminated"),
        ),
        ({"exitCode": 25}, {}, ("OutOfMemory", "HostOutOfMemory")),
    ],
)
def test_failure_without_a_termination_message(
    ended: dict[str, Any], pod_status: dict[str, Any], expected: tuple[str, str]
) -> None:
    world = preparing()
    pod = world.pod(world.child("prepare"), terminated=ended)
    pod["status"] |= pod_status
    world.condition("prepare", "Failed", "BackoffLimitExceeded")
    world.settle()
    failure = world.status["failure"]
    assert (failure["class"], failure["reason"]) == expected
    assert failure["message"]


def test_earlier_tries_are_in_the_message() -> None:
    world = preparing()
    said = {"class": "Storage", "reason": "Unreachable", "message": "s3://data: timed out"}
    world.fail("prepare", 21, suffix="a", **said)
    world.pods("prepare", running={})
    world.settle()
    assert world.status["phase"] == "Preparing"
    assert "prepare-1-0-a failed (Unreachable): s3://data: timed out" in world.message("Prepared")


def test_a_failed_job_waits_for_its_failed_pods() -> None:
    world = preparing()
    world.pods("prepare", running={})
    world.condition("prepare", "Failed", "PodFailurePolicy")
    failed = world.child("prepare")["status"]["conditions"][0]
    failed["lastTransitionTime"] = format_time(world.now)
    world.settle()
    assert world.status["phase"] != "Failed"
    assert world.plan().requeue_after == timedelta(seconds=10)
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "line 3"}
    pods = copy.deepcopy(world.of("Pod"))
    world.fail("prepare", 11, **said)
    world.pass_()
    assert world.status["failure"]["reason"] == "MalformedRecord"

    world = preparing()
    world.objects |= {("Pod", pod["metadata"]["name"]): pod for pod in pods}
    world.child("prepare")["status"] = {"conditions": [failed]}
    world.wait(10)
    world.settle()
    assert world.status["failure"]["reason"] == "PodFailurePolicy", "no failed pod appeared"


def test_the_jobs_reason_is_used_without_pods() -> None:
    world = preparing()
    world.condition("prepare", "Failed", "BackoffLimitExceeded")
    world.settle()
    assert world.status["failure"]["reason"] == "BackoffLimitExceeded"


def test_a_pods_own_cause_outranks_lost_peers() -> None:
    world = at_training()
    world.fail("train", 13, 1, **{"class": "Diverged", "reason": "NaN", "message": "loss is NaN"})
    world.wait(1)
    lost = {"class": "NodeFailure", "reason": "PeerLost", "message": "m", "retryable": True}
    world.fail("train", 20, 0, **lost)
    world.condition("train", "FailureTarget", "PodFailurePolicy")
    world.settle()
    assert world.status["failure"]["reason"] == "NaN"
    assert world.status["failure"]["pod"].endswith("train-1-1-x")
    assert world.status["restarts"] == 0, "a final failure is no restart"


def waiting(world: World, role: str, reason: str, message: str) -> None:
    world.pods(role, waiting={"reason": reason, "message": message})


@pytest.mark.parametrize(
    ("reason", "message", "seconds"),
    [
        ("InvalidImageName", "bad", 0),
        ("ErrImagePull", "manifest for x not found", 30),
        ("ImagePullBackOff", "401 Unauthorized", 30),
        ("ErrImagePull", "dial tcp: i/o timeout", 600),
    ],
)
def test_an_image_that_cannot_be_pulled(reason: str, message: str, seconds: int) -> None:
    world = preparing()
    waiting(world, "prepare", reason, message)
    world.pull_failing_since = {p["metadata"]["uid"]: world.now for p in world.of("Pod")}
    if seconds:
        world.settle()
        assert world.status["phase"] == "Pending"
        assert world.condition_of("Prepared") == "False/ImagePull"
        assert world.plan().requeue_after == timedelta(seconds=seconds)
        world.wait(seconds)
    world.settle()
    failure = world.status["failure"]
    assert (failure["class"], failure["reason"]) == ("ImagePull", reason)
    assert "registry.example/trainer:1" in failure["message"] and message in failure["message"]
    assert "spec.compute.image" in failure["message"]


def test_a_registry_outage_ends_no_run_that_has_trained() -> None:
    world = at_training(scheduling={"startDeadlineSeconds": 3600})
    world.report(step=5)
    world.settle()
    world.wait(20)
    lost = {"class": "NodeFailure", "reason": "ProcessKilled", "message": "m", "retryable": True}
    world.fail("train", 20, 1, **lost)
    pulling = {"reason": "ImagePullBackOff", "message": "manifest for x not found"}
    world.pod(world.child("train"), 1, "y", waiting=pulling)
    world.settle()
    assert world.condition_of("Running") == "False/ImagePull"
    world.wait(1800)
    world.settle()
    assert world.status["phase"] == "Starting", "the other pods wait in place"
    world.wait(1800)
    world.settle()
    assert world.status["failure"]["class"] == "ImagePull"


def test_a_missing_secret_is_reported_until_it_exists() -> None:
    world = preparing()
    waiting(world, "prepare", "CreateContainerConfigError", 'secret "s3" not found')
    world.settle()
    assert world.condition_of("Prepared") == "False/MissingSecret"
    assert 'secret "s3" not found' in world.message("Ready")
    world.pods("prepare", running={})
    world.settle()
    assert world.condition_of("Prepared") == "False/Preparing"
    assert world.status["phase"] == "Preparing"


def unschedulable(world: World, role: str, count: int) -> None:
    for pod in world.pods(role, count):
        del pod["spec"]["nodeName"]
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: no nvidia.com/gpu"}
        ]


def test_too_few_nodes() -> None:
    world = World(scheduling={"startDeadlineSeconds": 120})
    world.settle()
    world.finish("prepare")
    world.settle()
    unschedulable(world, "train", 2)
    world.settle()
    assert world.status["phase"] == "Starting"
    assert world.condition_of("Running") == "False/Unschedulable"
    assert "no nvidia.com/gpu" in world.message("Running")
    assert world.plan().requeue_after == timedelta(seconds=120)
    world.wait(120)
    world.settle()
    failure = world.status["failure"]
    assert (failure["class"], failure["reason"]) == ("Unschedulable", "Unschedulable")
    assert "no nvidia.com/gpu" in failure["message"] and "compute.nodes" in failure["message"]


def test_too_few_nodes_for_the_workers_of_prepare() -> None:
    world = World(scheduling={"startDeadlineSeconds": 120}, prepare={"workers": 2})
    world.settle()
    world.pods("map", 2, running={})
    world.settle()
    assert "2 of 2 workers run" in world.message("Prepared")
    unschedulable(world, "map", 2)
    world.wait(120)
    world.settle()
    assert "fewer prepare.workers" in world.status["failure"]["message"]


def test_the_start_deadline_is_live_and_excludes_queue_time() -> None:
    world = World(scheduling={"startDeadlineSeconds": 120, "queueName": "q"})
    world.settle()
    world.finish("prepare")
    world.settle()
    world.wait(10_000)
    world.settle()
    assert world.status["phase"] == "Queued"
    world.child("train")["spec"]["suspend"] = False
    unschedulable(world, "train", 2)
    world.wait(100)
    world.edit(scheduling={"startDeadlineSeconds": 500})
    world.settle()
    assert world.plan().requeue_after == timedelta(seconds=400)


def test_a_job_without_pods_is_reported_and_fails() -> None:
    world = World(scheduling={"startDeadlineSeconds": 180})
    world.settle()
    assert world.condition_of("Prepared") == "False/Preparing"
    assert world.plan().requeue_after == timedelta(seconds=120)
    world.wait(120)
    world.settle()
    assert world.condition_of("Prepared") == "False/PodsNotCreated"
    world.wait(60)
    world.settle()
    assert world.status["failure"]["reason"] == "PodsNotCreated"
    assert "quota" in world.status["failure"]["message"]


def test_a_forbidden_pod_template_fails_before_anything_runs() -> None:
    world = World(compute={"podTemplate": {"spec": {"hostNetwork": True}}})
    world.settle()
    assert world.names("Job") == []
    assert world.condition_of("Failed") == "True/InvalidPodTemplate"
    assert "spec.compute.podTemplate.spec.hostNetwork" in world.message("Stalled")
    world.edit(compute={"podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}})
    world.job["spec"]["compute"]["podTemplate"]["spec"].pop("hostNetwork")
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-2"]


def test_a_job_that_the_api_server_refuses() -> None:
    world = World()
    world.settle()
    world.finish("prepare")
    world.refused = {"Job bot-1-0f9c2-train-1": Refusal("exceeded quota: jobs", final=False)}
    world.pass_()
    assert world.status["phase"] == "Starting"
    assert world.condition_of("Running") == "False/ChildRefused"
    assert "exceeded quota" in world.message("Ready")
    world.objects.pop(("Job", "bot-1-0f9c2-train-1"))
    world.refused = {"Job bot-1-0f9c2-train-1": Refusal("tolerations[2].operator: bad", final=True)}
    world.settle()
    assert world.condition_of("Failed") == "True/ChildRefused"
    assert "tolerations[2].operator" in world.status["failure"]["message"]


def test_a_change_that_the_api_server_refuses_is_shown_and_retried() -> None:
    world = at_training()
    world.edit(suspend=True)
    train = world.child("train")["metadata"]["name"]
    world.refused = {f"Job {train}": Refusal("Job a: 500 failed calling webhook")}
    plan = world.plan()
    assert [delete.name for delete in plan.delete] == [train]
    assert plan.status is not None
    world.job["status"] = plan.status
    assert world.condition_of("Reconciling") == "True/ChildRefused"
    assert "failed calling webhook" in world.message("Reconciling")
    world.refused = {}
    world.settle()
    assert world.condition_of("Reconciling") == "False/Suspended"


def test_a_run_spec_that_the_api_server_refuses() -> None:
    world = World()
    no = Refusal("exceeded quota: count/configmaps", final=False)
    world.refused = {"ConfigMap bot-1-0f9c2-run-spec-1": no}
    world.pass_()
    assert world.condition_of("Prepared") == "False/ChildRefused"
    assert "count/configmaps" in world.message("Ready")
