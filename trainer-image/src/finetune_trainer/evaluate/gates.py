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
    GateResult,
    SetTable,
    TableRow,
)
from finetune_api.gates import Gate, GateRow
from finetune_api.tasks import METRICS, Metric
from finetune_trainer.evaluate.metric_text import shown
from finetune_trainer.evaluate.paired import ALPHA, FEWEST_GROUPS
from finetune_trainer.evaluate.recommendation import primary_of


def results_of_gates(gates: Iterable[Gate], tables: Sequence[SetTable]) -> list[GateResult]:
    """Return the result of each gate on each of its sets, in order."""
    return [_result(gate, table) for gate in gates for table in sets_of(gate, tables)]


def sets_of(gate: Gate, tables: Sequence[SetTable]) -> list[SetTable]:
    """The sets that a gate is about."""
    if gate.data_set is not None:
        return [table for table in tables if table.name == gate.data_set]
    return [t for t in tables if not t.retention and gate.metric in _tuned(t).metrics]


def _result(gate: Gate, table: SetTable) -> GateResult:
    found = _tuned(table).metrics.get(gate.metric)
    against = gate.effective_row
    passed, because = (
        _by_value(gate, found.value if found else math.nan)
        if against is None
        else _by_row(gate, table, against)
    )
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


def _by_value(gate: Gate, found: float) -> tuple[bool, str]:
    wanted = gate.effective_value
    passed = found >= wanted if gate.operator == "AtLeast" else found <= wanted
    words = "at least" if gate.operator == "AtLeast" else "at most"
    text = f"{shown(gate.metric, found)}, {words} {shown(gate.metric, wanted)} wanted"
    return (
        passed,
        text if passed else f"{text}: missed by {shown(gate.metric, abs(found - wanted))}",
    )


def _by_row(gate: Gate, table: SetTable, against: GateRow) -> tuple[bool, str]:
    row = row_against(table, against, gate.metric)
    if row is None:
        if against == "Current":
            return True, "there is no current model yet"
        return False, f"no {against} row was measured"
    compared = row.comparisons.get(gate.metric)
    if compared is None:
        return False, f"no comparison with {row.row}: no sample has both answers, or a value is NaN"
    low = lowest_gain(gate.metric, compared)
    text = f"against {row.row} {_figures(gate.metric, compared)}"
    groups = row.groups or row.samples
    if compared.test != "McNemar" and groups < FEWEST_GROUPS:
        return False, f"{text}: {groups} samples are too few to decide, give {FEWEST_GROUPS}"
    wanted = gate.effective_value
    if gate.operator == "BetterThan":
        said = f"{text}, p {compared.p:.2g}"
        if gate.value is None:
            passed = compared.verdict == "Better"
            why = _NOT_BETTER.get(compared.verdict, compared.verdict)
        else:
            passed = compared.p < ALPHA and low > wanted
            why = f"not significantly better by more than {shown(gate.metric, wanted)}"
        return passed, said if passed else f"{said}: {why}"
    passed = low >= -wanted
    limit = shown(gate.metric, wanted)
    return passed, text if passed else f"{text}: a loss of more than {limit} is not ruled out"


_NOT_BETTER: Final = {
    "Worse": "significantly worse",
    "NotBetter": "a gain of evaluation.minEffect is ruled out",
    "TooFewSamples": "not significantly better",
}


def lowest_gain(metric: Metric, compared: Comparison) -> float:
    """Lower end of the interval of the gain: above 0 the tuned model is better."""
    return compared.low if METRICS[metric].higher_is_better else -compared.high


def row_against(table: SetTable, wanted: GateRow, metric: Metric) -> TableRow | None:
    """The row of a table that the tuned model is compared with: the best by the metric of those
    that ``wanted`` stands for. None: there is none."""
    rows = [row for row in table.rows if kind_of(row) == wanted]
    sign = 1 if METRICS[metric].higher_is_better else -1

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


def _tuned(table: SetTable) -> TableRow:
    return next(row for row in table.rows if row.model == "Tuned" and row.prompt == AS_IS)


def against_current(tables: Sequence[SetTable], margin_points: float) -> tuple[bool, str]:
    """Whether the tuned model may replace the current one, and the figures in words: on no test set
    is it worse by more than the margin, in the set's main metric.

    Args:
        margin_points: ``output.current.margin``, in points (see ``MetricKind.point``).
    """
    tested = [table for table in tables if not table.retention]
    found = [_not_worse(table, margin_points) for table in tested]
    if not found:
        return False, "there is no test set on which the two could be compared"
    return all(passed for passed, _ in found), "; ".join(text for _, text in found)


def _not_worse(table: SetTable, margin_points: float) -> tuple[bool, str]:
    row = row_against(table, "Current", "Loss")
    metric = primary_of(list(_tuned(table).metrics))
    compared = row.comparisons.get(metric) if row and metric else None
    if row is None or metric is None or compared is None:
        return False, (
            f"{table.name}: the current model was not measured on these samples (it answered other"
            " ones, or its predictions.jsonl is gone)"
        )
    margin = margin_points * METRICS[metric].point
    passed = lowest_gain(metric, compared) >= -margin
    text = f"{table.name} {metric}: {_figures(metric, compared)} over {row.samples} samples"
    possible = f"{text}: worse by more than {shown(metric, margin)} is possible"
    return passed, text if passed else possible


def _figures(metric: Metric, compared: Comparison) -> str:
    values = compared.effect, compared.low, compared.high
    effect, low, high = (shown(metric, value, signed=True) for value in values)
    return f"{effect}, 95 % interval {low} to {high}"
