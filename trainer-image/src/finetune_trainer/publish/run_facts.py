"""Facts about a run and its result, gathered once for metrics.json, the report and the model
card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from finetune_api.evaluation_results import (
    ArtefactResult,
    Comparison,
    DataSetScores,
    Estimate,
    EvaluationResult,
)
from finetune_api.methods import Method
from finetune_api.optimizers import Anchor
from finetune_api.results import PreparedSummary, TrainSummary
from finetune_api.run_spec import RunSpec
from finetune_api.sources import ModelLocation
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.metric_text import interval_text
from finetune_trainer.prepared.manifest import DataManifest
from finetune_trainer.prepared.origins import MOST, in_words
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.publish.memorisation import memorisation_warning
from finetune_trainer.publish.overfitting import Overfitting, overfitting
from finetune_trainer.publish.results import with_comparisons
from finetune_trainer.publish.side_by_side import SideBySide, side_by_side
from finetune_trainer.publish.suspects import suspects_hint
from finetune_trainer.storage.runfiles import Memorisation, RunResult, SuspectLabels

METRICS_FILE: Final = "metrics.json"
TABLE_KEYS: Final = ("retention", "rows", "recommendation", "slices")
"""What ``metrics.json`` has of a ``SetTable``, for each test set."""
_HUGE: Final = 1e9
"""Larger values are shown with an exponent: a perplexity may have 300 digits."""
_CLASSES_SHOWN: Final = 20
_VERDICTS: Final[dict[str, str]] = {
    "Better": "better",
    "Worse": "worse",
    "NotBetter": "no gain that matters",
    "TooFewSamples": "undecided",
}
DRAWN_HEAD: Final = (
    "The classification head of the base model has random weights, so the scores of the base model"
    " are at chance level."
)


@dataclass(frozen=True)
class Score:
    """One metric of one test set."""

    data_set: str
    samples: int
    metric: str
    kind: MetricKind
    base: float | None
    """Value of the base model; None: not measured."""
    tuned: float | None
    """Value of the tuned model; None: nothing was trained."""
    comparison: Comparison | None = None
    """With the base model; None: not measured, or the metric follows from another one."""

    @property
    def value(self) -> float:
        """Value of the tuned model or, where nothing was trained, of the base model."""
        found = self.base if self.tuned is None else self.tuned
        return math.nan if found is None else found

    @property
    def gain(self) -> float | None:
        """tuned - base."""
        return None if self.base is None or self.tuned is None else self.tuned - self.base

    @property
    def better(self) -> bool | None:
        """Whether the tuned model is better; None if the values are equal or one is NaN."""
        if not self.gain or math.isnan(self.gain):
            return None
        return (self.gain > 0) == self.kind.higher_is_better

    def estimated(self, found: Estimate | None) -> str:
        """Format an estimate of this metric with its interval: ``52.0 % (45.1, 58.8)``."""
        if found is None:
            return "–"
        if found.low is None or found.high is None:
            return self.show(found.value)
        ends = interval_text(self.kind, found.low, found.high)
        return f"{self.show(found.value)} ({ends})"

    @property
    def interval(self) -> str:
        """The gain's 95 % confidence interval in its unit: ``2.1, 7.9``."""
        found = self.comparison
        if found is None:
            return ""
        return interval_text(self.kind, found.low, found.high)

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        found = self.comparison
        if found is None:
            return ""
        if found.verdict == "TooFewSamples" and found.needed_samples:
            return f"undecided: {found.needed_samples:,} samples would do"
        return _VERDICTS.get(found.verdict, found.verdict)

    def show(self, value: float | None, signed: bool = False) -> str:
        """Format a value of this metric: ``97.5 %``, ``+0.123``, ``1.014e+304``."""
        if value is None:
            return "–"
        sign = "+" if signed else ""
        if self.kind.percent:
            return f"{100 * value:{sign}.1f} %"
        if abs(value) >= _HUGE:
            return f"{value:{sign}.3e}"
        return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.3f}"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the published files, and of a full model for comparison."""

    stored: dict[str, int]
    """All files of a format's folder, by format."""
    full_copy: int
    """Weights of the full model in the dtype of the base."""


