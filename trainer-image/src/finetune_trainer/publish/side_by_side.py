"""Samples of a set side by side for the report: prompt, reference, and what each row answered.

    answers of base and tuned model ──► value of each sample ──► groups by change ──► some of each

Of each group at most ``QUOTA`` samples are shown, so that a few losses are seen beside many gains,
and the page stays small. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.evaluation_results import BASE
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.comparisons import score_of
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.recommendation import PRIMARY
from finetune_trainer.evaluate.table import RowOutcome, rows_of
from finetune_trainer.evaluate.weighted_scores import Ratio
from finetune_trainer.personal import redacted
from finetune_trainer.prepared.split import position
from finetune_trainer.publish.measured_sets import MeasuredSet

QUOTA: Final = 8
"""Samples of each group that the report shows."""
MOST_CHARACTERS: Final = 2000
"""Characters of a text that the report shows."""

_GRADED: Final[frozenset[str]] = frozenset({"Rouge", "Rouge1", "Rouge2", "TokenF1", "JsonFieldF1"})
"""Metrics that grade answers, even where no answer is between right and wrong; others do if one
is."""
Change = Literal["gained", "lost", "wrong", "right", "same", "all"]
"""What tuning changed in the answer to a sample. A metric of right and wrong has gained, lost,
wrong and right (in both answers); others have gained, lost and same. all: not compared."""
_NAMES: Final[dict[bool, dict[Change, str]]] = {
    False: {
        "gained": "wrong → right", "lost": "right → wrong", "wrong": "both wrong",
        "right": "both right",
    },
    True: {"gained": "better", "lost": "worse", "same": "unchanged"},
}  # fmt: skip
"""By whether the metric grades answers, instead of telling right from wrong."""
_NAMES_ALONE: Final[dict[bool, dict[Change, str]]] = {
    False: {"wrong": "wrong", "right": "right"},
    True: {"same": ""},
}
"""The same of one model, where nothing was trained."""


@dataclass(frozen=True)
class ShownAnswer:
    """What a row answered to a sample."""

    row: str
    text: str
    value: str
    """right, wrong or the value of the metric; "" without a metric."""
    right: bool | None
    """None: the metric does not tell right from wrong."""


@dataclass(frozen=True)
class ShownSample:
    """A sample with its answers."""

    number: int
    """In the set, from 1."""
    change: Change
    name: str
    """Of the change."""
    prompt: str
    reference: str
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class ChangeGroup:
    """The samples of a set with one change."""

    change: Change
    name: str
    count: int
    """All samples of the set that base and tuned model answered."""
    shown: int


@dataclass(frozen=True)
class SideBySide:
    """The shown samples of a set."""

    name: str
    metric: str | None
    """Metric whose values tell the changes; None: the set has no metric of single samples, or the
    base model did not answer."""
    groups: list[ChangeGroup]
    samples: list[ShownSample]


@dataclass(frozen=True)
class _Answers:
    """The first draw of a row."""

    row: str
    texts: Mapping[int, str]
    """Answer by sample."""
    values: Mapping[int, float]
    """Value of the metric by sample; empty without one."""


def side_by_side(found: MeasuredSet, seed: int, redact: bool) -> SideBySide | None:
    """Return the samples of a set that the report shows; None: nothing was answered.

    Of each group, samples that the most rows answered come first; then, with a graded metric, those
    with the largest change; then the order is that of a hash of the sample's text, keyed by the
    seed.

    Args:
        seed: ``data.split.seed``.
        redact: replace personal data in the answers (``data.quality.personalData: Redact``, which
            has replaced it in prompts and references).
    """
    rows = [
        row.of(row.draws[:1])
        for row in rows_of(found.answered, found.references, found.groups)
        if row.samples
    ]
    metric, values = _measured(found.metrics, rows)
    answers = [
        _Answers(row.row.name, dict(zip(row.samples, row.draws[0].answers, strict=True)), known)
        for row, known in zip(rows, values, strict=True)
    ]
    by_row = {each.row: each for each in answers}
    judged = by_row.get(found.judged.row.name) if answers else None
    if judged is None:
        return None
    base = by_row.get(BASE.name)
    kind = found.metrics[metric] if metric else None
    graded = metric in _GRADED or not all(
        value in (0.0, 1.0) for each in answers for value in each.values.values()
    )
    changes = _changes(base, judged, kind, graded)
    of_change = _NAMES if judged is not base else _NAMES_ALONE
    names: Mapping[Change, str] = of_change[graded] if metric else {"all": ""}
    answered = Counter(number for each in answers for number in each.texts)

    def rank(number: int) -> tuple[float, ...]:
        size = abs(changes[number][1]) if graded else 0.0
        return -answered[number], -size, position(seed, found.digests[number]), number

    order = sorted(changes, key=rank)
    members = {change: [n for n in order if changes[n][0] == change] for change in names}
    return SideBySide(
        name=found.name,
        metric=metric,
        groups=[
            ChangeGroup(change, names[change], len(numbers), min(QUOTA, len(numbers)))
            for change, numbers in members.items()
        ],
        samples=[
            ShownSample(
                number=n + 1,
                change=change,
                name=names[change],
                prompt=_cut(found.references[n].prompt),
                reference=_cut(found.references[n].completion),
                answers=[
                    _shown(each, n, kind, graded, redact) for each in answers if n in each.texts
                ],
            )
            for change, numbers in members.items()
            for n in numbers[:QUOTA]
        ],
    )


def _measured(
    metrics: Kinds, rows: Sequence[RowOutcome]
) -> tuple[str | None, list[dict[int, float]]]:
    """Return the first metric that is a mean over samples, in the order of PRIMARY, and its values
    by row; None: there is none, or the base model did not answer."""
    order = [m for m in PRIMARY if m in metrics]
    if BASE in [row.row for row in rows]:
        for metric in dict.fromkeys([*order, *metrics]):
            values = [_values(row, metric) for row in rows]
            if metrics[metric].source != "Loss" and not metrics[metric].relative and all(values):
                return metric, values
    return None, [{} for _ in rows]


def _values(row: RowOutcome, metric: str) -> dict[int, float]:
    """The value of a metric of each answered sample; none if it is not a mean over samples, or some
    have no value."""
    score = score_of(metric, row.outcome(row.samples))
    if not isinstance(score, Ratio) or len(score.sums) != len(row.samples):
        return {}
    return dict(zip(row.samples, score.sums.tolist(), strict=True))


def _changes(
    base: _Answers | None, judged: _Answers, kind: MetricKind | None, graded: bool
) -> dict[int, tuple[Change, float]]:
    """Return change and gain of each sample that both models answered.

    Args:
        judged: the tuned model or, where nothing was trained, the base model.
    """
    if kind is None or base is None:
        return dict.fromkeys(judged.texts, ("all", 0.0))
    sign = 1 if kind.higher_is_better else -1
    found: dict[int, tuple[Change, float]] = {}
    for number in base.texts.keys() & judged.texts.keys():
        after = judged.values[number]
        gain = sign * (after - base.values[number])
        kept: Change = "same" if graded else "right" if after else "wrong"
        found[number] = "gained" if gain > 0 else "lost" if gain < 0 else kept, gain
    return found


def _shown(
    each: _Answers, number: int, kind: MetricKind | None, graded: bool, redact: bool
) -> ShownAnswer:
    text = _cut(redacted(each.texts[number]) if redact else each.texts[number])
    if kind is None:
        return ShownAnswer(each.row, text, "", None)
    value = each.values[number]
    if graded:
        return ShownAnswer(each.row, text, shown(kind, value), None)
    return ShownAnswer(each.row, text, "right" if value else "wrong", bool(value))


def _cut(text: str) -> str:
    """Leave out the middle of a long text."""
    text = text.strip()
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"
