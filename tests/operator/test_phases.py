"""Phase and progress in status, between two stages and while a gang loads."""

from __future__ import annotations

from operator_world import PREPARED, TRAINED, World, at_training


def test_the_next_stage_begins_once_the_pods_have_succeeded() -> None:
    """The Job is not complete yet, and is not stopped either."""
    world = World()
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    world.child("prepare")["status"]["conditions"] = []
    world.settle()
    assert world.status["phase"] == "Starting" and world.condition_of("Prepared").startswith("True")
    assert world.child("train")
    assert "activeDeadlineSeconds" not in world.child("prepare")["spec"]


def test_the_report_of_a_pod_that_is_deleted_at_once_is_kept() -> None:
    """It was deleted after it had succeeded, and before a pass."""
    world = World()
    world.settle()
    world.finish("prepare", prepared=PREPARED)
    for key in [key for key in world.objects if key[0] == "Pod"]:
        world.gone.append(world.objects.pop(key))
    world.settle()
    assert world.status["prepared"]["trainSamples"] == PREPARED["trainSamples"]


def test_a_gang_whose_pods_end_is_training() -> None:
    """Other pods of the gang may run still: its Job says when all have ended."""
    world = at_training()
    world.finish("train", trained=TRAINED)
    world.child("train")["status"]["conditions"] = []
    world.settle()
    assert world.status["phase"] == "Training"
    world.condition("train", "Complete")
    world.settle()
    assert world.status["phase"] == "Publishing"


def test_a_gang_that_loads_keeps_the_step_and_has_the_planned_total() -> None:
    world = at_training()
    world.report("Loading")
    world.settle()
    assert world.status["phase"] == "Starting"
    shown = world.status["progress"]
    assert (shown["step"], shown["totalSteps"], shown["percent"]) == (0, 30, 0)
    world.report(step=12, totalSteps=30)
    world.settle()
    world.report("Loading", attempt=2, restarts=1)
    world.settle()
    shown = world.status["progress"]
    assert (shown["step"], shown["totalSteps"], shown["percent"]) == (12, 30, 40)
