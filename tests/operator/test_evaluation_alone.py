"""Jobs with method.type None: the same stages, with the words of an evaluation and no model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_world import PREPARED, PUBLISHED, SCORES, TRAINED, World, completed

from finetune_api import names

ALONE: dict[str, Any] = {"method": {"type": "None"}}
MEASURED = {**SCORES, "tuned": {}}
RESULTS = {
    **PUBLISHED,
    "formats": [],
    "scores": [MEASURED],
    "mainResult": {"dataSet": "test", "metric": "Loss", "value": "2 (1.8, 2.2)"},
}


def evaluation(**more: Any) -> World:
    """A job that measures a model on a test set."""
    world = World(**ALONE, **more)
    world.job["spec"]["data"] = {"test": [{"source": "s3://data/test.jsonl"}]}
    return world


def at_work(**more: Any) -> World:
    world = evaluation(**more)
    world.settle()
    world.finish("prepare", prepared=PREPARED | {"trainSamples": 0, "totalSteps": 0})
    world.settle()
    world.wait(5)
    world.pods("train", world.job["spec"]["compute"]["nodes"], running={})
    world.settle()
    return world


def done(**more: Any) -> World:
    world = at_work(**more)
    trained = {k: v for k, v in TRAINED.items() if k not in ("loss", "checkpoint")}
    world.wait(60)
    world.finish("train", trained=trained | {"steps": 0, "scores": [MEASURED]})
    world.settle()
    world.finish("publish", published=RESULTS)
    world.settle()
    return world


def test_the_gang_is_that_of_a_training_and_evaluates() -> None:
    world = at_work()
    jobs = {job["metadata"]["labels"][names.LABEL_ROLE]: job for job in world.of("Job")}
    assert jobs["train"]["spec"]["completions"] == 2
    container = jobs["train"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["supervise"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (config,) = world.of("ConfigMap")
    spec = json.loads(config["data"][names.RUN_SPEC_KEY])["spec"]
    assert spec["method"] == {"type": "None"} and "train" not in spec["data"]
    assert world.status["phase"] == "Evaluating"
    assert world.condition_of("Running") == "True/GangRunning"
    assert world.message("Prepared").startswith("5 samples at")


def test_status_has_the_values_of_the_model_and_no_comparison() -> None:
    world = done()
    assert world.status["phase"] == "Complete"
    assert world.condition_of("Evaluated") == "True/Evaluated"
    assert world.message("Evaluated") == "the model is measured on the test sets"
    assert world.status["evaluation"] == [{"dataSet": "test", "metric": "Loss", "base": "2"}]
    assert world.status["mainResult"] == RESULTS["mainResult"]
    assert "formats" not in world.status["output"] or not world.status["output"]["formats"]
    assert "checkpoints" not in world.status
    assert (world.status["progress"]["stage"], world.status["progress"]["step"]) == ("Done", 0)


def test_a_missed_gate_holds_the_run() -> None:
    gate = {"metric": "Accuracy", "operator": "AtLeast", "value": "0.9"}
    world = at_work(evaluation={"gates": [gate]})
    world.wait(60)
    world.finish("train", trained=TRAINED | {"steps": 0, "scores": [MEASURED]})
    world.settle()
    assert world.condition_of("Evaluated") == "Unknown/GatesPending"
    world.finish("publish", published=RESULTS | {"held": "test Accuracy AtLeast: 80 %"})
    world.settle()
    assert world.condition_of("Evaluated") == "False/GatesMissed"


@pytest.mark.parametrize("other", [at_work, done], ids=["at work", "complete"])
def test_nothing_starts_from_its_results(other: Any) -> None:
    world = World(model={"source": None, "fineTuneJobRef": {"name": "first"}})
    world.others = [other(name="first", uid="aaaaa-0000")]
    world.settle()
    assert not world.objects
    assert world.condition_of("Prepared") == "False/NoModelPublished"
    assert world.condition_of("Stalled") == "True/NoModelPublished"
    assert "FineTuneJob first evaluates a model, and publishes none" in world.message("Prepared")


def test_it_measures_the_model_of_another_job() -> None:
    world = evaluation(model={"source": None, "fineTuneJobRef": {"name": "first"}})
    world.others = [completed(name="first", uid="aaaaa-0000")]
    world.settle()
    assert world.run["base"]["job"] == "first"
