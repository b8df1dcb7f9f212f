"""Breakdown of step time, with a clock that the test advances."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from engine import CPU, samples, spec_of

from finetune_trainer.engine.flops import Work
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.packing import feed as feed_module
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.prepared.dataset import TokenSample
from finetune_trainer.train import clock as clock_module
from finetune_trainer.train.clock import Clock
from finetune_trainer.train.loop import log
from finetune_trainer.train.session import Session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.telemetry import Telemetry

STEPS = 4
PATIENCE = 60
"""Timeout in seconds, after which the test fails instead of hanging."""


class Time:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FeedTime:
    """The same clock for the feed, which reads it before and after it waits for a step's data."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self._asked = 0
        self.waits = threading.Semaphore(0)

    def perf_counter(self) -> float:
        now = self._time.now
        self._asked += 1
        if self._asked % 2:
            self.waits.release()
        return now


@pytest.mark.parametrize(("fetching", "share"), [(3.0, 0.75), (0.0, 0.0)], ids=["slow", "ready"])
def test_the_data_wait_share_is_reported_per_log_interval(
    monkeypatch: pytest.MonkeyPatch, fetching: float, share: float
) -> None:
    """A step computes for 1 s. Slow storage takes 3 s more, all of it waiting; data that is ready
    takes none."""
    time = Time()
    asked = FeedTime(time)
    monkeypatch.setattr(clock_module, "time", time)
    monkeypatch.setattr(feed_module, "time", asked)
    made = samples([8] * 16)
    lengths = np.array([8] * 16)
    plan = Plan(lengths, lengths // 2, batch_size=4, seed=0, micro_batch_tokens=16, ranks=1)

    def read(positions: Sequence[int]) -> list[TokenSample]:
        if fetching:  # until the loop waits for the data
            assert asked.waits.acquire(timeout=PATIENCE)
            time.now += fetching
        return [made[p] for p in positions]

    telemetry = Telemetry("1-a", 1, 0, StartupClock(None, None))
    telemetry.say(total_steps=STEPS)
    world = SimpleNamespace(device=CPU, is_main=False, sum=lambda values: values)
    session: Any = SimpleNamespace(
        plan=plan, telemetry=telemetry, world=world, spec=spec_of({"type": "Full"}),
        sources=["a"], guard=Guard(spec_of({"type": "Full"}).training.guard, CPU),
    )  # fmt: skip
    clock, state = Clock(Work(0, 0, 0, False, 0), None), LoopState()
    told = []
    with Feed(plan, read, rank=0, start=0, end=STEPS, device=CPU) as feed:
        for batch in feed:
            time.now += 1.0
            state.advance(torch.ones(7, dtype=torch.float64), batch.plan.tokens)
            clock.step(cast(Session, session), batch)
            if state.step % 2 == 0:
                log(session, state, 0.1, torch.tensor(1.0), clock)
                told.append(telemetry.progress.data_wait_share)
                assert telemetry.registry.get_sample_value("finetune_data_wait_share") == told[-1]
    assert told == [share, share]
    assert clock.take_wait_share(session) == 0.0, "no step since"
