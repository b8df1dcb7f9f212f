"""The chart's ValidatingAdmissionPolicy on a real API server: each rule refuses and accepts.

``spec.managedBy`` selects the release whose policy judges a job: one with the default values, and
one with strict values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chart.conftest import Object, of_kind, one, render
from chart.test_install import SPEC
from cluster.api import eventually
from cluster.control_plane import ControlPlane
from finetune_api.names import API_VERSION, KIND, PLURAL
from finetune_api.podtemplate import template_problems
from finetune_operator.children.overlay import lay_over

STRICT = (
    "managedBy=strict",
    "fullnameOverride=strict",
    "trainer.image.repository=registry.example.com/finetune/trainer",
    "admission.images={registry.example.com/team/*}",
    "admission.serviceAccounts={robot}",
    "admission.priorityClasses={batch-*,low}",
    "admission.modelSources={s3://*}",
    "admission.storageEndpoints={https://s3.example.com}",
    "admission.judgeEndpoints={https://judge.example.com/*,http://judge.models.svc/v1}",
    "admission.volumeTypes={configMap,secret}",
    "admission.capabilities={IPC_LOCK}",
    "admission.deniedTolerations={node-role.kubernetes.io/control-plane,sensitive}",
)
OWN_S3 = {"storage": {"endpoint": "https://s3.example.com"}}
LATE = ("managedBy=late", "fullnameOverride=late")


def template(**spec: Any) -> Object:
    return {"compute": {"podTemplate": {"spec": spec}}}


def container(**fields: Any) -> Object:
    return template(containers=[{"name": "trainer", **fields}])


def data(**access: Any) -> Object:
    source = {"source": "s3://data/x.jsonl", "storage": access}
    return {"data": {"test": [source, {"source": "s3://data/y.jsonl"}]}}


def judge(endpoint: str) -> Object:
    return {"evaluation": {"judge": {"endpoint": endpoint, "model": "wise"}}}


CONTROL_PLANE = {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}
TEMPLATE = "spec.compute.podTemplate"
REFUSED: list[tuple[Object, str]] = [
    ({"compute": {"image": "elsewhere/x:1"}}, "spec.compute.image: elsewhere/x:1"),
    ({"compute": {"image": "finetune-trainer-x:1"}}, "spec.compute.image: finetune-trainer-x:1"),
    ({"storage": {"serviceAccountName": "admin"}}, "spec.storage.serviceAccountName: admin"),
    (
        {"scheduling": {"priorityClassName": "system-node-critical"}},
        "spec.scheduling.priorityClassName: system-node-critical",
    ),
    (
        {"prepare": {"tolerations": [CONTROL_PLANE]}},
        "spec.prepare.tolerations[].key: node-role.kubernetes.io/control-plane",
    ),
    (
        template(tolerations=[{"operator": "Exists"}]),
        f"{TEMPLATE}.spec.tolerations[].key: every key",
    ),
    (template(hostNetwork=True), f"{TEMPLATE}.spec.hostNetwork"),
    (template(hostPID=True, hostIPC=True), f"{TEMPLATE}.spec.hostIPC"),
    (template(initContainers=[{"name": "x"}]), f"{TEMPLATE}.spec.initContainers"),
    (template(serviceAccountName="admin"), f"{TEMPLATE}.spec.serviceAccountName"),
    (template(securityContext={"runAsUser": 0}), f"{TEMPLATE}.spec.securityContext.runAsUser"),
    (
        template(volumes=[{"name": "v", "hostPath": {"path": "/"}}]),
        f"{TEMPLATE}.spec.volumes[].hostPath",
    ),
    (container(command=["sh"]), f"{TEMPLATE}.spec.containers[].command"),
    (
        container(securityContext={"privileged": True}),
        f"{TEMPLATE}.spec.containers[].securityContext.privileged",
    ),
    (
        container(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}),
        f"{TEMPLATE}.spec.containers[].securityContext.capabilities.add: IPC_LOCK",
    ),
    ({"compute": {"podTemplate": {"kind": "Pod"}}}, f"{TEMPLATE}.kind"),
    (judge("https://judge.example.com/v1"), "spec.evaluation.judge.endpoint: https://judge.exam"),
]
ACCEPTED: list[Object] = [
    {},
    {"compute": {"image": "finetune-trainer:0.1.0-cuda"}},
    {"compute": {"image": f"finetune-trainer@sha256:{'a' * 64}"}},
    {"storage": {"serviceAccountName": "finetune-s3"}},
    {"scheduling": {"priorityClassName": "urgent"}},
    {"prepare": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}},
    {"model": {"source": "hf://organisation/model"}},
    {"storage": {"endpoint": "http://anywhere.example.com"}},
    {
        "compute": {
            "podTemplate": {
                "metadata": {"labels": {"team": "a"}},
                "spec": {
                    "nodeSelector": {"gpu": "a100"},
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "securityContext": {"supplementalGroups": [7]},
                    "volumes": [
                        {"name": "a", "configMap": {"name": "ca"}},
                        {"name": "b", "secret": {"secretName": "s"}},
                        {"name": "c", "persistentVolumeClaim": {"claimName": "c"}},
                        {"name": "d", "emptyDir": {}},
                    ],
                    "containers": [{"name": "trainer", "env": [{"name": "A", "value": "b"}]}],
                },
            }
        }
    },
]
STRICTLY_REFUSED: list[tuple[Object, str]] = [
    ({"compute": {"image": "finetune-trainer:1"}}, "spec.compute.image: finetune-trainer:1"),
    ({"storage": {"serviceAccountName": "any"}}, "spec.storage.serviceAccountName: any"),
    ({"scheduling": {"priorityClassName": "urgent"}}, "priorityClassName: urgent"),
    ({"model": {"source": "hf://organisation/model"}}, "spec.model.source: hf://organisation"),
    ({"storage": {"endpoint": "http://x.example.com"}}, "spec.storage.endpoint: http://x.example"),
    ({"storage": {"endpoint": None}}, "spec.storage.endpoint: https://s3.amazonaws.com"),
    (data(endpoint="http://x"), "spec.data.test[].storage.endpoint: http://x"),
    (
        {"model": {"storage": {"region": "eu-1"}}},
        "spec.model.storage.endpoint: https://s3.amazonaws.com",
    ),
    ({"prepare": {"tolerations": [{"key": "sensitive", "operator": "Exists"}]}}, "key: sensitive"),
    (template(volumes=[{"name": "d", "emptyDir": {}}]), f"{TEMPLATE}.spec.volumes[].emptyDir"),
    (
        container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
        "capabilities.add: SYS_ADMIN",
    ),
    (
        judge("https://judge.example.com.evil.example/v1"),
        "spec.evaluation.judge.endpoint: https://judge.example.com.evil.example/v1",
    ),
    (judge("http://judge.models.svc/v2"), "spec.evaluation.judge.endpoint: http://judge.models"),
]
STRICTLY_ACCEPTED: list[Object] = [
    {},
    {"compute": {"image": "registry.example.com/team/own:1"}},
    {"compute": {"image": "registry.example.com/finetune/trainer:2"}},
    {"scheduling": {"priorityClassName": "batch-low"}},
    {"scheduling": {"priorityClassName": "low"}},
    data(endpoint="https://s3.example.com"),
    template(volumes=[{"name": "a", "configMap": {"name": "ca"}}]),
    container(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}),
    judge("https://judge.example.com/v1"),
    judge("http://judge.models.svc/v1"),
]


@pytest.fixture(scope="module")
def api(plane: ControlPlane) -> Iterator[ControlPlane]:
    """The control plane with the policies of both releases in force."""
    made = [one(render(), "CustomResourceDefinition"), *policy(), *policy(*STRICT)]
    plane.apply(*made)
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "admission"}})
    plane.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune-operator.dev")
    for strict in (False, True):
        bad = job({"storage": {"serviceAccountName": "admin"}}, strict)
        eventually("the policy is in force", lambda bad=bad: "not allowed" in answer(plane, bad))
    yield plane
    for obj in [*made, *policy(*LATE)]:  # helm installs its own in other tests
        plane.kubectl("delete", obj["kind"], obj["metadata"]["name"], "--ignore-not-found")


def policy(*sets: str) -> list[Object]:
    objects = render("crds.enabled=false", *sets)  # the policy on deletions comes with the CRD
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    return [one(objects, kind) for kind in kinds]


def job(change: Object, strict: bool = False, name: str = "bot") -> Object:
    spec = lay_over(SPEC, {"managedBy": "strict", **OWN_S3} if strict else {})
    meta = {"name": name, "namespace": "admission"}
    return {
        "apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": lay_over(spec, change),
    }  # fmt: skip


def answer(api: ControlPlane, made: Object) -> str:
    """The API server's refusal of a job; empty: it accepts the job."""
    path = f"/apis/{API_VERSION}/namespaces/admission/{PLURAL}?dryRun=All"
    told = api.request("POST", path, made)
    return str(told["message"]) if told["kind"] == "Status" else ""


