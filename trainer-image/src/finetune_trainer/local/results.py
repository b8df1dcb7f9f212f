"""``finetune report`` and ``finetune compare``: results of published models on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.evaluation_results import EvaluationResult
from finetune_api.methods import METHODS
from finetune_api.tasks import Kinds
from finetune_trainer.failures import TrainerError, UserError, printable
from finetune_trainer.local.display import plain_table, scores_table, short_verdict, show_error
from finetune_trainer.local.manifest import with_paths
from finetune_trainer.local.storage import published_store
from finetune_trainer.publish.judge_texts import judge_texts
from finetune_trainer.publish.lm_eval_export import export
from finetune_trainer.publish.model_comparison import ComparedSet, Model, compare_models
from finetune_trainer.publish.predictions import by_sample
from finetune_trainer.publish.published_results import (
    PublishedResults,
    read_all_predictions,
    read_results,
)
from finetune_trainer.publish.results import remedy_text
from finetune_trainer.publish.row_tables import (
    ShownMatrix,
    ShownTable,
    counted,
    matrix_table,
    shown_tables,
)
from finetune_trainer.publish.run_facts import Score, artefact_text, scores_of
from finetune_trainer.publish.trade_off import TradeOff, trade_off

LETTERS: Final = "ABCDEFGH"
"""Names of the models in the tables of a comparison: as many as it may have."""
NO_CLAIMS: Final[Mapping[str, Path]] = {}


def report(
    uri: str, state_dir: Path, *, endpoint: str | None, local_storage: bool,
    lm_eval: Path | None = None, claims: Mapping[str, Path] = NO_CLAIMS,
) -> int:  # fmt: skip
    """Show the results of a published model, and return the exit code.

    Args:
        uri: folder of the model.
        lm_eval: folder for the results in the files of lm-evaluation-harness.
        claims: local folders that are shown in place of claims.
    """
    console, written = Console(), list[Path]()
    try:
        with published_store(state_dir, endpoint, local_storage) as store:
            results = read_results(store, uri)
            if lm_eval is not None:
                written = export(results, read_all_predictions(store, results), lm_eval)
    except TrainerError as error:
        return show_error(console, error)
    _show_report(console, results, with_paths(results.name, claims))
    for path in written:
        _say(console, f"Written: {path}")
    return 0


def compare(
    uris: Sequence[str], state_dir: Path, *, endpoint: str | None, local_storage: bool,
    min_effect: float, claims: Mapping[str, Path] = NO_CLAIMS,
) -> int:  # fmt: skip
    """Compare published models on the samples that all have answered, and return the exit code.

    Args:
        uris: folders of the models; the others are compared with the first.
        min_effect: as ``evaluation.minEffect``, in hundredths.
        claims: as for ``report``.
    """
    console = Console()
    try:
        if not 2 <= len(uris) <= len(LETTERS):
            raise UserError(
                "InvalidAddress", f"{len(uris)} models given; 2 to {len(LETTERS)} can be compared"
            )
        with published_store(state_dir, endpoint, local_storage) as store:
            found = [read_results(store, uri) for uri in uris]
            models = [
                Model(
                    each.name,
                    by_sample(read_all_predictions(store, each)),
                    {scores.name: list(scores.judged) for scores in each.scores},
                    each.kinds,
                    each.judged,
                )
                for each in found
            ]
        compared = compare_models(models, min_effect)
    except TrainerError as error:
        return show_error(console, error)
    for letter, results in zip(LETTERS, found, strict=False):
        _say(console, f"{letter}: {with_paths(results.name, claims)}, {results.uri}")
    if not compared:
        _say(console, "No test or retention set has the same name in all models.")
    for each in compared:
        _show_compared(console, each)
    return 0


def _say(console: Console, text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


# --- report --------------------------------------------------------------------------------------


def _show_report(console: Console, found: PublishedResults, name: str) -> None:
    manifest, evaluation = found.manifest, found.evaluation
    console.print(Text(printable(name), style="bold"))
    trains = METHODS[manifest.method].trains
    what = f"{manifest.method} on {manifest.base_model}; published" if trains else "Evaluation"
    _say(console, f"{what} at {found.uri}")
    if manifest.held:
        _say(console, f"Held:    {manifest.held}")
    for table in evaluation.sets:
        if (advice := table.recommendation) is not None:
            _say(console, f"Advice:  {table.name}: {advice.action}: {advice.because}")
    if found.overfitting:
        _say(console, f"Overfit: {found.overfitting}")
    if remedy := remedy_text(evaluation.remedy):
        _say(console, f"Remedy:  {remedy}")
    if found.suspect_labels:
        _say(console, f"Labels:  {found.suspect_labels}")
    forgotten = "Retention sets: what was forgotten" if trains else "Retention sets"
    for retention, title in ((False, "Test metrics"), (True, forgotten)):
        names = {table.name for table in evaluation.sets if table.retention is retention}
        scores = [each for each in found.scores if each.name in names]
        if scores and trains:
            console.print(scores_table(title, scores, found.kinds))
        elif scores:
            console.print(_values_table(title, evaluation, names, found.kinds))
    for shown in shown_tables(evaluation, scores_of(found.scores, found.kinds)):
        console.print(_rows_table(shown))
    if (matrix := matrix_table(evaluation.matrix, found.kinds)) is not None:
        console.print(_matrix_table(matrix))
        if matrix.summary:
            _say(console, f"Over all sets: {matrix.summary}")
        if matrix.not_read:
            _say(console, f"Published results that were not read: {matrix.not_read}")
    if evaluation.remedy is not None:
        console.print(_points_table(trade_off(evaluation.remedy)))
    if evaluation.gates or evaluation.current:
        console.print(_gates_table(evaluation))
    for text in judge_texts(evaluation.judge):
        _say(console, text)
    if evaluation.artefact is not None:
        _say(console, artefact_text(evaluation.artefact))
    _say(console, f"Report:  {found.uri}/report.html")


def _values_table(
    title: str, evaluation: EvaluationResult, names: Collection[str], kinds: Kinds
) -> Table:
    """Metrics of a model that was measured as it is."""
    table = plain_table(f"{title}, with their 95 % intervals")
    for name in ("data set", "samples", "metric", "value"):
        table.add_column(name, overflow="fold")
    for each in (t for t in evaluation.sets if t.name in names and t.judged):
        row = each.judged
        assert row is not None, "checked above"
        for n, (metric, estimate) in enumerate(row.metrics.items()):
            score = Score(each.name, row.samples, metric, kinds[metric], estimate.value, None)
            first = (each.name, counted(row.samples, row.groups)) if n == 0 else ("", "")
            cells = (*first, metric, score.estimated(estimate))
            table.add_row(*(Text(printable(cell)) for cell in cells))
        table.add_section()
    return table


def _rows_table(shown: ShownTable) -> Table:
    table = plain_table(f"{shown.name}: all ways to ask, compared by {shown.primary}")
    ahead = f"{shown.judged.lower()} is ahead by"
    for name in ("row", "samples", shown.primary, ahead, "tokens"):
        table.add_column(name, overflow="fold")
    for row in shown.rows:  # the report has all metrics
        cells = (row.name, row.samples, row.values[0], row.ahead, row.tokens)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _matrix_table(shown: ShownMatrix) -> Table:
    table = plain_table("The sequence of runs; *: the first that had the set as a test set")
    for name in ("after", *shown.sets):
        table.add_column(Text(printable(name)), overflow="fold")
    for name, values in (*shown.rows, ("forgotten", shown.forgetting)):
        table.add_row(*(Text(printable(cell)) for cell in (name, *values)))
    return table


def _points_table(shown: TradeOff) -> Table:
    table = plain_table("Points between the base and the tuned model, on the half that chooses")
    for name in ("point", "validation loss", *shown.sets, "verdict"):
        table.add_column(Text(printable(name)), overflow="fold")
    for row in shown.rows:
        cells = (row.name, row.validation, *row.retention, row.verdict)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _gates_table(evaluation: EvaluationResult) -> Table:
    table = plain_table("Gates")
    for name in ("gate", "data set", "result", "figures"):
        table.add_column(name, overflow="fold")
    lines = [(f"{g.metric} {g.operator}", g.data_set, g.passed, g.because)
             for g in evaluation.gates]  # fmt: skip
    if (current := evaluation.current) is not None:
        lines.append((f"current model {current.run or ''}", "", current.passed, current.because))
    for gate, name, passed, because in lines:
        result = Text("passed", "green") if passed else Text("missed", "red")
        table.add_row(Text(printable(gate)), Text(printable(name)), result,
                      Text(printable(because)))  # fmt: skip
    return table


# --- compare -------------------------------------------------------------------------------------


def _show_compared(console: Console, found: ComparedSet) -> None:
    if not found.models:
        _say(console, f"{found.name}: no sample is the same in all models; not compared.")
        return
    common = counted(found.samples, found.groups)
    some = "" if found.samples == found.of else f", of {found.of:,}"
    table = plain_table(f"{found.name}: {common} samples in common{some}")
    for name in ("metric", "model", "value", "against A", "p", "verdict"):
        table.add_column(name, overflow="fold")
    for metric, kind in found.metrics.items():
        for letter, model in zip(LETTERS, found.models, strict=False):
            estimate = model.estimates.get(metric)
            if estimate is None:
                continue
            compared = model.comparisons.get(metric)
            score = Score(found.name, found.samples, metric, kind, None, estimate.value, compared)
            effect, p = "", ""
            if compared is not None:
                effect = f"{score.show(compared.effect, signed=True)} ({score.interval})"
                p = f"{compared.p:.2g}"
            table.add_row(
                metric if letter == LETTERS[0] else "", letter, score.estimated(estimate), effect,
                p, short_verdict(compared),
            )  # fmt: skip
        table.add_section()
    console.print(table)
