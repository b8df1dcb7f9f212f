"""Objects that the chart renders for various values."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.conftest import CHART, helm, of_kind, one, render
from chart.rights import documented_rights, rights
from finetune_api import names
from finetune_api.crd import crd
from finetune_operator import watch
from finetune_operator.__main__ import options
from finetune_operator.config import NetworkAccess

ROOT = Path(__file__).resolve().parents[2]

ALL_ON = (
    "replicas=2",
    "managedBy=blue",
    "monitoring.enabled=true",
    "monitoring.labels.release=prometheus",
    "watchNamespaces={team-a,team-b}",
    "imagePullSecrets[0].name=pull",
    "trainer.image.pullPolicy=Always",
    "trainer.modelCache.path=/mnt/nvme/finetune",
    "priorityClassName=high",
    "nodeSelector.pool=cpu",
    "tolerations[0].operator=Exists",
    "extraEnv[0].name=HTTPS_PROXY",
    "extraEnv[0].value=http://proxy:3128",
    "podLabels.team=ml",
    "podAnnotations.note=x",
    "serviceAccount.annotations.role=x",
    "service.annotations.note=x",
)
SETS = {
    "default": (),
    "all on": ALL_ON,
    "all off": (
        "crds.enabled=false",
        "rbac.create=false",
        "rbac.aggregateToDefaultRoles=false",
        "serviceAccount.create=false",
        "leaderElection.enabled=false",
        "replicas=1",
        "podDisruptionBudget.enabled=false",
    ),
}


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_lint(sets: tuple[str, ...]) -> None:
    values = [part for value in sets for part in ("--set", value)]
    helm("lint", "--strict", CHART, *values)


def test_versions_agree() -> None:
    """Chart, operator, trainer and API have one version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    versions = {
        tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]["version"]
        for part in ("crds", "operator", "trainer-image")
    }
    assert versions == {chart["appVersion"]} == {chart["version"]}


# --- the CustomResourceDefinition ----------------------------------------------------------------


def test_the_crd_is_the_generated_one() -> None:
    rendered = one(render(), "CustomResourceDefinition")
    assert rendered["spec"] == crd()["spec"]
    assert rendered["metadata"]["name"] == crd()["metadata"]["name"]


def test_crds_keep_sets_the_resource_policy() -> None:
    kept = one(render(), "CustomResourceDefinition")["metadata"]
    assert kept["annotations"] == {"helm.sh/resource-policy": "keep"}
    dropped = one(render("crds.keep=false"), "CustomResourceDefinition")["metadata"]
    assert "annotations" not in dropped


def test_the_crd_can_be_left_out() -> None:
    assert not of_kind(render("crds.enabled=false"), "CustomResourceDefinition")


# --- permissions ---------------------------------------------------------------------------------

RIGHTS, LEADER = documented_rights()


def test_cluster_wide_permissions() -> None:
    objects = render("rbac.aggregateToDefaultRoles=false")
    assert rights(one(objects, "ClusterRole")) == RIGHTS
    assert rights(one(objects, "Role")) == LEADER
    for binding in of_kind(objects, "ClusterRoleBinding") + of_kind(objects, "RoleBinding"):
        assert binding["subjects"] == [
            {
                "kind": "ServiceAccount",
                "name": "rel-finetune-operator",
                "namespace": "finetune-system",
            }
        ]


def test_permissions_cover_what_the_operator_watches_and_creates() -> None:
    for group, _, plural in watch.RESOURCES.values():
        assert RIGHTS[group, plural] >= {"list", "watch"}
    for kind in ("ConfigMap", "NetworkPolicy", "Service", "Job"):
        group, _, plural = watch.RESOURCES[kind]
        assert RIGHTS[group, plural] >= {"get", "create", "delete"}


def test_permissions_are_limited_to_the_operators_lease() -> None:
    role = one(render("leaderElection.leaseName=mine"), "Role")
    (named,) = (rule for rule in role["rules"] if "create" not in rule["verbs"])
    assert named["resourceNames"] == ["mine"]


def test_namespaced_permissions() -> None:
    objects = render("watchNamespaces={team-a,team-b}", "rbac.aggregateToDefaultRoles=false")
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")
    roles = {r["metadata"]["namespace"]: r for r in of_kind(objects, "Role")}
    assert rights(roles["team-a"]) == rights(roles["team-b"]) == RIGHTS
    assert set(roles) == {"team-a", "team-b", "finetune-system"}
    bound = {b["metadata"]["namespace"] for b in of_kind(objects, "RoleBinding")}
    assert bound == set(roles)


def test_the_release_namespace_may_be_watched() -> None:
    objects = render("watchNamespaces={finetune-system}")
    role_names = [r["metadata"]["name"] for r in of_kind(objects, "Role")]
    assert sorted(role_names) == ["rel-finetune-operator", "rel-finetune-operator-leader"]


