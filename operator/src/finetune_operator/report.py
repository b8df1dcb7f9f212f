"""How status is written: conditions that keep their transition times, figures as strings."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final, Literal, TypeVar

from pydantic import ValidationError

from finetune_api.base import Model
from finetune_api.names import Condition as ConditionType
from finetune_api.names import Role
from finetune_api.results import PreparedSummary, Progress, PublishSummary, TrainSummary
from finetune_api.status import (
    Condition,
    DataSetLoss,
    FineTuneJobStatus,
    MetricValue,
    OutputStatus,
    Prepared,
    ProgressStatus,
)
from finetune_operator.objects import format_time
from finetune_operator.plan import Event

STAGE_CONDITION: Final[dict[Role, ConditionType]] = {
    "prepare": "Prepared",
    "train": "Evaluated",
    "publish": "Published",
}
MESSAGE_MAX: Final = 4096

M = TypeVar("M", bound=Model)


def read_status(raw: Any) -> FineTuneJobStatus:
    """The status of a stored object. One that was edited by hand, or written by another release,
    and cannot be read counts as absent: it is rebuilt from what is there."""
    try:
        return FineTuneJobStatus.model_validate(raw or {})
    except ValidationError:
        return FineTuneJobStatus()


def make(model: type[M], **fields: Any) -> M:
    """A model by its fields' Python names; manifests know them by their aliases only."""
    return model.model_validate(fields, by_alias=False, by_name=True)


class Conditions:
    """The conditions of a status in the making."""

    def __init__(
        self, before: list[Condition], generation: int | None, now: datetime, keep: bool
    ) -> None:
        """``keep`` carries the old ones over: false where a new run begins."""
        self._before = {c.type: c for c in before}
        self._now = {c.type: c for c in before} if keep else {}
        self._generation = generation
        self._time = format_time(now)

    def set(
        self,
        type_: ConditionType,
        status: Literal["True", "False", "Unknown"],
        reason: str,
        message: str = "",
    ) -> None:
        """Observe a condition; its transition time stays where its status does."""
        old = self._before.get(type_)
        same = old is not None and old.status == status
        self._now[type_] = make(
            Condition,
            type=type_,
            status=status,
            observed_generation=self._generation,
            last_transition_time=old.last_transition_time if old and same else self._time,
            reason=reason,
            message=message[:MESSAGE_MAX],
        )

    def holds(self, type_: ConditionType) -> bool:
        """Whether a condition is True so far."""
        found = self._now.get(type_)
        return found is not None and found.status == "True"

    def has(self, type_: ConditionType) -> bool:
        """Whether a condition was observed at all."""
        return type_ in self._now

    def to_list(self) -> list[Condition]:
        """In the order of their types, so that equal statuses are equal."""
        return [self._now[t] for t in sorted(self._now)]


def number(value: float | None, digits: int = 4) -> str | None:
    """A figure as a string of so many significant digits; of large ones all before the point, as
    long as people read them."""
    if value is None:
        return None
    return f"{value:.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """``2m10s``, ``3h04m``, ``45s``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def progress_status(progress: Progress, read_at: datetime) -> ProgressStatus:
    """Progress as status shows it."""
    left = progress.remaining_seconds
    total = progress.total_steps
    return make(
        ProgressStatus,
        stage=progress.stage,
        step=progress.step,
        total_steps=total,
        percent=min(100, 100 * progress.step // total) if total else 0,
        epoch=f"{progress.epoch:.2f}",
        loss=number(progress.loss),
        data_set_losses=[
            make(DataSetLoss, name=name, loss=number(loss))
            for name, loss in progress.by_source.items()
        ],
        learning_rate=number(progress.learning_rate),
        tokens_per_second=number(progress.tokens_per_second),
        mfu=number(progress.mfu),
        remaining=None if left is None else duration(left),
        estimated_completion_time=None
        if left is None
        else format_time(read_at + timedelta(seconds=min(left, 10**9))),
        last_update_time=format_time(read_at),
    )


def final_progress(
    before: ProgressStatus | None, trained: TrainSummary, now: datetime
) -> ProgressStatus:
    """Progress of a gang that is done: the poller may have missed its last steps."""
    total = before.total_steps if before else trained.steps
    return make(
        ProgressStatus,
        stage="Done",
        step=trained.steps,
        total_steps=trained.steps if trained.stopped_early else max(total, trained.steps),
        percent=100,
        epoch=before.epoch if before else "0",
        loss=number(trained.loss) or (before.loss if before else None),
        data_set_losses=before.data_set_losses if before else [],
        learning_rate=before.learning_rate if before else None,
        tokens_per_second=before.tokens_per_second if before else None,
        mfu=before.mfu if before else None,
        last_update_time=format_time(now),
    )


def prepared_status(summary: PreparedSummary) -> Prepared:
    """What prepare found, as far as status shows it."""
    return make(Prepared, **{name: getattr(summary, name) for name in Prepared.model_fields})


def output_status(published: PublishSummary) -> OutputStatus:
    """What was published, as status shows it."""
    return make(
        OutputStatus,
        uri=published.uri,
        digest=published.digest,
        formats=published.formats,
        bytes=published.bytes,
        full_copy_bytes=published.full_copy_bytes,
    )


def evaluation(trained: TrainSummary) -> list[MetricValue]:
    """Test metrics side by side."""
    rows = []
    for scores in trained.scores:
        for metric in sorted(scores.untuned.keys() | scores.tuned.keys()):
            untuned, tuned = scores.untuned.get(metric), scores.tuned.get(metric)
            gain = tuned - untuned if tuned is not None and untuned is not None else None
            rows.append(
                make(
                    MetricValue,
                    data_set=scores.name,
                    metric=metric,
                    untuned=number(untuned),
                    tuned=number(tuned),
                    gain=number(gain),
                )
            )
    return rows[:256]


def events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Event, ...]:
    """Events of what changed for a user: conditions that became true, incidents, new runs."""
    found = []
    begun = before.run.number if before.run and before.run.start_time else None
    if after.run and after.run.start_time and begun != after.run.number:
        from_ = f", from run {after.run.base.run} of {after.run.base.job}" if after.run.base else ""
        found.append(Event("Normal", "RunStarted", f"run {after.run.id} begins{from_}"))
    same_run = bool(before.run and after.run and before.run.id == after.run.id)
    if same_run and after.restarts > before.restarts:
        message = f"incident {after.restarts} of the gang; it goes on from its last commit"
        found.append(Event("Warning", "Restarted", message))
    held = {c.type for c in before.conditions if c.status == "True"} if same_run else set()
    for condition in after.conditions:
        if condition.status != "True" or condition.type in held | {"Ready", "Reconciling"}:
            continue
        if condition.type == "Stalled" and after.failure is not None:
            continue  # told by Failed
        bad = condition.type in ("Failed", "Stalled") or condition.reason == "MayNotFit"
        found.append(
            Event("Warning" if bad else "Normal", condition.reason, condition.message or "")
        )
    return tuple(found)
