"""``Work``: one pass over one run, and all that can be read off it: which stage it is in, what its
pods have said, how often the gang was restarted, what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from finetune_api.identity import child_name, order_name
from finetune_api.names import ROLES, Role
from finetune_api.order import RunOrder
from finetune_api.results import PreparedSummary, PublishSummary, TrainSummary
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import TRAINED_ALONE
from finetune_operator.decision.failure import incidents
from finetune_operator.decision.obstacles import Obstacle, obstacle
from finetune_operator.decision.plan import CurrentRun, Draft, Subject
from finetune_operator.decision.stages import STAGE_CONDITION
from finetune_operator.world.observe import JobView, Observed, Refusal
from finetune_operator.world.pods import PodView


@dataclass
class Work:
    """One pass over one run. ``spec`` is the spec as it stands, for fields of class Live; all
    else comes from the run's order."""

    subject: Subject
    spec: FineTuneJobSpec
    problems: list[str]
    before: FineTuneJobStatus
    observed: Observed
    run: CurrentRun
    now: datetime
    draft: Draft = field(default_factory=Draft)

    @property
    def order(self) -> RunOrder:
        return self.run.order

    @property
    def same_run(self) -> bool:
        """Whether the stored status speaks of this run."""
        return self.before.run is not None and self.before.run.id == self.run.id

    @cached_property
    def stage(self) -> Role | None:
        """The first stage that is not done; None when all are."""
        return next((r for r in ROLES if not self.done(r)), None)

    @cached_property
    def job(self) -> JobView | None:
        """Job of the stage, in the run's present revision."""
        stage = self.stage
        return self.observed.job(stage, self.run.id, self.run.revision) if stage else None

    @cached_property
    def pods(self) -> list[PodView]:
        """Pods of the stage, in the run's present revision."""
        stage = self.stage
        return self.observed.pods_of(stage, self.run.id, self.run.revision) if stage else []

    def done(self, role: Role) -> bool:
        """A stage is done once status says so, or a Job of any revision completed."""
        kept = self.same_run and any(
            c.type == STAGE_CONDITION[role] and c.status == "True" for c in self.before.conditions
        )
        jobs = (j for j in self.observed.jobs if j.role == role and j.run == self.run.id)
        complete = any(j.complete for j in jobs) or (role == "train" and self._trained_alone)
        return kept or self.run.outcome == "Complete" or complete

    @cached_property
    def _trained_alone(self) -> bool:
        """Whether the gang's first pod has left the result and another pod, lost in that moment,
        waits in vain for a gang to end with it."""
        told = [
            pod.finished + TRAINED_ALONE
            for pod in self.observed.pods_of("train", self.run.id)
            if pod.phase == "Succeeded" and pod.finished
            if pod.termination and pod.termination.run == self.run.id and pod.termination.trained
        ]
        if told and min(told) > self.now:
            self.draft.look_at(min(told))
        return any(due <= self.now for due in told)

    @cached_property
    def prepared(self) -> PreparedSummary | None:
        return next((s for s in self._said("prepare", "prepared") if s), None)

    @cached_property
    def trained(self) -> TrainSummary | None:
        return next((s for s in self._said("train", "trained") if s), None)

    @cached_property
    def published(self) -> PublishSummary | None:
        return next((s for s in self._said("publish", "published") if s), None)

    def _said(self, role: Role, what: str) -> list[Any]:
        pods = sorted(self.observed.pods_of(role, self.run.id), key=lambda p: p.index)
        words = [p.termination for p in pods if p.termination and p.termination.run == self.run.id]
        return [getattr(w, what) for w in words]

    @cached_property
    def restarts(self) -> int:
        """Incidents so far: what storage counted, and what the pods show."""
        counts = [self.before.restarts if self.same_run else 0]
        progress = self.observed.progress
        if progress is not None and progress.run == self.run.id:
            counts.append(progress.restarts)
        if self.trained is not None:
            counts.append(self.trained.restarts)
        if self.stage == "train" and not (self.job and self.job.failed):
            counts.append(self.run.restarts_before + incidents(self.pods))
        return max(counts)

    @cached_property
    def obstacle(self) -> Obstacle | None:
        """What keeps the stage's pods from running."""
        if self.job is None or self.job.finished:
            return None
        deadline = timedelta(seconds=self.spec.scheduling.start_deadline_seconds)
        return obstacle(self.job, self.pods, deadline)

    @property
    def refusal(self) -> Refusal | None:
        """The API server's no to the stage's Job, or to what is made before it: the order, and the
        Service, which has the Job's name."""
        if self.stage is None or self.job is not None:
            return None
        who, run = self.subject.name, self.run
        made = (
            order_name(who, run.id, run.revision),
            child_name(who, run.id, self.stage, run.revision),
        )
        return next((r for r in map(self.observed.refused.get, made) if r is not None), None)

    @property
    def queue(self) -> str | None:
        """Kueue's queue, where it decides about the stage's Job."""
        return self.order.spec.scheduling.queue_name if self.stage == "train" else None