@pytest.mark.parametrize(("change", "fault"), REFUSED, ids=[fault for _, fault in REFUSED])
def test_the_default_policy_refuses(api: ControlPlane, change: Object, fault: str) -> None:
    told = answer(api, job(change))
    assert fault in told and "not allowed; allowed: " in told


def test_the_default_policy_accepts(api: ControlPlane) -> None:
    for change in ACCEPTED:
        assert answer(api, job(change)) == "", change


@pytest.mark.parametrize(
    ("change", "fault"), STRICTLY_REFUSED, ids=[fault for _, fault in STRICTLY_REFUSED]
)
def test_a_strict_policy_refuses(api: ControlPlane, change: Object, fault: str) -> None:
    told = answer(api, job(change, strict=True))
    assert fault in told and "not allowed; allowed: " in told and "chart value admission." in told


def test_a_strict_policy_accepts(api: ControlPlane) -> None:
    for change in STRICTLY_ACCEPTED:
        assert answer(api, job(change, strict=True)) == "", change


def test_the_policy_and_the_operator_refuse_the_same_template_fields() -> None:
    """One table (``finetune_api.podtemplate``) is behind both."""
    for change, _ in [*REFUSED, *STRICTLY_REFUSED]:
        pod_template = change.get("compute", {}).get("podTemplate")
        if pod_template and "tolerations" not in pod_template.get("spec", {}):
            narrower = "IPC_LOCK" in json.dumps(pod_template) or "emptyDir" in json.dumps(
                pod_template
            )
            assert bool(template_problems(pod_template)) != narrower, pod_template


