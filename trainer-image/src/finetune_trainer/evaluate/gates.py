"""Gates: conditions on the results that decide whether a run may be used.

    gates of the spec + tables of all sets ──► GateResult of each gate and set

Pure. Gates must all pass, so their p values need no correction: a run that is no better passes all
of them at most as often as any one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from finetune_api.evaluation_results import (
    AS_IS,
    RETRIEVAL,
    Comparison,
    Estimate,
    GateResult,
    SetTable,
    TableRow,
)
from finetune_api.gates import Gate, GateRow
from finetune_api.tasks import Kinds, MetricKind
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.paired import FEWEST_GROUPS
from finetune_trainer.evaluate.paired_tests import ALPHA
from finetune_trainer.evaluate.recommendation import primary_of


def results_of_gates(
    gates: Iterable[Gate], tables: Sequence[SetTable], kinds: Kinds, *, in_use: bool
) -> list[GateResult]:
    """Return the result of each gate on each of its sets, in order. A gate without a set is missed.

    Args:
        kinds: all metrics of the run.
        in_use: whether there is a current model.
    """
    return [
        _result(gate, table, kinds[gate.metric], in_use)
        for gate in gates
        for table in sets_of(gate, tables) or [SetTable(name=gate.data_set or "test sets", rows=[])]
    ]


def sets_of(gate: Gate, tables: Sequence[SetTable]) -> list[SetTable]:
    """The sets that a gate is about."""
    if gate.data_set is not None:
        return [table for table in tables if table.name == gate.data_set]
    return [t for t in tables if not t.retention and gate.metric in _metrics(t)]


def _result(gate: Gate, table: SetTable, kind: MetricKind, in_use: bool) -> GateResult:
    found = _metrics(table).get(gate.metric)
    against = gate.effective_row
    if not table.rows:
        passed, because = False, "the set was not measured"
    elif against is None:
        passed, because = _by_value(gate, kind, found.value if found else math.nan)
    elif against == "Current" and not in_use:
        passed, because = True, "there is no current model yet"
    else:
        passed, because = _by_row(gate, table, kind, against)
    return GateResult(
        data_set=table.name,
        metric=gate.metric,
        operator=gate.operator,
        row=against,
        wanted=gate.effective_value if gate.value is not None else None,
        found=found.value if found and math.isfinite(found.value) else None,
        passed=passed,
        because=because,
    )


def _by_value(gate: Gate, kind: MetricKind, found: float) -> tuple[bool, str]:
    wanted = gate.effective_value
    passed = found >= wanted if gate.operator == "AtLeast" else found <= wanted
    words = "at least" if gate.operator == "AtLeast" else "at most"
    text = f"{shown(kind, found)}, {words} {shown(kind, wanted)} wanted"
    return (
        passed,
        text if passed else f"{text}: missed by {shown(kind, abs(found - wanted))}",
    )


def _by_row(gate: Gate, table: SetTable, kind: MetricKind, against: GateRow) -> tuple[bool, str]:
    row = row_against(table, against, gate.metric, kind)
    if row is None:
        what = _UNKNOWN if against == "Current" else f"no row {against} was measured"
        return False, what
    compared = row.comparisons.get(gate.metric)
    if compared is None:
        return False, f"no comparison with {row.row}: no sample has both answers, or a value is NaN"
    low = lowest_gain(kind, compared)
    text = f"against {row.row} {_figures(kind, compared)}"
    if (few := _too_few(compared)) is not None:
        return False, f"{text}: {few}"
    wanted = gate.effective_value
    if gate.operator == "BetterThan":
        said = f"{text}, p {compared.p:.2g}"
        if gate.value is None:
            passed = compared.verdict == "Better"
            why = _NOT_BETTER.get(compared.verdict, compared.verdict)
        else:
            passed = compared.p < ALPHA and low > wanted
            why = f"not significantly better by more than {shown(kind, wanted)}"
        return passed, said if passed else f"{said}: {why}"
    passed = rules_out(kind, compared, wanted)
    limit = shown(kind, wanted)
    return passed, text if passed else f"{text}: a loss of more than {limit} is not ruled out"


_NOT_BETTER: Final = {
    "Worse": "significantly worse",
    "NotBetter": "a gain of evaluation.minEffect is ruled out",
    "TooFewSamples": "not significantly better",
}


def lowest_gain(kind: MetricKind, compared: Comparison) -> float:
    """Lower end of the interval of the gain: above 0 the tuned model is better."""
    return compared.low if kind.higher_is_better else -compared.high


def rules_out(kind: MetricKind, compared: Comparison, loss: float) -> bool:
    """Whether a comparison rules out that the new model is worse by more than ``loss``, in the unit
    of the metric. Too few groups rule out nothing."""
    return _too_few(compared) is None and lowest_gain(kind, compared) >= -loss


def row_against(table: SetTable, wanted: GateRow, metric: str, kind: MetricKind) -> TableRow | None:
    """The row of a table that the tuned model is compared with: the best by the metric of those
    that ``wanted`` stands for. None: there is none."""
    rows = [row for row in table.rows if kind_of(row) == wanted]
    sign = 1 if kind.higher_is_better else -1

    def rank(row: TableRow) -> float:
        found = row.metrics.get(metric)
        return sign * found.value if found and math.isfinite(found.value) else -math.inf

    return max(rows, key=rank, default=None)


def kind_of(row: TableRow) -> GateRow | None:
    """What a gate calls a row; None: the tuned model's."""
    if row.model == "Current":
        return "Current"
    if row.model == "Tuned":
        return None
    return kind_of_prompt(row.prompt)


