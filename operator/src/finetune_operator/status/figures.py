"""Conversion of stage results to status fields; figures become strings."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.evaluation_results import DataSetScores
from finetune_api.results import (
    MainResult,
    PreparedSummary,
    Progress,
    PublishSummary,
    TrainSummary,
)
from finetune_api.status import (
    DataSetLoss,
    MainResultStatus,
    MetricValue,
    OutputStatus,
    Prepared,
    ProgressStatus,
)
from finetune_operator.status.models import make
from finetune_operator.world.objects import format_time


def number(value: float | None, digits: int = 4) -> str | None:
    """Format a figure with ``digits`` significant digits. A figure from 10,000 to below 1e15 is
    rounded to an integer."""
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


def progress_status(
    progress: Progress, read_at: datetime, stored: ProgressStatus | None, planned: int
) -> ProgressStatus:
    """Progress as status shows it. A gang that loads knows neither its step nor the total yet: the
    last step that status had, and the planned total, are kept.

    Args:
        stored: the run's progress in status.
        planned: optimizer steps of the run as prepare has counted them; 0: unknown.
    """
    left = progress.remaining_seconds
    step, total = progress.step, progress.total_steps
    if not total:
        step, total = stored.step if stored else 0, planned
    return make(
        ProgressStatus,
        stage=progress.stage,
        data_stage=progress.data_stage,
        nodes=progress.nodes,
        step=step,
        total_steps=total,
        percent=min(100, 100 * step // total) if total else 0,
        epoch=f"{progress.epoch:.2f}",
        loss=number(progress.loss),
        data_set_losses=[
            make(DataSetLoss, name=name, loss=number(loss))
            for name, loss in progress.by_source.items()
        ],
        anchor_kl=number(progress.anchor_kl),
        base_kl=number(progress.base_kl),
        router_loss=number(progress.router_loss),
        learning_rate=number(progress.learning_rate),
        tokens_per_second=number(progress.tokens_per_second),
        mfu=number(progress.mfu),
        data_wait_share=number(progress.data_wait_share, 3),
        checkpoints_abandoned=progress.checkpoints_abandoned,
        remaining=None if left is None else duration(left),
        estimated_completion_time=None
        if left is None
        else format_time(read_at + timedelta(seconds=min(left, 10**9))),
        last_update_time=format_time(read_at),
    )


def final_progress(
    before: ProgressStatus | None, trained: TrainSummary, now: datetime
) -> ProgressStatus:
    """Progress of a finished gang: the poller may have missed its last steps."""
    total = max(before.total_steps if before else 0, trained.steps)
    last = before or make(
        ProgressStatus, stage="Done", step=0, total_steps=0, percent=0, epoch="0",
        last_update_time=format_time(now),
    )  # fmt: skip
    return last.model_copy(
        update={
            "stage": "Done",
            "step": trained.steps,
            "total_steps": trained.steps if trained.stopped_early else total,
            "percent": 100,
            "loss": number(trained.loss) or last.loss,
            "remaining": None,
            "estimated_completion_time": None,
            "last_update_time": format_time(now),
        }
    )


def prepared_status(summary: PreparedSummary) -> Prepared:
    """The fields of prepare's summary that status shows."""
    return make(Prepared, **{name: getattr(summary, name) for name in Prepared.model_fields})


def output_status(published: PublishSummary) -> OutputStatus:
    """The published model, as status shows it."""
    return make(
        OutputStatus,
        uri=published.uri,
        digest=published.digest,
        formats=published.formats,
        bytes=published.bytes,
        full_copy_bytes=published.full_copy_bytes,
        held=published.held,
        became_current=published.became_current,
    )


def main_result(found: MainResult | None) -> MainResultStatus | None:
    """The main result, as status shows it."""
    if found is None:
        return None
    return make(
        MainResultStatus,
        data_set=found.data_set,
        metric=found.metric,
        value=found.value,
        verdict=found.verdict,
        gain=found.gain,
        current_gap=number(found.current_gap),
    )


def evaluation(found: list[DataSetScores]) -> list[MetricValue]:
    """Test metrics of the base and the tuned model, side by side."""
    rows = []
    for scores in found:
        for metric in sorted(scores.base.keys() | scores.tuned.keys()):
            base, tuned = scores.base.get(metric), scores.tuned.get(metric)
            gain = tuned - base if tuned is not None and base is not None else None
            compared = scores.comparisons.get(metric)
            rows.append(
                make(
                    MetricValue,
                    data_set=scores.name,
                    metric=metric,
                    base=number(base),
                    tuned=number(tuned),
                    gain=number(gain),
                    gain_low=number(compared.low) if compared else None,
                    gain_high=number(compared.high) if compared else None,
                    verdict=compared.verdict if compared else None,
                )
            )
    return rows[:256]
