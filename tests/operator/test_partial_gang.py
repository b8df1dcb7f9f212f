"""A gang of which only some pods find nodes gives the nodes back, pauses, and tries again."""

from __future__ import annotations

from datetime import timedelta

import pytest
from operator_world import PREPARED, World

from finetune_operator.decision.partial_gang import pause
from finetune_operator.world.objects import format_time, parse_time


def half(**more: object) -> World:
    """Three of four pods hold nodes."""
    world = World(compute={"nodes": 4}, **more)
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.settle()
    place(world, 3)
    return world


def place(world: World, held: int) -> None:
    """The scheduler finds nodes for the first pods of the gang's Job."""
    world.pods("train", held, running={})
    job = world.child("train")
    for index in range(held, 4):
        pod = world.pod(job, index)
        pod["spec"].pop("nodeName", None)
        said = {
            "type": "PodScheduled",
            "status": "False",
            "message": "0/3 nodes: no nvidia.com/gpu",
        }
        pod["status"]["conditions"] = [said]
    world.settle()


def given_back(world: World) -> None:
    """The gang waits until it gives its nodes back, and its pods end."""
    world.wait(300)
    world.settle()
    world.remove_pods()


def test_a_partial_gang_gives_its_nodes_back_and_tries_again() -> None:
    world = half()
    assert world.condition_of("Running") == "False/Unschedulable"
    assert "queue" not in world.status
    again = world.plan().requeue_after
    assert again is not None and again.total_seconds() == 300
    began = world.now
    given_back(world)
    assert world.names("Job") == ["bot-1-0f9c2-prepare-1"]
    queue = world.status["queue"]
    assert (queue["tries"], queue["since"]) == (1, format_time(began))
    assert world.status["phase"] == "Queued"
    assert world.condition_of("Running") == "False/Unschedulable"
    assert "no nvidia.com/gpu" in world.message("Running")
    assert queue["nextTryTime"] in world.message("Running")
    due = parse_time(queue["nextTryTime"])
    assert due is not None and timedelta(seconds=30) <= due - world.now <= timedelta(seconds=90)
    assert world.plan().requeue_after == due - world.now
    world.now = due
    world.settle()
    assert "bot-1-0f9c2-train-1" in world.names("Job")
    world.wait(5)
    place(world, 4)
    assert world.status["phase"] == "Training" and "queue" not in world.status
    assert world.run["revision"] == 1 and world.status["restarts"] == 0


def test_pauses_grow_and_the_whole_wait_ends_at_the_start_deadline() -> None:
    world = half(scheduling={"startDeadlineSeconds": 3600})
    began, tries = world.now, 0
    while world.status["phase"] != "Failed" and tries < 50:
        given_back(world)
        if world.status["phase"] == "Failed":
            break
        tries += 1
        assert world.status["queue"]["tries"] == tries
        due = parse_time(world.status["queue"]["nextTryTime"])
        assert due is not None
        world.now = due
        world.settle()
        if world.status["phase"] != "Failed":
            place(world, 3)
    failure = world.status["failure"]
    assert (failure["class"], failure["reason"]) == ("Unschedulable", "Unschedulable")
    assert "no nvidia.com/gpu" in failure["message"]
    assert 3600 <= (world.now - began).total_seconds() < 3600 + 300
    assert 4 <= tries <= 10


def test_a_deletion_that_is_refused_is_repeated_and_counts_once() -> None:
    world = half()
    world.wait(300)
    for _ in range(60):
        plan = world.plan()
        world.job["status"] = plan.status or world.job["status"]
        assert [delete.kind for delete in plan.delete] == ["Job"]
    assert world.status["queue"]["tries"] == 1


def test_a_gang_whose_other_pods_no_scheduler_looks_at_is_released() -> None:
    world = half()
    for pod in world.of("Pod"):
        if "nodeName" not in pod["spec"]:
            pod["status"]["conditions"] = []
    given_back(world)
    assert "no node yet" in world.status["queue"]["message"]


def test_an_edit_of_the_gang_ends_the_wait() -> None:
    world = half(scheduling={"startDeadlineSeconds": 3600})
    given_back(world)
    world.edit(scheduling={"queueName": "gpus"})
    world.settle()
    assert "bot-1-0f9c2-train-2" in world.names("Job") and "queue" not in world.status
    world.wait(8000)
    world.child("train")["spec"]["suspend"] = False
    world.child("train")["status"] = {"startTime": format_time(world.now)}
    place(world, 0)
    assert world.status["phase"] != "Failed", "time in a queue is not counted"


def test_a_gang_of_which_no_pod_found_a_node_holds_nothing_and_waits() -> None:
    world = half()
    world.remove_pods()
    place(world, 0)
    world.wait(1000)
    world.settle()
    assert "bot-1-0f9c2-train-1" in world.names("Job") and "queue" not in world.status


def test_kueue_decides_for_a_gang_with_a_queue() -> None:
    world = half(scheduling={"queueName": "gpus"})
    world.child("train")["spec"]["suspend"] = False
    world.wait(1000)
    world.settle()
    assert "bot-1-0f9c2-train-1" in world.names("Job") and "queue" not in world.status


def test_a_suspended_wait_is_over() -> None:
    world = half()
    given_back(world)
    world.edit(suspend=True)
    world.settle()
    assert world.status["phase"] == "Suspended" and "queue" not in world.status


@pytest.mark.parametrize(("tries", "mean"), [(1, 60), (2, 120), (3, 240), (4, 480), (9, 480)])
def test_pauses_differ_between_jobs(tries: int, mean: int) -> None:
    found = [pause(f"uid-{i}", tries).total_seconds() for i in range(200)]
    assert all(0.5 * mean <= seconds <= 1.5 * mean for seconds in found)
    assert max(found) - min(found) > 0.8 * mean
    assert pause("uid-1", tries) == pause("uid-1", tries)
