"""Steps, evaluations and the learning rate: pure functions of the spec."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.planning.mixture import Stage
from finetune_trainer.engine.planning.schedule import (
    evaluation_steps,
    learning_rate,
    log_interval,
    replay_of,
    stage_plans,
    stages_of,
    steps_of,
)
from finetune_trainer.failures import UserError


def spec(**blocks: Any) -> FineTuneJobSpec:
    return parse_spec(
        {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
            "output": {"destination": "s3://bucket/out"},
            **blocks,
        }
    )


@pytest.mark.parametrize(
    ("training", "samples", "steps"),
    [
        ({}, 64, 6),  # three epochs of 32 samples a step
        ({}, 65, 7),  # batches cross epoch boundaries; the last, short batch is trained
        ({}, 20, 3),  # a batch has no sample twice
        ({}, 1, 3),
        ({"epochs": 1, "batchSize": 8}, 20, 3),
        ({"maxSteps": 7}, 20, 7),
    ],
)
def test_steps(training: dict[str, Any], samples: int, steps: int) -> None:
    assert steps_of(spec(training=training), samples) == steps


SETS = {"small": 1_000, "large": 9_000}


def source(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "source": f"s3://bucket/{name}.jsonl", **fields}


@pytest.mark.parametrize(
    ("data", "stages"),
    [
        ({}, [Stage(10, None)]),
        ({"mixingTemperature": "2"}, [Stage(10, [1_000**0.5, 9_000**0.5])]),
        (
            {"train": [source("large", weight="0.25"), source("small", weight="0.75")]},
            [Stage(10, [0.75, 0.25])],
        ),
        (
            {
                "stages": [
                    {"name": "a", "steps": "0.5", "weights": [{"name": "large", "weight": "1"}]},
                    {"name": "b", "steps": "1.5"},
                ]
            },
            [Stage(3, [0.0, 1.0], "a"), Stage(7, None, "b")],  # 2.5 steps round to 3
        ),
    ],
)
def test_stages(data: dict[str, Any], stages: list[Stage]) -> None:
    both = {"train": [source("small"), source("large")]}
    assert stages_of(spec(data={**both, **data}), SETS, 10) == stages


def test_a_stage_of_empty_sets_is_refused() -> None:
    data = {"train": [source("empty", weight="1"), source("small", weight="0")]}
    with pytest.raises(UserError, match=r"spec\.data\.train: .*empty.* have no sample") as caught:
        stages_of(spec(data=data), SETS, 10)
    assert caught.value.reason == "NothingToMix"


def in_stages(*steps: str) -> FineTuneJobSpec:
    """Return a spec over both sets with stages s0, s1, … of these shares of the steps."""
    stages = [{"name": f"s{i}", "steps": part} for i, part in enumerate(steps)]
    return spec(data={"train": [source("small"), source("large")], "stages": stages})


@given(st.lists(st.integers(1, 60), min_size=1, max_size=16), st.integers(1, 300))
def test_every_stage_has_a_step_or_is_refused(parts: list[int], total: int) -> None:
    made = in_stages(*map(str, parts))
    try:
        stages = stages_of(made, SETS, total)
    except UserError as error:
        assert error.reason == "StageTooShort"
        assert min(parts) * total < sum(parts), "a whole step is never rounded away"
    else:
        assert [stage.name for stage in stages] == [f"s{i}" for i in range(len(parts))]
        assert min(stage.steps for stage in stages) >= 1
        assert sum(stage.steps for stage in stages) == total


def test_a_stage_without_a_step_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError) as caught:
        stages_of(in_stages("0.98", "0.02"), SETS, 12)
    assert caught.value.reason == "StageTooShort"
    for word in ("spec.data.stages[1]", "'s1'", "2.00%", "12 steps", "maxSteps", "epochs"):
        assert word in caught.value.message


def test_stage_plans_have_names_steps_and_shares() -> None:
    only_large = {"name": "a", "steps": "1", "weights": [{"name": "large", "weight": "3"}]}
    data = {
        "train": [source("small"), source("large")],
        "stages": [only_large, {"name": "b", "steps": "4"}],
    }
    first, then = stage_plans(stages_of(spec(data=data), SETS, 10), SETS)
    assert (first.name, first.steps, first.mixture) == ("a", 2, {"large": 1.0})
    assert (then.name, then.steps, then.mixture) == ("b", 8, {"small": 0.1, "large": 0.9})
    assert then.mixture_text == "small 10 %, large 90 %"
    assert stage_plans(stages_of(spec(), SETS, 10), SETS) == []


def test_replay_sets_are_the_marked_sets_with_samples() -> None:
    data = {"train": [source("a"), source("b", replay=True), source("c", replay=True)]}
    held = spec(data=data, training={"anchor": {"klCoefficient": "0.1"}})
    assert replay_of(held, ["a", "c"]) == [False, True]
    assert replay_of(spec(data=data), ["a", "c"]) == [False, False]
    with pytest.raises(UserError, match=r"klCoefficient: .*\(b, c\) have no sample") as caught:
        replay_of(held, ["a"])
    assert caught.value.reason == "NothingToReplay"


@pytest.mark.parametrize(
    ("evaluation", "total", "steps"),
    [
        ({}, 100, list(range(10, 101, 10))),
        ({}, 25, [3, 6, 9, 12, 15, 18, 21, 24]),
        ({}, 4, [1, 2, 3, 4]),
        ({"everySteps": 40}, 100, [40, 80]),
        ({"everySteps": 40}, 30, []),
    ],
)
def test_evaluations(evaluation: dict[str, Any], total: int, steps: list[int]) -> None:
    assert list(evaluation_steps(spec(evaluation=evaluation), total)) == steps


@given(st.integers(1, 10**6))
def test_the_curve_has_enough_points(total: int) -> None:
    assert log_interval(total) <= 10
    assert total // log_interval(total) >= min(total, 100)


@given(
    schedule=st.sampled_from(["Cosine", "Linear", "Constant"]),
    warmup=st.sampled_from(["0", "0.03", "0.5", "1"]),
    total=st.integers(1, 300),
)
def test_the_rate_rises_to_the_peak_and_then_never_rises(
    schedule: str, warmup: str, total: int
) -> None:
    made = spec(training={"schedule": schedule, "warmupRatio": warmup, "learningRate": "0.1"})
    rates = [learning_rate(made, total, t) for t in range(total)]
    assert max(rates) == pytest.approx(0.1)
    assert all(rate > 0 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_rates_match_the_formula_of_each_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        made = spec(training={"schedule": schedule, "warmupRatio": "0.2", "learningRate": "1"})
        return [learning_rate(made, 10, t) for t in (0, 1, 2, 6, 9)]

    assert rates("Constant") == pytest.approx([0.5, 1, 1, 1, 1])
    assert rates("Linear") == pytest.approx([0.5, 1, 1, 0.5, 0.125])
    assert rates("Cosine") == pytest.approx([0.5, 1, 1, 0.5, 0.0380602])
