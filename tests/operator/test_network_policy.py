"""NetworkPolicies: their rules, and their life beside the Jobs whose pods they protect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from operator_world import (
    CONFIG,
    PREPARED,
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


def policy(world: World) -> dict[str, Any]:
    (found,) = world.of("NetworkPolicy")
    spec: dict[str, Any] = found["spec"]
    return spec


# --- rules -------------------------------------------------------------------------------------


def test_a_run_is_open_to_its_gang_and_at_the_metrics_port() -> None:
    world = world_with(NetworkAccess(metrics_from=(PROMETHEUS,)))
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    spec = policy(world)
    selected = spec["podSelector"]["matchLabels"]
    assert selected.keys() == {names.LABEL_JOB_UID, names.LABEL_RUN}
    assert spec["policyTypes"] == ["Ingress"]
    from_gang, metrics = spec["ingress"]
    (peer,) = from_gang.pop("from")
    assert from_gang == {}, "all ports"
    gang = peer["podSelector"]["matchLabels"]
    assert gang == selected | {names.LABEL_ROLE: "train"}
    assert metrics == {
        "from": [PROMETHEUS], "ports": [{"port": names.METRICS_PORT, "protocol": "TCP"}],
    }  # fmt: skip
    labels = {
        role: world.child(role)["spec"]["template"]["metadata"]["labels"].items()
        for role in ("prepare", "train")
    }
    assert all(selected.items() <= of_role for of_role in labels.values())
    assert gang.items() <= labels["train"] and not gang.items() <= labels["prepare"]
    (owner,) = world.child("train")["metadata"]["ownerReferences"]
    (made,) = world.of("NetworkPolicy")
    assert made["metadata"]["ownerReferences"] == [owner]


def test_without_peers_anyone_may_read_the_metrics_port() -> None:
    assert "from" not in policy(at_training())["ingress"][1]


def test_stated_egress_excludes_all_other_destinations_but_the_gang() -> None:
    world = world_with(NetworkAccess(egress=(DNS,)))
    world.settle()
    spec = policy(world)
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == [{"to": spec["ingress"][0]["from"]}, DNS]


# --- life --------------------------------------------------------------------------------------


def test_the_policy_is_created_once_before_any_job() -> None:
    world = World()
    created = [(c.kind, c.role) for c in world.settle_and_list()]
    assert created.index(("NetworkPolicy", None)) < created.index(("Job", "prepare"))
    assert completed().names("NetworkPolicy") == ["bot-1-0f9c2-network"]


def test_the_policy_of_a_run_lives_as_long_as_its_jobs_and_pods() -> None:
    world = at_training()
    world.edit(compute={"nodes": 1})
    world.pass_()
    assert world.names("NetworkPolicy") == ["bot-1-0f9c2-network"], "the same run"
    world.edit(training={"learningRate": "1e-6"})
    world.pass_()
    world.settle()
    assert world.names("NetworkPolicy") == ["bot-1-0f9c2-network", "bot-2-0f9c2-network"], (
        "pods of the first run save their state: not open meanwhile"
    )
    world.remove_pods()
    world.settle()
    assert world.names("NetworkPolicy") == ["bot-2-0f9c2-network"]


def test_ttl_removes_the_policy_with_the_jobs() -> None:
    world = completed(childrenTTLSecondsAfterFinished=0)
    world.settle()
    world.remove_pods()
    world.settle()
    assert world.names("Job") == world.names("NetworkPolicy") == []


def test_the_policy_of_a_failed_run_goes_with_its_jobs() -> None:
    world = World()
    world.settle()
    said = {"class": "DataError", "reason": "MalformedRecord", "message": "m"}
    world.fail("prepare", 11, **said)
    world.condition("prepare", "Failed")
    world.settle()
    assert world.status["phase"] == "Failed" and len(world.of("NetworkPolicy")) == 1
    world.objects.pop(("Job", "bot-1-0f9c2-prepare-1"))
    world.settle()
    assert world.names("NetworkPolicy") == []


def test_a_policy_removed_by_hand_is_created_again() -> None:
    world = at_training()
    world.objects.pop(("NetworkPolicy", "bot-1-0f9c2-network"))
    jobs = world.names("Job")
    world.settle()
    assert len(world.of("NetworkPolicy")) == 1 and world.names("Job") == jobs


def test_other_settings_reach_a_running_gang() -> None:
    world = at_training()
    world.config = replace(CONFIG, network=NetworkAccess(metrics_from=(PROMETHEUS,)))
    world.settle()
    assert policy(world)["ingress"][1]["from"] == [PROMETHEUS]
    complete(world)
    assert world.status["phase"] == "Complete"


def test_switched_off_no_policy_is_left() -> None:
    world = at_training()
    world.config = replace(CONFIG, network=None)
    world.settle()
    assert world.names("NetworkPolicy") == []
    assert not [o for o in world_with(None).pass_().create if o.kind == "NetworkPolicy"]


def test_a_refused_policy_is_shown_and_ends_no_run() -> None:
    world = World()
    key = child_key("NetworkPolicy", "bot-1-0f9c2-network")
    world.refused = {key: Refusal("NetworkPolicy: 403 forbidden")}
    world.pass_()
    assert world.condition_of("Prepared") == "False/ChildRefused"
    running = at_training()
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
