"""Grace period of the gang's pods: by the time to save, measured or estimated."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import PREPARED, World, at_training, train

from finetune_api import names

GIB = 2**30


def memory(gib: int, sharding: str) -> dict[str, Any]:
    parts = {"parameters": GIB, "gradients": gib * GIB // 3, "optimizer": 2 * gib * GIB // 3}
    return {
        "needed": 4 * GIB, "sharding": sharding, "gradientCheckpointing": False, "parts": parts,
    }  # fmt: skip


def grace_of(world: World, role: str = "train") -> int:
    pod = world.child(role)["spec"]["template"]["spec"]
    env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert env[names.ENV_GRACE_SECONDS] == str(pod["terminationGracePeriodSeconds"])
    return int(pod["terminationGracePeriodSeconds"])


@pytest.mark.parametrize(
    ("estimate", "given", "seconds"),
    [
        (None, {}, 120),
        (memory(1, "NoShard"), {}, 120),
        (memory(10, "NoShard"), {}, 60 + 2 * 102),
        (memory(10, "FullShard"), {}, 60 + 2 * 409),
        (memory(1000, "FullShard"), {}, 3600),
        (memory(10, "FullShard"), {"terminationGracePeriodSeconds": 45}, 45),
    ],
)
def test_the_first_gang_gets_an_estimate(
    estimate: dict[str, Any] | None, given: dict[str, Any], seconds: int
) -> None:
    world = World(compute={"gpusPerNode": 4, **given})
    world.settle()
    said = PREPARED | ({"memory": estimate} if estimate else {})
    world.finish("prepare", prepared=said)
    world.settle()
    assert abs(grace_of(world) - seconds) <= 2
    assert grace_of(world, "prepare") == 120


def test_the_next_gang_gets_the_measured_time() -> None:
    world = at_training()
    assert grace_of(world) == 120
    world.report(step=5, saveSeconds=299.2, latestCheckpoint="s3://b/1")
    world.settle()
    assert world.status["checkpoints"]["saveSeconds"] == 300
    world.report(attempt=2, saveSeconds=0.0, latestCheckpoint="s3://b/1")
    world.settle()
    assert world.status["checkpoints"]["saveSeconds"] == 300, "the longest of the run"
    world.edit(suspend=True)
    world.settle()
    world.remove_pods()
    world.edit(suspend=False)
    world.settle()
    assert grace_of(world) == 660


@pytest.mark.parametrize("disruption", ["Allow", "DoNotDisrupt"])
def test_autoscalers_leave_the_gang_in_place_unless_allowed(disruption: str) -> None:
    world = World(
        scheduling={"disruption": disruption},
        compute={"podTemplate": {"metadata": {"annotations": {"a": "b"}}}},
    )
    world.settle()
    train(world)
    expected = {"a": "b"}
    if disruption == "DoNotDisrupt":
        expected |= {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    template = world.child("train")["spec"]["template"]
    assert template["metadata"]["annotations"] == expected
    assert world.child("prepare")["spec"]["template"]["metadata"]["annotations"] == {"a": "b"}