@dataclass(frozen=True)
class About:
    """A run and its result."""

    run_spec: RunSpec
    result: RunResult
    prepared: PreparedSummary
    data: DataManifest
    sizes: Sizes
    base: ModelLocation
    """The full model on which an adapter is loaded."""
    scores: list[Score]
    evaluation: EvaluationResult
    """Results of all rows on the test sets."""
    sets: Sequence[MeasuredSet]
    """The sets, with the answers of all rows."""
    drawn_head: bool = False
    """Whether the classification head of the base model has random weights."""

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.run_spec.spec

    @property
    def trains(self) -> bool:
        """Whether the run has tuned a model; else it has measured one as it is."""
        return self.spec.method.kind.trains

    def scores_of(self, *, retention: bool) -> list[Score]:
        """Scores on the retention sets, or on the test sets."""
        lost = {table.name for table in self.evaluation.sets if table.retention}
        return [score for score in self.scores if (score.data_set in lost) is retention]

    @property
    def side_by_side(self) -> list[SideBySide]:
        """Samples of each set with the answers of all rows."""
        seed, redact = self.spec.data.split.seed, self.spec.data.quality.personal_data == "Redact"
        found = [side_by_side(each, seed, redact) for each in self.sets]
        return [each for each in found if each is not None]

    @property
    def overfitting(self) -> Overfitting | None:
        """The validation loss beside the training loss; None: one of them is not known."""
        return overfitting(self.result)

    @property
    def formats(self) -> list[str]:
        """Names of the published folders: adapter, merged."""
        return list(self.sizes.stored)


def gather(
    run_spec: RunSpec,
    result: RunResult,
    prepared: PreparedSummary,
    data: DataManifest,
    sizes: Sizes,
    base: ModelLocation,
    evaluation: EvaluationResult,
    sets: Sequence[MeasuredSet],
    drawn_head: bool = False,
) -> About:
    """Collect the facts; scores are in the order of the test sets, then of the metrics."""
    scores = scores_of(
        with_comparisons(result.summary.scores, evaluation), run_spec.spec.evaluation.kinds
    )
    return About(
        run_spec, result, prepared, data, sizes, base, scores, evaluation, sets, drawn_head
    )  # fmt: skip


def scores_of(scores: Iterable[DataSetScores], kinds: Kinds) -> list[Score]:
    """The test metrics, in the order of the test sets, then of the metrics.

    Args:
        kinds: all metrics of the run.
    """
    return [
        Score(
            found.name, found.samples, metric, kinds[metric], found.base.get(metric),
            found.tuned.get(metric),
            found.comparisons.get(metric),
        )
        for found in scores
        for metric in found.judged
    ]  # fmt: skip


def by_set(scores: Iterable[Score]) -> list[tuple[str, list[Score]]]:
    """The scores of each test set, in order."""
    return [(name, list(rows)) for name, rows in groupby(scores, lambda score: score.data_set)]


