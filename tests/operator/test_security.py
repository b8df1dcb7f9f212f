"""On a real API server with the chart: the operator's rights are those of docs/security.md and of
the audit log of a job's whole life, and the pods of jobs meet the pod security standard
*restricted*."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from operator_job import WITHIN, Job, walk_to_training
from operator_process import OperatorProcess
from operator_world import CONFIG, PUBLISHED, TRAINED, World

from chart.conftest import CHART, helm, one, render
from chart.rights import Rights, documented_rights, rights
from cluster.api import eventually
from cluster.audit import Audit
from cluster.control_plane import ControlPlane
from finetune_api import names
from finetune_operator.children.overlay import lay_over
from finetune_operator.children.render import render as render_children
from finetune_operator.config import HISTORY, Config
from finetune_operator.decision.plan import Create, Plan

SYSTEM = "finetune-system"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:rel-finetune-operator"
BLOCK_DELETION = ("finetune-operator.dev", "finetunejobs/finalizers")
"""No request, but checked by the API server when children are created."""


RARELY: Rights = {
    ("", "configmaps"): {"get"},
    ("", "services"): {"get"},
    ("batch", "jobs"): {"get", "patch"},
    ("networking.k8s.io", "networkpolicies"): {"get", "patch"},
}
"""Rights for what no undisturbed job needs: get a child whose creation was not answered
(``test_api_faults``), end the Job of a run that fails while pods run (``test_not_started``), and
change the NetworkPolicies of running gangs to other settings (``test_network_policy``)."""


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(tmp_path_factory.mktemp("audit"), [ACCOUNT])


@pytest.fixture(scope="module")
def plane(audit: Audit) -> Iterator[ControlPlane]:
    """An audited control plane with the chart."""
    strict = "--enable-admission-plugins=OwnerReferencesPermissionEnforcement"
    flags = {"kube-apiserver": [*audit.flags, strict]}
    with ControlPlane(kwok_nodes=1, flags=flags) as plane:
        place = ("--kubeconfig", plane.kubeconfig, "--namespace", SYSTEM, "--create-namespace")
        helm("install", "rel", CHART, *place)
        # The plugin learns about new kinds within half a minute; until then it refuses children.
        eventually("the kind is known", lambda: make_child(plane, ACCOUNT), within=120)
        yield plane


def make_child(plane: ControlPlane, user: str) -> str:
    """Make a child that blocks the deletion of its job, as a dry run.

    Raises:
        RuntimeError: the API server's refusal.
    """
    owner = {
        "apiVersion": names.API_VERSION, "kind": names.KIND, "name": "bot", "uid": "u",
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
    meta = {"name": "child", "namespace": "default", "ownerReferences": [owner]}
    child = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta})
    create = ("apply", "--server-side", "--dry-run=server", "-f", "-")
    return plane.kubectl(*create, "--as", user, stdin=child)


@pytest.fixture(scope="module")
def operator(
    plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """The operator with the chart's arguments, as the chart's service account."""
    (container,) = one(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    own = ("--port", "--image=")
    arguments = [a for a in container["args"] if not a.startswith(own)]
    log = tmp_path_factory.mktemp("operator") / "log"
    account = plane.kubeconfig_of("operator", ACCOUNT)
    with OperatorProcess(account, log, *arguments, "--progress", "direct") as process:
        yield process


@pytest.fixture
def lived(plane: ControlPlane, audit: Audit, operator: OperatorProcess) -> Rights:
    """The rights that the operator used in the whole life of a job."""
    late = Job(plane, "without-pods")
    no_pods = {"metadata": {"name": "none", "namespace": late.namespace}}
    plane.apply({"apiVersion": "v1", "kind": "ResourceQuota", **no_pods} | quota())
    late.apply()
    job = Job(plane, "rights")
    walk_to_training(job, childrenTTLSecondsAfterFinished=0)
    job.end("train", count=2, trained=TRAINED)
    job.end("publish", published=PUBLISHED)
    job.reach("Complete")
    for kind in ("jobs", "services", "networkpolicies"):
        eventually(f"{kind} are deleted", lambda kind=kind: not job.all(kind), within=WITHIN)
    remember_later_run(job)
    eventually("the old run spec is deleted", lambda: len(job.all("configmaps")) == 1)
    eventually("the quota is shown", lambda: "quota" in json.dumps(late.status), within=120)
    assert operator.stop() == 0
    used: Rights = {}
    for asked in audit.requests():
        assert asked.code != 403, asked
        used.setdefault((asked.group, asked.resource), set()).update(asked.needed)
    return used


def quota() -> dict[str, Any]:
    return {"spec": {"hard": {"pods": "0"}}}


def remember_later_run(job: Job) -> None:
    """Store the run spec of a later run, with which the first run is beyond the history."""
    (stored,) = job.all("configmaps")
    kept = ("labels", "annotations", "ownerReferences", "namespace")
    meta = {key: stored["metadata"][key] for key in kept} | {"name": "later"}
    run = meta["labels"][names.LABEL_RUN]
    meta["labels"][names.LABEL_RUN] = run.replace("1-", f"{HISTORY + 2}-", 1)
    job.api.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": stored["data"]}
    )


def test_granted_documented_and_used_rights_are_the_same(
    plane: ControlPlane, lived: Rights
) -> None:
    watched, own = documented_rights()
    granted = rights(plane.get("clusterrole", "rel-finetune-operator"))
    assert granted == watched
    assert rights(plane.get("role", "rel-finetune-operator-leader", "-n", SYSTEM)) == own
    del granted[BLOCK_DELETION]
    for about, verbs in RARELY.items():
        assert verbs <= granted[about] and not verbs & lived[about], about
        lived[about] |= verbs
    assert lived == granted | own


def test_children_that_block_deletion_need_the_right_on_finalizers(
    plane: ControlPlane, tmp_path: Path
) -> None:
    """Where the admission plugin is on, as in this control plane."""
    role = plane.get("clusterrole", "rel-finetune-operator")
    lesser = [rule for rule in role["rules"] if BLOCK_DELETION[1] not in rule["resources"]]
    api = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "lesser"}}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "lesser"}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "lesser"}
    plane.apply(
        {**api, "kind": "ClusterRole", "rules": lesser},
        {**api, "kind": "ClusterRoleBinding", "roleRef": reference, "subjects": [subject]},
    )
    make_child(plane, ACCOUNT)
    with pytest.raises(RuntimeError, match="cannot set blockOwnerDeletion"):
        make_child(plane, "lesser")


# --- pod security --------------------------------------------------------------------------------

GPU_POOL = {"key": "gpu", "operator": "Exists"}
TEMPLATE = {
    "metadata": {"labels": {"team": "a"}, "annotations": {"note": "x"}},
    "spec": {
        "affinity": {"podAntiAffinity": {}},
        "dnsConfig": {"searches": ["x.example.com"]},
        "dnsPolicy": "ClusterFirst",
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["s3"]}],
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"gpu": "a100"},
        "schedulingGates": [{"name": "example.com/gate"}],
        "securityContext": {
            "fsGroup": 7, "fsGroupChangePolicy": "Always", "supplementalGroups": [7],
        },
        "tolerations": [GPU_POOL],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "volumes": [
            {"name": "ca", "configMap": {"name": "ca"}},
            {"name": "secret", "secret": {"secretName": "s"}},
            {"name": "claim", "persistentVolumeClaim": {"claimName": "c"}},
            {"name": "disk", "emptyDir": {}},
            {
                "name": "own",
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": ["ReadWriteOnce"],
                            "resources": {"requests": {"storage": "1Gi"}},
                        }
                    }
                },
            },
        ],
        "containers": [
            {
                "name": "trainer",
                "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}],
                "imagePullPolicy": "Always",
                "resources": {"limits": {"example.com/rdma": "1"}},
                "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
            }
        ],
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "template": {"compute": {"podTemplate": TEMPLATE}},
    "gpus": {"compute": {"gpusPerNode": 8, "resources": {"limits": {"memory": "64Gi"}}}},
    "one node": {"compute": {"nodes": 1, "sharedMemory": "16Gi"}},
    "own image": {"compute": {"image": "registry.example.com/own@sha256:" + "a" * 64}},
    "workers": {"prepare": {"workers": 3, "tolerations": [GPU_POOL], "nodeSelector": {"a": "b"}}},
    "claims": {
        "model": {"source": "pvc://models/base"}, "data": {"train": [{"source": "pvc://data/x"}]},
    },
    "account": {"storage": {"secretRef": None, "serviceAccountName": "finetune-s3"}},
    "scheduling": {
        "scheduling": {"schedulerName": "own", "priorityClassName": "urgent"},
        "compute": {"podTemplate": {"spec": {"preemptionPolicy": "Never"}}},
    },
    "queue": {"scheduling": {"queueName": "gpus"}},
}  # fmt: skip
CHOSEN = [c for size in (0, 1, 2, len(OPTIONS)) for c in combinations(OPTIONS, size)]
IPC_LOCK = {"name": "trainer", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}


@pytest.fixture(scope="module")
def restricted(plane: ControlPlane) -> ControlPlane:
    """The control plane with a namespace that enforces the standard."""
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": "restricted", "labels": level}
    account = {"name": "finetune-s3", "namespace": "restricted"}
    plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": meta},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        {
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": "urgent"}, "value": 7, "preemptionPolicy": "Never",
        },
    )  # fmt: skip
    default = ("get", "serviceaccount", "default", "-n", "restricted", "-o", "name")
    eventually("its default account", lambda: plane.kubectl(*default))
    return plane


def refusals(plane: ControlPlane, change: dict[str, Any], config: Config = CONFIG) -> list[str]:
    """The API server's refusals of the pods of a job's stages."""
    world = World()
    world.job["spec"] = lay_over(world.job["spec"], change)
    plan = world.plan()
    create = tuple(Create("Job", role) for role in names.ROLES)
    found = []
    for job in render_children(Plan(plan.subject, plan.run, create=create), config):
        template = job["spec"]["template"]
        meta = {**template["metadata"], "name": "probe"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        path = "/api/v1/namespaces/restricted/pods?dryRun=All&fieldValidation=Strict"
        told = plane.request("POST", path, pod)
        found += [told["message"]] if told["kind"] == "Status" else []
    return found


def test_pods_are_restricted_with_every_option(restricted: ControlPlane) -> None:
    """Every option alone, every two of them, and all."""
    for chosen in CHOSEN:
        change: dict[str, Any] = {}
        for option in chosen:
            change = lay_over(change, OPTIONS[option])
        assert refusals(restricted, change) == [], chosen


@pytest.mark.parametrize(
    ("change", "config", "what"),
    [
        ({"compute": {"podTemplate": {"spec": {"containers": [IPC_LOCK]}}}}, CONFIG, "IPC_LOCK"),
        ({}, replace(CONFIG, model_cache="/mnt/cache"), "hostPath"),
    ],
    ids=["IPC_LOCK", "model cache"],
)
def test_two_options_need_a_namespace_without_the_standard(
    restricted: ControlPlane, change: dict[str, Any], config: Config, what: str
) -> None:
    (told,) = refusals(restricted, change, config)
    assert "violates PodSecurity" in told and what in told
