"""The GPU time of a run by class: what its pods held, from their own times, and what the training
processes did with it, from their account of the time.

    pod:      has a node ──► container runs ──► all pods run ──► first step …            ──► ends
                      pull            idle             load        classes of TimeUse    teardown

Status holds the sums and the time up to which they are counted. A pass adds what the pods held
since then. Time in which all pods run is ``unsettled`` until the gang's next report divides it; a
gang that was killed reports nothing more, so that is the next attempt's report, or the end of the
run. No report can claim more than the pods held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final, NamedTuple

from finetune_api.cluster import Compute
from finetune_api.status import GpuSeconds, Usage
from finetune_api.time_use import TIME_CLASSES, TimeUse
from finetune_operator.config import USAGE_LAG, USAGE_STEP_SECONDS
from finetune_operator.status.figures import number
from finetune_operator.status.models import make
from finetune_operator.world.objects import format_time, parse_time
from finetune_operator.world.pods import PodView

STEP: Final = timedelta(seconds=USAGE_STEP_SECONDS)
REPORTED: Final = tuple(name for name in TIME_CLASSES if name != "launch")
"""Classes that the trainer reports. Of its launch it cannot tell the wait for other pods."""


@dataclass(frozen=True)
class Gang:
    """What a run has asked the cluster for."""

    compute: Compute
    pods: Sequence[PodView]
    """Its pods, of all revisions."""
    gone: Sequence[PodView]
    """Those that no longer exist."""
    since: datetime | None
    """Since when the gang is to run: its Job's creation, or before; None: it has no Job."""
    waits: bool
    """Whether it is still to run."""

    @property
    def gpus(self) -> int:
        """GPUs of the whole gang."""
        return self.compute.nodes * self.compute.gpus_per_node

    @property
    def spans(self) -> list[Span]:
        """The times in which pods hold their GPUs."""
        resource = self.compute.gpu_resource_name
        found = [_span(pod, resource, gone=False) for pod in self.pods]
        found += [_span(pod, resource, gone=True) for pod in self.gone]
        return [span for span in found if span is not None]


@dataclass(frozen=True)
class Span:
    """The time in which a pod holds its GPUs."""

    gpus: int
    member: tuple[str, int]
    """Its Job and completion index."""
    begin: datetime
    started: datetime | None
    """When its container started."""
    lost: datetime | None
    """When its node was lost."""
    end: datetime | None

    def holds(self, at: datetime) -> bool:
        return self.begin <= at and (self.end is None or at < self.end)

    def runs(self, at: datetime) -> bool:
        return self.started is not None and self.started <= at

    def works(self, at: datetime) -> bool:
        return self.runs(at) and (self.lost is None or at < self.lost)


@dataclass
class Held:
    """GPU-seconds that pods held in an interval, and seconds in which there was no pod."""

    pull: int = 0
    together: int = 0
    """All pods of the gang ran."""
    idle: int = 0
    blank: int = 0


def usage(
    before: Usage, gang: Gang, report: TimeUse | None, *, over: bool = False, done: bool,
    ended: bool, now: datetime,
) -> Usage:  # fmt: skip
    """Usage of a run so far.

    Args:
        before: usage as stored.
        report: the trainer's newest account.
        over: whether it is its attempt's final report.
        done: whether the training is done.
        ended: whether no attempt follows for now: the run has ended, or is suspended.
    """
    spans = gang.spans
    account = _Account(before, gang, spans, report, now)
    lasts = any(span.end is None or span.end > account.latest for span in spans)
    if report is not None and account.is_due(report, at_once=done or ended):
        account.count_to(_time(report.until) if done or ended else account.latest)
        account.settle(report)
    account.count_to(account.latest, done=done)
    if ended and not lasts:
        last = max((span.end for span in spans if span.end is not None), default=account.until)
        account.settle(report and _closed(report, over, last.timestamp()))
    return account.usage()


def _closed(report: TimeUse, over: bool, at: float) -> TimeUse:
    """The account of an attempt whose last pod ended at a time."""
    return report.ended(report.until).torn_down(at) if over else report.ended(at)


