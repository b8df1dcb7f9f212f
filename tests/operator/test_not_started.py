"""Pods that never start, or that an injected sidecar keeps running: named within seconds, with the
object that lacks, and ended at the start deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import pytest
from operator_world import PREPARED, TRAINED, UID, World, at_training, stored_object

from finetune_api import names
from finetune_operator.store import Store
from finetune_operator.warning_reader import WarningReader, late_objects
from finetune_operator.world.objects import format_time


def starting(**more: Any) -> World:
    """A gang whose Job was just made."""
    world = World(scheduling={"startDeadlineSeconds": 300}, **more)
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    return world


@pytest.mark.parametrize(
    ("state", "warning", "told"),
    [
        (
            {"reason": "CreateContainerError", "message": "mount point is not a directory"}, "",
            "(CreateContainerError): mount point is not a directory",
        ),
        ({"reason": "RunContainerError", "message": "exec: no file"}, "", "exec: no file"),
        ({"reason": "ImageInspectError", "message": "layer is corrupt"}, "", "layer is corrupt"),
        (
            {"reason": "ContainerCreating"},
            'MountVolume.SetUp failed for volume "data": configmap "ca" not found',
            '(ContainerCreating): MountVolume.SetUp failed for volume "data": configmap "ca"',
        ),
    ],
)  # fmt: skip
def test_a_pod_that_does_not_start_is_named_at_once_and_ended_at_the_deadline(
    state: dict[str, Any], warning: str, told: str
) -> None:
    world = starting()
    world.pods("train", 2, waiting=state)
    world.warnings = {p["metadata"]["uid"]: warning for p in world.of("Pod") if warning}
    world.settle()
    assert world.condition_of("Running") == "False/NotStarted"
    assert told in world.message("Running") and "on node node-" in world.message("Running")
    assert world.plan().requeue_after == timedelta(seconds=300)
    world.wait(300)
    world.settle()
    failure = world.status["failure"]
    assert (failure["class"], failure["reason"]) == ("NodeFailure", "NotStarted")
    assert "startDeadlineSeconds" in failure["message"] and told in failure["message"]


def test_a_pod_may_take_its_time_to_start() -> None:
    world = starting()
    world.pods("train", 2, waiting={"reason": "ContainerCreating"})
    world.settle()
    assert world.condition_of("Running") == "False/Starting"
    world.wait(20)
    world.settle()
    assert "its image is pulled, or a volume is mounted" in world.message("Running")
    world.pods("train", 2, running={})
    world.settle()
    assert world.status["phase"] == "Training"


def test_an_injected_init_container_that_cannot_start_is_named() -> None:
    world = starting()
    for pod in world.pods("train", 2, waiting={"reason": "PodInitializing"}):
        waiting = {"reason": "CreateContainerError", "message": "no such user"}
        pod["status"]["initContainerStatuses"] = [{"name": "mesh", "state": {"waiting": waiting}}]
    world.settle()
    assert "init container mesh: no such user" in world.message("Running")


def test_a_quota_that_admits_only_some_pods_is_named() -> None:
    world = starting(compute={"nodes": 4})
    world.pods("train", 3, running={})
    world.settle()
    assert world.condition_of("Running") == "False/Starting"
    world.wait(120)
    world.settle()
    assert "3 of 4 pods of Job bot-1-0f9c2-train-1 exist" in world.message("Running")
    uid = world.child("train")["metadata"].setdefault("uid", "train")
    world.warnings = {uid: 'Error creating: pods "bot" is forbidden: exceeded quota: gpus'}
    world.settle()
    assert "exceeded quota: gpus" in world.message("Running")
    world.wait(300)
    world.settle()
    assert world.status["failure"]["reason"] == "PodsNotCreated"


def test_the_back_off_of_a_replacement_is_no_obstacle() -> None:
    world = at_training()
    world.wait(20)
    lost = {"class": "NodeFailure", "reason": "ProcessKilled", "message": "m", "retryable": True}
    world.fail("train", 20, 1, **lost)
    world.settle()
    world.wait(60)
    world.settle()
    assert world.condition_of("Running") == "False/Starting"
    world.wait(65)
    world.settle()
    assert world.condition_of("Running") == "False/PodsNotCreated"


@pytest.mark.parametrize("evicted", [1, 2])
def test_pods_that_vanish_late_in_a_run_are_waited_for(evicted: int) -> None:
    """The start deadline is over for long, and the Job replaces the pods after its back-off."""
    world = at_training()
    world.wait(10_000)
    for index in range(evicted):
        world.objects.pop(("Pod", f"{world.child('train')['metadata']['name']}-{index}-x"))
    world.settle()
    assert world.status["phase"] == "Starting"
    assert world.condition_of("Running") == "False/Starting"
    world.wait(125)
    world.settle()
    assert world.condition_of("Running") == "False/PodsNotCreated", "now it is late"
    world.wait(3600)
    world.settle()
    assert world.status["failure"]["reason"] == "PodsNotCreated"


def test_a_worker_of_map_that_has_succeeded_may_lose_its_pod() -> None:
    world = World(prepare={"workers": 3})
    world.settle()
    world.pods("map", 3, running={})
    world.pod(world.child("map"), 0, terminated={"exitCode": 0})
    world.child("map")["status"]["completedIndexes"] = "0"
    world.settle()
    world.objects.pop(("Pod", world.child("map")["metadata"]["name"] + "-0-x"))
    world.wait(10_000)
    world.settle()
    assert world.condition_of("Prepared") == "False/Preparing"


def test_a_pod_that_no_scheduler_looks_at_is_named() -> None:
    world = starting()
    for pod in world.pods("train", 2):
        del pod["spec"]["nodeName"]
        pod["status"]["conditions"] = []
    world.settle()
    assert world.condition_of("Running") == "False/Starting"
    world.wait(20)
    world.settle()
    assert "the scheduler has not looked at it yet" in world.message("Running")
    world.wait(300)
    world.settle()
    assert world.status["failure"]["reason"] == "Unschedulable"


def test_publish_waits_out_an_outage_of_storage() -> None:
    """Its Job tries again for an hour; the trained model is not lost."""
    world = at_training()
    world.finish("train", trained=TRAINED)
    world.settle()
    away = {"class": "Storage", "reason": "StorageUnreachable", "message": "no answer"}
    for number in range(6):
        world.fail("publish", 21, suffix=f"p{number}", **away)
        world.settle()
        world.wait(600)
        world.settle()
        assert world.status["phase"] == "Publishing"
        assert "Retrying: pod" in world.message("Published")
        assert "no answer" in world.message("Published")


def with_sidecar(pod: dict[str, Any]) -> None:
    pod["status"]["phase"] = "Running"


@pytest.mark.parametrize("role", ["prepare", "publish"])
def test_a_sidecar_keeps_no_cpu_stage_from_ending(role: str) -> None:
    world = World() if role == "prepare" else at_training()
    if role == "publish":
        world.finish("train", trained=TRAINED)
    world.settle()
    (pod,) = world.pods(role, running={})
    world.wait(10)
    world.pods(role, terminated={"exitCode": 0})
    with_sidecar(pod)
    world.settle()
    assert world.status["phase"] in ("Preparing", "Pending", "Publishing")
    again = world.plan().requeue_after
    assert again is not None and again.total_seconds() == 30
    world.wait(30)
    world.settle()
    assert world.status["phase"] in ("Starting", "Complete")
    assert world.child(role)["spec"]["activeDeadlineSeconds"] == 0, "ends the sidecar"


@pytest.mark.parametrize("code", [11, 21, 22])
def test_a_failed_cpu_stage_with_a_sidecar_fails_the_run(code: int) -> None:
    """Its Job would neither fail nor replace the pod; another retryToken tries again."""
    world = World()
    world.settle()
    world.pods("prepare", running={})
    said = {"class": "Storage", "reason": "StorageUnreachable", "message": "m"}
    with_sidecar(world.fail("prepare", code, **said))
    world.settle()
    world.wait(30)
    world.settle()
    assert world.status["phase"] == "Failed" and world.run["revision"] == 1
    assert world.status["failure"]["reason"] == "StorageUnreachable"


def test_a_sidecar_keeps_no_final_failure_from_ending_the_run() -> None:
    world = at_training()
    world.wait(10)
    pod = world.fail(
        "train", 11, **{"class": "DataError", "reason": "MalformedRecord", "message": "m"}
    )
    with_sidecar(pod)
    world.settle()
    assert world.status["phase"] != "Failed"
    world.wait(30)
    world.settle()
    assert world.status["failure"]["reason"] == "MalformedRecord"


# --- the reader of warnings ----------------------------------------------------------------------


class Events:
    """A cluster with warnings, by uid."""

    def __init__(self, **warnings: str) -> None:
        self.warnings, self.asked = warnings, list[list[str]]()

    async def newest_warnings(self, namespace: str, uids: Collection[str]) -> dict[str, str]:
        assert namespace == "team"
        self.asked.append(sorted(uids))
        return {uid: self.warnings[uid] for uid in uids if uid in self.warnings}


def store_of(world: World) -> Store:
    store = Store()
    store.put(names.KIND, world.job | stored_object(names.KIND, UID, 1))
    for kind in ("Job", "Pod"):
        for child in world.of(kind):
            child["metadata"] |= {
                "uid": child["metadata"]["name"], "resourceVersion": "1", "namespace": "team",
            }  # fmt: skip
            store.put(kind, child)
    return store


def test_warnings_are_read_about_late_objects_alone_and_shown() -> None:
    world = starting(compute={"nodes": 3})
    world.child("train")["status"] = {"startTime": format_time(world.now)}
    (late, _) = world.pods("train", 2, waiting={"reason": "ContainerCreating"})
    world.pod(world.child("train"), 1, running={})
    store = store_of(world)
    assert list(late_objects(store, world.now)) == []
    world.wait(6)
    name, job = late["metadata"]["name"], world.child("train")["metadata"]["name"]
    assert [each.uid for each in late_objects(store, world.now)] == [name, job]
    cluster = Events(**{name: "configmap ca not found", job: "exceeded quota"})
    told: list[str] = []
    reader = WarningReader(store, cluster, lambda uid, seconds: told.append(uid))  # type: ignore[arg-type]
    asyncio.run(reader.look(world.now))
    asyncio.run(reader.look(world.now))
    assert cluster.asked == [sorted([name, job])], "in one list, and not again at once"
    assert told == [UID, UID]
    observed = store.observed(UID)
    assert [p.warning for p in observed.pods if p.warning] == ["configmap ca not found"]
    assert [j.warning for j in observed.jobs if j.role == "train"] == ["exceeded quota"]


def test_no_warnings_are_read_about_a_job_at_rest() -> None:
    world = starting()
    world.pods("train", 2, waiting={"reason": "ContainerCreating"})
    world.wait(60)
    store = store_of(world)
    assert list(late_objects(store, world.now))
    store.put(names.KIND, stored_object(names.KIND, UID, 2, status={"phase": "Training"}))
    assert list(late_objects(store, world.now)) == []
