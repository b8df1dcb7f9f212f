"""Prometheus series of the operator. Per-job series are read from the store at scrape time, so that
a deleted job leaves no series behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from finetune_api.status import GpuSeconds
from finetune_operator.store import Store

JOBS_SHOWN: Final = 2000
"""Maximum number of jobs with series of their own, the newest first: bounds the size of the
page."""

_PROGRESS: Final = {
    "step": "Optimizer steps done.",
    "totalSteps": "Optimizer steps of the run.",
    "loss": "Training loss per supervised token, in nats.",
    "learningRate": "Learning rate of the last step.",
    "tokensPerSecond": "Real tokens trained per second.",
    "mfu": "Model FLOPs utilization, from 0 to 1.",
    "dataWaitShare": "Share of the steps' time spent waiting for data, from 0 to 1.",
    "checkpointsAbandoned": "Checkpoints of the current attempt that could not be written.",
    "anchorKl": "KL(base || tuned) per supervised token of replay sets, in nats.",
    "baseKl": "KL(base || tuned) per supervised token of validation samples, in nats.",
    "routerLoss": "Load-balancing loss of experts, before its coefficient.",
}
_USAGE: Final = {
    "gpuSeconds": ("gpu_seconds", "GPUs times seconds that the run's gangs held them."),
    "goodput": ("goodput_ratio", "Productive share of these, from 0 to 1."),
    "queuedSeconds": ("queued_seconds", "Seconds in which the gang was to run and held no node."),
}
GPU_CLASSES: Final = tuple(name for name in GpuSeconds.model_fields if name != "unsettled")
"""Classes of GPU time that only grow."""


_STARTUP_SECONDS: Final = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class Metrics:
    """The operator's own counters, and its registry."""

    def __init__(self, store: Store, queue_depth: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "finetune_operator_reconcile_seconds",
            "Duration of one pass over one job.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "finetune_operator_reconcile_errors",
            "Passes that failed and are retried.",
            registry=self.registry,
        )
        self._started = Counter(
            "finetune_operator_runs_started", "Runs begun.", registry=self.registry
        )
        self._finished = Counter(
            "finetune_operator_runs_finished",
            "Runs ended, by outcome and failure class.",
            ["outcome", "failure_class"],
            registry=self.registry,
        )
        self._restarts = Counter(
            "finetune_operator_restarts", "Incidents of gangs.", registry=self.registry
        )
        self._gpu_seconds = Counter(
            "finetune_operator_gpu_seconds",
            "GPU-seconds of gangs, by class (status.usage.gpuSecondsByClass).",
            ["class"],
            registry=self.registry,
        )
        self._startup = Histogram(
            "finetune_operator_startup_seconds",
            "Time of runs from their start to their first optimizer step, by part and in total.",
            ["part"],
            buckets=_STARTUP_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Jobs(store, queue_depth))
        ProcessCollector(registry=self.registry)

    def note(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Count the changes of a status write."""
        old_run, new_run = before.get("run") or {}, after.get("run") or {}
        same = old_run.get("id") == new_run.get("id")
        if new_run and not same:
            self._started.inc()
        if new_run.get("outcome") and not (same and old_run.get("outcome")):
            kind = (after.get("failure") or {}).get("class", "")
            self._finished.labels(new_run["outcome"], kind).inc()
        elif old_run and not same and not old_run.get("outcome"):
            self._finished.labels("Superseded", "").inc()
        base = before if same else {}
        self._restarts.inc(max(0, after.get("restarts", 0) - base.get("restarts", 0)))
        old, new = _gpu_seconds(base), _gpu_seconds(after)
        for name in GPU_CLASSES:
            self._gpu_seconds.labels(name).inc(max(0, new.get(name, 0) - old.get(name, 0)))
        if "startup" not in base:
            for key, seconds in (after.get("startup") or {}).items():
                self._startup.labels(key.removesuffix("Seconds")).observe(seconds)


class _Jobs(Collector):
    """Series read from the current jobs."""

    def __init__(self, store: Store, queue_depth: Callable[[], int]) -> None:
        self._store = store
        self._queue_depth = queue_depth

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._store.jobs())
        yield GaugeMetricFamily(
            "finetune_operator_queue_depth", "Jobs waiting for a pass.", self._queue_depth()
        )
        yield _by_phase(jobs)
        jobs.sort(key=lambda j: str(j["metadata"].get("creationTimestamp")), reverse=True)
        yield from _per_job(jobs[:JOBS_SHOWN])


def _gpu_seconds(status: Mapping[str, Any]) -> Mapping[str, int]:
    found: Mapping[str, int] = (status.get("usage") or {}).get("gpuSecondsByClass") or {}
    return found


def _by_phase(jobs: Iterable[Mapping[str, Any]]) -> Metric:
    family = GaugeMetricFamily(
        "finetune_jobs", "FineTuneJobs by phase.", labels=["namespace", "phase"]
    )
    count: dict[tuple[str, str], int] = {}
    for job in jobs:
        phase = (job.get("status") or {}).get("phase") or "Pending"
        key = (job["metadata"]["namespace"], phase)
        count[key] = count.get(key, 0) + 1
    for (namespace, phase), number in sorted(count.items()):
        family.add_metric([namespace, phase], number)
    return family


def _per_job(jobs: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    who = ["namespace", "name"]
    families = {
        key: GaugeMetricFamily(f"finetune_job_{_snake(key)}", text, labels=who)
        for key, text in _PROGRESS.items()
    }
    families |= {
        key: GaugeMetricFamily(f"finetune_job_{name}", text, labels=who)
        for key, (name, text) in _USAGE.items()
    }
    restarts = GaugeMetricFamily("finetune_job_restarts", "Incidents of the gang.", labels=who)
    test = GaugeMetricFamily(
        "finetune_job_test_metric",
        "Test metrics of finished runs, of the base and of the tuned model.",
        labels=[*who, "run", "data_set", "metric", "model"],
    )
    gap = GaugeMetricFamily(
        "finetune_job_current_gap",
        "Main metric of the finished run minus that of the model in use before, on equal samples.",
        labels=[*who, "run", "data_set", "metric"],
    )
    for job in jobs:
        status = job.get("status") or {}
        name = [job["metadata"]["namespace"], job["metadata"]["name"]]
        figures = {**(status.get("progress") or {}), **(status.get("usage") or {})}
        for key, family in families.items():
            if key in figures:
                family.add_metric(name, float(figures[key]))
        restarts.add_metric(name, status.get("restarts", 0))
        run = (status.get("run") or {}).get("id", "")
        for row in status.get("evaluation") or []:
            for model in ("base", "tuned"):
                if model in row:
                    labels = [*name, run, row["dataSet"], row["metric"], model]
                    test.add_metric(labels, float(row[model]))
        main = status.get("mainResult") or {}
        if "currentGap" in main:
            labels = [*name, run, main["dataSet"], main["metric"]]
            gap.add_metric(labels, float(main["currentGap"]))
    yield from families.values()
    yield restarts
    yield test
    yield gap


def _snake(camel: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in camel)
