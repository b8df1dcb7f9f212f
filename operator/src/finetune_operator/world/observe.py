"""Everything that one pass knows about a job: the views of its children."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from finetune_api.names import Role
from finetune_api.results import Progress
from finetune_operator.world.children import (
    JobView,
    PolicyView,
    ServiceView,
    StoredRunSpec,
    job_view,
    policy_view,
    service_view,
    stored_run_spec,
)
from finetune_operator.world.models import ModelJob
from finetune_operator.world.objects import Object
from finetune_operator.world.pods import PodView, pod_view


@dataclass(frozen=True)
class Refusal:
    """The API server's refusal to create, change or delete a child."""

    message: str
    final: bool = False
    """Whether the child to create is invalid, so that no retry can succeed. Otherwise the request
    may succeed later: a quota, a webhook that fails, a server that is overloaded."""


def child_key(kind: str, name: str) -> str:
    """Key of a child in ``Observed.refused``."""
    return f"{kind} {name}"


@dataclass(frozen=True)
class Observed:
    """The observed children of one job, and the models that it starts from."""

    run_specs: tuple[StoredRunSpec, ...] = ()
    jobs: tuple[JobView, ...] = ()
    services: tuple[ServiceView, ...] = ()
    policies: tuple[PolicyView, ...] = ()
    pods: tuple[PodView, ...] = ()
    gone: tuple[PodView, ...] = ()
    """Pods that ran and no longer exist, as last seen."""
    progress: Progress | None = None
    """Newest ``/progress`` of a gang of the job, possibly of an earlier run."""
    progress_time: datetime | None = None
    """When ``progress`` was read."""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """By ``child_key``; removed once the API server accepts the request."""
    lacks_pods_since: Mapping[str, datetime] = field(default_factory=dict)
    """When Jobs that lack pods were first seen so, by name of the Job."""
    models: tuple[ModelJob, ...] = ()
    """The job whose model this job starts from, the job that that job starts from, and so on."""

    def job(self, role: Role, run: str, revision: int) -> JobView | None:
        """The Job of a stage in a revision of a run."""
        for job in self.jobs:
            if (job.role, job.run, job.revision) == (role, run, revision):
                return job
        return None

    def pods_of(self, role: Role, run: str, revision: int | None = None) -> list[PodView]:
        """The pods of a stage of a run, of one revision or of all."""
        return [
            p
            for p in self.pods
            if p.role == role and p.run == run and revision in (None, p.revision)
        ]

    def lacking_pods(self) -> list[str]:
        """Names of the Jobs that lack pods."""
        jobs = (j for j in self.jobs if j.makes_pods)
        return [j.name for j in jobs if j.missing(self.pods_of(j.role, j.run, j.revision))]

    def progress_of(self, run: str) -> Progress | None:
        """The newest progress if it belongs to the given run."""
        return self.progress if self.progress is not None and self.progress.run == run else None


View = StoredRunSpec | JobView | ServiceView | PolicyView | PodView

VIEWS: Final[dict[str, Callable[[Object], View | None]]] = {
    "ConfigMap": stored_run_spec,
    "Service": service_view,
    "NetworkPolicy": policy_view,
    "Job": job_view,
    "Pod": pod_view,
}
"""View of a child by its kind; None for an object that the operator did not make for a run."""


def observe(
    *,
    views: Mapping[str, Mapping[str, View | None]],
    gone: Iterable[PodView] = (),
    pull_failing_since: Mapping[str, datetime] | None = None,
    warnings: Mapping[str, str] | None = None,
    node_problems: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    progress_time: datetime | None = None,
    refused: Mapping[str, Refusal] | None = None,
    models: Iterable[ModelJob] = (),
) -> Observed:
    """What a pass sees of a job.

    Args:
        views: the views of its children, by kind and uid.
        pull_failing_since, warnings, node_problems: by uid of the child.
    """
    since, told = pull_failing_since or {}, warnings or {}
    problems = node_problems or {}
    kinds = (StoredRunSpec, JobView, ServiceView, PolicyView, PodView)
    found: dict[type, list[View]] = {kind: [] for kind in kinds}
    for of_kind in views.values():
        for uid, view in of_kind.items():
            if isinstance(view, PodView) and uid in since:
                view = replace(view, pull_failing_since=since[uid])
            if isinstance(view, PodView) and uid in problems:
                view = replace(view, node_problem=problems[uid])
            if isinstance(view, PodView | JobView) and uid in told:
                view = replace(view, warning=told[uid])
            if view is not None:
                found[type(view)].append(view)
    return Observed(
        run_specs=tuple(found[StoredRunSpec]),  # type: ignore[arg-type]
        jobs=tuple(found[JobView]),  # type: ignore[arg-type]
        services=tuple(found[ServiceView]),  # type: ignore[arg-type]
        policies=tuple(found[PolicyView]),  # type: ignore[arg-type]
        pods=tuple(found[PodView]),  # type: ignore[arg-type]
        gone=tuple(gone),
        progress=progress,
        progress_time=progress_time,
        refused=dict(refused or {}),
        models=tuple(models),
    )
