"""Runs that start from another job's model: such a run waits and reports why, begins with the
published model, and keeps it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from operator_world import PUBLISHED, World, at_training, complete, completed, train

from finetune_api import names
from finetune_operator.store import Store

FIRST_UID = "aaaaa-0000"


def follower(*others: World, wanted: str = "first", **more: Any) -> World:
    """A job that starts from another job's model."""
    world = World(model={"source": None, "fineTuneJobRef": {"name": wanted}}, **more)
    world.others = list(others)
    return world


def first(**more: Any) -> World:
    return World(name="first", uid=FIRST_UID, **more)


def run_spec_of(world: World) -> Any:
    (found,) = world.of("ConfigMap")
    return json.loads(found["data"][names.RUN_SPEC_KEY])


def failed() -> World:
    world = first()
    world.settle()
    world.fail("prepare", 11, **{"class": "DataError", "reason": "Bad", "message": "line 3"})
    world.condition("prepare", "Failed", "PodFailurePolicy")
    world.settle()
    return world


def refused() -> World:
    world = first(training={"epochs": 1, "maxSteps": 1})
    world.settle()
    return world


def suspended() -> World:
    world = first(suspend=True)
    world.settle()
    return world


def edited() -> World:
    world = completed(name="first", uid=FIRST_UID)
    world.edit(training={"seed": 9})  # not yet seen by the operator
    return world


@pytest.mark.parametrize(
    ("others", "reason", "said"),
    [
        ([], "WaitingForModel", "there is no FineTuneJob first in namespace team"),
        ([first()], "WaitingForModel", "FineTuneJob first has not begun"),
        ([suspended()], "WaitingForModel", "FineTuneJob first is suspended"),
        ([at_training(name="first", uid=FIRST_UID)], "WaitingForModel",
         "FineTuneJob first is Training (run 1-aaaaa); the run begins once it is Complete"),
        ([edited()], "WaitingForModel", "has not begun a run with its current spec"),
        ([failed()], "ModelFailed", "FineTuneJob first has failed (Bad: line 3); fix that job"),
        ([refused()], "ModelFailed", "is stalled (InvalidSpec: spec.training: epochs and maxSteps"),
    ],
)  # fmt: skip
def test_a_waiting_run_reports_why_and_creates_nothing(
    others: list[World], reason: str, said: str
) -> None:
    world = follower(*others)
    world.settle()
    assert not world.objects
    assert world.status["phase"] == "Waiting"
    assert world.condition_of("Prepared") == world.condition_of("Ready") == f"False/{reason}"
    assert said in world.message("Prepared")
    stuck = reason == "ModelFailed"
    assert world.condition_of("Reconciling") == f"{not stuck}/{reason}"
    assert (world.condition_of("Stalled") == f"True/{reason}") is stuck
    assert "startTime" not in world.run and "base" not in world.run
    assert world.status["observedGeneration"] == 1
    assert world.plan().requeue_after is None, "a change of the other job triggers the next pass"


def test_a_held_model_is_not_built_upon() -> None:
    held = at_training(name="first", uid=FIRST_UID)
    complete(held, held="support F1 AtLeast: 80.1 %, at least 85.0 % wanted")
    world = follower(held)
    world.settle()
    assert world.condition_of("Stalled") == "True/ModelHeld"
    assert "is held (support F1 AtLeast: 80.1 %" in world.message("Prepared")
    assert PUBLISHED["uri"] in world.message("Prepared")
    complete_again = completed(name="first", uid=FIRST_UID)
    world.others = [complete_again]
    world.settle()
    assert world.run["base"]["job"] == "first"


def circle(*wishes: tuple[str, str]) -> list[World]:
    """Jobs, given as pairs of a name and the name of the job that it refers to."""
    worlds = [
        World(name=name, uid=f"{name}-uid", model={"source": None, "fineTuneJobRef": {"name": to}})
        for name, to in wishes
    ]
    for world in worlds:
        world.others = [other for other in worlds if other is not world]
    return worlds


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ([("bot", "bot")], "bot → bot"),
        ([("bot", "a"), ("a", "bot")], "bot → a → bot"),
        ([("bot", "a"), ("a", "b"), ("b", "a")], "(a → b → a)"),
    ],
)
def test_a_reference_cycle_is_reported(wishes: list[tuple[str, str]], told: str) -> None:
    world = circle(*wishes)[0]
    plan = world.pass_()
    assert world.condition_of("Stalled") == "True/ReferenceCycle"
    assert told in world.message("Stalled")
    assert [event.reason for event in plan.events] == ["ReferenceCycle"]
    assert not world.objects


def test_a_cycle_with_a_published_model_is_not_reported() -> None:
    other = completed(name="first", uid=FIRST_UID)
    world = follower(other, wanted="middle")
    middle = World(name="middle", uid="m", model={"fineTuneJobRef": {"name": "first"}})
    other.job["spec"]["model"] = {"fineTuneJobRef": {"name": "middle"}}
    world.others.append(middle)
    world.settle()
    assert world.condition_of("Prepared") == "False/WaitingForModel"


