"""NetworkPolicies: their rules, and their life beside the Jobs whose pods they protect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from operator_world import (
    CONFIG,
    PREPARED,
    PUBLISHED,
    TRAINED,
    World,
    at_training,
    complete,
    completed,
)

from finetune_api import names
from finetune_operator.__main__ import options
from finetune_operator.config import NetworkAccess
from finetune_operator.world.observe import Refusal, child_key

PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
DNS = {"ports": [{"port": 53, "protocol": "UDP"}]}


def world_with(access: NetworkAccess | None) -> World:
    world = World()
    world.config = replace(CONFIG, network=access)
    return world


def policy(world: World, role: str) -> dict[str, Any]:
    (found,) = (
        p for p in world.of("NetworkPolicy") if p["metadata"]["labels"][names.LABEL_ROLE] == role
    )
    spec: dict[str, Any] = found["spec"]
    return spec


def roles(world: World) -> list[str]:
    return [name.rsplit("-", 2)[1] for name in world.names("NetworkPolicy")]


# --- rules -------------------------------------------------------------------------------------


def test_a_gang_is_open_to_its_own_pods_and_at_the_metrics_port() -> None:
    world = world_with(NetworkAccess(metrics_from=(PROMETHEUS,)))
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    spec, job = policy(world, "train"), world.child("train")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    keys = {names.LABEL_JOB_UID, names.LABEL_RUN, names.LABEL_REVISION, names.LABEL_ROLE}
    assert spec["podSelector"]["matchLabels"].keys() == keys
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["ingress"] == [
        {"from": [{"podSelector": spec["podSelector"]}]},
        {"from": [PROMETHEUS], "ports": [{"port": names.METRICS_PORT, "protocol": "TCP"}]},
    ]
    (owner,) = job["metadata"]["ownerReferences"]
    for made in world.of("NetworkPolicy"):
        assert made["metadata"]["ownerReferences"] == [owner]


def test_without_peers_anyone_may_read_the_metrics_port() -> None:
    assert "from" not in policy(at_training(), "train")["ingress"][1]


@pytest.mark.parametrize("role", ["map", "prepare", "publish"])
def test_a_cpu_stage_accepts_no_connection(role: str) -> None:
    world = World(prepare={"workers": 2 if role == "map" else 1})
    world.settle()
    if role == "publish":
        world.finish("prepare", prepared=PREPARED)
        world.settle()
        world.finish("train", trained=TRAINED)
        world.settle()
    assert policy(world, role)["ingress"] == []
    assert policy(world, role)["policyTypes"] == ["Ingress"]


def test_stated_egress_excludes_all_other_destinations_but_the_gang() -> None:
    world = world_with(NetworkAccess(egress=(DNS,)))
    world.settle()
    prepare = policy(world, "prepare")
    assert (prepare["policyTypes"], prepare["egress"]) == (["Ingress", "Egress"], [DNS])
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    train = policy(world, "train")
    assert train["egress"] == [{"to": [{"podSelector": train["podSelector"]}]}, DNS]


# --- life --------------------------------------------------------------------------------------


def test_the_policy_is_created_before_the_job_whose_pods_it_protects() -> None:
    world = World()
    for role in ("prepare", "train", "publish"):
        created = [(c.kind, c.role) for c in world.settle_and_list()]
        before = created.index(("NetworkPolicy", role))
        assert before < created.index(("Job", role))
        reports = {"prepare": {"prepared": PREPARED}, "train": {"trained": TRAINED}}
        world.finish(role, **reports.get(role, {"published": PUBLISHED}))
    world.settle()
    assert roles(world) == ["prepare", "publish", "train"]


def test_a_policy_lives_as_long_as_its_job_and_its_pods() -> None:
    world = at_training()
    world.edit(compute={"nodes": 1})
    world.pass_()
    assert not [j for j in world.names("Job") if "train" in j], "being deleted"
    assert roles(world) == ["prepare", "train"], "its pods save their state: not open meanwhile"
    world.remove_pods()
    world.settle()
    assert world.names("NetworkPolicy") == ["bot-1-0f9c2-prepare-1", "bot-1-0f9c2-train-2"]


def test_ttl_removes_policies_with_the_jobs() -> None:
    world = completed(childrenTTLSecondsAfterFinished=0)
    world.settle()
    world.remove_pods()
    world.settle()
    assert world.names("Job") == world.names("NetworkPolicy") == []


def test_the_policy_of_a_failed_stage_goes_with_its_job() -> None:
    world = World()
    world.settle()
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "m"}
    world.fail("prepare", 11, **said)
    world.condition("prepare", "Failed")
    world.settle()
    assert world.status["phase"] == "Failed" and roles(world) == ["prepare"]
    world.objects.pop(("Job", "bot-1-0f9c2-prepare-1"))
    world.settle()
    assert roles(world) == []


def test_a_policy_removed_by_hand_is_created_again() -> None:
    world = at_training()
    world.objects.pop(("NetworkPolicy", "bot-1-0f9c2-train-1"))
    jobs = world.names("Job")
    world.settle()
    assert roles(world) == ["prepare", "train"] and world.names("Job") == jobs


def test_other_settings_reach_a_running_gang() -> None:
    world = at_training()
    world.config = replace(CONFIG, network=NetworkAccess(metrics_from=(PROMETHEUS,)))
    world.settle()
    assert policy(world, "train")["ingress"][1]["from"] == [PROMETHEUS]
    assert "from" not in policy(world, "prepare"), "it has ended"
    complete(world)
    assert world.status["phase"] == "Complete"


def test_switched_off_no_policy_is_left() -> None:
    world = at_training()
    world.config = replace(CONFIG, network=None)
    world.settle()
    assert roles(world) == []
    assert not [o for o in world_with(None).pass_().create if o.kind == "NetworkPolicy"]


def test_a_refused_policy_is_shown_and_ends_no_run() -> None:
    world = World()
    name = "bot-1-0f9c2-prepare-1"
    world.refused = {child_key("NetworkPolicy", name): Refusal("NetworkPolicy: 403 forbidden")}
    world.pass_()
    assert world.condition_of("Prepared") == "False/ChildRefused"
    running = at_training()
    key = child_key("NetworkPolicy", "bot-1-0f9c2-train-1")
    running.refused = {key: Refusal("NetworkPolicy: 403 forbidden")}
    running.pass_()
    assert running.status["phase"] == "Training"
    assert "403 forbidden" in running.message("Reconciling")


# --- settings ----------------------------------------------------------------------------------


def test_settings_of_the_command_line() -> None:
    def read(*more: str) -> NetworkAccess | None:
        return options(["--image", "x", *more]).config.network

    assert read() == NetworkAccess()
    assert read("--network-policy", "off") is None
    text = '{"metricsFrom": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "egress": [{}]}'
    assert read("--network-policy", text) == NetworkAccess(
        ({"ipBlock": {"cidr": "10.0.0.1/32"}},), ({},)
    )


@pytest.mark.parametrize("text", ["on", "[]", '{"from": []}', '{"egress": {}}', '{"egress": [1]}'])
def test_wrong_settings_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(["--image", "x", "--network-policy", text])
    assert "--network-policy: off or JSON" in capsys.readouterr().err