def test_a_job_older_than_a_rule_keeps_working_until_its_spec_changes(api: ControlPlane) -> None:
    old = job({"managedBy": "late", "compute": {"image": "elsewhere/x:1"}}, name="old")
    api.apply(old)
    api.apply(*policy(*LATE))
    refused = job({"managedBy": "late", "compute": {"image": "elsewhere/x:1"}})
    eventually("the policy is in force", lambda: "not allowed" in answer(api, refused))
    who = ("ftj", "old", "-n", "admission")
    api.kubectl("annotate", *who, "note=x")
    edit = '{"spec": {"training": {"seed": 7}}}'
    with pytest.raises(RuntimeError, match=r"spec\.compute\.image: elsewhere/x:1 not allowed"):
        api.kubectl("patch", *who, "--type=merge", "-p", edit)
    api.kubectl("delete", *who)


def test_a_large_job_stays_within_the_cost_budget(api: ControlPlane) -> None:
    """Lists of podTemplate have no maximum length; the API server bounds the request's size."""
    many = range(1500)
    volumes = [{"name": f"v{i}", "configMap": {"name": "c"}} for i in many]
    mounts = [{"name": f"v{i}", "mountPath": f"/v/{i}"} for i in many]
    keys = [{"key": f"k{i}", "operator": "Exists"} for i in many]
    sets = [{"source": f"s3://data/{i}.jsonl", **OWN_S3} for i in range(63)]
    large: Object = {
        "data": {"train": sets},
        **template(
            volumes=volumes,
            tolerations=keys,
            containers=[{"name": "trainer", "volumeMounts": mounts}],
        ),
    }
    assert answer(api, job(large, strict=True)) == ""
    large["compute"]["podTemplate"]["spec"]["tolerations"].append({"operator": "Exists"})
    assert "tolerations[].key: every key" in answer(api, job(large, strict=True))


def test_expressions_fit_the_schema(api: ControlPlane) -> None:
    """The API server checks types once a policy's CRD is known."""

    def warnings() -> list[Any] | None:
        found = api.get("validatingadmissionpolicy", "strict").get("status", {})
        return [found.get("typeChecking", {}).get("expressionWarnings", [])] if found else None

    assert eventually("types are checked", warnings) == [[]]


def test_a_namespaced_release_judges_its_namespaces_alone() -> None:
    binding = policy("watchNamespaces={team-a}")[1]
    (asked,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert (asked["key"], asked["values"]) == ("kubernetes.io/metadata.name", ["team-a"])
    (left,) = of_kind(render("admission.enabled=false"), "ValidatingAdmissionPolicy")
    assert left["metadata"]["name"] == "deletion.finetune-operator.dev"
