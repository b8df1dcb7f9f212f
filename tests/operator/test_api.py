"""The operator process against a real API server with its Job controller and simulated nodes:
apply, all stages, kill, suspend, change, delete."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_job import WITHIN, Job, walk_to_training
from operator_process import IMAGE, OperatorProcess
from operator_world import PREPARED, PUBLISHED, TRAINED, spec

from cluster.api import eventually
from cluster.audit import Audit
from cluster.control_plane import ControlPlane
from finetune_api import names
from finetune_operator.config import STAGE_BACKOFF_LIMIT
from finetune_operator.world.pods import INDEX_ANNOTATION

CRD = Path(__file__).parents[2] / "crds" / "finetunejob.crd.yaml"


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(tmp_path_factory.mktemp("audit"), ["admin"])


@pytest.fixture(scope="module")
def plane(audit: Audit) -> Iterator[ControlPlane]:
    with ControlPlane(kwok_nodes=2, flags={"kube-apiserver": audit.flags}) as plane:
        plane.kubectl("apply", "--server-side", "-f", CRD)
        yield plane


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operator") / "log"


@pytest.fixture(scope="module")
def operator(plane: ControlPlane, log: Path) -> Iterator[OperatorProcess]:
    with OperatorProcess(plane.kubeconfig, log, "--leader-election", "false") as process:
        yield process


@pytest.fixture
def job(plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Job]:
    name = request.node.name.replace("_", "-")[:60].rstrip("-")
    made = Job(plane, name)
    yield made
    plane.kubectl("delete", "ftj", "bot", "-n", name, "--ignore-not-found")


def test_from_apply_to_complete(job: Job, operator: OperatorProcess) -> None:
    walk_to_training(job)
    assert job.status["prepared"]["trainSamples"] == 90
    later = time.time() + 60  # after the start of its pods, which start just before they end below
    start = {"seconds": {"import": 2.0, "step": 1.0}, "fromStep": 0, "firstStep": later}
    job.end("train", count=2, trained=TRAINED | {"startup": start})
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    status = job.status
    found = status["startup"]
    assert (found["importSeconds"], found["stepSeconds"]) == (2, 1)
    parts = ("prepareSeconds", "queueSeconds", "scheduleSeconds", "pullSeconds")
    assert sum(found[part] for part in parts) <= found["totalSeconds"]
    assert status["output"]["uri"] == PUBLISHED["uri"]
    assert status["evaluation"][0]["gain"] == "-1.5"
    for type_ in ("Prepared", "Evaluated", "Published", "Complete", "Ready"):
        assert (job.condition_of(type_) or "").startswith("True/"), type_
    assert job.names("jobs") == ["prepare-1", "publish-1", "train-1"]
    events = job.api.get("events", "-n", job.namespace)["items"]
    ours = [e["reason"] for e in events if e.get("reportingComponent") == names.FIELD_OWNER]
    assert ours == ["Published"]
    owned_and_ours_alone(job)
    who = f'name="bot",namespace="{job.namespace}"'
    of_run = f'metric="Loss",{{}}{who},run="{status["run"]["id"]}"'
    tuned = of_run.format('model="tuned",')
    assert operator.metric(f'finetune_job_test_metric{{data_set="test",{tuned}}}') == 0.5
    gap = of_run.format("")
    assert operator.metric(f'finetune_job_current_gap{{data_set="test",{gap}}}') == -0.25
    shown = job.api.kubectl("get", "ftj", "bot", "-n", job.namespace, "-o", "wide")
    assert "Better" in shown and "-1.5 (-1.8, -1.2)" in shown
    assert operator.metric(f"finetune_job_total_steps{{{who}}}") == 30
    finished = 'finetune_operator_runs_finished_total{failure_class="",outcome="Complete"}'
    assert (operator.metric(finished) or 0) >= 1


def test_writes_and_passes_of_one_job(job: Job, operator: OperatorProcess, audit: Audit) -> None:
    """The whole life of a job costs the API server this many writes, and the operator at most this
    many passes: the speed of the operator with many jobs follows from both."""
    passes = "finetune_operator_reconcile_seconds_count"
    before = operator.metric(passes) or 0
    walk_to_training(job)
    until_training = audit.writes(names.FIELD_OWNER, job.namespace)
    # Pending, Preparing, Starting, Training; more messages on a slow machine, seconds apart.
    assert until_training.pop("finetunejobs/status") <= 6
    assert until_training == {"configmaps": 1, "jobs": 2, "networkpolicies": 1, "services": 1}
    job.end("train", count=2, trained=TRAINED)
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    outcome = {"configmaps": 2, "jobs": 3, "networkpolicies": 1, "services": 1, "events": 1}

    def settled() -> bool:
        writes = audit.writes(names.FIELD_OWNER, job.namespace)
        return writes.pop("finetunejobs/status") <= 10 and writes == outcome

    eventually("the outcome is recorded", settled, within=WITHIN)
    assert (operator.metric(passes) or 0) - before <= 25


def owned_and_ours_alone(job: Job) -> None:
    """Assert that all children have owner references and no writers but the operator (and the
    controllers of status), and that the operator wrote only status of the user's object."""
    uid = job.object["metadata"]["uid"]
    ours = ["-n", job.namespace, "-l", f"{names.LABEL_JOB_UID}={uid}"]
    for kind in ("jobs", "services", "configmaps", "networkpolicies"):
        text = job.api.kubectl("get", kind, *ours, "-o", "json", "--show-managed-fields")
        items = json.loads(text)["items"]
        assert items
        for item in items:
            owner = item["metadata"]["ownerReferences"][0]
            assert (owner["uid"], owner["controller"]) == (uid, True)
            writers = {
                f["manager"] for f in item["metadata"]["managedFields"] if not f.get("subresource")
            }
            assert writers == {names.FIELD_OWNER}
    meta = job.object["metadata"]
    assert "finalizers" not in meta and "annotations" not in meta and "labels" not in meta


