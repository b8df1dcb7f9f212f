"""Breakdown of an attempt's wall time: compute, data wait, checkpoints, evaluation."""

from __future__ import annotations

import time
from collections import deque

import torch

from finetune_trainer.engine.compilation import compilation_seconds
from finetune_trainer.engine.flops import Work
from finetune_trainer.engine.packing.feed import StepTensors
from finetune_trainer.engine.packing.transfer import Wait
from finetune_trainer.train.session import Session


def end_startup(session: Session, from_step: int) -> None:
    """Report the startup time, after the attempt's first step. Synchronizes the device, once."""
    if session.world.device.type == "cuda":
        torch.cuda.synchronize(session.world.device)
    compiling = compilation_seconds() if session.spec.training.compile else None
    startup = session.telemetry.first_step(from_step, compiling)
    if session.world.is_main:
        print(f"first step after {startup.text}", flush=True)


class Clock:
    """Measures the training loop of this attempt: time by part, tokens and operations."""

    def __init__(self, work: Work, peak: float | None) -> None:
        """
        Args:
            work: floating-point operations of the model.
            peak: peak operations per second of all ranks together; None: unknown.
        """
        self._work, self._peak = work, peak
        self._operations = 0.0
        self._began = self._mark = self._last_checkpoint = time.perf_counter()
        self._steps = 0
        self.steps_since_checkpoint = 0
        self._tokens = 0
        self._busy = self._computed = self._waited = 0.0
        self._waits: deque[Wait] = deque()
        """Data waits not yet counted: the device may not have begun these steps."""
        self._recent = self._recently_waited = 0.0

    def step(self, session: Session, batch: StepTensors) -> None:
        """Record the end of a step."""
        if not self._steps:
            end_startup(session, batch.plan.number)
        now = time.perf_counter()
        took, self._mark = now - self._mark, now
        self._steps += 1
        self.steps_since_checkpoint += 1
        self._tokens += batch.plan.tokens
        self._busy += took
        self._recent += took
        self._waits.append(batch.wait)
        lengths = session.plan.lengths[list(batch.plan.samples)]
        self._operations += self._work.training(lengths, batch.plan.supervised)
        telemetry = session.telemetry
        telemetry.step.set(batch.plan.number + 1)
        telemetry.tokens.inc(batch.plan.tokens)
        telemetry.samples.inc(len(batch.plan.samples))
        telemetry.step_time.observe(took)
        self._record_waits(session)

    def _record_waits(self, session: Session) -> None:
        """Count the data waits that are known by now, without device synchronization."""
        while self._waits and (seconds := self._waits[0].seconds()) is not None:
            self._waits.popleft()
            self._waited += seconds
            self._recently_waited += seconds
            session.telemetry.seconds.labels("data_wait").inc(seconds)
        more = max(0.0, self._busy - self._waited - self._computed)
        self._computed += more
        session.telemetry.seconds.labels("compute").inc(more)

    def count(self, session: Session, part: str, seconds: float) -> None:
        """Count time outside of steps, such as a checkpoint or an evaluation."""
        session.telemetry.seconds.labels(part).inc(seconds)
        self._mark = time.perf_counter()

    def checkpoint_saved(self) -> None:
        self._last_checkpoint = time.perf_counter()
        self.steps_since_checkpoint = 0

    def since_checkpoint(self) -> float:
        return time.perf_counter() - self._last_checkpoint

    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def tokens_per_second(self) -> float:
        return self._tokens / self._busy if self._busy else 0.0

    def take_wait_share(self, session: Session) -> float:
        """Return the share of the steps' time since the last call that was spent waiting for data,
        and reset it."""
        self._record_waits(session)
        share = min(1.0, self._recently_waited / self._recent) if self._recent else 0.0
        self._recent = self._recently_waited = 0.0
        return share

    def utilization(self) -> float | None:
        """Return the model FLOPs utilization (MFU), counted on real tokens; None: the peak is
        unknown."""
        if not self._peak or not self._busy:
            return None
        return self._operations / self._busy / self._peak

    def remaining(self, steps: int) -> float:
        """Return the expected seconds of ``steps``, including evaluations and checkpoints."""
        return self.elapsed() / self._steps * steps if self._steps else 0.0
