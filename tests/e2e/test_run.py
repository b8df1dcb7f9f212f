"""Runs from kubectl apply to an evaluated model, and with lost pods, operator and suspension."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from e2e_outside import evaluate_outside, load_adapter, load_merged

from cluster.api import eventually

pytestmark = pytest.mark.e2e

SHORT = {
    "training": {"epochs": None, "maxSteps": 40},
    "evaluation": {"maxSamples": 8, "artefactCheck": "Off"},
}
"""Spec of a short run, for tests that do not check the metrics."""

GAIN = {"Accuracy": 0.3, "Rouge": 0.05}
"""Minimal gain on the quickstart's two tasks."""


OPERATOR_SERIES = (
    "finetune_jobs{", "finetune_job_step{", "finetune_job_loss{", "finetune_job_restarts{",
    "finetune_operator_reconcile_seconds_bucket{", "finetune_operator_reconcile_errors_total",
    "finetune_operator_queue_depth", "finetune_operator_runs_started_total",
    "finetune_operator_runs_finished_total{", "finetune_operator_restarts_total",
    "finetune_operator_gpu_seconds_total{", "finetune_operator_startup_seconds_bucket{",
)  # fmt: skip


def scores(status: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """Map (data set, metric) to the values of (base model, tuned model)."""
    return {
        (m["dataSet"], m["metric"]): (float(m["base"]), float(m["tuned"]))
        for m in status["evaluation"]
    }


def restarts_of_pods(pods: list[dict[str, Any]]) -> dict[str, int]:
    return {
        p["metadata"]["uid"]: sum(c["restartCount"] for c in p["status"]["containerStatuses"])
        for p in pods
    }


def test_a_job_ends_in_an_evaluated_model(platform, manifest_of, tmp_path: Path) -> None:
    name = platform.apply(manifest_of("support-bot", evaluation={"baselines": None}))
    status = platform.wait(name, "Complete")
    assert status["phase"] == "Complete"
    assert status["restarts"] == 0
    assert status["usage"]["gpuSeconds"] == 0
    parts = dict(status["startup"])
    total = parts.pop("totalSeconds")
    assert {"prepareSeconds", "scheduleSeconds", "pullSeconds", "modelSeconds"} <= parts.keys()
    assert 0 < sum(parts.values()) <= total + len(parts), "each is rounded"
    found = scores(status)
    assert ("intent", "Accuracy") in found, status["evaluation"]
    assert found["intent", "Accuracy"][1] > found["intent", "Accuracy"][0] + GAIN["Accuracy"]
    assert found["note", "Rouge"][1] > found["note", "Rouge"][0] + GAIN["Rouge"]
    assert found["intent", "Loss"][1] < found["intent", "Loss"][0]

    uri = status["output"]["uri"]
    assert uri.startswith(f"s3://output/{name}/1-")
    published = {info.uri.removeprefix(f"{uri}/") for info in platform.store.list(f"{uri}/")}
    assert {
        "manifest.json", "metrics.json", "report.html", "README.md",
        "merged/model.safetensors", "merged/config.json", "merged/tokenizer.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    } <= published  # fmt: skip
    for path in published:
        platform.store.download(f"{uri}/{path}", tmp_path / path)
    for entry in ("intent", "note"):
        told = {metric: value[1] for (name_, metric), value in found.items() if name_ == entry}
        data = platform.inputs / f"data/{entry}-test.jsonl"
        again = evaluate_outside(load_merged(tmp_path), tmp_path / "merged", data, entry)
        for metric, value in again.items():
            assert value == pytest.approx(told[metric], rel=1e-3, abs=1e-3), (entry, metric)
    adapter = load_adapter(tmp_path, platform.inputs / "model")
    data = platform.inputs / "data/intent-test.jsonl"
    again = evaluate_outside(adapter, tmp_path / "merged", data, "intent")
    assert again["Loss"] == pytest.approx(found["intent", "Loss"][1], rel=1e-3, abs=1e-3)
    assert again["Accuracy"] == found["intent", "Accuracy"][1]

    # The gang's pods ran on two nodes, and the operator exports the final figures of the run.
    assert len({p["spec"]["nodeName"] for p in platform.pods(name, "train")}) == 2
    page = platform.operator_metrics()
    for series in OPERATOR_SERIES:
        assert f"\n{series}" in page, series
    assert 'finetune_job_test_metric{data_set="intent",metric="Accuracy",model="tuned"' in page

    # The operator adds no finalizers or annotations to the user's object: GitOps sees no drift.
    job = platform.job(name)
    assert not job["metadata"].get("finalizers")
    assert set(job["metadata"].get("annotations", {})) <= {
        "kubectl.kubernetes.io/last-applied-configuration"
    }

    # A finished run stays finished when its children are deleted.
    platform.kubectl("delete", "jobs", "-l", f"finetune-operator.dev/job-name={name}")
    platform.kubectl("annotate", "finetunejob", name, "touched=yes")
    again = platform.wait(name, "Complete")
    assert again["run"] == status["run"]
    assert not platform.pods(name, "train")


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_lost_pod_is_one_incident_and_the_run_resumes(platform, manifest_of, index: int) -> None:
    gpus = {"gpusPerNode": 1, "gpuResourceName": platform.advertise_gpus()}
    spec = {"checkpoint": {"everySteps": 5}, "compute": gpus, **SHORT}
    name = platform.apply(manifest_of(f"lost-{index}", **spec))
    platform.wait_for_step(name, 10)
    (victim,) = [
        p for p in platform.pods(name, "train")
        if p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == str(index)
    ]  # fmt: skip
    platform.kubectl("delete", "pod", victim["metadata"]["name"], "--grace-period=0", "--force")
    status = platform.wait(name, "Complete")
    assert status["restarts"] == 1
    assert status["run"]["attempt"] == 2
    assert status["run"]["number"] == 1
    head = json.loads(platform.store.get(f"{run_uri(status, name)}/HEAD.json"))
    assert head["attempt"] == 2
    assert head["restarts"] == 1
    assert head["released"] is True
    assert head["time"]["seconds"]["recomputed"] > 0
    usage = status["usage"]
    spent = usage["gpuSecondsByClass"]
    assert sum(spent.values()) == usage["gpuSeconds"]
    assert min(spent["productive"], spent["recomputed"], spent["idle"], spent["load"]) > 0, usage
    assert usage["queuedSeconds"] >= 0
    result = json.loads(platform.store.get(f"{run_uri(status, name)}/result.json"))
    steps = [p["step"] for p in result["curve"]]
    assert steps == sorted(set(steps)), "the curve continues from the last checkpoint"
    before, after = scores(status)["intent", "Loss"]
    assert after < before


def run_uri(status: dict[str, Any], name: str) -> str:
    return f"s3://output/{name}/.workspace/runs/{name}/{status['run']['id']}"


def test_killing_the_operator_neither_stops_nor_restarts_a_run(platform, manifest_of) -> None:
    name = platform.apply(manifest_of("unattended", checkpoint={"everySteps": 10}, **SHORT))
    before = platform.wait_for_step(name, 5)
    pods = restarts_of_pods(platform.pods(name, "train"))
    for pod in platform.cluster.get("pods", "-n", "finetune-system")["items"]:
        platform.cluster.kubectl(
            "-n", "finetune-system", "delete", "pod", pod["metadata"]["name"],
            "--grace-period=0", "--force",
        )  # fmt: skip
    eventually(
        "the new operator reports",
        lambda: platform.status(name)["progress"]["step"] > before["progress"]["step"],
        within=120,
    )
    assert restarts_of_pods(platform.pods(name, "train")) == pods
    status = platform.wait(name, "Complete")
    assert status["restarts"] == 0
    assert status["run"]["attempt"] == 1
    assert status["run"]["startTime"] == before["run"]["startTime"]


def a_running_pod(platform, name: str, role: str) -> str | None:
    """Return the name of a running pod of a role, if there is one."""
    pods = platform.pods(name, role)
    names = [p["metadata"]["name"] for p in pods if p["status"]["phase"] == "Running"]
    return names[-1] if names else None


def test_killed_map_and_reduce_pods_do_not_change_prepared_data(platform, manifest_of) -> None:
    """With 3 workers, a killed map pod and a killed reduce pod, the digest and all bytes of the
    prepared data are the same as with one worker."""
    written = []
    for workers in (1, 3):
        name = platform.apply(manifest_of(f"prepare-{workers}", prepare={"workers": workers}))
        for role in ("map", "prepare") if workers > 1 else ():
            # The pod of prepare comes after all map pods, also the one that replaces the killed.
            pod = eventually(
                f"a pod of {role} runs", partial(a_running_pod, platform, name, role), within=180
            )
            platform.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
        status = platform.wait(name, "Prepared")
        assert not status["prepared"]["reused"]
        uri = status["prepared"]["uri"]
        assert uri.startswith(f"s3://output/prepare-{workers}/"), "a workspace of its own"
        files = {info.uri.removeprefix(uri): info for info in platform.store.list(f"{uri}/")}
        written.append(
            (status["prepared"]["digest"],
             {path: platform.store.get(info.uri) for path, info in files.items()})
        )  # fmt: skip
        assert bool(platform.pods(name, "map")) == (workers > 1)
        platform.delete(name)
    assert written[0] == written[1]


def test_an_operator_outside_the_cluster_reads_progress_through_the_api_server(
    platform, manifest_of
) -> None:
    platform.scale_operator(0)
    with platform.operator_outside():
        name = platform.apply(manifest_of("outside", **SHORT))
        first = platform.wait_for_step(name, 1, committed=False)
        assert first["progress"]["totalSteps"] == 40
        platform.wait_for_step(name, first["progress"]["step"] + 5, committed=False)
        platform.delete(name)
    platform.scale_operator(1)


def test_suspend_saves_a_checkpoint_and_resume_continues(platform, manifest_of) -> None:
    name = platform.apply(manifest_of("paused", checkpoint={"everySeconds": 3600}, **SHORT))
    eventually(
        "training",
        lambda: platform.status(name).get("progress", {}).get("step", 0) >= 5,
        within=240,
    )
    platform.kubectl(
        "patch", "finetunejob", name, "--type=merge", "-p", '{"spec":{"suspend":true}}'
    )
    platform.wait(name, "Suspended")
    eventually("no pod is left", lambda: not running(platform.pods(name, "train")), within=90)
    head = json.loads(platform.store.get(f"{run_uri(platform.status(name), name)}/HEAD.json"))
    assert head["released"] is True
    assert head["checkpoints"][0]["step"] >= 5
    platform.kubectl(
        "patch", "finetunejob", name, "--type=merge", "-p", '{"spec":{"suspend":false}}'
    )
    status = platform.wait(name, "Complete")
    assert status["restarts"] == 0
    assert status["run"]["attempt"] == 2


def running(pods: list[dict[str, Any]]) -> list[str]:
    return [p["metadata"]["name"] for p in pods if p["status"]["phase"] in ("Pending", "Running")]