def test_operator_restart_keeps_all_children(job: Job, operator: OperatorProcess) -> None:
    walk_to_training(job)
    before = {kind: job.uids(kind) for kind in ("jobs", "pods", "services", "configmaps")}
    operator.kill()
    job.end("train", count=2, trained=TRAINED)  # while no operator runs
    operator.start(image="registry.example/trainer:2")
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    for kind, uids in before.items():
        assert uids <= job.uids(kind), f"{kind} were replaced"
    assert job.status["run"]["number"] == 1 and job.status["restarts"] == 0
    images = {j["spec"]["template"]["spec"]["containers"][0]["image"] for j in job.all("jobs")}
    assert images == {IMAGE}, "an upgraded operator must not change a run"


def test_a_final_exit_code_fails_the_run(job: Job, operator: OperatorProcess) -> None:
    job.apply()
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "train.jsonl line 3"}
    job.end("prepare", code=11, failure=said)
    job.reach("Failed")
    failure = job.status["failure"]
    assert {k: failure[k] for k in said} == said and failure["exitCode"] == 11
    assert job.condition_of("Stalled") == "True/MalformedRecord"
    job.api.kubectl("delete", "jobs", "--all", "-n", job.namespace)
    job.patch(failurePolicy={"maxRestarts": 1})
    eventually("observed", lambda: job.status["observedGeneration"] == 2)
    assert job.names("jobs") == [] and job.status["phase"] == "Failed"


@pytest.mark.slow
def test_a_prepare_worker_that_always_fails_ends_it(job: Job, operator: OperatorProcess) -> None:
    job.apply(prepare={"workers": 2})
    said = {"class": "Storage", "reason": "Unreachable", "message": "timed out", "retryable": True}
    for _ in range(1 + STAGE_BACKOFF_LIMIT):
        pods = job.running("map", 2, within=90)  # the backoff grows with each try
        first = [p for p in pods if p["metadata"]["labels"][INDEX_ANNOTATION] == "0"]
        job.end_pods(first, "map", 21, failure=said)
    job.reach("Failed")
    assert job.status["failure"]["reason"] == "Unreachable"
    (made,) = job.all("jobs")
    ended = {c["type"]: c["reason"] for c in made["status"]["conditions"]}
    assert ended["FailureTarget"] == "MaxFailedIndexesExceeded"


