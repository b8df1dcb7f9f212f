"""The store: newest versions, deletions, and which objects belong to which job."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from operator_world import UID, at_training, spec, stored_object

from finetune_api import names
from finetune_operator.decision.stages import GANG
from finetune_operator.progress import running_gangs
from finetune_operator.store import Store


def test_the_store_keeps_the_newest_version() -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 5))
    store.put(names.KIND, stored_object(names.KIND, UID, 7, status={"phase": "Training"}))
    store.put(names.KIND, stored_object(names.KIND, UID, 6))
    found = store.job(UID)
    assert found is not None and found.raw_status == {"phase": "Training"}


def test_only_a_version_with_another_view_needs_a_pass() -> None:
    store = Store()
    job = stored_object(names.KIND, UID, 1)
    assert store.put(names.KIND, job) == UID
    assert store.put(names.KIND, job) is None, "the echo of a write of this process"
    pod = next(p for p in at_training().of("Pod") if "train" in p["metadata"]["name"])
    assert store.put("Pod", versioned(pod, 2)) == UID
    assert store.put("Pod", versioned(pod, 3)) is None
    ready = {"type": "ContainersReady", "status": "True"}
    pod["status"]["conditions"].append(ready)
    assert store.put("Pod", versioned(pod, 4)) is None, "no pass reads this condition"
    pod["status"]["phase"] = "Failed"
    assert store.put("Pod", versioned(pod, 5)) == UID
    assert store.versions("Pod", "team") == {"p": 5}


def versioned(obj: dict[str, Any], version: int) -> dict[str, Any]:
    copied = copy.deepcopy(obj)
    copied["metadata"] |= {"uid": "p", "resourceVersion": str(version)}
    return copied


def test_the_spec_of_a_job_is_parsed_once_a_generation() -> None:
    store = Store()
    for version, generation in ((1, 1), (2, 1), (3, 2)):
        job = stored_object(names.KIND, UID, version, spec=spec(training={"seed": generation}))
        job["metadata"]["generation"] = generation
        before = store.job(UID)
        store.put(names.KIND, job)
        found = store.job(UID)
        assert found is not None and found.spec is not None
        assert found.spec.training.seed == generation
        assert (before is not None and before.spec is found.spec) == (version == 2)


def test_a_late_response_does_not_restore_a_deleted_child() -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    assert store.put("Job", stored_object("Job", "j", 10)) == UID
    assert store.remove("Job", stored_object("Job", "j", 12)) == UID
    store.put("Job", stored_object("Job", "j", 11))
    assert store.children(UID, "Job") == {}


def test_a_pod_that_vanished_while_it_ran_is_remembered_as_ended() -> None:
    world = at_training()
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    for number, pod in enumerate(p for p in world.of("Pod") if "train" in p["metadata"]["name"]):
        pod["metadata"] |= {"uid": f"p{number}", "resourceVersion": "1"}
        store.put("Pod", pod)
        store.remove("Pod", pod)
    gone = store.observed(UID).gone
    assert len(gone) == 2 and all(p.finished is not None for p in gone)


def test_a_pod_that_vanished_before_it_ran_held_its_node_until_then() -> None:
    world = at_training()
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    pod = world.pod(world.child("train"), 0, "y", waiting={"reason": "ContainerCreating"})
    pod["metadata"] |= {"resourceVersion": "1", "deletionTimestamp": "2100-01-01T00:00:00Z"}
    store.put("Pod", pod)
    store.remove("Pod", pod)
    (gone,) = store.observed(UID).gone
    assert gone.finished is None and gone.exit_code is None, "no container has ended"
    assert gone.deleted_by is not None
    assert abs((gone.deleted_by - datetime.now(UTC)).total_seconds()) < 60


def test_the_store_keeps_nothing_of_a_deleted_job() -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    store.put("Job", stored_object("Job", "j", 2))
    store.remove(names.KIND, stored_object(names.KIND, UID, 3))
    store.remove("Job", stored_object("Job", "j", 4))
    assert store.job(UID) is None and store.versions("Job", None) == {} and list(store.jobs()) == []
    assert not store._children


def test_a_late_response_does_not_restore_a_deleted_job() -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    store.remove(names.KIND, stored_object(names.KIND, UID, 3))
    store.put(names.KIND, stored_object(names.KIND, UID, 2, status={"phase": "Training"}))
    assert store.job(UID) is None and list(store.jobs()) == []


def test_what_no_pass_reads_is_not_kept_in_memory() -> None:
    store = Store()
    job = stored_object(names.KIND, UID, 1)
    job["metadata"] |= {
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "team": "a"},
    }
    store.put(names.KIND, job)
    kept = store.job(UID)
    assert kept is not None and kept.metadata["annotations"] == {"team": "a"}
    assert "managedFields" not in kept.metadata and "managedFields" in job["metadata"]


def test_the_progress_of_a_job_wakes_none_of_the_jobs_that_start_from_its_model() -> None:
    store = Store()
    spec = {"model": {"fineTuneJobRef": {"name": UID}}}
    follower = stored_object(names.KIND, "follower", 1, spec=spec)
    store.put(names.KIND, follower)

    def woken(version: int, **status: Any) -> list[str]:
        job = stored_object(names.KIND, UID, version, status={"run": {"id": "1"}, **status})
        store.put(names.KIND, job)
        return store.affected(names.KIND, job)

    assert woken(1, phase="Training", progress={"step": 1}) == ["follower"]
    assert woken(2, phase="Training", progress={"step": 2}) == []
    assert woken(3, phase="Publishing") == ["follower"]
    assert woken(4, phase="Publishing") == []
    store.remove(names.KIND, stored_object(names.KIND, UID, 5))
    assert store.affected(names.KIND, stored_object(names.KIND, UID, 5)) == ["follower"]


def test_a_child_that_is_disowned_is_forgotten() -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    child = stored_object("Job", "j", 2)
    store.put("Job", child)
    orphan = stored_object("Job", "j", 3)
    del orphan["metadata"]["ownerReferences"]
    assert store.put("Job", orphan) == UID, "its former job has a pass"
    assert store.children(UID, "Job") == {}
    assert store.put("Job", orphan) is None and store.remove("Job", orphan) is None


def test_a_job_of_another_operator_is_not_kept_and_can_be_handed_over() -> None:
    def job(version: int, **spec: Any) -> dict[str, Any]:
        return stored_object(names.KIND, UID, version, spec=spec)

    unnamed, named = Store(), Store("blue")
    for store in (unnamed, named):
        store.put(names.KIND, job(1))
        store.put("Job", stored_object("Job", "j", 2))
    assert unnamed.job(UID) is not None and named.job(UID) is None
    for store in (unnamed, named):
        store.put(names.KIND, job(3, managedBy="blue"))
    assert unnamed.job(UID) is None and unnamed.children(UID, "Job") == {}
    assert named.job(UID) is not None
    assert list(named.children(UID, "Job")) == ["j"]
    assert list(unnamed.jobs()) == [] and len(list(named.jobs())) == 1


def elsewhere(child: dict[str, Any]) -> None:
    child["metadata"]["namespace"] = "attacker"


def without_controller(child: dict[str, Any]) -> None:
    child["metadata"]["ownerReferences"][0]["controller"] = False


def controlled_by_another_job(child: dict[str, Any]) -> None:
    child["metadata"]["ownerReferences"][0]["uid"] = "another"


def controlled_by_another_kind(child: dict[str, Any]) -> None:
    child["metadata"]["ownerReferences"][0] |= {"apiVersion": "apps/v1", "kind": "Deployment"}


@pytest.mark.parametrize("kind", ["ConfigMap", "Service", "Job"])
@pytest.mark.parametrize(
    "disguise",
    [elsewhere, without_controller, controlled_by_another_job, controlled_by_another_kind],
)
def test_an_object_that_only_claims_a_job_is_none_of_its_children(
    kind: str, disguise: Callable[[dict[str, Any]], None]
) -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    claiming = stored_object(kind, "c", 2)
    disguise(claiming)
    store.put(kind, claiming)
    assert store.children(UID, kind) == {}
    store.put(kind, stored_object(kind, "own", 2))
    assert list(store.children(UID, kind)) == ["own"]


@pytest.mark.parametrize("disguise", [elsewhere, without_controller, controlled_by_another_kind])
def test_no_progress_is_read_from_a_pod_that_only_claims_a_job(
    disguise: Callable[[dict[str, Any]], None],
) -> None:
    store = Store()
    store.put(names.KIND, stored_object(names.KIND, UID, 1))
    pods = at_training().of("Pod")
    pod = copy.deepcopy(next(p for p in pods if p["metadata"]["labels"][names.LABEL_ROLE] == GANG))
    pod["metadata"] |= {"uid": "p", "resourceVersion": "1"}
    pod["status"]["podIP"] = "10.0.0.9"
    claiming = copy.deepcopy(pod)
    disguise(claiming)
    store.put("Pod", claiming)
    assert list(running_gangs(store)) == []
    store.remove("Pod", claiming)
    assert store.observed(UID).gone == ()
    store.put("Pod", pod | {"metadata": pod["metadata"] | {"uid": "q"}})
    assert [gang.ip for gang in running_gangs(store)] == ["10.0.0.9"]
