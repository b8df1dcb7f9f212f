"""Rendered objects: valid names, one label set, one owner, restricted pods, an immutable run
spec."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import CONFIG, World, at_training

from finetune_api import names
from finetune_api.podtemplate import template_problems
from finetune_api.run_spec import parse_run_spec
from finetune_operator.children.overlay import lay_over
from finetune_operator.children.render import render
from finetune_operator.config import GRACE_SECONDS, PUBLISH_BACKOFF_LIMIT, STAGE_BACKOFF_LIMIT
from finetune_operator.decision.plan import Create, Plan

LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
VALUE = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")

ALL = (
    Create("ConfigMap"),
    Create("NetworkPolicy"),
    Create("Job", "prepare"),
    Create("Service", "train"),
    Create("Job", "train"),
    Create("Job", "publish"),
)


def rendered(world: World, create: tuple[Create, ...] = ALL) -> list[dict[str, Any]]:
    plan = world.plan()
    return render(Plan(plan.subject, plan.run, create=create), CONFIG)


def pod_of(world: World, role: str) -> dict[str, Any]:
    found: dict[str, Any] = rendered(world, (Create("Job", role),))[0]["spec"]["template"]["spec"]
    return found


def args_of(world: World, role: str) -> list[str]:
    found: list[str] = pod_of(world, role)["containers"][0]["args"]
    return found


def env_of(world: World, role: str) -> dict[str, Any]:
    env = pod_of(world, role)["containers"][0]["env"]
    names_ = [e["name"] for e in env]
    assert len(names_) == len(set(names_)), "duplicate name: the API server would refuse the apply"
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in env}


@settings(max_examples=150, deadline=None)
@given(name=st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?", fullmatch=True))
def test_names_and_labels_are_valid_for_any_job_name(name: str) -> None:
    world = World()
    world.job["metadata"]["name"] = name
    for obj in rendered(world):
        meta = obj["metadata"]
        assert LABEL.match(meta["name"]) and len(meta["name"]) <= 63 - len("-1023")
        assert meta["name"][0].isalpha(), "a Service's name begins with a letter"
        for value in meta["labels"].values():
            assert len(value) <= 63 and VALUE.match(value), value


@settings(max_examples=30, deadline=None)
@given(nodes=st.integers(1, 64), gpus=st.integers(0, 8), secret=st.booleans())
def test_rendering_is_deterministic_owned_and_labelled(nodes: int, gpus: int, secret: bool) -> None:
    more: dict[str, Any] = {"compute": {"nodes": nodes, "gpusPerNode": gpus}}
    world = World(**more)
    if not secret:
        world.job["spec"]["storage"] = {"serviceAccountName": "s3-writer"}
    objects = rendered(world)
    assert json.dumps(objects) == json.dumps(rendered(world))
    for obj in objects:
        meta = obj["metadata"]
        assert meta["ownerReferences"] == [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": "bot",
                "uid": world.job["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
        assert {
            names.LABEL_MANAGED_BY, names.LABEL_NAME, names.LABEL_JOB_UID, names.LABEL_JOB_NAME,
            names.LABEL_RUN, names.LABEL_REVISION,
        } <= meta["labels"].keys()  # fmt: skip


@pytest.mark.parametrize("role", names.ROLES)
def test_pods_are_restricted_and_write_to_empty_dirs_only(role: str) -> None:
    pod = pod_of(World(), role)
    container = pod["containers"][0]
    assert pod["automountServiceAccountToken"] is False
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {v["name"]: v for v in pod["volumes"]}
    writable = [m for m in container["volumeMounts"] if not m.get("readOnly")]
    assert all("emptyDir" in volumes[m["name"]] for m in writable)
    assert {m["mountPath"] for m in writable} >= {names.SCRATCH, "/tmp"}
    assert container["terminationMessagePath"] == names.TERMINATION_PATH
    commands = {"train": ["supervise"], "map": ["prepare", "--map"]}
    assert container["args"] == commands.get(role, [role])
    for toleration in pod["tolerations"]:
        assert toleration["tolerationSeconds"] <= 60


def test_the_gangs_job_and_service() -> None:
    world = World(compute={"nodes": 3, "gpusPerNode": 4, "sharedMemory": "8Gi"})
    job = rendered(world, (Create("Job", "train"),))[0]
    service = rendered(world, (Create("Service", "train"),))[0]
    body = job["spec"]
    assert (body["completionMode"], body["completions"], body["parallelism"]) == ("Indexed", 3, 3)
    assert body["backoffLimit"] == 2**31 - 1
    assert "suspend" not in body
    pod = body["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert service["spec"]["publishNotReadyAddresses"] and service["spec"]["clusterIP"] == "None"
    labels = body["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    shm = next(v for v in pod["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    env = env_of(world, "train")
    assert env[names.ENV_NODES] == "3" and env[names.ENV_PROCESSES] == "4"
    name = job["metadata"]["name"]
    assert env[names.ENV_RENDEZVOUS] == f"{name}-0.{name}:29400"
    assert env[names.ENV_GRACE_SECONDS] == str(pod["terminationGracePeriodSeconds"])
    assert int(env[names.ENV_GRACE_SECONDS]) == GRACE_SECONDS
    assert "job-completion-index" in env[names.ENV_NODE_RANK]["fieldRef"]["fieldPath"]


def test_map_is_an_indexed_job_of_workers() -> None:
    world = World(prepare={"workers": 4})
    (job,) = rendered(world, (Create("Job", "map"),))
    body = job["spec"]
    assert body["completionMode"] == "Indexed"
    assert (body["completions"], body["parallelism"]) == (4, 4)
    assert (body["backoffLimitPerIndex"], body["maxFailedIndexes"]) == (STAGE_BACKOFF_LIMIT, 0)
    assert "backoffLimit" not in body, "one failed worker ends the stage, not only its index"
    assert names.ENV_WORKER not in env_of(world, "map"), "the Job controller sets it"
    assert args_of(world, "map") == ["prepare", "--map"]


@pytest.mark.parametrize(("workers", "args"), [(1, ["prepare"]), (4, ["prepare", "--reduce"])])
def test_prepare_is_one_pod_that_does_all_or_reduces(workers: int, args: list[str]) -> None:
    world = World(prepare={"workers": workers})
    for job in rendered(world, (Create("Job", "prepare"), Create("Job", "publish"))):
        assert "completionMode" not in job["spec"] and job["spec"]["completions"] == 1
        role = job["metadata"]["labels"][names.LABEL_ROLE]
        limits = {"prepare": STAGE_BACKOFF_LIMIT, "publish": PUBLISH_BACKOFF_LIMIT}
        assert job["spec"]["backoffLimit"] == limits[role]
    assert args_of(world, "prepare") == args and args_of(world, "publish") == ["publish"]


def test_final_codes_fail_the_job_and_disruption_and_fencing_do_not() -> None:
    rules = rendered(World(), (Create("Job", "train"),))[0]["spec"]["podFailurePolicy"]["rules"]
    failing = {v for r in rules if r["action"] == "FailJob" for v in r["onExitCodes"]["values"]}
    assert failing == set(names.FINAL_EXIT_CODES) - {16}
    ignored = [r for r in rules if r["action"] == "Ignore"]
    assert ignored[0]["onExitCodes"]["values"] == [16]
    assert ignored[1]["onPodConditions"][0]["type"] == "DisruptionTarget"


def test_the_run_spec_is_immutable_and_holds_every_default() -> None:
    config_map = rendered(World(), (Create("ConfigMap"),))[0]
    assert config_map["immutable"] is True
    run_spec = parse_run_spec(config_map["data"][names.RUN_SPEC_KEY])
    assert run_spec.spec.training.batch_size == 32
    assert json.loads(config_map["data"][names.RUN_SPEC_KEY])["spec"]["training"]["batchSize"] == 32


def test_credentials_go_by_reference_per_storage_profile() -> None:
    world = World()
    other = {"endpoint": "http://other:9000", "secretRef": {"name": "other"}}
    world.job["spec"]["data"]["train"][0]["storage"] = other
    env = env_of(world, "prepare")
    assert env[names.storage_env(0, "AWS_ACCESS_KEY_ID")] == {
        "secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}
    }
    assert env[names.storage_env(1, "AWS_SESSION_TOKEN")] == {
        "secretKeyRef": {"name": "other", "key": "AWS_SESSION_TOKEN", "optional": True}
    }
    assert sum("FINETUNE_STORAGE_" in name for name in env) == 2 * len(names.SECRET_KEYS)


def test_the_judges_key_goes_to_publish_only() -> None:
    judge = {"endpoint": "https://judge.example.com/v1", "model": "wise"}
    world = World(evaluation={"judge": judge | {"secretRef": {"name": "judge"}}})
    assert env_of(world, "publish")[names.ENV_JUDGE_KEY] == {
        "secretKeyRef": {"name": "judge", "key": "API_KEY"}
    }
    for role in ("prepare", "train"):
        assert names.ENV_JUDGE_KEY not in env_of(world, role)
    without = World(evaluation={"judge": judge})
    assert names.ENV_JUDGE_KEY not in env_of(without, "publish")


def test_claims_are_mounted_read_only_for_every_stage() -> None:
    world = World(model={"source": "pvc://weights/qwen"})
    world.job["spec"]["data"]["test"] = [{"source": "pvc://records/test.jsonl"}]
    for role in names.ROLES:
        pod = pod_of(world, role)
        found = {
            v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if "persistentVolumeClaim" in v
        }
        assert found == {"weights", "records"}
        mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
        assert mounts[f"{names.PVC_ROOT}/weights"]["readOnly"] is True


def test_the_model_cache_is_mounted_by_the_gang_only() -> None:
    keeps = replace(CONFIG, model_cache="/mnt/nvme/finetune")
    plan = World().plan()
    for role in names.ROLES:
        (job,) = render(Plan(plan.subject, plan.run, create=(Create("Job", role),)), keeps)
        pod = job["spec"]["template"]["spec"]
        paths = [v["hostPath"] for v in pod["volumes"] if "hostPath" in v]
        variables = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        found = variables.get(names.ENV_MODEL_CACHE)
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        if role == "train":
            assert paths == [{"path": "/mnt/nvme/finetune", "type": "DirectoryOrCreate"}]
            assert mounts[found] == "model-cache"
        else:
            assert not paths and found is None


def test_labels_and_annotations_of_the_template_apply_to_all_stages() -> None:
    """Workload identity and service meshes are chosen by them."""
    meta = {"labels": {"azure.workload.identity/use": "true"}, "annotations": {"mesh": "off"}}
    world = World(compute={"podTemplate": {"metadata": meta}})
    for role in names.ROLES:
        (job,) = rendered(world, (Create("Job", role),))
        template = job["spec"]["template"]["metadata"]
        assert template["labels"]["azure.workload.identity/use"] == "true"
        assert template["labels"][names.LABEL_ROLE] == role
        assert template["annotations"]["mesh"] == "off"


def test_cpu_stages_have_their_own_nodes_and_resources() -> None:
    world = World(
        prepare={
            "resources": {"requests": {"cpu": "8"}},
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "cpu", "operator": "Exists"}],
        },
        compute={"podTemplate": {"spec": {
            "nodeSelector": {"pool": "gpu"}, "imagePullSecrets": [{"name": "pull"}],
            "containers": [{"name": "trainer", "env": [{"name": "HTTPS_PROXY", "value": "p"}],
                            "resources": {"limits": {"rdma/ib": "1"}}}],
        }}},
    )  # fmt: skip
    prepare, train = pod_of(world, "prepare"), pod_of(world, "train")
    assert prepare["nodeSelector"] == {"pool": "cpu"} and train["nodeSelector"] == {"pool": "gpu"}
    assert prepare["containers"][0]["resources"] == {"requests": {"cpu": "8"}}
    assert train["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1", "rdma/ib": "1"}
    for role in names.ROLES:
        assert pod_of(world, role)["imagePullSecrets"] == [{"name": "pull"}]
        assert env_of(world, role)["HTTPS_PROXY"] == "p"


GOOD: list[dict[str, Any]] = [
    {},
    {"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"}}},
    {"spec": {"nodeSelector": {"a": "b"}, "tolerations": [], "affinity": {}}},
    {"spec": {"volumes": [{"name": "ca", "configMap": {"name": "ca"}}]}},
    {"spec": {"containers": [
        {"name": "trainer", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}]}},
    {"spec": {"containers": [
        {"name": "trainer", "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]}]}},
]  # fmt: skip


@pytest.mark.parametrize("template", GOOD)
def test_an_allowed_pod_template_has_no_problems(template: dict[str, Any]) -> None:
    assert template_problems(template) == []


def container(**more: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "trainer", **more}]}}


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"kind": "Pod"}, ".kind"),
        ({"spec": {"hostNetwork": True}}, ".spec.hostNetwork"),
        ({"spec": {"serviceAccountName": "admin"}}, ".spec.serviceAccountName"),
        ({"spec": {"restartPolicy": "Always"}}, ".spec.restartPolicy"),
        ({"spec": {"initContainers": []}}, ".spec.initContainers"),
        ({"spec": {"securityContext": {"runAsUser": 0}}}, ".spec.securityContext.runAsUser"),
        ({"spec": {"volumes": [{"name": "h", "hostPath": {}}]}}, ".spec.volumes[0].hostPath"),
        ({"spec": {"volumes": [{"name": "p", "projected": {}}]}}, ".spec.volumes[0].projected"),
        ({"spec": {"volumes": [{"name": "run-spec", "emptyDir": {}}]}}, ".spec.volumes[0].name"),
        ({"spec": {"volumes": "x"}}, ".spec.volumes"),
        ({"spec": {"containers": [{"name": "sidecar"}]}}, ".spec.containers[0].name"),
        (container(command=["sh"]), ".spec.containers[0].command"),
        (container(args=["sh"]), ".spec.containers[0].args"),
        (container(image="x"), ".spec.containers[0].image"),
        (container(securityContext={"privileged": True}), ".securityContext.privileged"),
        (container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), ".capabilities.add"),
        (container(env=[{"name": "FINETUNE_RUN_SPEC", "value": "x"}]), ".env[0].name"),
        (container(volumeMounts=[{"name": "v", "mountPath": "/etc/finetune"}]), ".mountPath"),
        ({"metadata": {"labels": {names.LABEL_JOB_UID: "x"}}}, ".metadata.labels["),
        ({"metadata": {"name": "x"}}, ".metadata.name"),
        ({"spec": 7}, ".spec"),
        ({"spec": {"containers": None}}, ".spec.containers"),
        (container(env=None), ".env"),
        (container(securityContext={"capabilities": {"add": 5}}), ".capabilities.add"),
        (container(securityContext={"capabilities": {"add": [{}]}}), ".capabilities.add"),
    ],
)
def test_a_forbidden_template_field_is_named_by_its_path(
    template: dict[str, Any], path: str
) -> None:
    problems = template_problems(template)
    assert len(problems) == 1 and path in problems[0].partition(": ")[0]
    assert problems[0].startswith("spec.compute.podTemplate")


def test_an_overlay_replaces_a_variable_whole() -> None:
    base = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    top = [{"name": "A", "valueFrom": {"fieldRef": {}}}, {"name": "C", "value": "3"}]
    assert lay_over(base, top) == [top[0], base[1], top[1]]


def test_decide_does_not_change_its_inputs() -> None:
    world = at_training()
    before = json.dumps([world.job, list(world.objects.values())])
    world.plan()
    assert json.dumps([world.job, list(world.objects.values())]) == before