def test_restarts_exhausted_ends_the_gang_and_keeps_its_pods(
    job: Job, operator: OperatorProcess
) -> None:
    walk_to_training(job, failurePolicy={"maxRestarts": 0})
    lost = {"class": "NodeFailure", "reason": "DeviceLost", "message": "m", "retryable": True}
    job.end("train", code=20, count=2, ending=1, failure=lost)
    job.reach("Failed")
    assert job.status["failure"]["reason"] == "DeviceLost"

    def ended() -> bool:
        train = next(j for j in job.all("jobs") if "train" in j["metadata"]["name"])
        conditions = train["status"].get("conditions", [])
        return any(c["type"] == "Failed" and c["status"] == "True" for c in conditions)

    eventually("the Job has ended", ended, within=WITHIN)
    assert job.status["restarts"] == 1
    failed = [p["metadata"]["name"] for p in job.all("pods") if p["status"]["phase"] == "Failed"]
    assert job.status["failure"]["pod"] in failed, "the pod must stay for its logs"


def test_suspend_and_resume_continue_the_run(job: Job, operator: OperatorProcess) -> None:
    walk_to_training(job)
    jobs = job.uids("jobs")
    job.patch(suspend=True)
    job.reach("Suspended")
    eventually("no pod is left", lambda: not job.names("pods")[1:], within=WITHIN)
    job.patch(suspend=False)
    job.running("train", 2)
    job.reach("Training")
    assert len(job.uids("jobs") & jobs) == 1, "prepare's; the gang's Job is recreated"
    assert job.status["run"]["revision"] == 1
    assert job.status["restarts"] == 0 and not job.status.get("incidents")


def test_resume_change_creates_a_gang_and_new_run_change_a_run(
    job: Job, operator: OperatorProcess
) -> None:
    walk_to_training(job)
    job.patch(compute={"nodes": 1})
    eventually("gang 2", lambda: job.names("jobs") == ["prepare-1", "train-2"], within=WITHIN)
    job.running("train", 1)
    assert job.status["run"]["revision"] == 2
    job.patch(training={"seed": 7})
    eventually("run 2", lambda: job.status["run"]["number"] == 2, within=WITHIN)
    eventually("only its Job", lambda: job.names("jobs") == ["prepare-1"], within=WITHIN)
    assert job.status["history"][0]["outcome"] == "Superseded"
    assert job.names("configmaps") == ["run-spec-1", "run-spec-1", "run-spec-2"]


def test_status_removed_by_hand_is_rebuilt(job: Job, operator: OperatorProcess) -> None:
    walk_to_training(job)
    jobs, run = job.uids("jobs"), job.status["run"]
    removal = ["--type=json", "-p", '[{"op": "remove", "path": "/status"}]']
    who = ["ftj", "bot", "-n", job.namespace, "--subresource=status"]
    job.api.kubectl("patch", *who, *removal)
    job.reach("Training")
    assert job.status["run"] == run and job.uids("jobs") == jobs
    assert job.condition_of("Prepared") == "True/DataReady"


def test_unschedulable_gang_fails_the_run(job: Job, operator: OperatorProcess) -> None:
    template = {"spec": {"nodeSelector": {"no": "such-node"}}}
    job.apply(compute={"podTemplate": template}, scheduling={"startDeadlineSeconds": 3})
    job.end("prepare", prepared=PREPARED)
    job.reach("Failed")
    failure = job.status["failure"]
    assert failure["reason"] == "Unschedulable" and "0/2 nodes are available" in failure["message"]


