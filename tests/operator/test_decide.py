"""The course of a run: prepare, train, publish, and interruptions between them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from operator_world import (
    PREPARED,
    PUBLISHED,
    TRAINED,
    UID,
    World,
    at_training,
    complete,
    completed,
    stored_object,
)
from prometheus_client import generate_latest

from finetune_api import names
from finetune_operator.children.jobs import STAGE_JOBS
from finetune_operator.config import ANNOTATION_OUTCOME
from finetune_operator.decide import defect
from finetune_operator.decision.stages import CONDITION
from finetune_operator.metrics import Metrics
from finetune_operator.status.activity import BEGINS, WORKS
from finetune_operator.status.status import REACHED
from finetune_operator.store import Store
from finetune_operator.world.objects import format_time
from finetune_operator.world.stored import StoredJob


def timeless(status: dict[str, Any]) -> dict[str, Any]:
    """A status without condition transition times and other times that a lost status loses."""
    conditions = [
        {k: v for k, v in c.items() if k != "lastTransitionTime"} for c in status["conditions"]
    ]
    run = {k: v for k, v in status["run"].items() if k != "completionTime"}
    progress = {k: v for k, v in status.get("progress", {}).items() if k != "lastUpdateTime"}
    return {**status, "conditions": conditions, "run": run, "progress": progress}


def test_first_pass_creates_run_spec_and_prepare_job() -> None:
    world = World()
    plan = world.pass_()
    assert world.names("ConfigMap") == ["bot-1-0f9c2-run-spec-1"]
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    assert world.status["phase"] == "Pending"
    assert world.status["observedGeneration"] == 1
    assert world.run["id"] == "1-0f9c2"
    assert world.condition_of("Reconciling") == "True/Preparing"
    assert plan.events == (), "the normal course of a run is in status"


def test_every_stage_is_in_every_table() -> None:
    for table in (CONDITION, STAGE_JOBS, BEGINS, WORKS):
        assert list(table) == list(names.ROLES)
    assert set(REACHED) == set(CONDITION.values())


def test_memory_warning_sets_reason_and_event() -> None:
    world = World()
    world.settle()
    memory = {
        "needed": 9, "available": 8, "sharding": "NoShard", "gradientCheckpointing": True,
        "parts": {"parameters": 9}, "warning": "It may not fit. What fits: nothing",
    }  # fmt: skip
    world.finish("prepare", prepared={**PREPARED, "memory": memory})
    found = [event for _ in range(3) for event in world.pass_().events]
    assert world.condition_of("Prepared") == "True/MayNotFit"
    (warned,) = [event for event in found if event.reason == "MayNotFit"]
    assert warned.type == "Warning" and warned.message.endswith("What fits: nothing")


def test_several_pods_map_before_one_reduces() -> None:
    world = World(prepare={"workers": 3})
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-map-1"] and world.status["phase"] == "Pending"
    world.pods("map", 2, running={})
    world.settle()
    assert (
        world.condition_of("Prepared") == "False/Preparing" and world.status["phase"] == "Preparing"
    )
    assert "2 of 3 workers run" in world.message("Prepared")
    world.finish("map")
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-map-1", "bot-1-0f9c2-prepare-1"]
    assert (
        world.condition_of("Prepared") == "False/Preparing" and world.status["phase"] == "Preparing"
    )
    assert "all workers have mapped" in world.message("Prepared")
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    assert world.condition_of("Prepared") == "True/DataReady"
    assert world.status["prepared"]["trainSamples"] == 90
    assert world.names("Service") == ["bot-1-0f9c2-train-1"]


@pytest.mark.parametrize("role", ["map", "prepare"])
def test_suspend_and_resume_during_map_and_during_reduce(role: str) -> None:
    world = World(prepare={"workers": 2})
    world.settle()
    if role == "prepare":
        world.finish("map")
        world.settle()
    world.edit(suspend=True)
    world.settle()
    assert f"bot-1-0f9c2-{role}-1" not in world.names("Job")
    assert world.status["phase"] == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert "backoffLimitPerIndex" in world.child(role)["spec"] or role == "prepare"


def test_a_failure_of_the_reduce_fails_the_run() -> None:
    world = World(prepare={"workers": 2})
    world.settle()
    world.finish("map")
    world.settle()
    world.fail("prepare", 11, **{"class": "DataError", "reason": "Bad", "message": "line 3"})
    world.condition("prepare", "Failed", "PodFailurePolicy")
    world.settle()
    assert world.status["failure"]["reason"] == "Bad" and world.run["outcome"] == "Failed"
    assert world.condition_of("Prepared") == "False/Bad"


def test_a_run_goes_through_its_stages_to_complete() -> None:
    world = World()
    world.settle()
    world.pods("prepare", running={})
    world.settle()
    assert world.status["phase"] == "Preparing"
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    assert world.condition_of("Prepared") == "True/DataReady"
    assert world.status["prepared"]["trainSamples"] == 90
    assert world.names("Service") == ["bot-1-0f9c2-train-1"]
    assert world.status["phase"] == "Starting"
    world.pods("train", 1, running={})
    world.settle()
    assert world.condition_of("Running") == "False/Starting"
    world.pods("train", 2, running={})
    world.settle()
    assert world.condition_of("Running") == "True/GangRunning"
    assert world.status["phase"] == "Training"
    world.finish("train", trained=TRAINED)
    world.settle()
    assert world.condition_of("Evaluated") == "True/Evaluated"
    assert world.condition_of("Running") == "False/NotTraining"
    assert world.status["phase"] == "Publishing"
    world.finish("publish", published=PUBLISHED)
    world.settle()
    assert world.condition_of("Published") == "True/Published"
    assert world.condition_of("Complete") == "True/Published"
    assert (world.condition_of("Ready"), world.condition_of("Reconciling")) == (
        "True/Complete",
        "False/Complete",
    )
    assert world.status["phase"] == "Complete"
    shown = {k: v for k, v in PUBLISHED.items() if k not in ("scores", "mainResult")}
    assert world.status["output"] == shown
    assert world.status["parameters"] == {"trainable": 10, "total": 1000}
    assert world.status["evaluation"] == [
        {
            "dataSet": "test",
            "metric": "Loss",
            "base": "2",
            "tuned": "0.5",
            "gain": "-1.5",
            "gainLow": "-1.75",
            "gainHigh": "-1.25",
            "verdict": "Better",
        }
    ]
    assert world.run["outcome"] == "Complete"


@pytest.mark.parametrize(
    ("published", "condition", "event"),
    [
        ({"held": "support F1 AtLeast: 80.1 %, at least 85.0 % wanted", "becameCurrent": False},
         "False/GatesMissed", ("Warning", "GatesMissed")),
        ({"becameCurrent": True, "recommendation": "intent: Tune: tuning is what helps"},
         "True/Evaluated", ("Normal", "BecameCurrent")),
        ({"remedy": "Interpolation: point 0.4"}, "True/Evaluated", None),
    ],
)  # fmt: skip
def test_a_held_run_is_complete_and_says_what_it_missed(
    published: dict[str, Any], condition: str, event: tuple[str, str] | None
) -> None:
    world = at_training()
    world.wait(60)
    world.finish("train", trained=TRAINED)
    world.settle()
    world.finish("publish", published=PUBLISHED | published)
    found = [event for _ in range(3) for event in world.pass_().events]
    assert [(e.type, e.reason) for e in found] == ([event] if event else []) + [
        ("Normal", "Published")]  # fmt: skip
    for _ in range(2):
        assert world.status["phase"] == "Complete"
        assert world.condition_of("Evaluated") == condition
        assert world.condition_of("Ready") == "True/Complete"
        if "held" in published:
            assert world.message("Evaluated") == world.status["output"]["held"] == published["held"]
        assert world.status["output"].get("becameCurrent") == published.get("becameCurrent")
        for name in ("recommendation", "remedy"):
            assert published.get(name, "") in world.message("Evaluated")
        assert world.status["mainResult"] == PUBLISHED["mainResult"] | {"currentGap": "-0.25"}
        # The pods that reported it go; status keeps it.
        world.objects = {k: v for k, v in world.objects.items() if v["kind"] == "ConfigMap"}
        world.settle()


@pytest.mark.parametrize("reason", ["GatesPending", "GatesMissed"])
def test_a_gang_is_done_whatever_the_gates_say(reason: str) -> None:
    """Its Job may be gone before publish is done; nothing is trained again."""
    world = at_training(evaluation={"gates": [{"metric": "Loss", "operator": "BetterThan"}]})
    world.wait(60)
    world.finish("train", trained=TRAINED)
    world.settle()
    assert world.condition_of("Evaluated") == "Unknown/GatesPending"
    for condition in world.status["conditions"]:
        if condition["type"] == "Evaluated":
            condition["reason"] = reason
    train = {key for key, found in world.objects.items() if "train" in found["metadata"]["name"]}
    world.objects = {k: v for k, v in world.objects.items() if k not in train}
    world.settle()
    assert world.status["phase"] == "Publishing"
    assert not [name for name in world.names("Job") if "train" in name]


def test_progress_is_shown_and_progress_of_another_run_ignored() -> None:
    world = at_training()
    world.report(
        step=10, totalSteps=40, loss=1.23456, remainingSeconds=130.0, epoch=0.25,
        bySource={"notes": 1.5, "code": 0.98765},
    )  # fmt: skip
    world.settle()
    shown = world.status["progress"]
    assert shown["dataSetLosses"] == [
        {"name": "notes", "loss": "1.5"}, {"name": "code", "loss": "0.9877"}]  # fmt: skip
    assert (shown["percent"], shown["loss"], shown["remaining"]) == (25, "1.235", "2m10s")
    assert world.progress is not None
    world.progress = world.progress.model_copy(update={"run": "9-other", "step": 39})
    world.settle()
    assert world.status["progress"]["step"] == 10


def test_figures_of_progress_reach_status_and_metrics_and_stay_after_the_end() -> None:
    world = at_training()
    told = {"dataWaitShare": 0.123456, "checkpointsAbandoned": 2, "anchorKl": 0.05, "mfu": 0.4,
            "baseKl": 0.3}  # fmt: skip
    world.report(step=20, totalSteps=30, dataStage="later", routerLoss=1.25, **told)
    world.settle()
    shown = {"dataStage": "later", "dataWaitShare": "0.123", "checkpointsAbandoned": 2,
             "anchorKl": "0.05", "routerLoss": "1.25", "mfu": "0.4", "baseKl": "0.3"}  # fmt: skip
    assert shown.items() <= world.status["progress"].items()
    world.progress = None  # the pod is gone
    complete(world)
    assert shown.items() <= world.status["progress"].items()
    assert (world.status["progress"]["stage"], world.status["progress"]["step"]) == ("Done", 30)
    store = Store()
    store.put("FineTuneJob", {**stored_object("FineTuneJob", UID, 1), "status": world.status})
    page = generate_latest(Metrics(store, lambda: 0).registry).decode()
    for line in (
        "data_wait_share{",
        "checkpoints_abandoned{",
        "anchor_kl{",
        "base_kl{",
        "router_loss{",
    ):
        assert f"finetune_job_{line}" in page
    assert f'finetune_job_checkpoints_abandoned{{name="{UID}",namespace="team"}} 2.0' in page


def test_status_is_not_rewritten_while_a_gang_runs() -> None:
    world = at_training(compute={"gpusPerNode": 8})
    world.report(step=1, totalSteps=4)
    world.settle()
    assert world.plan().status is None


def test_condition_keeps_its_transition_time_while_its_status_stays() -> None:
    world = at_training()
    before = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    world.wait(100)
    world.report(stage="Loading")
    world.settle()
    after = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    assert after["Prepared"] == before["Prepared"]
    assert after["Running"] == before["Running"]
    assert world.status["phase"] == "Starting"


def test_a_finished_run_stays_finished_when_its_children_are_deleted() -> None:
    world = completed()
    before = copy.deepcopy(world.status)
    world.objects = {k: o for k, o in world.objects.items() if k[0] == "ConfigMap"}
    world.settle()
    assert world.status == before
    world.objects.clear()
    world.settle()
    assert world.status == before
    assert not world.objects


def test_a_failed_run_stays_failed_when_its_children_are_deleted() -> None:
    world = World()
    world.settle()
    world.fail("prepare", 11, **{"class": "DataError", "reason": "Bad", "message": "line 3"})
    world.condition("prepare", "Failed", "PodFailurePolicy")
    world.settle()
    world.objects.clear()
    world.settle()
    assert world.status["failure"]["reason"] == "Bad"
    assert world.condition_of("Stalled") == "True/Bad"
    assert not world.objects


@pytest.mark.parametrize("stage", ["prepare", "train", "publish", "done"])
def test_status_deleted_by_hand_is_rebuilt_from_children(stage: str) -> None:
    world = World()
    world.settle()
    if stage != "prepare":
        world = at_training()
    if stage in ("publish", "done"):
        world.finish("train", trained=TRAINED)
        world.settle()
    if stage == "done":
        world.finish("publish", published=PUBLISHED)
        world.settle()
    before = copy.deepcopy(world.status)
    children = copy.deepcopy(world.objects)
    del world.job["status"]
    world.settle()
    assert world.objects == children
    assert timeless(world.status) == timeless(before)


def test_a_complete_run_without_status_and_jobs_is_not_retrained() -> None:
    world = completed()
    del world.job["status"]
    world.objects = {k: o for k, o in world.objects.items() if k[0] == "ConfigMap"}
    world.settle()
    assert world.condition_of("Complete") == "True/Published"
    assert world.names("Job") == []


def test_a_pod_lost_after_the_result_does_not_block_publish() -> None:
    world = at_training()
    world.finish("train", trained=TRAINED)
    job = world.child("train")
    job["status"]["conditions"] = []
    lost = world.of("Pod")[-1]
    lost["status"]["containerStatuses"][0]["state"] = {"running": {}}
    lost["status"]["phase"] = "Running"
    world.settle()
    assert not any("publish" in name for name in world.names("Job")), "the pod may still end"
    world.wait(61)
    world.settle()
    assert world.condition_of("Evaluated") == "True/Evaluated"
    assert world.child("train")["spec"]["activeDeadlineSeconds"] == 0
    assert world.child("publish")


def test_children_are_never_rendered_again() -> None:
    world = at_training()
    world.config = type(world.config)(image="registry.example/trainer:2")
    plan = world.settle()
    assert plan.create == ()
    world.finish("train", trained=TRAINED)
    world.settle()
    image = world.child("publish")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "registry.example/trainer:1", "a run keeps its image across an operator upgrade"


def test_large_figures_are_abbreviated() -> None:
    world = at_training()
    scores = {"Perplexity": math.exp(80), "Loss": math.nan}
    test = {"name": "test", "samples": 5, "base": scores, "tuned": {"Perplexity": 123456.0}}
    world.finish("train", trained={**TRAINED, "scores": [test]})
    world.settle()
    assert world.status["phase"] == "Publishing"
    shown = {row["metric"]: row for row in world.status["evaluation"]}
    assert (shown["Perplexity"]["base"], shown["Perplexity"]["tuned"]) == ("5.541e+34", "123456")
    assert shown["Loss"]["base"] == "nan"


def test_an_operator_defect_is_reported_and_cleared_by_the_next_pass() -> None:
    world = at_training()
    before = copy.deepcopy(world.status)
    plan = defect(StoredJob(world.job), TypeError("no such thing"), world.now)
    assert plan.status is not None and not (plan.delete or plan.create or plan.change)
    assert [(e.type, e.reason) for e in plan.events] == [("Warning", "OperatorDefect")]
    world.job["status"] = plan.status
    assert world.condition_of("Stalled") == "True/OperatorDefect"
    assert "TypeError: no such thing" in world.message("Stalled")
    assert world.status["phase"] == "Training" and world.status["run"] == before["run"]
    assert defect(StoredJob(world.job), TypeError("no such thing"), world.now).status is None, (
        "reported once"
    )
    world.settle()
    assert timeless(world.status) == timeless(before)


def test_a_job_being_deleted_is_left_alone() -> None:
    world = World()
    world.job["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    plan = world.plan()
    assert plan.create == () and plan.status is None


def test_children_stay_until_status_has_their_results() -> None:
    world = at_training(childrenTTLSecondsAfterFinished=0)
    world.fail("train", 14, **{"class": "OutOfMemory", "reason": "Oom", "message": "m"})
    world.condition("train", "Failed", "PodFailurePolicy")
    plan = world.plan()
    assert plan.status is not None and plan.status["phase"] == "Failed"
    assert not plan.delete, "the operator may crash before it writes status"
    world.settle()
    assert world.names("Job") == [] and world.status["failure"]["reason"] == "Oom"


def test_ttl_removes_jobs_and_services_and_keeps_the_run_spec() -> None:
    world = completed(childrenTTLSecondsAfterFinished=60)
    assert len(world.names("Job")) == 3
    again = world.plan().requeue_after
    assert again is not None and again.total_seconds() == 60
    world.wait(60)
    world.settle()
    assert world.names("Job") == [] and world.names("Service") == []
    assert world.names("ConfigMap") == ["bot-1-0f9c2-run-spec-1"]
    assert world.status["phase"] == "Complete"


@pytest.mark.parametrize("running", [False, True])
def test_an_invalid_stored_spec_sets_a_condition(running: bool) -> None:
    world = at_training() if running else World()
    world.job["spec"]["training"] = {"epochs": 1, "maxSteps": 1}
    world.job["metadata"]["generation"] += 1
    world.settle()
    assert world.condition_of("Stalled") == "True/InvalidSpec"
    assert "epochs and maxSteps exclude each other" in world.message("Stalled")
    if running:
        assert world.status["phase"] == "Training"
        assert world.status["observedGeneration"] == 1, "compared once it is valid again"
        world.finish("train", trained=TRAINED)
        world.settle()
        assert world.names("Job")[1].endswith("publish-1")
    else:
        assert not world.objects


@pytest.mark.parametrize("status", [{"phase": 7}, {"run": None}, "text"])
def test_unreadable_status_is_rebuilt(status: object) -> None:
    world = at_training()
    before = copy.deepcopy(world.status)
    world.job["status"] = status if isinstance(status, dict) else {"conditions": status}
    world.settle()
    assert timeless(world.status) == timeless(before)


def test_what_a_newer_release_wrote_into_status_is_kept_and_passed_over() -> None:
    """The operator is rolled back while a run trains."""
    world = at_training()
    world.status["restarts"] = 2
    known = copy.deepcopy(world.status)
    world.job["status"] |= {"phase": "Healing", "lostTime": {"hang": 3}}
    world.status["run"]["faults"] = 1
    world.status["conditions"].append(
        {
            "type": "Elastic", "status": "True", "reason": "Fewer", "message": "",
            "lastTransitionTime": format_time(world.now), "severity": "Info",
        }
    )  # fmt: skip
    world.settle()
    assert world.status["lostTime"] == {"hang": 3} and world.status["run"]["faults"] == 1
    assert world.condition_of("Elastic") == "True/Fewer"
    assert (world.status["phase"], world.status["restarts"]) == ("Training", 2)
    assert world.status["run"]["id"] == known["run"]["id"]
    world.edit(rerunToken="again")
    world.settle()
    assert "lostTime" not in world.status, "figures of another run"


def test_a_run_whose_outcome_only_a_newer_release_knows_stays_ended() -> None:
    world = at_training()
    world.status["run"]["outcome"] = "Cancelled"
    world.status["failure"] = {"class": "Cancelled", "reason": "ByUser", "message": "cancelled"}
    world.settle()
    assert world.status["phase"] == "Failed"
    assert world.status["failure"]["class"] == "Cancelled"
    (config_map,) = world.of("ConfigMap")
    assert config_map["metadata"]["annotations"][ANNOTATION_OUTCOME] == "Failed"


def test_labels_select_children_of_one_job() -> None:
    world = at_training()
    for kind in ("ConfigMap", "Service", "Job"):
        for obj in world.of(kind):
            assert obj["metadata"]["labels"][names.LABEL_JOB_UID] == world.job["metadata"]["uid"]
