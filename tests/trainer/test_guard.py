"""The guard: which steps are taken, and that a skipped step changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from engine import CPU, spec_of, tiny_llama

from finetune_api.training import Guard as Rule
from finetune_trainer.engine.guard import WARM_UP, Guard, Skipped
from finetune_trainer.engine.optimizers import step_if
from finetune_trainer.train.rollback import diagnose, read_guard
from finetune_trainer.train.session import Session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.telemetry import Telemetry


def losses_of(steps: int) -> list[float]:
    """Falling, slightly noisy losses."""
    return [2.0 * 0.99**step + 0.1 * math.sin(step) for step in range(steps)]


SPIKES = Rule.model_validate({"spikeDeviations": "6"})


def judged(
    losses: list[float], norms: dict[int, float] | None = None, rule: Rule = SPIKES
) -> list[Skipped]:
    guard = Guard(rule, CPU)
    for step, loss in enumerate(losses):
        norm = (norms or {}).get(step, 1.0)
        guard.judge(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    return guard.skipped()


def skipped(
    losses: list[float], norms: dict[int, float] | None = None, rule: Rule = SPIKES
) -> list[int]:
    return [found.step for found in judged(losses, norms, rule)]


def test_all_steps_of_a_noisy_run_are_taken() -> None:
    assert skipped(losses_of(300)) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_steps_are_skipped_from_the_first_step_on(bad: float) -> None:
    assert skipped([bad, *losses_of(40), bad]) == [0, 41]
    assert skipped(losses_of(5), norms={2: bad}) == [2]


def test_spikes_are_skipped_and_do_not_move_the_threshold() -> None:
    course = losses_of(100)
    for step in (60, 61, 62, 63, 64, 65):
        course[step] = 6.0
    assert skipped(course) == [60, 61, 62, 63, 64, 65]


def test_spikes_are_not_detected_during_warm_up_or_if_disabled() -> None:
    early, late = losses_of(100), losses_of(100)
    early[WARM_UP - 1] = late[60] = 6.0
    assert skipped(early) == []
    assert skipped(late, rule=Rule()) == []


def test_spikes_are_distinguished_from_non_finite_steps() -> None:
    course = losses_of(100)
    course[60], course[61], course[62] = 6.0, math.inf, 6.0
    found = judged(course, norms={62: math.nan})
    assert found == [Skipped(60, True), Skipped(61, False), Skipped(62, False)]


@pytest.mark.parametrize(
    ("spikes", "reason", "words"),
    [
        ([False], "LossNotFinite", ["step 7 had a loss or gradient that was no finite number"]),
        ([False, True, True], "LossNotFinite", ["steps 7 to 9", "(2 of them a spike instead)"]),
        ([True, True], "LossSpike", ["steps 7 to 8", "training.guard.spikeDeviations"]),
    ],
)
def test_reason_of_consecutive_skipped_steps(
    spikes: list[bool], reason: str, words: list[str]
) -> None:
    streak = [Skipped(7 + i, spike) for i, spike in enumerate(spikes)]
    found, why, remedy = diagnose(streak, "sample 3 of 'support'")
    assert found == reason
    assert all(word in why for word in words), why
    assert "sample 3 of 'support'" in remedy and "training.learningRate" in remedy
    assert ("training.guard.spikeDeviations" in remedy) is (reason == "LossSpike")


def test_a_resumed_guard_continues_with_the_saved_statistics() -> None:
    whole, first, second = (Guard(SPIKES, CPU) for _ in range(3))
    course = [torch.tensor(loss, dtype=torch.float64) for loss in losses_of(80)]
    one = torch.tensor(1.0)
    for step, loss in enumerate(course):
        whole.judge(step, loss, one)
        (first if step < 50 else second).judge(step, loss, one)
        if step == 49:
            second.resume(first.statistics)
    assert second.statistics == whole.statistics
    assert second.skipped() == [], "no step was skipped"


def test_consecutive_skipped_steps_are_reported_together() -> None:
    def steps(*numbers: int) -> list[Skipped]:
        return [Skipped(number, number % 2 == 0) for number in numbers]

    state = LoopState(step=10)
    assert state.note_skipped(steps(3, 4, 8, 9)) == steps(3, 4)
    assert state.skipped == steps(8, 9)
    state = LoopState.from_json(state.to_json())
    state.step = 13
    assert state.note_skipped(steps(10, 12)) == steps(8, 9, 10)
    assert state.skipped == steps(12)
    state.step = 20
    assert state.note_skipped([]) == steps(12)
    assert (state.skipped, state.skipped_steps) == ([], 6)


def test_tokens_of_skipped_steps_are_not_counted_also_after_a_resume() -> None:
    state = LoopState()
    for tokens in (100, 20, 3):
        state.advance(torch.zeros(7, dtype=torch.float64), tokens)
    guard = Guard(Rule(), CPU)
    for step, loss in enumerate((2.0, math.nan, 1.9)):
        guard.judge(step, torch.tensor(loss), torch.tensor(1.0))
    telemetry = Telemetry("1-a", 1, 0, StartupClock(None, None))
    session = SimpleNamespace(guard=guard, telemetry=telemetry, spec=spec_of({"type": "Full"}))
    read_guard(cast(Session, session), state)
    assert state.tokens == 103
    resumed = LoopState.from_json(state.to_json())
    resumed.advance(torch.zeros(7, dtype=torch.float64), 1000)
    assert (resumed.tokens, resumed.skipped_steps) == (1103, 1)


@pytest.mark.parametrize("fused", [True, False], ids=["in the kernel", "by waiting"])
def test_a_skipped_step_changes_neither_weights_nor_moments(fused: bool) -> None:
    model = tiny_llama()
    group = {"params": list(model.parameters()), "rate_factor": 1.0}
    optimizer = torch.optim.AdamW([group], weight_decay=0.1, fused=fused)

    def step(taken: bool, gradient: float) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        step_if([optimizer], 0.1, torch.tensor(taken))
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        return [*(p.detach().clone() for p in model.parameters()), *moments]

    before = step(True, 1.0)
    after = step(False, math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(step(True, 1.0)[0], before[0])
