"""Which run a job is at: run identity, and what a changed spec does to it.

The orders in the cluster are the truth about runs: status may be lost, a process may die between
two writes. Specs are compared only when ``metadata.generation`` has moved on since status was
written, and against the newest order re-defaulted by today's models, so that a new default (of a
newer CRD, or of a newer operator) touches no run.
"""

from __future__ import annotations

from typing import Final

from finetune_api.classes import FieldClass, changed_classes
from finetune_api.identity import run_id
from finetune_api.order import CONTRACT_VERSION, JobIdentity, RunOrder, TunedBase
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.config import Config
from finetune_operator.decision.plan import CurrentRun, Subject
from finetune_operator.world.observe import Observed, OrderView
from finetune_operator.world.references import Wait, find_base, from_status

ENDED: Final = ("Complete", "Failed")


def current_run(
    subject: Subject,
    spec: FineTuneJobSpec | None,
    before: FineTuneJobStatus,
    observed: Observed,
    config: Config,
) -> CurrentRun | None:
    """The run to work on, which may begin with this pass; None while there is none.

    ``spec`` is None where today's models refuse it: then nothing begins and nothing changes.
    """
    latest = _newest_order(observed)
    number = max(before.run.number if before.run else 0, latest.number if latest else 0)
    if number == 0:
        return _begin(1, subject, spec, observed, config) if spec and not spec.suspend else None
    if latest is not None and latest.number < number:
        latest = None
    outcome = _outcome(number, before, latest)
    changed = _changed(subject, spec, before, latest)
    if spec is not None and "NewRun" in changed:
        return _begin(number + 1, subject, spec, observed, config)
    if spec is not None and "Resume" in changed and outcome != "Complete":
        return _revise(number, subject, spec, before, latest, outcome, config)
    return _as_it_is(number, subject, spec, before, latest, outcome, observed, config)


def _newest_order(observed: Observed) -> OrderView | None:
    return max(observed.orders, key=lambda o: (o.number, o.revision), default=None)


def _outcome(number: int, before: FineTuneJobStatus, latest: OrderView | None) -> str | None:
    """How the newest revision of the run ended; status of an older revision says nothing."""
    if latest is not None and latest.outcome in ENDED:
        return latest.outcome
    run = before.run
    if run is None or run.number != number:
        return None
    if latest is not None and run.revision != latest.revision:
        return None
    return run.outcome if run.outcome in ENDED else None


def _changed(
    subject: Subject,
    spec: FineTuneJobSpec | None,
    before: FineTuneJobStatus,
    latest: OrderView | None,
) -> dict[FieldClass, list[str]]:
    if spec is None or before.observed_generation == subject.generation:
        return {}
    if latest is None or latest.order is None:
        # Nothing to compare with: only an explicit wish starts a new run. One that still waits for
        # its model begins with the spec as it stands.
        if before.run is not None and before.run.start_time is None:
            return {}
        token = before.run.rerun_token if before.run else None
        return {} if spec.rerun_token in (None, token) else {"NewRun": ["rerunToken"]}
    return changed_classes(latest.order.spec.to_json(), spec.to_json())


def _begin(
    number: int, subject: Subject, spec: FineTuneJobSpec, observed: Observed, config: Config
) -> CurrentRun:
    run = run_id(number, subject.uid)
    base, wait = _find_base(subject, spec, observed)
    return CurrentRun(
        number=number,
        id=run,
        revision=1,
        order=_order(subject, run, spec, base),
        image=spec.compute.image or config.image,
        wait=wait,
    )


def _find_base(
    subject: Subject, spec: FineTuneJobSpec, observed: Observed
) -> tuple[TunedBase | None, Wait | None]:
    """What a run that begins now starts from, or why it waits."""
    found = find_base(subject.name, subject.namespace, spec, observed.models)
    return (None, found) if isinstance(found, Wait) else (found, None)


def _kept_base(
    number: int, spec: FineTuneJobSpec, before: FineTuneJobStatus, latest: OrderView | None
) -> TunedBase | None:
    """What a run that has begun started from, whatever the other job did since."""
    if spec.model.fine_tune_job_ref is None:
        return None
    if latest is not None and latest.order is not None:
        return latest.order.base
    run = before.run
    if run is None or run.number != number or run.base is None:
        return None
    return from_status(run.base, spec.model.storage)


def _revise(
    number: int,
    subject: Subject,
    spec: FineTuneJobSpec,
    before: FineTuneJobStatus,
    latest: OrderView | None,
    outcome: str | None,
    config: Config,
) -> CurrentRun:
    """The same run in a new gang. A run that had failed gets its restarts back."""
    run = run_id(number, subject.uid)
    revision = _revision(before, latest) + 1
    restarts_before = latest.restarts_before if latest else 0
    base, restarts = _kept_base(number, spec, before, latest), _restarts(number, before)
    return CurrentRun(
        number=number,
        id=run,
        revision=revision,
        order=_order(subject, run, spec, base, revision, restarts),
        image=spec.compute.image or config.image,
        restarts_before=restarts if outcome == "Failed" else restarts_before,
    )


def _revision(before: FineTuneJobStatus, latest: OrderView | None) -> int:
    """The newest gang of the run."""
    return latest.revision if latest else before.run.revision if before.run else 1


def _restarts(number: int, before: FineTuneJobStatus) -> int:
    """Incidents of the run so far."""
    return before.restarts if before.run is not None and before.run.number == number else 0


def _as_it_is(
    number: int,
    subject: Subject,
    spec: FineTuneJobSpec | None,
    before: FineTuneJobStatus,
    latest: OrderView | None,
    outcome: str | None,
    observed: Observed,
    config: Config,
) -> CurrentRun | None:
    run = run_id(number, subject.uid)
    if latest is not None and latest.order is not None:
        return CurrentRun(
            number=number,
            id=run,
            revision=latest.revision,
            order=latest.order,
            image=latest.image or latest.order.spec.compute.image or config.image,
            restarts_before=latest.restarts_before,
            outcome=outcome,
            recorded=True,
        )
    if spec is None:
        return None
    # The order was removed by hand, or today's models refuse it, or none was made, since the run
    # waits for its model: the spec as it stands now.
    base, wait = _kept_base(number, spec, before, latest), None
    if base is None and outcome is None:
        base, wait = _find_base(subject, spec, observed)
    revision = _revision(before, latest)
    return CurrentRun(
        number=number,
        id=run,
        revision=revision,
        order=_order(subject, run, spec, base, revision, _restarts(number, before)),
        image=(latest.image if latest else "") or spec.compute.image or config.image,
        restarts_before=latest.restarts_before if latest else 0,
        outcome=outcome,
        recorded=latest is not None,
        wait=wait,
    )


def _order(
    subject: Subject,
    run: str,
    spec: FineTuneJobSpec,
    base: TunedBase | None,
    revision: int = 1,
    restarts: int = 0,
) -> RunOrder:
    return RunOrder(
        version=CONTRACT_VERSION,
        job=JobIdentity(namespace=subject.namespace, name=subject.name, uid=subject.uid),
        run=run,
        spec=spec,
        base=base,
        revision=revision,
        restarts=restarts,
    )
