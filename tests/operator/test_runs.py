"""Effects of a changed spec on a run: Live, Resume, NewRun, and changes that must have no
effect."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from operator_world import PREPARED, TRAINED, World, at_training, completed

from finetune_api import names
from finetune_api.spec import Checkpoint


def test_live_change_keeps_the_gang() -> None:
    world = at_training()
    before = copy.deepcopy(world.objects)
    world.edit(failurePolicy={"maxRestarts": 9}, childrenTTLSecondsAfterFinished=5)
    world.settle()
    assert world.objects == before
    assert world.status["observedGeneration"] == 2


def test_resume_change_makes_a_new_gang_once_the_old_one_is_gone() -> None:
    world = at_training()
    world.edit(compute={"nodes": 3})
    world.pass_()
    assert world.names("ConfigMap") == ["bot-1-0f9c2-run-spec-1", "bot-1-0f9c2-run-spec-2"]
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"], "old pods are still ending"
    world.remove_pods()
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1", "bot-1-0f9c2-train-2"]
    assert world.names("Service") == ["bot-1-0f9c2-train-2"]
    assert world.child("train")["spec"]["completions"] == 3
    assert (world.run["number"], world.run["revision"]) == (1, 2)


def test_a_pod_on_a_dead_node_does_not_block_the_new_gang() -> None:
    world = at_training()
    world.edit(compute={"nodes": 1})
    world.settle()
    assert "bot-1-0f9c2-train-2" not in world.names("Job")
    again = world.plan().requeue_after
    assert again is not None
    world.wait(again.total_seconds())
    world.settle()
    assert "bot-1-0f9c2-train-2" in world.names("Job")


@pytest.mark.parametrize("change", [{"resources": {"requests": {"cpu": "4"}}}, {"workers": 4}])
def test_resume_change_while_preparing_prepares_again(change: dict[str, Any]) -> None:
    world = World()
    world.settle()
    world.pods("prepare", running={})
    world.edit(prepare=change)
    world.settle()
    assert world.names("Job") == [], "the new Job waits for the pods of the old one"
    world.remove_pods()
    world.settle()
    role = "map" if "workers" in change else "prepare"
    assert world.names("Job") == [f"bot-1-0f9c2-{role}-2"]
    assert world.child(role)["spec"]["completions"] == change.get("workers", 1)


def test_fewer_workers_during_map_wait_for_the_running_pods() -> None:
    world = World(prepare={"workers": 3})
    world.settle()
    world.pods("map", 3, running={})
    world.edit(prepare={"workers": 1})
    world.settle()
    assert world.names("Job") == []
    world.remove_pods()
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-2"]


def test_more_workers_after_prepare_do_not_map_again() -> None:
    world = at_training()
    world.edit(prepare={"workers": 3})
    world.settle()
    assert not [name for name in world.names("Job") if "-map-" in name]
    assert (world.condition_of("Prepared") or "").startswith("True/")


def test_new_run_replaces_the_current_one() -> None:
    world = at_training()
    world.edit(training={"epochs": 5})
    plan = world.pass_()
    assert {d.name for d in plan.delete} == {
        "bot-1-0f9c2-prepare-1",
        "bot-1-0f9c2-train-1",
    }
    world.settle()
    assert world.names("Job") == ["bot-2-0f9c2-prepare-1"]
    assert world.names("ConfigMap") == ["bot-1-0f9c2-run-spec-1", "bot-2-0f9c2-run-spec-1"]
    assert world.run["number"] == 2
    assert [(r["number"], r["outcome"]) for r in world.status["history"]] == [(1, "Superseded")]
    assert "prepared" not in world.status and world.condition_of("Prepared") == "False/Preparing"


def test_changing_the_spec_back_begins_a_third_run() -> None:
    world = completed()
    world.edit(training={"seed": 1})
    world.settle()
    world.edit(training={"seed": 42})
    world.settle()
    assert world.run["id"] == "3-0f9c2"
    assert [r["outcome"] for r in world.status["history"]] == ["Superseded", "Complete"]


def test_rerun_token_begins_a_new_run_and_keeps_history_bounded() -> None:
    world = completed()
    for token in range(14):
        world.edit(rerunToken=str(token))
        world.settle()
    assert world.run["number"] == 15 and world.run["rerunToken"] == "13"
    assert [r["number"] for r in world.status["history"]] == list(range(14, 4, -1))
    assert len(world.names("ConfigMap")) == 11, "run specs are deleted with the history"


@pytest.mark.parametrize(
    "change", [{"compute": {"nodes": 7}}, {"failurePolicy": {"maxRestarts": 0}}]
)
def test_a_complete_run_stays_complete_when_only_its_gang_is_changed(change: Any) -> None:
    world = completed()
    before = copy.deepcopy(world.objects)
    world.edit(**change)
    world.settle()
    assert world.objects == before and world.status["phase"] == "Complete"
    assert world.status["observedGeneration"] == 2


def test_a_failed_run_resumes_when_its_gang_is_changed() -> None:
    world = at_training(failurePolicy={"maxRestarts": 0})
    world.fail("train", 20, **{"class": "NodeFailure", "reason": "Gone", "message": "m"})
    world.settle()
    assert world.status["phase"] == "Failed" and world.status["restarts"] == 1
    world.condition("train", "Failed", "DeadlineExceeded")
    world.remove_pods()
    world.edit(compute={"nodes": 1})
    world.settle()
    assert world.run["revision"] == 2 and "outcome" not in world.run
    assert world.condition_of("Failed") == "False/Resumed" and "failure" not in world.status
    world.progress = None
    world.settle()
    assert world.status["restarts"] == 1, "the count continues, but not against the new gang"
    assert "bot-1-0f9c2-train-2" in world.names("Job")


def test_a_final_failure_is_no_incident_of_the_resumed_run() -> None:
    world = at_training(failurePolicy={"maxRestarts": 0})
    world.report(attempt=1, restarts=0)
    world.fail("train", 14, **{"class": "OutOfMemory", "reason": "CudaOutOfMemory", "message": "m"})
    world.condition("train", "Failed", "PodFailurePolicy")
    world.settle()
    assert world.status["phase"] == "Failed" and world.status["restarts"] == 0
    world.remove_pods()
    world.edit(training={"microBatchTokens": 1024})
    world.settle()
    run_spec = told(world, "bot-1-0f9c2-run-spec-2")
    assert (run_spec["revision"], run_spec["restarts"]) == (2, 0), "HEAD.json counts from these"
    world.objects.pop(("Job", "bot-1-0f9c2-train-1"))
    world.pods("train", 2, running={})
    world.report(attempt=2, restarts=0)
    world.settle()
    assert world.status["phase"] == "Training" and world.status["restarts"] == 0
    world.wait(20)
    world.fail("train", 20, 1, "y", **{"class": "NodeFailure", "reason": "Gone", "message": "m"})
    world.settle()
    assert world.status["phase"] == "Failed", "its own incidents count"


def test_the_run_spec_has_the_incidents_before_its_gang() -> None:
    world = at_training()
    world.fail("train", 20, **{"class": "NodeFailure", "reason": "Gone", "message": "m"})
    world.settle()
    world.edit(compute={"nodes": 1})
    world.pass_()
    assert told(world, "bot-1-0f9c2-run-spec-2")["restarts"] == 1


def told(world: World, run_spec: str) -> dict[str, Any]:
    text = world.objects["ConfigMap", run_spec]["data"][names.RUN_SPEC_KEY]
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_change_without_a_new_generation_changes_nothing() -> None:
    """A changed default of the CRD shows in the object immediately, without a new generation."""
    world = at_training()
    before = copy.deepcopy(world.objects)
    world.job["spec"]["training"] = {"batchSize": 64}
    world.settle()
    assert world.objects == before


def test_a_new_default_of_a_newer_operator_changes_no_run(monkeypatch: Any) -> None:
    """The snapshot was written by an older release that did not know a field, or had another
    default for it. The user then changes a Live field, which creates a generation."""
    world = at_training()
    run_spec = world.of("ConfigMap")[0]
    snapshot = json.loads(run_spec["data"][names.RUN_SPEC_KEY])
    del snapshot["spec"]["evaluation"]["maxSamples"]
    del snapshot["spec"]["data"]["quality"]
    run_spec["data"][names.RUN_SPEC_KEY] = json.dumps(snapshot)
    world.edit(failurePolicy={"maxRestarts": 1})
    world.job["spec"]["evaluation"] = {"maxSamples": 1000}  # as the newer CRD shows it
    before = copy.deepcopy(world.objects)
    world.settle()
    assert world.objects == before and world.run["number"] == 1


def test_a_stored_default_survives_a_changed_default() -> None:
    """The API server writes defaults into the object at creation; later defaults do not change
    them."""
    world = World(checkpoint={"keepLast": Checkpoint().keep_last + 5})
    world.settle()
    before = copy.deepcopy(world.objects)
    world.edit(failurePolicy={"maxRestarts": 1})
    world.settle()
    assert world.objects == before


def test_a_crash_between_run_spec_and_status_repeats_no_run() -> None:
    world = completed()
    world.edit(training={"seed": 7})
    old_status = copy.deepcopy(world.status)
    world.pass_()
    world.job["status"] = old_status
    world.edit(training={"seed": 8})
    world.settle()
    assert world.run["number"] == 3, "run 2 was recorded with another spec"
    run_specs = {
        o["metadata"]["name"]: o["data"][names.RUN_SPEC_KEY] for o in world.of("ConfigMap")
    }
    seeds = [
        json.loads(run_specs[f"bot-{n}-0f9c2-run-spec-1"])["spec"]["training"]["seed"]
        for n in (1, 2, 3)
    ]
    assert seeds == [42, 7, 8]


def test_a_removed_run_spec_of_a_running_run_is_recreated() -> None:
    world = at_training()
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-1"))
    world.settle()
    assert world.names("ConfigMap") == ["bot-1-0f9c2-run-spec-1"]
    assert world.run["number"] == 1


def test_an_edit_made_while_the_run_spec_was_removed_begins_a_new_run() -> None:
    """The run that trains must not be rewritten with another seed."""
    world = at_training(training={"seed": 1})
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-1"))
    world.edit(training={"seed": 2})
    world.settle()
    assert world.run["number"] == 2
    assert told(world, "bot-2-0f9c2-run-spec-1")["spec"]["training"]["seed"] == 2
    assert "bot-1-0f9c2-run-spec-1" not in world.names("ConfigMap")


def test_an_edit_of_the_gang_made_while_the_run_spec_was_removed_is_a_revision() -> None:
    world = at_training()
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-1"))
    world.edit(compute={"nodes": 3})
    world.settle()
    assert (world.run["number"], world.run["revision"]) == (1, 2)
    assert told(world, "bot-1-0f9c2-run-spec-2")["spec"]["compute"]["nodes"] == 3


def test_an_edit_is_not_reverted_when_its_run_spec_is_removed() -> None:
    world = at_training()
    world.edit(compute={"nodes": 3})
    world.settle()
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-2"))
    world.settle()
    assert world.run["revision"] == 2
    assert told(world, "bot-1-0f9c2-run-spec-2")["spec"]["compute"]["nodes"] == 3


def test_an_invalid_edit_beside_a_refused_run_spec_leaves_the_gang_at_work() -> None:
    """A quota refused the next revision's run spec, and then the spec became invalid."""
    world = at_training()
    world.status["run"]["revision"] = 2  # as status shows it while the run spec is refused
    world.edit(training={"epochs": 1, "maxSteps": 1})
    world.settle()
    assert world.condition_of("Stalled") == "True/InvalidSpec"
    assert world.status["phase"] == "Training" and "bot-1-0f9c2-train-1" in world.names("Job")


