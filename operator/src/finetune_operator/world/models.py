"""FineTuneJobs as sources of models: what a job has published for the jobs that start from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, TunedBase
from finetune_api.sources import StorageAccess
from finetune_api.status import FineTuneJobStatus, RunBase
from finetune_operator.world.children import StoredRunSpec
from finetune_operator.world.objects import Object
from finetune_operator.world.references import reference_of
from finetune_operator.world.stored import read_spec, read_status


@dataclass(frozen=True)
class ModelJob:
    """A job whose model another job starts from."""

    name: str
    refers_to: str | None
    """Name of the job that this job starts from."""
    settled: bool
    """Whether its status reflects its current spec."""
    status: FineTuneJobStatus
    run_spec: RunSpec | None
    """Run spec of its current run; built from its spec if the ConfigMap was removed."""

    @property
    def complete(self) -> bool:
        """Whether its current run has published a model."""
        run = self.status.run
        return self.settled and run is not None and run.outcome == "Complete"

    @property
    def evaluates(self) -> bool:
        """Whether its current run trains nothing, and so publishes no model."""
        return self.run_spec is not None and not self.run_spec.spec.method.kind.trains


def model_mark(job: Object) -> tuple[Any, ...]:
    """The parts of a job that the jobs which start from its model depend on."""
    status = job.get("status") or {}
    run = status.get("run") or {}
    stalled = [c for c in status.get("conditions") or [] if c.get("type") == "Stalled"]
    return (
        job["metadata"].get("generation"), status.get("observedGeneration"), status.get("phase"),
        run.get("id"), run.get("revision"), run.get("outcome"), str(status.get("failure")),
        str(status.get("output")), [(c.get("status"), c.get("message")) for c in stalled],
    )  # fmt: skip


def model_view(job: Object, stored: Iterable[StoredRunSpec]) -> ModelJob:
    """View of a job for the jobs that start from its model; ``stored`` are its run specs."""
    meta, status = job["metadata"], read_status(job.get("status"))
    run = status.run.id if status.run else None
    run_specs = [v for v in stored if v.run == run and v.run_spec]
    newest = max(run_specs, key=lambda v: v.revision, default=None)
    return ModelJob(
        name=meta["name"],
        refers_to=reference_of(job),
        settled=status.observed_generation == meta.get("generation", 1),
        status=status,
        run_spec=newest.run_spec if newest else _run_spec_from_spec(job, status),
    )


def _run_spec_from_spec(job: Object, status: FineTuneJobStatus) -> RunSpec | None:
    """Build a run spec from the current spec, for a run whose ConfigMap was removed."""
    spec, _ = read_spec(job.get("spec"))
    if spec is None:
        return None
    base = status.run and status.run.base
    meta = job["metadata"]
    return RunSpec(
        version=CONTRACT_VERSION,
        job=JobIdentity(namespace=meta["namespace"], name=meta["name"], uid=meta["uid"]),
        run=status.run.id if status.run else "",
        spec=spec,
        base=base_from_status(base, spec.model.storage) if base else None,
    )


def base_from_status(base: RunBase, storage: StorageAccess | None) -> TunedBase:
    """The model that a run started from, read from status, which does not record storage access."""
    return TunedBase(
        job=base.job, run=base.run, uri=base.uri, digest=base.digest, storage=storage
    )  # fmt: skip
