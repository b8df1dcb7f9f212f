"""The current run of a job: run identity, and the effect of a changed spec.

The run specs in the cluster are authoritative: status may be lost, and a process may die between
two writes. Specs are compared only if ``metadata.generation`` has changed since status was written,
and only with the newest run spec re-defaulted by this release's models, so that a new default (of a
newer CRD or operator) affects no run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from finetune_api.classes import FieldClass, changed_classes, class_digest
from finetune_api.identity import run_id
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, TunedBase
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import Config
from finetune_operator.decision.base_model import Wait, find_base
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.world.children import StoredRunSpec
from finetune_operator.world.models import base_from_status
from finetune_operator.world.observe import Observed

_OUTCOMES: Final = ("Complete", "Failed")


def current_run(
    subject: Subject,
    spec: FineTuneJobSpec | None,
    before: FineTuneJobStatus,
    observed: Observed,
    config: Config,
) -> CurrentRun | None:
    """Return the run to work on, which may begin in this pass; None while there is none.

    ``spec`` is None if this release's models refuse it: then no run begins or changes.
    """
    known = _Known(subject, before, observed, config)
    if known.number == 0:
        return _begin(known, 1, spec) if spec and not spec.suspend else None
    changed = _changed_classes(known, spec) if spec else {}
    if spec is not None and "NewRun" in changed:
        return _begin(known, known.number + 1, spec)
    if spec is not None and "Resume" in changed and known.outcome != "Complete":
        return _next_revision(known, spec)
    if spec is not None and _retry_requested(known, spec):
        return _next_revision(known, spec)
    return _unchanged(known, spec)


@dataclass(frozen=True)
class _Known:
    """What status and the run specs in the cluster show about a job's runs."""

    subject: Subject
    before: FineTuneJobStatus
    observed: Observed
    config: Config

    @cached_property
    def number(self) -> int:
        """Number of the newest run; 0 before the first."""
        numbers = [o.number for o in self.observed.run_specs]
        return max([self.before.run.number if self.before.run else 0, *numbers])

    @cached_property
    def stored(self) -> StoredRunSpec | None:
        """The run spec of the newest revision of the newest run; None if it was removed, or while
        the run waits for its base model."""
        newest = self.newest_stored
        run = self.before.run if self.same_run else None
        return None if newest and run and newest.revision < run.revision else newest

    @cached_property
    def newest_stored(self) -> StoredRunSpec | None:
        """The newest run spec of the newest run that is left in the cluster."""
        stored = (o for o in self.observed.run_specs if o.number == self.number)
        return max(stored, key=lambda o: o.revision, default=None)

    def is_of_run(self, spec: FineTuneJobSpec, kind: FieldClass) -> bool:
        """Whether a spec has the run's fields of a class, by the digest in status; True if status
        has none."""
        run = self.before.run
        digest = run and (run.spec_digest if kind == "NewRun" else run.gang_digest)
        return digest is None or class_digest(spec.to_json(), kind) == digest

    @property
    def id(self) -> str:
        return run_id(self.number, self.subject.uid)

    @property
    def revision(self) -> int:
        """Number of the newest revision."""
        if self.stored is not None:
            return self.stored.revision
        return self.before.run.revision if self.before.run else 1

    @property
    def same_run(self) -> bool:
        """Whether status belongs to the newest run."""
        return self.before.run is not None and self.before.run.number == self.number

    @property
    def restarts(self) -> int:
        """Incidents of the run so far."""
        return self.before.restarts if self.same_run else 0

    @cached_property
    def outcome(self) -> str | None:
        """How the newest revision of the run ended; the outcome in a status of an older revision is
        ignored."""
        if self.stored is not None and self.stored.outcome is not None:
            return _final(self.stored.outcome)
        run = self.before.run
        if run is None or not self.same_run:
            return None
        if self.stored is not None and run.revision != self.stored.revision:
            return None
        return _final(run.outcome)

    def make_run_spec(
        self, run: str, spec: FineTuneJobSpec, base: TunedBase | None, revision: int, restarts: int
    ) -> RunSpec:
        """Build the run spec of a revision; ``restarts`` is the run's number of earlier
        incidents."""
        who = self.subject
        return RunSpec(
            version=CONTRACT_VERSION,
            job=JobIdentity(namespace=who.namespace, name=who.name, uid=who.uid),
            run=run,
            spec=spec,
            base=base,
            revision=revision,
            restarts=restarts,
        )


def _final(outcome: str | None) -> str | None:
    """A recorded outcome. One that only another release knows ended the run without a model that
    this release could hand on."""
    return outcome if outcome in (None, *_OUTCOMES) else "Failed"


