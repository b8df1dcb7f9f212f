"""Phase and progress in status, between two stages and while a gang loads."""

from __future__ import annotations

from typing import Any

from operator_world import PREPARED, TRAINED, World, at_training


def test_the_phase_between_two_stages_is_that_of_the_one_that_ends() -> None:
    """A pod has ended, but its Job is not complete yet."""
    world = World()
    world.settle()
    for role, phase in (("prepare", "Preparing"), ("train", "Training")):
        said: Any = {"prepared": PREPARED} if role == "prepare" else {"trained": TRAINED}
        world.finish(role, **said)
        world.child(role)["status"]["conditions"] = []
        world.settle()
        assert world.status["phase"] == phase
        world.condition(role, "Complete")
        world.settle()


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
