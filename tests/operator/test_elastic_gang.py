"""An elastic gang (compute.minNodes): it goes on without a lost node, and does not wait for nodes
that it can do without."""

from __future__ import annotations

import pytest
from operator_world import PREPARED, TRAINED, World, at_training
from test_partial_gang import place
from test_recreate import LOST, lose_node

from finetune_api import names
from finetune_api.results import Termination

LONG = 24 * 3600
ELASTIC = {"compute": {"nodes": 4, "minNodes": 2}}


def short(held: int, **more: object) -> World:
    """An elastic gang of 4 of which some pods find no nodes."""
    world = World(**ELASTIC, **more)
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    place(world, held)
    return world


def test_a_gang_with_enough_nodes_trains_past_every_deadline() -> None:
    world = short(3)
    world.report(attempt=1, step=1, nodes=3)
    world.settle()
    assert world.status["phase"] == "Training"
    assert world.condition_of("Running") == "True/GangRunning"
    text = world.message("Running")
    assert "3 of 4 pods run; 3 of 4 nodes train (compute.minNodes is 2)" in text
    assert "no nvidia.com/gpu" in text
    assert world.status["progress"]["nodes"] == 3
    world.wait(LONG)
    world.report(attempt=1, step=9, nodes=3)
    world.settle()
    assert world.status["phase"] == "Training", "neither released nor failed"
    place(world, 4)
    world.report(attempt=2, step=9, nodes=4)
    world.settle()
    assert world.message("Running") == "4 of 4 pods run"


@pytest.mark.parametrize("held", [1, 2])
def test_a_gang_without_enough_nodes_gives_them_back(held: int) -> None:
    world = short(held)
    if held == 2:  # enough, but not the node that holds the rendezvous
        pod = world.pod(world.child("train"), 0)
        pod["spec"].pop("nodeName")
        pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": "m"}]
        world.settle()
    assert world.condition_of("Running") == "False/Unschedulable"
    world.wait(300)
    world.settle()
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]


def test_a_lost_node_leaves_the_gang_time_to_go_on_without_it() -> None:
    world = at_training(**ELASTIC)
    world.report(attempt=1, step=10, nodes=4)
    world.settle()
    lose_node(world, index=3)
    world.settle()
    assert "3 of 4 pods run; node node-3 is not reachable" in world.message("Running")
    world.wait(120)  # an inelastic gang is recreated after 45 s
    world.settle()
    assert world.run["revision"] == 1 and world.status["phase"] == "Training"
    world.report(attempt=2, restarts=1, step=11, nodes=3)
    world.settle()
    assert "3 of 4 nodes train" in world.message("Running")
    assert (world.status["restarts"], world.status["faults"]) == (1, 0)


def test_a_gang_that_does_not_go_on_is_recreated() -> None:
    world = at_training(**ELASTIC)
    world.report(attempt=1, step=10, nodes=4)
    lose_node(world, index=3)
    world.settle()
    world.wait(300)
    plan = world.pass_()
    assert world.run["revision"] == 2
    assert "makes no progress" in plan.events[-1].message


@pytest.mark.parametrize("index", [0, 1])
def test_a_gang_that_needs_the_lost_node_is_recreated_at_once(index: int) -> None:
    """Without pod 0 no rendezvous, and without minNodes no gang."""
    compute = {"nodes": 4, "minNodes": 2 if index == 0 else 4}
    world = at_training(compute=compute)
    world.report(attempt=1, step=10)
    lose_node(world, index=index)
    world.settle()
    world.wait(45)
    world.settle()
    assert world.run["revision"] == 2


@pytest.mark.parametrize("queue", [None, "gpus"])
def test_a_pod_on_a_node_that_stays_lost_moves_unless_the_gang_would_queue(
    queue: str | None,
) -> None:
    scheduling = {"scheduling": {"queueName": queue}} if queue else {}
    world = at_training(**ELASTIC, **scheduling)
    lose_node(world, index=3)
    for step in range(30):
        world.report(attempt=2, restarts=1, step=step, nodes=3)
        world.settle()
        if world.run["revision"] == 2:
            break
        world.wait(30)
    assert (world.run["revision"] == 2) == (queue is None)
    if queue is None:
        assert step == 20, "after 10 minutes"
        assert "bot-1-0f9c2-train-2" not in world.names("Job"), "the others save their state first"
        for pod in world.of("Pod"):
            if pod["metadata"]["name"] != "bot-1-0f9c2-train-1-3-x":
                world.objects.pop(("Pod", pod["metadata"]["name"]))
        world.settle()
        assert "bot-1-0f9c2-train-2" in world.names("Job"), "the lost pod is not waited for"


def test_a_long_back_off_of_one_pod_does_not_end_the_others_work() -> None:
    world = at_training(**ELASTIC, failurePolicy={"maxRestarts": 20})
    for number in range(6):
        world.report(attempt=number + 1, restarts=number, nodes=3)
        world.wait(60)
        world.fail("train", 20, 3, f"i{number}", **LOST)
        world.objects.pop(("Pod", world.child("train")["metadata"]["name"] + "-3-x"), None)
        world.settle()
    assert world.run["revision"] == 1 and world.status["phase"] == "Training"


def test_training_is_done_without_the_pod_that_found_no_node() -> None:
    world = short(3)
    world.report(attempt=1, step=30, nodes=3)
    world.settle()
    said = Termination.model_validate(
        {"run": world.run["id"], "role": "train", "trained": TRAINED}
    ).to_text()
    for index in range(3):
        ended = {"exitCode": 0} | ({"message": said} if index == 0 else {})
        world.pod(world.child("train"), index, terminated=ended)
    world.settle()
    assert world.status["phase"] == "Publishing"


def test_a_gang_whose_pods_end_does_not_start_again() -> None:
    world = short(3)
    world.report(attempt=1, step=30, nodes=3)
    world.settle()
    world.pod(world.child("train"), 1, terminated={"exitCode": 0})
    world.settle()
    assert world.status["phase"] == "Training"
    assert world.message("Running") == "the gang has finished, its pods end"


def test_kueue_may_admit_fewer_pods() -> None:
    for compute, expected in (
        (ELASTIC["compute"], {"kueue.x-k8s.io/job-min-parallelism": "2",
                              "kueue.x-k8s.io/job-completions-equal-parallelism": "true"}),
        ({"nodes": 4, "minNodes": 4}, None),
    ):  # fmt: skip
        world = World(compute=compute, scheduling={"queueName": "gpus"})
        world.settle()
        world.finish("prepare", prepared=PREPARED)
        world.settle()
        job = world.child("train")
        assert job["metadata"].get("annotations") == expected
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
        assert job["metadata"]["labels"][names.LABEL_QUEUE] == "gpus"
