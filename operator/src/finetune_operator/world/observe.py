"""What is there: a job's orders, child Jobs, Services and pods, read out of plain API objects.

Every view holds only what decisions need. Nothing here raises on odd objects: what cannot be read
is absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import ValidationError

from finetune_api import names
from finetune_api.base import explain
from finetune_api.names import Role
from finetune_api.order import RunOrder
from finetune_api.results import Progress
from finetune_operator.config import (
    ANNOTATION_IMAGE,
    ANNOTATION_OUTCOME,
    ANNOTATION_RESTARTS,
    ANNOTATION_SUSPENDED,
)
from finetune_operator.world.objects import Object, parse_time, place_of
from finetune_operator.world.pods import PodView, pod_view
from finetune_operator.world.references import ModelJob, model_job
from finetune_operator.world.stored import read_status


@dataclass(frozen=True)
class OrderView:
    """The ConfigMap of one revision of a run."""

    name: str
    run: str
    number: int
    revision: int
    image: str
    created: datetime | None = None
    restarts_before: int = 0
    outcome: str | None = None
    order: RunOrder | None = None
    """None where today's models refuse it; ``problems`` says why."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobView:
    """A child Job."""

    name: str
    role: Role
    run: str
    revision: int
    created: datetime
    started: datetime | None = None
    suspended: bool = False
    held: bool = False
    """Suspended by us, for spec.suspend."""
    complete: bool = False
    failed: bool = False
    """Failed, or about to be: the Job controller waits for pods that may never end."""
    failed_at: datetime | None = None
    failure_reason: str = ""
    failure_message: str = ""
    stopping: bool = False
    """Told to end: its deadline was set to nothing."""
    deleting: bool = False

    @property
    def finished(self) -> bool:
        return self.complete or self.failed


@dataclass(frozen=True)
class ServiceView:
    """A gang's headless Service."""

    name: str
    run: str
    revision: int


@dataclass(frozen=True)
class Refusal:
    """The API server's no to a child that was to be made."""

    message: str
    final: bool
    """Invalid, and so for ever; otherwise forbidden just now (a quota)."""


@dataclass(frozen=True)
class Observed:
    """All that is known of one job's children."""

    orders: tuple[OrderView, ...] = ()
    jobs: tuple[JobView, ...] = ()
    services: tuple[ServiceView, ...] = ()
    pods: tuple[PodView, ...] = ()
    gone: tuple[PodView, ...] = ()
    """Pods of the gang that ran and no longer exist, as they were last seen."""
    progress: Progress | None = None
    progress_time: datetime | None = None
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """By name of the child, until it is accepted."""
    models: tuple[ModelJob, ...] = ()
    """The job whose model this one starts from, the one that this names, and so on."""

    def job(self, role: Role, run: str, revision: int) -> JobView | None:
        """The Job of a role in a revision of a run."""
        for job in self.jobs:
            if (job.role, job.run, job.revision) == (role, run, revision):
                return job
        return None

    def pods_of(self, role: Role, run: str, revision: int | None = None) -> list[PodView]:
        """The pods of a role of a run, of one revision or of all."""
        return [
            p
            for p in self.pods
            if p.role == role and p.run == run and revision in (None, p.revision)
        ]


def observe(
    *,
    config_maps: Iterable[Object] = (),
    jobs: Iterable[Object] = (),
    services: Iterable[Object] = (),
    pods: Iterable[Object] = (),
    gone: Iterable[Object] = (),
    pull_failing_since: Mapping[str, datetime] | None = None,
    progress: Progress | None = None,
    progress_time: datetime | None = None,
    refused: Mapping[str, Refusal] | None = None,
    models: Iterable[ModelJob] = (),
) -> Observed:
    """The views of a job's children; ``pull_failing_since`` is by pod uid."""
    since = pull_failing_since or {}
    return Observed(
        orders=tuple(filter(None, map(order_view, config_maps))),
        jobs=tuple(filter(None, map(job_view, jobs))),
        services=tuple(filter(None, map(service_view, services))),
        pods=tuple(
            filter(None, (pod_view(p, since.get(p["metadata"].get("uid", ""))) for p in pods))
        ),
        gone=tuple(filter(None, map(pod_view, gone))),
        progress=progress,
        progress_time=progress_time,
        refused=dict(refused or {}),
        models=tuple(models),
    )


def model_view(job: Object, config_maps: Iterable[Object]) -> ModelJob:
    """Another job, as the one that starts from its model sees it."""
    status = read_status(job.get("status"))
    views = sorted(filter(None, map(order_view, config_maps)), key=lambda v: -v.revision)
    run = status.run.id if status.run else None
    return model_job(job, status, [v.order for v in views if v.order and v.run == run])


def order_view(obj: Object) -> OrderView | None:
    """The order in a ConfigMap, or None where it is none of ours."""
    labels = obj["metadata"].get("labels") or {}
    notes = obj["metadata"].get("annotations") or {}
    run, revision = labels.get(names.LABEL_RUN, ""), labels.get(names.LABEL_REVISION, "")
    text = (obj.get("data") or {}).get(names.ORDER_KEY)
    number = run.partition("-")[0]
    if text is None or not number.isdigit() or not revision.isdigit():
        return None
    order, problems = _read_order(text)
    restarts = notes.get(ANNOTATION_RESTARTS, "0")
    return OrderView(
        name=obj["metadata"]["name"],
        run=run,
        number=int(number),
        revision=int(revision),
        image=notes.get(ANNOTATION_IMAGE, ""),
        created=parse_time(obj["metadata"].get("creationTimestamp")),
        restarts_before=int(restarts) if restarts.isdigit() else 0,
        outcome=notes.get(ANNOTATION_OUTCOME),
        order=order,
        problems=problems,
    )


def _read_order(text: str) -> tuple[RunOrder | None, tuple[str, ...]]:
    """Any contract version is read: an order of an older release is still the run's snapshot."""
    try:
        return RunOrder.model_validate(json.loads(text)), ()
    except ValidationError as error:
        return None, tuple(explain(error, root="order"))
    except ValueError as error:
        return None, (f"order: not JSON ({error})",)


def job_view(obj: Object) -> JobView | None:
    """A child Job, or None where its labels are not ours."""
    place = place_of(obj)
    created = parse_time(obj["metadata"].get("creationTimestamp"))
    if place is None or created is None:
        return None
    role, run, revision = place
    status = obj.get("status") or {}
    true = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    bad = true.get("Failed") or true.get("FailureTarget") or {}
    return JobView(
        name=obj["metadata"]["name"],
        role=role,
        run=run,
        revision=revision,
        created=created,
        started=parse_time(status.get("startTime")),
        suspended=bool(obj.get("spec", {}).get("suspend")),
        held=(obj["metadata"].get("annotations") or {}).get(ANNOTATION_SUSPENDED) == "true",
        complete="Complete" in true or "SuccessCriteriaMet" in true,
        failed=bool(bad),
        failed_at=parse_time(bad.get("lastTransitionTime")),
        failure_reason=bad.get("reason", ""),
        failure_message=bad.get("message", ""),
        stopping=obj.get("spec", {}).get("activeDeadlineSeconds") == 0,
        deleting="deletionTimestamp" in obj["metadata"],
    )


def service_view(obj: Object) -> ServiceView | None:
    """A gang's Service, or None where its labels are not ours."""
    place = place_of(obj)
    return ServiceView(obj["metadata"]["name"], place[1], place[2]) if place else None