def test_a_quota_is_named_in_seconds(job: Job, operator: OperatorProcess) -> None:
    meta = {"name": "none", "namespace": job.namespace}
    none = {"apiVersion": "v1", "kind": "ResourceQuota", "spec": {"hard": {"pods": "0"}}}
    job.api.apply({**none, "metadata": meta})
    job.apply()

    def named() -> bool:
        found = {c["type"]: c["message"] for c in job.status["conditions"]}
        return "exceeded quota: none" in found["Prepared"]

    eventually("the quota is named", named, within=WITHIN)
    assert job.condition_of("Prepared") == "False/PodsNotCreated"


def test_rules_for_failures_with_the_real_job_controller(
    job: Job, operator: OperatorProcess
) -> None:
    """A rule retries what ends a Job, avoids a node, and ends what a Job would retry."""
    rules = [{"class": "Diverged", "action": "Gang"}]
    walk_to_training(job, failurePolicy={"rules": rules, "maxRestarts": 5})

    def fail(code: int, failure_class: str, reason: str, revision: int) -> str:
        said = {"class": failure_class, "reason": reason, "message": "m", "retryable": code >= 20}
        pod = job.running("train", 2)[0]
        job.end_pods([pod], "train", code, failure=said)
        eventually(
            f"revision {revision}",
            lambda: job.status["run"]["revision"] == revision,
            within=WITHIN,
        )
        return str(pod["spec"]["nodeName"])

    fail(13, "Diverged", "LossNotFinite", 2)
    ended = next(j for j in job.all("jobs") if j["metadata"]["name"].endswith("train-1"))
    assert "PodFailurePolicy" in [c["reason"] for c in ended["status"]["conditions"]]
    job.reach("Training")
    assert job.status["faults"] == 1 and job.status["incidents"][0]["action"] == "Gang"

    job.patch(failurePolicy={"rules": [{"class": "NodeFailure", "action": "Elsewhere"}]})
    node = fail(20, "NodeFailure", "DeviceFault", 3)
    job.reach("Training")
    assert [n["node"] for n in job.status["avoidedNodes"]] == [node]
    assert node not in {p["spec"]["nodeName"] for p in job.running("train", 2)}

    job.patch(failurePolicy={"rules": [{"class": "Storage", "action": "End"}]})
    fail(21, "Storage", "StorageUnreachable", 3)
    job.reach("Failed")
    assert job.status["failure"]["reason"] == "StorageUnreachable"


def test_a_template_refused_by_kubernetes(job: Job, operator: OperatorProcess) -> None:
    template = {"spec": {"tolerations": [{"operator": "Sometimes"}]}}
    job.apply(compute={"podTemplate": template})
    job.end("prepare", prepared=PREPARED)
    job.reach("Failed")
    assert job.condition_of("Failed") == "True/ChildRefused"
    assert "tolerations" in job.status["failure"]["message"]


def test_a_webhook_that_fails_is_shown_until_it_works_again(
    job: Job, operator: OperatorProcess
) -> None:
    name = f"down-{job.namespace}"
    job.api.apply(
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": name},
            "webhooks": [
                {
                    "name": "down.example.com",
                    "clientConfig": {"url": "https://127.0.0.1:1/"},
                    "rules": [
                        {
                            "apiGroups": ["batch"], "apiVersions": ["v1"], "resources": ["jobs"],
                            "operations": ["CREATE"],
                        }
                    ],
                    "namespaceSelector": {
                        "matchLabels": {"kubernetes.io/metadata.name": job.namespace}
                    },
                    "sideEffects": "None",
                    "admissionReviewVersions": ["v1"],
                }
            ],
        }
    )  # fmt: skip

    def refused() -> bool:
        found = [c for c in job.status.get("conditions", ()) if c["type"] == "Prepared"]
        return bool(found) and "500" in found[0]["message"] and "webhook" in found[0]["message"]

    try:
        job.apply()
        eventually("the refusal is shown", refused, within=WITHIN)
        assert job.condition_of("Prepared") == "False/ChildRefused"
    finally:
        job.api.kubectl("delete", "validatingwebhookconfiguration", name)
    job.running("prepare", 1, within=2 * WITHIN)
    job.reach("Preparing")