def kind_of_prompt(prompt: str) -> GateRow:
    """What a gate calls the base model's answers to prompts put in one way (``Row.prompt``)."""
    if prompt in _NAMED:
        return _NAMED[prompt]
    return "FewShot" if prompt.endswith("-shot") else "Prompt"


_NAMED: Final[dict[str, GateRow]] = {AS_IS: "Base", RETRIEVAL: "Retrieval"}


def _metrics(table: SetTable) -> dict[str, Estimate]:
    """Metrics of the judged model."""
    return table.judged.metrics if table.judged else {}


def _too_few(compared: Comparison) -> str | None:
    """Why a comparison decides nothing; None: it may."""
    groups = compared.groups or 0
    if compared.test == "McNemar" or groups >= FEWEST_GROUPS:
        return None
    return f"{groups} samples are too few to decide, give {FEWEST_GROUPS}"


_UNKNOWN: Final = (
    "the current model was not measured on these samples (it answered other ones, or its"
    " predictions.jsonl is gone or changed)"
)


def against_current(
    tables: Sequence[SetTable], kinds: Kinds, margin_points: float, *, in_use: bool
) -> tuple[bool, str]:
    """Whether the tuned model may become the current one, and the figures in words: on no test set
    is it worse than the one in use by more than the margin, in the set's main metric.

    Args:
        kinds: all metrics of the run.
        margin_points: ``output.current.margin``, in points (see ``MetricKind.point``).
        in_use: whether there is a current model.
    """
    tested = [table for table in tables if not table.retention]
    if not tested:
        return False, "there is no test set, by which models could be compared"
    found = [_not_worse(table, kinds, margin_points, in_use) for table in tested]
    return all(passed for passed, _ in found), "; ".join(text for _, text in found)


def _not_worse(
    table: SetTable, kinds: Kinds, margin_points: float, in_use: bool
) -> tuple[bool, str]:
    metrics = _metrics(table)
    metric = primary_of(metrics)
    if metric is None or not math.isfinite(metrics[metric].value):
        return False, f"{table.name}: no metric has a finite value"
    kind = kinds[metric]
    value = f"{table.name} {metric}: {shown(kind, metrics[metric].value)}"
    if not in_use:
        return True, f"{value}; there is no current model yet"
    row = row_against(table, "Current", metric, kind)
    if row is None:
        return False, f"{table.name}: {_UNKNOWN}"
    compared = row.comparisons.get(metric)
    if compared is None:
        theirs = row.metrics.get(metric)
        if theirs is not None and not math.isfinite(theirs.value):
            return True, f"{value}; that of the current model is not finite"
        return False, f"{table.name}: {_UNKNOWN}"
    text = f"{table.name} {metric}: {_figures(kind, compared)} over {compared.groups} samples"
    if (few := _too_few(compared)) is not None:
        return False, f"{text}: {few}"
    margin = margin_points * kind.point
    passed = lowest_gain(kind, compared) >= -margin
    possible = f"{text}: worse by more than {shown(kind, margin)} is possible"
    return passed, text if passed else possible


def _figures(kind: MetricKind, compared: Comparison) -> str:
    values = compared.effect, compared.low, compared.high
    effect, low, high = (shown(kind, value, signed=True) for value in values)
    return f"{effect}, 95 % interval {low} to {high}"
