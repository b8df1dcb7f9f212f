"""``RunView``: a run as one pass sees it, with the state derived from it. Read-only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from finetune_api.identity import child_name, network_policy_name, run_spec_name
from finetune_api.names import FINAL_EXIT_CODES, ExitCode, Role
from finetune_api.results import (
    PreparedSummary,
    Progress,
    PublishSummary,
    Termination,
    TrainSummary,
)
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AvoidedNode, FineTuneJobStatus, QueueStatus
from finetune_operator.config import GANG_LINGERS, SIDECAR_ENDS
from finetune_operator.decision.grace import grace_seconds
from finetune_operator.decision.incidents import Incidents, Place, incidents, recovered
from finetune_operator.decision.obstacles import Obstacle, obstacle
from finetune_operator.decision.plan import CurrentRun, Recreation, Subject
from finetune_operator.decision.stages import CONDITION, GANG, TESTED, stages_of
from finetune_operator.world.children import JobView
from finetune_operator.world.objects import parse_time
from finetune_operator.world.observe import Observed, Refusal, child_key
from finetune_operator.world.pods import PodView


@dataclass(frozen=True)
class RunView:
    """A run as one pass sees it."""

    subject: Subject
    spec: FineTuneJobSpec
    """The current spec, used for fields of class Live; all other fields come from the run spec."""
    problems: list[str]
    """Why this release's models refuse the current spec; ``spec`` is then the run's own."""
    before: FineTuneJobStatus
    """The stored status."""
    observed: Observed
    run: CurrentRun
    now: datetime
    access: str | None = None
    """Digest of the settings of NetworkPolicies; None: there are none."""
    recreation: Recreation | None = None
    """Why this revision begins in this pass, if it recreates the one before."""

    @property
    def run_spec(self) -> RunSpec:
        return self.run.run_spec

    @property
    def same_run(self) -> bool:
        """Whether the stored status belongs to this run."""
        return self.before.run is not None and self.before.run.id == self.run.id

    # --- stages ---------------------------------------------------------------------------------

    @cached_property
    def stage(self) -> Role | None:
        """The first stage that is not done; None when all are."""
        return next((role for role in stages_of(self.run_spec.spec) if not self.done(role)), None)

    @cached_property
    def job(self) -> JobView | None:
        """Job of the stage, in the run's current revision."""
        stage = self.stage
        return self.observed.job(stage, self.run.id, self.run.revision) if stage else None

    @cached_property
    def pods(self) -> list[PodView]:
        """Pods of the stage, in the run's current revision."""
        stage = self.stage
        return self.observed.pods_of(stage, self.run.id, self.run.revision) if stage else []

    def done(self, role: Role) -> bool:
        """Whether a stage is done: status shows it, or the stage's Job of any revision has
        completed. Map is also done if prepare is done without it."""
        if role == "map" and self.done("prepare"):
            return True
        if self.run.outcome == "Complete" or self._succeeded(role):
            return True
        if role == GANG and self.gang_released_at is not None and self.gang_released_at <= self.now:
            return True
        return self.same_run and any(
            c.type == CONDITION[role] and (c.status == "True" or c.reason in TESTED)
            for c in self.before.conditions
        )

    def _job_complete(self, role: Role) -> bool:
        jobs = (j for j in self.observed.jobs if j.role == role and j.run == self.run.id)
        return any(j.complete for j in jobs)

    def _succeeded(self, role: Role) -> bool:
        """Whether the Job of a stage has completed or, of a CPU stage, all of its pods have
        succeeded: the Job controller takes a second and more to say so, and forever if injected
        sidecars keep pods running."""
        if self._job_complete(role):
            return True
        job = self.observed.job(role, self.run.id, self.run.revision)
        if job is None or role == GANG:
            return False
        pods = self.observed.pods_of(role, self.run.id, self.run.revision)
        succeeded = (p for p in pods if p.exit_code == 0 and (p.ended or self.outlasted(p)))
        return len({p.index for p in succeeded} | job.completed) >= job.parallelism

    def outlasted(self, pod: PodView) -> bool:
        """Whether sidecars keep a pod running for too long after its trainer has ended."""
        ended = pod.finished if pod.only_sidecars_run else None
        return ended is not None and ended + SIDECAR_ENDS <= self.now

    @property
    def failed_beside_sidecar(self) -> bool:
        """Whether the stage has failed, although a sidecar keeps its pod running, so that the Job
        neither fails nor replaces the pod: a gang's pod for good, a CPU stage's for any cause."""
        return any(
            self.outlasted(p)
            and (p.exit_code in FINAL_EXIT_CODES or self.stage != GANG)
            and p.exit_code not in (0, ExitCode.FENCED)
            for p in self.pods
        )  # fmt: skip

    @cached_property
    def gang_released_at(self) -> datetime | None:
        """When training counts as done although a pod of the gang still runs: another pod has
        reported the result, and a pod that was lost at that moment is replaced and waits for its
        peers in vain. At once if the pods that are left do not run: an elastic gang has ended
        without them. None without such a result, or if the Job has completed."""
        if self._job_complete(GANG):
            return None
        pods = self.observed.pods_of(GANG, self.run.id)
        ends = [
            pod.finished
            for pod in pods
            if pod.exit_code == 0 and pod.finished
            if pod.termination and pod.termination.run == self.run.id and pod.termination.trained
        ]
        if not ends:
            return None
        left = [p for p in pods if not p.ended]
        idle = bool(left) and all(p.on_lost_node or not p.scheduled for p in left)
        return min(ends) + (timedelta(0) if idle else GANG_LINGERS)

    # --- reports of the trainer -----------------------------------------------------------------

    @cached_property
    def progress(self) -> Progress | None:
        """The newest progress of this run's gang."""
        return self.observed.progress_of(self.run.id)

    @cached_property
    def prepared(self) -> PreparedSummary | None:
        return next((t.prepared for t in self.terminations if t.prepared), None)

    @cached_property
    def trained(self) -> TrainSummary | None:
        return next((t.trained for t in self.terminations if t.trained), None)

    @cached_property
    def published(self) -> PublishSummary | None:
        return next((t.published for t in self.terminations if t.published), None)

    @cached_property
    def terminations(self) -> list[Termination]:
        """Termination messages of the run's pods, by pod index; those of deleted pods last."""
        every = *sorted(self.observed.pods, key=_index), *self.observed.gone
        pods = (p for p in every if p.run == self.run.id)
        messages = (p.termination for p in pods)
        return [m for m in messages if m is not None and m.run == self.run.id]

    # --- failures -------------------------------------------------------------------------------

    @cached_property
    def incidents(self) -> Incidents:
        """Incidents of the gang so far. Pods that end because the operator deletes their Job are
        none."""
        return self.recreation.incidents if self.recreation else self._incidents(())

    @property
    def incidents_when_recreated(self) -> Incidents:
        """Incidents if the stage's pods on lost nodes are given up in this pass."""
        return self._incidents(self.lost_pods)

    def _incidents(self, lost: Sequence[PodView]) -> Incidents:
        stored = self.before if self.same_run else FineTuneJobStatus()
        run = self.before.run
        # This revision continues a failed run, and status does not show it yet.
        if run is not None and run.outcome == "Failed" and run.revision < self.run.revision:
            stored = stored.model_copy(update={"faults": 0})
        known = recovered(Incidents(tuple(stored.incidents), stored.faults), self.progress)
        job = self.job
        if self.stage != GANG or job is None or not job.makes_pods:
            return known
        pods = [p for p in (*self.pods, *self.observed.gone) if p.job == job.uid]
        rules = self.spec.failure_policy.rules
        return incidents(known, pods, self.place, rules, job.created, self.now, lost)

    @cached_property
    def lost_pods(self) -> list[PodView]:
        """Pods of the stage on nodes that are not reachable."""
        return [p for p in self.pods if p.on_lost_node]

    @property
    def attempt(self) -> int:
        """The run's current attempt, as far as it was read from the gang; 0 before the first."""
        stored = self.before.run.attempt if self.before.run and self.same_run else 0
        return max(stored, self.progress.attempt if self.progress else 0)

    @property
    def place(self) -> Place:
        """How far the run has come, as last read from the gang."""
        stored = self.before.progress if self.same_run else None
        step = self.progress.step if self.progress else stored.step if stored else None
        return Place(self.attempt, step, self.latest_checkpoint)

    @property
    def latest_checkpoint(self) -> str | None:
        """URI of the newest checkpoint, as far as it was read from the gang."""
        if self.progress is not None and self.progress.latest_checkpoint:
            return self.progress.latest_checkpoint
        stored = self.before.checkpoints if self.same_run else None
        return stored.latest if stored else None

    @cached_property
    def restarts(self) -> int:
        """Restarts of the gang so far: the maximum of the counts in storage and from the pods."""
        counts = [self.before.restarts if self.same_run else 0, self.incidents.count]
        if self.progress is not None:
            counts.append(self.progress.restarts)
        if self.trained is not None:
            counts.append(self.trained.restarts)
        return max(counts)

    @property
    def queue_wait(self) -> QueueStatus | None:
        """The wait of this revision's gang, stored or begun in this pass."""
        if self.recreation is not None:
            return self.recreation.wait
        run = self.before.run
        same_gang = run is not None and (run.id, run.revision) == (self.run.id, self.run.revision)
        return self.before.queue if same_gang else None

    @property
    def save_seconds(self) -> int | None:
        """Longest time to save a checkpoint of the run, rounded up; None: none is known."""
        stored = self.before.checkpoints if self.same_run else None
        measured = self.progress.save_seconds if self.progress else 0.0
        return max(math.ceil(measured), (stored and stored.save_seconds) or 0) or None

    @property
    def grace_seconds(self) -> int:
        """terminationGracePeriodSeconds of the gang's pods, if they are made in this pass."""
        memory = self.prepared.memory if self.prepared else None
        return grace_seconds(self.run_spec.spec, memory, self.save_seconds)

    @property
    def avoided_nodes(self) -> tuple[AvoidedNode, ...]:
        """Nodes that the gang avoids if it is made in this pass."""
        if self.recreation is not None:
            return self.recreation.avoided
        stored = self.before.avoided_nodes if self.same_run else []
        return tuple(n for n in stored if (parse_time(n.until) or self.now) > self.now)

    @cached_property
    def obstacle(self) -> Obstacle | None:
        """What keeps the stage's pods from running."""
        if self.job is None or self.job.finished:
            return None
        if is_elastic(self) and (gang_runs(self) or any(p.exit_code == 0 for p in self.pods)):
            return None  # the others train, or have finished, without the pods that lack
        deadline = timedelta(seconds=self.spec.scheduling.start_deadline_seconds)
        has_run = self.stage == GANG and self.same_run and self.before.progress is not None
        rules = self.spec.failure_policy.rules
        waits = any(r.failure_class == "ImagePull" and r.action == "Wait" for r in rules)
        wait = self.queue_wait
        waiting = parse_time(wait.since) if wait and wait.reason == "Unschedulable" else None
        lacking = self.observed.lacks_pods_since.get(self.job.name)
        return obstacle(self.job, self.pods, deadline, has_run or waits, waiting, lacking)

    @property
    def refusal(self) -> Refusal | None:
        """The API server's refusal to create the stage's Job, or a child that is created before
        it: the run spec's ConfigMap, the NetworkPolicy or the Service."""
        if self.stage is None or self.job is not None:
            return None
        who, run = self.subject.name, self.run
        run_spec = child_key("ConfigMap", run_spec_name(who, run.id, run.revision))
        policy = child_key("NetworkPolicy", network_policy_name(who, run.id))
        stage = child_name(who, run.id, self.stage, run.revision)
        children = (run_spec, policy, child_key("Service", stage), child_key("Job", stage))
        return next((r for r in map(self.observed.refused.get, children) if r is not None), None)

    # --- the rest -------------------------------------------------------------------------------

    @property
    def queue(self) -> str | None:
        """Kueue's queue for the stage's Job; None if Kueue does not control the Job."""
        return self.run_spec.spec.scheduling.queue_name if self.stage == GANG else None

    @property
    def completion_time(self) -> datetime:
        """When the run ended, as recorded in status; now if the run ends in this pass."""
        run = self.before.run
        known = parse_time(run.completion_time) if run and self.same_run else None
        return known if known and self.run.outcome else self.now


def _index(pod: PodView) -> int:
    return pod.index


def is_elastic(view: RunView) -> bool:
    """Whether the stage is a gang that trains with fewer nodes than it may have."""
    compute = view.run_spec.spec.compute
    return view.stage == GANG and compute.effective_min_nodes < compute.nodes


def gang_runs(view: RunView) -> bool:
    """Whether all pods of the gang run; of an elastic gang, enough of them."""
    if is_elastic(view):
        return suffices(view, {p.index for p in view.pods if p.running and not p.on_lost_node})
    return len(running_indexes(view)) >= view.run_spec.spec.compute.nodes


def suffices(view: RunView, indexes: set[int]) -> bool:
    """Whether a gang trains with these completion indexes. Index 0 holds the rendezvous."""
    return 0 in indexes and len(indexes) >= view.run_spec.spec.compute.effective_min_nodes


def running_indexes(view: RunView) -> set[int]:
    """Completion indexes of the stage's pods that run."""
    return {p.index for p in view.pods if p.running}