def test_user_roles_are_not_bound_to_the_operator() -> None:
    objects = render("watchNamespaces={team-a}")
    clusterwide = {r["metadata"]["name"] for r in of_kind(objects, "ClusterRole")}
    assert clusterwide == {"rel-finetune-operator-view", "rel-finetune-operator-edit"}
    assert not of_kind(objects, "ClusterRoleBinding")


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_no_permission_is_a_wildcard_or_reads_secrets(sets: tuple[str, ...]) -> None:
    objects = render(*sets)
    for role in of_kind(objects, "Role") + of_kind(objects, "ClusterRole"):
        for (group, resource), verbs in rights(role).items():
            assert "*" not in {group, resource, *verbs}
            assert resource not in ("secrets", "pods/exec", "pods/proxy", "serviceaccounts/token")
            assert not {"impersonate", "escalate", "bind"} & verbs


# --- the operator's pod --------------------------------------------------------------------------


def pod(*sets: str) -> dict[str, Any]:
    spec: dict[str, Any] = one(render(*sets), "Deployment")["spec"]["template"]["spec"]
    return spec


def test_pod_is_restricted() -> None:
    spec = pod()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_operator_accepts_its_arguments() -> None:
    """The operator's own parser accepts the rendered arguments."""
    read = options(pod()["containers"][0]["args"])
    assert read.config.image == "finetune-trainer:0.1.0"
    assert read.config.image_pull_policy is None
    assert read.config.model_cache is None
    assert (read.namespaces, read.port, read.leader_election) == ((), 8080, True)
    assert (read.lease_namespace, read.lease_name) == ("finetune-system", "rel-finetune-operator")

    more = options(pod(*ALL_ON, "service.port=9000")["containers"][0]["args"])
    assert more.namespaces == ("team-a", "team-b")
    assert more.config.image_pull_policy == "Always"
    assert more.config.model_cache == "/mnt/nvme/finetune"
    assert more.port == 9000


@pytest.mark.parametrize(
    ("sets", "operator", "trainer"),
    [
        ((), "finetune-operator:0.1.0", "finetune-trainer:0.1.0"),
        (
            ("image.repository=reg.example.com/op", "trainer.image.tag=0.1.0-cuda"),
            "reg.example.com/op:0.1.0",
            "finetune-trainer:0.1.0-cuda",
        ),
        (
            (f"image.digest=sha256:{'a' * 64}", f"trainer.image.digest=sha256:{'b' * 64}"),
            f"finetune-operator@sha256:{'a' * 64}",
            f"finetune-trainer@sha256:{'b' * 64}",
        ),
    ],
)
def test_images(sets: tuple[str, ...], operator: str, trainer: str) -> None:
    (container,) = pod(*sets)["containers"]
    assert container["image"] == operator
    assert f"--image={trainer}" in container["args"]


def test_values_reach_the_pod() -> None:
    spec = pod(*ALL_ON)
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["priorityClassName"] == "high"
    assert "--managed-by=blue" in spec["containers"][0]["args"]
    assert spec["nodeSelector"] == {"pool": "cpu"}
    assert spec["tolerations"][-1] == {"operator": "Exists"}
    assert spec["containers"][0]["env"] == [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]


def network_policy(*sets: str) -> NetworkAccess | None:
    """The settings of NetworkPolicies that the operator reads from its rendered arguments."""
    return options(pod(*sets)["containers"][0]["args"]).config.network


def test_the_operator_and_stated_peers_read_metrics() -> None:
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "finetune-system"}},
        "podSelector": {
            "matchLabels": one(render(), "Deployment")["spec"]["selector"]["matchLabels"]
        },
    }
    assert network_policy() == NetworkAccess((operator,), ())
    outside = "networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.1/32"
    port = "networkPolicy.egress[0].ports[0].port=53"
    assert network_policy(outside, port) == NetworkAccess(
        (operator, {"ipBlock": {"cidr": "10.0.0.1/32"}}), ({"ports": [{"port": 53}]},)
    )
    assert network_policy("networkPolicy.enabled=false") is None


def test_two_replicas_stand_on_different_nodes_and_leave_dead_ones_soon() -> None:
    deployment = one(render(), "Deployment")
    assert deployment["spec"]["replicas"] == 2
    spec = deployment["spec"]["template"]["spec"]
    assert {t["key"]: t["tolerationSeconds"] for t in spec["tolerations"]} == {
        "node.kubernetes.io/not-ready": 15,
        "node.kubernetes.io/unreachable": 15,
    }
    (spread,) = spec["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"] == deployment["spec"]["selector"]["matchLabels"]
    own = pod("topologySpreadConstraints[0].topologyKey=zone")["topologySpreadConstraints"]
    assert own == [{"topologyKey": "zone"}]