def metrics_text(about: About) -> str:
    """Return ``metrics.json``: all figures of the run, for scripts. NaN and infinities, which JSON
    cannot represent, are null."""
    summary, result = about.result.summary, about.result
    raw = {
        "run": about.run_spec.run,
        "job": about.run_spec.job.to_json(),
        "baseModel": about.run_spec.base_model.source,
        "lineage": [ancestor.to_json() for ancestor in result.lineage],
        "formats": about.formats,
        "classes": about.data.classes,
        "drawnHead": about.drawn_head,
        "checkpoint": {"uri": summary.checkpoint, "step": summary.checkpoint_step},
        "test": [
            {
                "dataSet": found.name,
                "samples": found.samples,
                "base": found.base,
                "tuned": found.tuned,
                "gain": {
                    name: value - found.base[name]
                    for name, value in found.tuned.items()
                    if name in found.base
                },
                **_table_of(about, found.name),
            }
            for found in with_comparisons(summary.scores, about.evaluation)
        ],
        "gates": [gate.to_json() for gate in about.evaluation.gates],
        "current": about.evaluation.current and about.evaluation.current.to_json(),
        "held": about.evaluation.held,
        "artefact": about.evaluation.artefact.to_json() if about.evaluation.artefact else None,
        "matrix": about.evaluation.matrix and about.evaluation.matrix.to_json(),
        "judge": about.evaluation.judge.to_json() if about.evaluation.judge else None,
        "remedy": about.evaluation.remedy.to_json() if about.evaluation.remedy else None,
        "dataCurve": about.evaluation.data_curve and about.evaluation.data_curve.to_json(),
        "overfitting": _overfitting(about.overfitting),
        "suspectLabels": _suspects(result.suspects),
        "memorisation": _memorisation(result.memorisation),
        "validation": [point.to_json() for point in result.validation],
        "training": {
            "steps": summary.steps,
            "stoppedEarly": summary.stopped_early,
            "loss": summary.loss,
            "curve": [point.to_json() for point in result.curve],
            "restarts": summary.restarts,
            "skippedSteps": summary.skipped_steps,
            "rollbacks": summary.rollbacks,
            "quarantinedSamples": summary.quarantined_samples,
            "quarantined": [place.to_json() for place in result.quarantined],
            "seconds": round(summary.training_seconds, 1),
            "tokens": summary.tokens,
            "goodputTokensPerSecond": round(summary.tokens / max(1.0, summary.training_seconds), 1),
            "processSeconds": _process_seconds(summary),
            "goodput": round(summary.time.goodput, 3) if summary.time else None,
            "startupSeconds": _startup_seconds(summary),
            "processes": result.processes,
            "device": result.device,
        },
        "data": about.prepared.to_json(),
        "parameters": {
            "trainable": summary.trainable_parameters,
            "total": summary.total_parameters,
        },
        "bytes": {**about.sizes.stored, "fullCopy": about.sizes.full_copy},
        "spec": about.spec.to_json(),
        "versions": result.versions,
    }
    return json.dumps(_finite(raw), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _overfitting(found: Overfitting | None) -> dict[str, Any] | None:
    return {**found.to_json(), "gap": found.gap} if found else None


def _memorisation(found: Memorisation | None) -> dict[str, Any] | None:
    return {**found.to_json(), "warning": memorisation_warning(found)} if found else None


def _suspects(found: SuspectLabels | None) -> dict[str, Any] | None:
    return {**found.to_json(), "hint": suspects_hint(found)} if found else None


def artefact_text(found: ArtefactResult | None) -> str:
    """Format the comparison of the published model with the tested one in one line; "" if there was
    none."""
    if found is None:
        return ""
    said = [f"Not loaded again: {name}, {why}." for name, why in found.left_out.items()]
    if found.formats:
        before = "tested" if found.side == "test" else "trained"
        answers = f", {found.answers_equal} of {found.of} answers equal" if found.of else ""
        agrees = (
            f"Loaded again from object storage ({' and '.join(found.formats)}), the model is the"
            f" {before} one: {found.samples:,} samples, largest difference of a loss"
            f" {found.largest_loss_difference:.2g} nats per label{answers}."
        )
        said.insert(0, agrees)
    return " ".join(said)


def _table_of(about: About, name: str) -> dict[str, Any]:
    """The rows of a test set, what they recommend, and its slices."""
    table = next((t.to_json() for t in about.evaluation.sets if t.name == name), {})
    return {key: table.get(key) for key in TABLE_KEYS}


def _finite(raw: Any) -> Any:
    """Replace NaN and infinities in a JSON value by None."""
    if isinstance(raw, dict):
        return {key: _finite(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_finite(value) for value in raw]
    return None if isinstance(raw, float) and not math.isfinite(raw) else raw


def _process_seconds(summary: TrainSummary) -> dict[str, float] | None:
    """Return the process-seconds of all attempts by class, as far as the training processes know:
    without the time of pods that did not run yet, or waited for others."""
    if summary.time is None:
        return None
    return {name: round(spent, 1) for name, spent in summary.time.seconds.items()}


def _startup_seconds(summary: TrainSummary) -> dict[str, float] | None:
    """Return the seconds to the first step of the last attempt, by part and in total; None if the
    attempt had no step left to train."""
    if summary.startup is None:
        return None
    parts = [*summary.startup.seconds.items(), ("total", summary.startup.total)]
    return {part: round(seconds, 2) for part, seconds in parts}


def describe(method: Method) -> str:
    """Format a method and its settings in one line."""
    block = method.settings.to_json() if method.settings else {}
    said = [f"{name} {_value(value)}" for name, value in block.items() if value is not False]
    return ", ".join([method.type, *said])


def describe_task(about: About) -> str:
    """Format the task and its first classes."""
    classes = about.data.classes
    if not classes:
        return about.spec.task
    more = ", …" if len(classes) > _CLASSES_SHOWN else ""
    shown = ", ".join(classes[:_CLASSES_SHOWN])
    return f"{about.spec.task}, {len(classes)} classes: {shown}{more}"


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def megabytes(count: int) -> str:
    """Format a byte count: ``1,234.5 MB``."""
    return f"{count / 1e6:,.1f} MB"


def anchors(anchor: Anchor) -> list[tuple[str, str]]:
    """Return the anchors of the training as rows of a table: name and value."""
    parts = [("outputs (KL)", anchor.kl_coefficient), ("weights (L2)", anchor.l2_coefficient)]
    told = [f"{what} {value}" for what, value in parts if float(value) > 0]
    return [("Anchor to the base model", ", ".join(told))] if told else []


def _memory(prepared: PreparedSummary) -> list[tuple[str, str]]:
    found = prepared.memory
    if found is None:
        return []
    again = ", gradient checkpointing" if found.gradient_checkpointing else ""
    more = found.available is not None and found.needed > found.available
    there = f"; available: {megabytes(found.available or 0)}" if more else ""
    text = f"{megabytes(found.needed)} per process ({found.sharding}{again}), estimated{there}"
    return [("Memory", text)]


def _quarantine(result: RunResult) -> list[tuple[str, str]]:
    if not result.quarantined:
        return []
    named = in_words(result.quarantined)
    text = f"{result.summary.quarantined_samples:,}: {named} (metrics.json names the first {MOST})"
    return [("Samples left out of the training", text)]


def _point(found: EvaluationResult) -> str:
    """The point between base and tuned model, where one was chosen."""
    if found.remedy is None or found.remedy.chosen in (None, 1.0):
        return ""
    return f", point {found.remedy.chosen:g} from the base model ({found.remedy.scan})"


def settings(about: About) -> list[tuple[str, str]]:
    """Return the settings and key figures of the training, or of the evaluation alone, as rows of a
    table: name and value."""
    spec, result = about.spec, about.result
    summary = result.summary
    if not about.trains:
        return [
            ("Task", describe_task(about)),
            ("Model", about.run_spec.base_model.source),
            ("Parameters", f"{summary.total_parameters:,}"),
            ("Stored size", megabytes(about.sizes.full_copy)),
            ("Longest sample", f"{about.data.max_length:,} tokens"),
            ("Precision", spec.training.precision),
            ("Processes", f"{result.processes} on {result.device}"),
            *_memory(about.prepared),
            ("Time", f"{summary.training_seconds:.0f} s"),
            *([("Time of the processes", summary.time.text)] if summary.time else []),
            ("Restarts", str(summary.restarts)),
        ]
    length = (
        f"{spec.effective_epochs} epochs" if spec.effective_epochs else "given by training.maxSteps"
    )
    trained, total = summary.trainable_parameters, summary.total_parameters
    share = 100 * trained / max(1, total)
    stored = ", ".join(f"{name} {megabytes(n)}" for name, n in about.sizes.stored.items())
    return [
        ("Task", describe_task(about)),
        ("Base model", about.run_spec.base_model.source),
        ("Method", describe(spec.method)),
        ("Trained parameters", f"{trained:,} of {total:,} ({share:.2g} %)"),
        ("Stored size", f"{stored}; a full copy has {megabytes(about.sizes.full_copy)}"),
        ("Steps", f"{summary.steps:,} ({length})"),
        ("Batch", f"{spec.training.batch_size} samples per step"),
        ("Learning rate", f"{spec.effective_learning_rate:g}, {spec.training.schedule.lower()},"
                          f" warm-up {spec.training.warmup_ratio}"),
        ("Optimizer", spec.training.optimizer),
        ("Weight decay", spec.training.weight_decay),
        *anchors(spec.training.anchor),
        ("Longest sample", f"{about.data.max_length:,} tokens"),
        ("Precision", spec.training.precision),
        ("Seed", str(spec.training.seed)),
        ("Processes", f"{result.processes} on {result.device}"),
        *_memory(about.prepared),
        ("Training time", f"{summary.training_seconds:.0f} s"),
        *([("Time of the processes", summary.time.text)] if summary.time else []),
        *([("First step after", summary.startup.text)] if summary.startup else []),
        ("Restarts", str(summary.restarts)),
        ("Skipped steps", str(summary.skipped_steps)),
        *_quarantine(result),
        ("Published checkpoint", f"step {summary.checkpoint_step}{_point(about.evaluation)}"),
    ]  # fmt: skip
