"""The record of the current run in status, and the history of earlier ones."""

from __future__ import annotations

from typing import Literal

from finetune_api.classes import class_digest
from finetune_api.status import Run, RunBase
from finetune_operator.config import HISTORY
from finetune_operator.decision.run_view import RunView
from finetune_operator.status.models import make
from finetune_operator.world.objects import format_time


def run_record(view: RunView, outcome: Literal["Complete", "Failed"] | None) -> Run:
    """``status.run``; ``outcome`` is None while the run continues."""
    stored = view.before.run if view.same_run else None
    attempt = max(view.attempt, view.trained.attempt if view.trained else 0)
    return make(
        Run,
        id=view.run.id,
        number=view.run.number,
        revision=view.run.revision,
        attempt=attempt,
        start_time=_start_time(view, stored),
        completion_time=format_time(view.completion_time) if outcome else None,
        rerun_token=view.run_spec.spec.rerun_token,
        retry_token=view.spec.retry_token,
        **_digests(view, stored),
        base=_base(view),
        outcome=outcome,
        output=view.run_spec.output_uri if outcome == "Complete" else None,
    )


def _digests(view: RunView, stored: Run | None) -> dict[str, str]:
    """Digests of the run spec; of a frozen one that status knows, the stored ones."""
    frozen = view.run.recorded and stored is not None and stored.revision == view.run.revision
    if frozen and stored and stored.spec_digest and stored.gang_digest:
        return {"spec_digest": stored.spec_digest, "gang_digest": stored.gang_digest}
    spec = view.run_spec.spec.to_json()
    return {
        "spec_digest": class_digest(spec, "NewRun"), "gang_digest": class_digest(spec, "Resume"),
    }  # fmt: skip


def _start_time(view: RunView, stored: Run | None) -> str | None:
    """Creation time of the run's first run spec, now if there is none yet; None while the run waits
    for its base model."""
    if view.run.wait is not None:
        return None
    if stored is not None and stored.start_time is not None:
        return stored.start_time
    made = [o.created for o in view.observed.run_specs if o.run == view.run.id and o.created]
    return format_time(min(made, default=view.now))


def _base(view: RunView) -> RunBase | None:
    base = view.run_spec.base
    if base is None:
        return None
    return make(RunBase, job=base.job, run=base.run, uri=base.uri, digest=base.digest)


def history(view: RunView) -> list[Run]:
    """Earlier runs, newest first, for a stored status that belongs to the previous run."""
    earlier, last = view.before.history, view.before.run
    if last is None:
        return earlier
    ended = last.model_copy(
        update={
            "outcome": last.outcome or "Superseded",
            "completion_time": last.completion_time or format_time(view.now),
        }
    )
    return [ended, *earlier][:HISTORY]