def test_incidents_survive_a_removed_run_spec() -> None:
    world = at_training()
    world.wait(20)
    world.fail("train", 20, **{"class": "NodeFailure", "reason": "Gone", "message": "m"})
    world.settle()
    world.objects.pop(("ConfigMap", "bot-1-0f9c2-run-spec-1"))
    world.settle()
    assert (world.status["restarts"], world.status["faults"]) == (1, 1)
    assert told(world, "bot-1-0f9c2-run-spec-1")["restarts"] == 1


def test_suspend_deletes_the_job_and_resume_recreates_it() -> None:
    """A suspended Job would keep its count of failed pods, and with it its back-off."""
    world = at_training()
    world.edit(suspend=True)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    assert (
        world.condition_of("Suspended") == "True/Suspended" and world.status["phase"] == "Suspended"
    )
    world.edit(suspend=False)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"], "its pods may still save their state"
    world.remove_pods()
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1", "bot-1-0f9c2-train-1"]
    assert world.condition_of("Suspended") == "False/NotSuspended"
    assert world.run["revision"] == 1 and world.status["restarts"] == 0
    world.wait(5)
    world.pods("train", 2, running={})
    world.settle()
    assert world.status["phase"] == "Training" and not world.status["incidents"]


def test_a_job_suspended_by_another_controller_is_left_alone() -> None:
    world = at_training()
    world.child("train")["spec"]["suspend"] = True  # as Kueue does to all Jobs of the namespace
    world.remove_pods()
    plan = world.settle()
    assert plan.change == () and world.child("train")["spec"]["suspend"] is True
    assert world.status["phase"] == "Queued"
    world.edit(suspend=True)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]


