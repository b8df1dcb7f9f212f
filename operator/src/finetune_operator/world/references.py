"""Jobs that start from the models of other jobs (``spec.model.fineTuneJobRef``): who names whom,
what a named job has published, and what is waited for until it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.base import InvalidSpec
from finetune_api.order import CONTRACT_VERSION, JobIdentity, RunOrder, TunedBase, tuned_base
from finetune_api.sources import StorageAccess
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_api.status import FineTuneJobStatus, RunBase
from finetune_operator.world.objects import Object

MESSAGE_MAX: Final = 500
"""Characters shown of why another job has failed."""


@dataclass(frozen=True)
class ModelJob:
    """A job whose model is waited for."""

    name: str
    refers_to: str | None
    """Name of the job that it starts from itself."""
    settled: bool
    """Whether its status speaks of its spec as it stands."""
    status: FineTuneJobStatus
    order: RunOrder | None
    """Order of its current run, or what stands in for one that was removed."""

    @property
    def complete(self) -> bool:
        """Whether its current run has published a model."""
        run = self.status.run
        return self.settled and run is not None and run.outcome == "Complete"


@dataclass(frozen=True)
class Wait:
    """Why a run cannot begin yet."""

    reason: str
    message: str
    stuck: bool = False
    """Whether it will not end by itself: somebody must change a job."""


def reference_of(job: Object) -> str | None:
    """Name of the job that a FineTuneJob (as stored) starts from, where it names one."""
    found: Any = job
    for key in ("spec", "model", "fineTuneJobRef", "name"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None


def model_job(job: Object, status: FineTuneJobStatus, orders: Iterable[RunOrder]) -> ModelJob:
    """The view of a job.

    Args:
        orders: that are in the cluster of its current run, newest first.
    """
    meta = job["metadata"]
    return ModelJob(
        name=meta["name"],
        refers_to=reference_of(job),
        settled=status.observed_generation == meta.get("generation", 1),
        status=status,
        order=next(iter(orders), None) or _order_from_status(job, status),
    )


def _order_from_status(job: Object, status: FineTuneJobStatus) -> RunOrder | None:
    """The order of a run whose own was removed by hand: after the spec as it stands."""
    try:
        spec = parse_spec(job.get("spec"))
    except InvalidSpec:
        return None
    base = status.run and status.run.base
    meta = job["metadata"]
    return RunOrder(
        version=CONTRACT_VERSION,
        job=JobIdentity(namespace=meta["namespace"], name=meta["name"], uid=meta["uid"]),
        run=status.run.id if status.run else "",
        spec=spec,
        base=from_status(base, spec.model.storage) if base else None,
    )


def from_status(base: RunBase, storage: StorageAccess | None) -> TunedBase:
    """A base as status remembers it, which knows no access."""
    return TunedBase(
        job=base.job, run=base.run, uri=base.uri, digest=base.digest, storage=storage
    )  # fmt: skip


def find_base(
    name: str, namespace: str, spec: FineTuneJobSpec, chain: tuple[ModelJob, ...]
) -> TunedBase | Wait | None:
    """What the job of that name starts from; None where its spec gives an address.

    Args:
        chain: the job that it names, the one that this names, and so on: to one that is missing,
            gives an address, or stands in the chain already.
    """
    if spec.model.fine_tune_job_ref is None:
        return None
    wanted = spec.model.fine_tune_job_ref.name
    if chain and chain[0].complete and chain[0].order is not None:
        output = chain[0].status.output
        return tuned_base(chain[0].order, output.digest if output else None, spec)
    circle = _circle(name, wanted, chain)
    if circle:
        text = (
            f"spec.model.fineTuneJobRef: the jobs wait for each other's models"
            f" ({' → '.join(circle)}); one of them must start from spec.model.source"
        )
        return Wait("ReferenceCycle", text, stuck=True)
    if not chain:
        text = (
            f"spec.model.fineTuneJobRef: there is no FineTuneJob {wanted} in namespace"
            f" {namespace}; the run begins once it is there and Complete"
        )
        return Wait("WaitingForModel", text)
    return _state_of(chain[0])


def _circle(name: str, wanted: str, chain: tuple[ModelJob, ...]) -> list[str]:
    """Names from a job to itself, where the chain leads back into itself and nobody in it has a
    model that the one before could start from."""
    if any(job.complete for job in chain):
        return []
    path = [name, *(job.name for job in chain)]
    back = chain[-1].refers_to if chain else wanted
    return [*path[path.index(back) :], back] if back in path else []


def _state_of(job: ModelJob) -> Wait:
    """What a job that has no model yet is at."""
    status = job.status
    begins = "; the run begins once it is Complete"
    held = {c.type: c for c in status.conditions if c.status == "True"}
    if "Stalled" in held and status.failure is None:
        text = f"{held['Stalled'].reason}: {held['Stalled'].message[:MESSAGE_MAX]}"
        return _stuck(job.name, f"is stalled ({text})")
    if not job.settled or status.run is None or status.phase is None:
        suspended = status.phase == "Suspended" and job.settled
        said = "is suspended" if suspended else "has not begun with its spec as it stands"
        return Wait("WaitingForModel", f"FineTuneJob {job.name} {said}{begins}")
    if status.failure is not None:
        cause = f"{status.failure.reason}: {status.failure.message[:MESSAGE_MAX]}"
        return _stuck(job.name, f"has failed ({cause})")
    text = f"FineTuneJob {job.name} is {status.phase} (run {status.run.id}){begins}"
    return Wait("WaitingForModel", text)


def _stuck(name: str, said: str) -> Wait:
    text = f"FineTuneJob {name} {said}; mend that job: the run begins once it is Complete"
    return Wait("ModelFailed", text, stuck=True)


class References:
    """Which job names which, of all FineTuneJobs."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, str], Object] = {}
        self._waiting: dict[tuple[str, str], set[str]] = {}
        self._wanted: dict[str, tuple[str, str]] = {}

    def put(self, job: Object) -> None:
        """Remember a job as it is now."""
        meta = job["metadata"]
        self._named[meta["namespace"], meta["name"]] = job
        self._forget_wish(meta["uid"])
        name = reference_of(job)
        if name is not None:
            wanted = self._wanted[meta["uid"]] = (meta["namespace"], name)
            self._waiting.setdefault(wanted, set()).add(meta["uid"])

    def remove(self, job: Object) -> None:
        """Forget a job; one that was made anew under its name stays."""
        meta = job["metadata"]
        known = self._named.get((meta["namespace"], meta["name"]))
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            del self._named[meta["namespace"], meta["name"]]
        self._forget_wish(meta["uid"])

    def _forget_wish(self, uid: str) -> None:
        wanted = self._wanted.pop(uid, None)
        if wanted is not None:
            self._waiting[wanted].discard(uid)
            if not self._waiting[wanted]:
                del self._waiting[wanted]

    def dependents(self, job: Object) -> list[str]:
        """Uids of the jobs that name this one."""
        meta = job["metadata"]
        return sorted(self._waiting.get((meta["namespace"], meta["name"]), ()))

    def chain(self, job: Object) -> list[Object]:
        """The job that a job names, the one that this names, and so on, each once and the job
        itself never."""
        namespace = job["metadata"]["namespace"]
        seen, found = {job["metadata"]["name"]}, []
        name = reference_of(job)
        while name is not None and name not in seen:
            after = self._named.get((namespace, name))
            if after is None:
                break
            found.append(after)
            seen.add(name)
            name = reference_of(after)
        return found