class _Account:
    """Sums of GPU-seconds, which one pass advances."""

    def __init__(
        self, before: Usage, gang: Gang, spans: Sequence[Span], report: TimeUse | None,
        now: datetime,
    ) -> None:  # fmt: skip
        self._before, self._gang, self._spans, self._report = before, gang, spans, report
        begins = [span.begin for span in spans]
        self._last_begin = max(begins, default=None)
        begins += [gang.since] if gang.since else []
        self.until = parse_time(before.until) or min(begins, default=now)
        self._counted = before.until is not None or bool(begins)
        self._sums = {name: int(spent) for name, spent in before.gpu_seconds_by_class}
        self._queued = before.queued_seconds
        self._blank = 0
        self.latest = self._latest(now)

    def is_due(self, report: TimeUse, *, at_once: bool) -> bool:
        """Whether a report tells enough of the time that is not counted yet: status is not written
        for each. The first of an attempt settles what the one before did."""
        told = _time(report.until)
        new = told > self.until and _time(report.began) > self.until
        return told > self.until if at_once else new or told - self.until >= STEP

    def _latest(self, now: datetime) -> datetime:
        """The time up to which this pass may count."""
        late = now - USAGE_LAG
        if all(span.end is not None for span in self._spans) and not self._gang.waits:
            return _time(now.timestamp())
        if self._report is not None and self.is_due(self._report, at_once=False):
            return max(self.until, _time(min(late.timestamp(), self._report.until)))
        stamp = int(late.timestamp())
        return max(self.until, _time(stamp - stamp % USAGE_STEP_SECONDS))

    def count_to(self, end: datetime, *, done: bool = False) -> None:
        """Add what the pods held up to a time. After the training it is all teardown."""
        end = max(self.until, end)
        held = integrate(self._spans, self.until, end, self._need)
        self._sums["pull"] += held.pull
        self._sums["teardown" if done else "idle"] += held.idle
        self._sums["teardown" if done else "unsettled"] += held.together
        queued = self._queued_seconds(end)
        self._queued += queued
        self._blank += queued
        if held != Held(blank=held.blank) or queued:
            self.until = end

    def _queued_seconds(self, end: datetime) -> int:
        """Seconds up to a time in which the gang was to run and no pod held a node."""
        since, limit = self._gang.since, end if self._gang.waits else self._last_begin
        if since is None or limit is None:
            return 0
        start, stop = max(self.until, since), min(end, limit)
        return integrate(self._spans, start, stop, self._need).blank if start < stop else 0

    @property
    def _need(self) -> Need:
        compute, report = self._gang.compute, self._report
        if report is None:
            return Need(compute.nodes)
        working = math.ceil(report.processes / compute.effective_processes_per_node)
        return Need(compute.nodes, _time(report.began), working)

    def settle(self, report: TimeUse | None) -> None:
        """Divide the unsettled time by a report. What no report explains was spent on starts."""
        compute = self._gang.compute
        share = compute.gpus_per_node / compute.effective_processes_per_node
        told = report.seconds if report is not None else {}
        more = {n: int(told.get(n, 0.0) * share) - self._sums[n] for n in REPORTED}
        more = {name: spent for name, spent in more.items() if spent > 0}
        self._charge_unseen(sum(more.values()) - self._sums["unsettled"])
        there, wished = self._sums["unsettled"], sum(more.values())
        for name, spent in more.items():
            given = spent if wished <= there else spent * there // wished
            self._sums[name] += given
            self._sums["unsettled"] -= given
        uncommitted = math.ceil(report.uncommitted * share) if report is not None else 0
        rest = max(0, self._sums["unsettled"] - uncommitted)
        self._sums["load"] += rest
        self._sums["unsettled"] -= rest

    def _charge_unseen(self, lacking: int) -> None:
        """Charge for pods that came and went while no operator ran, as far as a report tells of
        them and there was time for them."""
        seconds = min(self._blank, math.ceil(max(0, lacking) / max(1, self._gang.gpus)))
        self._blank -= seconds
        self._queued -= seconds
        self._sums["unsettled"] += seconds * self._gang.gpus

    def usage(self) -> Usage:
        if not self._counted:
            return self._before
        total = sum(self._sums.values())
        return make(
            Usage,
            gpu_seconds=total,
            gpu_seconds_by_class=make(GpuSeconds, **self._sums),
            goodput=number(self._sums["productive"] / total, 3) if total else None,
            queued_seconds=self._queued,
            until=format_time(self.until),
        )


class Need(NamedTuple):
    """How many pods must work for the gang to be whole."""

    nodes: int
    began: datetime | None = None
    """When the attempt that reports began; an elastic gang may work with fewer."""
    working: int = 0

    def at(self, time: datetime) -> int:
        return self.nodes if self.began is None or time < self.began else self.working


def integrate(spans: Iterable[Span], start: datetime, end: datetime, need: Need) -> Held:
    """Divide what pods held from ``start`` to ``end``."""
    spans = [s for s in spans if s.begin < end and (s.end is None or s.end > start)]
    moments = [t for s in spans for t in (s.begin, s.started, s.lost, s.end)]
    times = {t for t in (*moments, need.began) if t is not None}
    held = Held()
    for at, until in pairwise(sorted({start, end} | {t for t in times if start < t < end})):
        seconds = int((until - at).total_seconds())
        there = [s for s in spans if s.holds(at)]
        running = sum(s.gpus for s in there if s.runs(at))
        held.pull += seconds * (sum(s.gpus for s in there) - running)
        if _whole(there, at, need.at(at)):
            held.together += seconds * running
        else:
            held.idle += seconds * running
        held.blank += 0 if there else seconds
    return held


def _whole(spans: Iterable[Span], at: datetime, need: int) -> bool:
    """Whether enough pods of one Job work."""
    indexes: dict[str, set[int]] = {}
    for span in spans:
        if span.works(at):
            indexes.setdefault(span.member[0], set()).add(span.member[1])
    return any(len(found) >= need for found in indexes.values())


def _span(pod: PodView, resource: str, *, gone: bool) -> Span | None:
    begin, end = pod.scheduled_at or pod.started, pod.finished
    if begin is None:
        return None
    if end is None and (pod.ended or gone):  # its container never ran
        end = pod.deleted_by or pod.disrupted_at or begin
    gpus = str(pod.limits.get(resource, "0"))
    return Span(
        gpus=int(gpus) if gpus.isdigit() else 0,
        member=(pod.job, pod.index),
        begin=begin,
        started=pod.started,
        lost=(pod.ready_changed or pod.disrupted_at) if pod.on_lost_node else None,
        end=None if end is None else max(begin, end),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)