def test_without_leader_election_there_is_only_one_pod() -> None:
    deployment = one(render("leaderElection.enabled=false", "replicas=1"), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    with pytest.raises(RuntimeError, match="replicas"):
        render("leaderElection.enabled=false")


def test_disruption_budget_needs_several_replicas() -> None:
    assert not of_kind(render("replicas=1"), "PodDisruptionBudget")
    budget = one(render(), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1


# --- monitoring ----------------------------------------------------------------------------------


def test_monitors_are_off_by_default() -> None:
    kinds = {o["kind"] for o in render()}
    assert not kinds & {"ServiceMonitor", "PodMonitor"}


def test_the_service_monitor_selects_the_operator() -> None:
    objects = render("monitoring.enabled=true")
    monitor, service = one(objects, "ServiceMonitor"), one(objects, "Service")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    template = one(objects, "Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    ports = [p["name"] for p in template["spec"]["containers"][0]["ports"]]
    assert service["spec"]["ports"][0]["targetPort"] in ports


def test_the_pod_monitor_selects_gangs() -> None:
    spec = one(render("monitoring.enabled=true"), "PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == {
        names.LABEL_NAME: names.APP_NAME,
        names.LABEL_ROLE: "train",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    assert spec["podMetricsEndpoints"][0]["port"] == names.METRICS_PORT_NAME
    assert spec["podTargetLabels"] == [names.LABEL_JOB_NAME, names.LABEL_RUN]
    assert spec["namespaceSelector"] == {"any": True}
    some = one(render(*ALL_ON), "PodMonitor")
    assert some["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert some["metadata"]["labels"]["release"] == "prometheus"


# --- values that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("replicas=many", "replicas"),
        ("replicas=-1", "replicas"),
        ("image.repository=", "repository"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=abc", "digest"),
        ("trainer.image.tagg=1", "tagg"),
        ("crds.enabled=1", "crds"),
        ("watchNamespaces=team-a", "watchNamespaces"),
        ("watchNamespaces={Team A}", "watchNamespaces"),
        ("logLevel=LOUD", "logLevel"),
        ("service.port=70000", "port"),
        ("monitoring.interval=often", "interval"),
        ("extraEnv[0].value=x", "extraEnv"),
        ("podDisruptionBudget.maxUnavailable=half", "maxUnavailable"),
        ("trainerImage=x", "trainerImage"),
        ("networkPolicy.metricsFrom[0].cidr=10.0.0.1/32", "cidr"),
        ("networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.1", "cidr"),
        ("networkPolicy.egress[0].ports[0].protocol=tcp", "protocol"),
    ],
)
def test_wrong_values_are_refused(value: str, complaint: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)schema.*{complaint}"):
        render(value)


def test_schema_and_values_have_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(keys(values, schema)) == set(properties(schema)) - {"global", "resources.claims"}


def keys(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{path}{name}"
        below = schema["properties"][name]
        if isinstance(value, dict) and "properties" in below:
            yield from keys(value, below, f"{path}{name}.")


def properties(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, below in schema.get("properties", {}).items():
        yield f"{path}{name}"
        yield from properties(below, f"{path}{name}.")


def test_an_old_kubernetes_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"requires kubeVersion: >=1\.31"):
        helm("template", "rel", CHART, "--kube-version", "v1.30.0")


def test_the_right_to_read_workloads_is_given_on_request_alone() -> None:
    assert not any("kueue" in o["metadata"]["name"] for o in render())
    rule = {"apiGroups": ["kueue.x-k8s.io"], "resources": ["workloads"], "verbs": ["list"]}
    assert one(render("kueue.enabled=true"), "ClusterRole", "-kueue")["rules"] == [rule]
    objects = render("kueue.enabled=true", "watchNamespaces={team-a,team-b}")
    made = [o for o in objects if o["metadata"]["name"].endswith("-kueue")]
    assert {o["kind"] for o in made} == {"Role", "RoleBinding"}
    roles = of_kind(made, "Role")
    assert [o["metadata"]["namespace"] for o in roles] == ["team-a", "team-b"]
    assert all(role["rules"] == [rule] for role in roles)


def test_the_right_to_read_nodes_is_given_on_request_alone() -> None:
    assert not any("nodes" in o["metadata"]["name"] for o in render())
    objects = render("nodeConditions.enabled=true", "watchNamespaces={team-a}")
    rule = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}
    assert one(objects, "ClusterRole", "-nodes")["rules"] == [rule]
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    told = "--node-conditions=Gpu*,SysLogsXID*,KernelDeadlock,ReadonlyFilesystem"
    assert told in container["args"]