def test_a_run_begins_with_the_published_model_and_keeps_it() -> None:
    other = first(storage={"endpoint": "http://near:9000"}, output={"destination": "s3://first"})
    world = follower(other)
    train(other)
    world.settle()
    assert not world.objects
    world.wait(600)
    complete(other)
    plan = world.pass_()
    assert [(e.reason, e.message) for e in plan.events] == [
        ("RunStarted", "run 1-0f9c2 begins, from run 1-aaaaa of first")
    ]
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    assert world.run["base"] == {
        "job": "first", "run": "1-aaaaa", "uri": "s3://first/1-aaaaa", "digest": "sha"
    }  # fmt: skip
    assert world.run["startTime"] == "2026-01-01T12:10:00Z"
    base = run_spec_of(world)["base"]
    assert base["storage"]["endpoint"] == "http://near:9000"
    assert base["beneath"]["source"] == "s3://models/base"
    assert world.condition_of("Prepared") == "False/Preparing"

    # A later run of the other job, or its deletion, changes nothing.
    before = copy.deepcopy(world.objects)
    other.edit(rerunToken="again")
    other.settle()
    world.settle()
    assert (world.objects, world.run["number"]) == (before, 1)
    world.others = []
    world.settle()
    train(world)
    world.edit(compute={"nodes": 1})
    world.settle()
    run_specs = [json.loads(o["data"][names.RUN_SPEC_KEY]) for o in world.of("ConfigMap")]
    assert [run_spec["base"] for run_spec in run_specs] == [base, base], (
        "the new gang keeps the base"
    )


def test_a_removed_run_spec_is_rebuilt_from_status() -> None:
    other = completed(name="first", uid=FIRST_UID)
    world = follower(other)
    train(world)
    base = run_spec_of(world)["base"]
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-1"))
    other.edit(rerunToken="again")
    other.settle()
    world.settle()
    assert world.status["phase"] == "Training"
    assert {k: run_spec_of(world)["base"][k] for k in ("run", "uri", "digest")} == {
        k: base[k] for k in ("run", "uri", "digest")
    }


def test_a_rerun_waits_for_the_other_jobs_current_run() -> None:
    other = completed(name="first", uid=FIRST_UID)
    world = follower(other)
    train(world)
    complete(world)
    assert world.status["phase"] == "Complete"
    other.edit(rerunToken="again")
    train(other)
    assert world.settle().create == (), "a new model alone starts no run"
    world.edit(rerunToken="too")
    world.settle()
    assert (world.status["phase"], world.run["id"]) == ("Waiting", "2-0f9c2")
    assert world.status["history"][0]["base"]["run"] == "1-aaaaa"
    assert world.names("Job") == [], "the previous run's Jobs are deleted"
    world.edit(rerunToken="three")
    world.settle()
    assert world.run["number"] == 2, "a waiting run takes the current spec"
    status = world.job.pop("status")
    world.settle()
    assert world.run["number"] == status["run"]["number"], "a lost status is rebuilt"
    complete(other)
    world.settle()
    assert world.run["base"]["run"] == "2-aaaaa"
    assert (world.run["rerunToken"], world.run["number"]) == ("three", 2)


def test_a_waiting_run_can_be_suspended_and_edited() -> None:
    world = follower()
    world.settle()
    world.edit(suspend=True)
    world.settle()
    assert (world.status["phase"], world.objects) == ("Suspended", {})
    world.edit(suspend=False)
    world.settle()
    assert world.status["phase"] == "Waiting"
    world.edit(model={"source": "s3://models/base", "fineTuneJobRef": None})
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    assert world.run["number"] == 1


def test_the_volume_claim_of_an_adapters_base_is_mounted() -> None:
    other = completed(name="first", uid=FIRST_UID, model={"source": "pvc://weights/base"})
    world = follower(other)
    world.settle()
    volumes = world.child("prepare")["spec"]["template"]["spec"]["volumes"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if v["name"] == "pvc-0"]
    assert claims == ["weights"]


def stored(world: World, version: int, uid: str = "") -> dict[str, Any]:
    job = copy.deepcopy(world.job)
    job["metadata"] |= {"resourceVersion": str(version), "uid": uid or job["metadata"]["uid"]}
    return job


def test_the_model_of_another_operators_job_is_found() -> None:
    other = completed(name="first", uid=FIRST_UID)
    other.job["spec"]["managedBy"] = "blue"
    world = follower()
    store = Store()
    uid = store.put(names.KIND, stored(world, 1))
    assert store.put(names.KIND, stored(other, 2)) is None
    for number, config_map in enumerate(other.of("ConfigMap")):
        config_map["metadata"] |= {"uid": f"c{number}", "resourceVersion": "3"}
        store.put("ConfigMap", config_map)
    assert uid is not None and [m.complete for m in store.observed(uid).models] == [True]
    assert len(list(store.jobs())) == 1


def test_the_store_tracks_references_between_jobs() -> None:
    other = completed(name="first", uid=FIRST_UID)
    world = follower()
    store = Store()
    uid = store.put(names.KIND, stored(world, 1))
    assert uid is not None
    assert store.observed(uid).models == ()
    store.put(names.KIND, stored(other, 2))
    for number, config_map in enumerate(other.of("ConfigMap")):
        config_map["metadata"] |= {"uid": f"c{number}", "resourceVersion": "3"}
        store.put("ConfigMap", config_map)
    (seen,) = store.observed(uid).models
    assert seen.complete and seen.run_spec is not None and seen.run_spec.run == "1-aaaaa"
    assert seen.status.output is not None and seen.status.output.digest == PUBLISHED["digest"]
    assert store.affected(names.KIND, stored(other, 2)) == [uid]
    assert store.affected("ConfigMap", config_map) == []

    # Deleted and created again before the deletion was observed.
    store.put(names.KIND, stored(other, 5, uid="bbbbb"))
    store.remove(names.KIND, stored(other, 4))
    assert [m.name for m in store.observed(uid).models] == ["first"]
    store.remove(names.KIND, stored(other, 6, uid="bbbbb"))
    assert store.observed(uid).models == ()
    assert store.affected(names.KIND, stored(other, 6)) == [uid], "the reference remains"
    world.edit(model={"source": "s3://models/base", "fineTuneJobRef": None})
    store.put(names.KIND, stored(world, 7))
    assert store.affected(names.KIND, stored(other, 6)) == []