def test_objects_of_another_namespace_are_no_children(job: Job, operator: OperatorProcess) -> None:
    """Someone who may write into another namespace copies the labels of this job's children."""
    walk_to_training(job)
    other, attacker = f"{job.namespace}-x", []
    job.api.kubectl("create", "namespace", other)
    for kind in ("configmaps", "jobs"):
        for child in job.all(kind):
            copied = {k: child[k] for k in ("apiVersion", "kind", "data", "spec") if k in child}
            meta = {k: child["metadata"].get(k, {}) for k in ("name", "labels", "annotations")}
            if kind == "configmaps":
                meta["labels"][names.LABEL_RUN] = "9-" + meta["labels"][names.LABEL_RUN][2:]
            else:
                template = copied["spec"]["template"]
                copied["spec"] = {"suspend": True, "template": template}
                template["metadata"] = {}
            attacker.append(meta["name"])
            job.api.apply({**copied, "metadata": meta | {"namespace": other}})
    job.patch(suspend=True)
    job.reach("Suspended")
    job.patch(suspend=False)
    job.running("train", 2)
    job.reach("Training")
    assert job.status["run"]["number"] == 1
    left = [o["metadata"]["name"] for o in job.api.get("jobs", "-n", other)["items"]]
    assert len(attacker) == 3 and sorted(left) == sorted(n for n in attacker if "spec" not in n)
    job.api.kubectl("delete", "namespace", other)


def test_suspended_queue_job_is_left_to_kueue(job: Job, operator: OperatorProcess) -> None:
    job.apply(scheduling={"queueName": "gpus"})
    job.end("prepare", prepared=PREPARED)
    job.reach("Queued")
    train = next(j for j in job.all("jobs") if "train" in j["metadata"]["name"])
    assert train["metadata"]["labels"][names.LABEL_QUEUE] == "gpus"
    assert train["spec"]["suspend"] is True
    name = train["metadata"]["name"]
    admit = '{"spec": {"suspend": false}}'
    job.api.kubectl("patch", "job", name, "-n", job.namespace, "--type=merge", "-p", admit)
    job.running("train", 2)
    job.reach("Training")


def test_a_job_waits_for_the_model_of_another(job: Job, operator: OperatorProcess) -> None:
    model = {"fineTuneJobRef": {"name": "bot"}}
    follower = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "next", "namespace": job.namespace},
        "spec": spec(compute={"gpusPerNode": 0}) | {"model": model},
    }
    job.api.apply(follower)

    def status() -> Any:
        return job.api.get("ftj", "next", "-n", job.namespace).get("status", {})

    def said() -> str:
        return str(next((c["message"] for c in status().get("conditions", ())), ""))

    eventually("it waits", lambda: "there is no FineTuneJob bot" in said(), within=WITHIN)
    assert job.names("jobs") == job.names("configmaps") == []
    walk_to_training(job)
    eventually("it sees the other", lambda: "bot is Training" in said(), within=WITHIN)
    job.end("train", count=2, trained=TRAINED)
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    eventually("it begins", lambda: status().get("phase") == "Preparing", within=WITHIN)
    run = job.status["run"]
    assert status()["run"]["base"]["run"] == run["id"]
    assert status()["run"]["base"]["uri"] == run["output"]


def test_ttl_and_deletion(job: Job, operator: OperatorProcess) -> None:
    walk_to_training(job, childrenTTLSecondsAfterFinished=0)
    job.end("train", count=2, trained=TRAINED)
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    eventually("children are gone", lambda: not job.names("jobs"), within=WITHIN)
    assert job.names("configmaps") == ["run-spec-1"] and job.names("services") == []
    eventually("policies are gone", lambda: not job.names("networkpolicies"), within=WITHIN)
    assert job.status["phase"] == "Complete"
    job.api.kubectl("delete", "ftj", "bot", "-n", job.namespace)
    eventually("the run spec is gone", lambda: not job.names("configmaps"), within=WITHIN)


def test_sigterm_ends_cleanly(operator: OperatorProcess) -> None:
    assert operator.stop() == 0
    operator.start()