def test_an_invalid_edit_does_not_resume_a_suspended_run() -> None:
    world = at_training()
    world.edit(suspend=True)
    world.settle()
    world.edit(training={"epochs": 1, "maxSteps": 1})
    world.settle()
    assert world.condition_of("Stalled") == "True/InvalidSpec"
    assert world.status["phase"] == "Suspended"
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    world.remove_pods()
    world.edit(suspend=False)
    world.settle()
    assert world.names("Job")[1:], "an invalid spec's suspend still counts"


def test_suspended_from_the_start_creates_nothing() -> None:
    world = World(suspend=True)
    world.settle()
    assert not world.objects and world.status["phase"] == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]


def test_a_queue_admits_the_gang_and_suspending_releases_its_quota() -> None:
    world = World(scheduling={"queueName": "gpus"})
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    job = world.child("train")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"][names.LABEL_QUEUE] == "gpus"
    assert world.status["phase"] == "Queued"
    assert world.settle().change == (), "left to Kueue"
    job["spec"]["suspend"] = False
    world.pods("train", 2, running={})
    world.settle()
    assert world.status["phase"] == "Training"
    world.edit(suspend=True)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    world.remove_pods()
    world.edit(suspend=False)
    world.settle()
    assert world.child("train")["spec"]["suspend"] is True


def test_publish_continues_without_the_gang() -> None:
    world = at_training()
    world.finish("train", trained=TRAINED)
    world.settle()
    world.objects = {k: o for k, o in world.objects.items() if "train" not in k[1]}
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1", "bot-1-0f9c2-publish-1"]