def _changed_classes(known: _Known, spec: FineTuneJobSpec) -> dict[FieldClass, list[str]]:
    """Fields in which the spec differs from the run's, by class."""
    before = known.before
    if before.observed_generation == known.subject.generation:
        return {}
    if known.stored is None or known.stored.run_spec is None:
        # There is no spec to compare with, but its digests. A run that still waits for its base
        # model begins with the current spec.
        if before.run is None or before.run.start_time is None or not known.same_run:
            return {}
        kinds: tuple[FieldClass, ...] = ("NewRun", "Resume")
        return {kind: ["spec"] for kind in kinds if not known.is_of_run(spec, kind)}
    return changed_classes(known.stored.run_spec.spec.to_json(), spec.to_json())


def next_gang(run: CurrentRun, restarts: int) -> CurrentRun:
    """The next revision of a run with the same spec, for a gang that is recreated."""
    update = {"revision": run.revision + 1, "restarts": restarts}
    return replace(
        run,
        revision=run.revision + 1,
        run_spec=run.run_spec.model_copy(update=update),
        recorded=False,
    )


def _retry_requested(known: _Known, spec: FineTuneJobSpec) -> bool:
    """Whether spec.retryToken has a value that the run has not had, and the run has failed."""
    run = known.before.run
    seen = {None, run.retry_token if run and known.same_run else None}
    if known.stored is not None and known.stored.run_spec is not None:
        seen.add(known.stored.run_spec.spec.retry_token)
    return known.outcome == "Failed" and spec.retry_token not in seen


def _begin(known: _Known, number: int, spec: FineTuneJobSpec) -> CurrentRun:
    """A new run."""
    run = run_id(number, known.subject.uid)
    base, wait = _find_base(known, spec)
    return CurrentRun(
        number=number,
        id=run,
        revision=1,
        run_spec=known.make_run_spec(run, spec, base, revision=1, restarts=0),
        image=spec.compute.image or known.config.image,
        wait=wait,
    )


def _next_revision(known: _Known, spec: FineTuneJobSpec) -> CurrentRun:
    """The same run in a new gang."""
    revision, base = known.revision + 1, _kept_base(known, spec)
    return CurrentRun(
        number=known.number,
        id=known.id,
        revision=revision,
        run_spec=known.make_run_spec(known.id, spec, base, revision, known.restarts),
        image=spec.compute.image or known.config.image,
    )


def _unchanged(known: _Known, spec: FineTuneJobSpec | None) -> CurrentRun | None:
    """The run as defined by its run spec."""
    run_spec = known.stored if spec is not None else known.newest_stored
    if run_spec is None or run_spec.run_spec is None:
        return _without_run_spec(known, spec) if spec is not None else None
    return CurrentRun(
        number=known.number,
        id=known.id,
        revision=run_spec.revision,
        run_spec=run_spec.run_spec,
        image=run_spec.image or run_spec.run_spec.spec.compute.image or known.config.image,
        outcome=known.outcome,
        recorded=True,
    )


def _without_run_spec(known: _Known, spec: FineTuneJobSpec) -> CurrentRun:
    """A run without a usable run spec: the ConfigMap was removed by hand, this release's models
    refuse it, or it does not exist yet because the run waits for its base model. The current spec
    applies, or that of an earlier revision if it is the one that has the run's fields."""
    earlier = known.newest_stored.run_spec if known.newest_stored else None
    if earlier is not None and not known.is_of_run(spec, "NewRun"):
        spec = earlier.spec if known.is_of_run(earlier.spec, "NewRun") else spec
    base, wait = _kept_base(known, spec), None
    if base is None and known.outcome is None:
        base, wait = _find_base(known, spec)
    image = known.stored.image if known.stored else ""
    return CurrentRun(
        number=known.number,
        id=known.id,
        revision=known.revision,
        run_spec=known.make_run_spec(known.id, spec, base, known.revision, known.restarts),
        image=image or spec.compute.image or known.config.image,
        outcome=known.outcome,
        recorded=known.stored is not None,
        wait=wait,
    )


def _find_base(known: _Known, spec: FineTuneJobSpec) -> tuple[TunedBase | None, Wait | None]:
    """The model that a run starts from if it begins now, or the reason to wait."""
    subject = known.subject
    found = find_base(subject.name, subject.namespace, spec, known.observed.models)
    return (None, found) if isinstance(found, Wait) else (found, None)


def _kept_base(known: _Known, spec: FineTuneJobSpec) -> TunedBase | None:
    """The model that a run started from, even if the other job has published another one since."""
    if spec.model.fine_tune_job_ref is None:
        return None
    stored = known.newest_stored
    if stored is not None and stored.run_spec is not None:
        return stored.run_spec.base
    run = known.before.run
    if run is None or not known.same_run or run.base is None:
        return None
    return base_from_status(run.base, spec.model.storage)
