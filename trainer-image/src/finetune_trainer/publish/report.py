"""``report.html``: a self-contained page with a run's metrics, loss, data and samples."""

from __future__ import annotations

import json
from typing import Any, Final, get_args

from finetune_trainer.pages import page
from finetune_trainer.publish.chart import Line, interval_chart, line_chart
from finetune_trainer.publish.judge_texts import judge_texts
from finetune_trainer.publish.memorisation import memorisation_text, memorisation_warning
from finetune_trainer.publish.results import main_result
from finetune_trainer.publish.row_tables import (
    counted,
    curve_table,
    matrix_table,
    slices_of,
    tables_of,
)
from finetune_trainer.publish.run_facts import DRAWN_HEAD, About, artefact_text, by_set, settings
from finetune_trainer.publish.side_by_side import QUOTA, Change
from finetune_trainer.publish.suspects import suspects_hint
from finetune_trainer.publish.trade_off import trade_off

_MAIN: Final = {
    "Better": "Better",
    "Worse": "Worse",
    "NotBetter": "Not better by what matters",
    "TooFewSamples": "Not known yet whether better",
}
"""Verdicts in words that go before "than the base model"."""


def render(about: About, data_report: bytes) -> str:
    """Return the page as HTML.

    Args:
        data_report: ``report.json`` of the prepared data.
    """
    validation = about.result.validation
    remedy = about.evaluation.remedy
    names = list(dict.fromkeys(name for point in validation for name in point.sets))
    return page(__package__, "report.html.j2").render(
        about=about,
        main=main_result(about.evaluation, about.spec.evaluation.kinds),
        verdicts=_MAIN,
        interval_chart=interval_chart,
        scores=by_set(about.scores_of(retention=False)),
        retained=by_set(about.scores_of(retention=True)),
        remedy=remedy,
        points=trade_off(remedy) if remedy else None,
        samples=_sample_counts(about),
        estimates={t.name: t.judged.metrics for t in about.evaluation.sets if t.judged},
        tables=tables_of(about),
        slices=slices_of(about.evaluation, about.spec.evaluation.kinds),
        matrix=matrix_table(about.evaluation.matrix, about.spec.evaluation.kinds),
        curve=curve_table(about.evaluation.data_curve, about.spec.evaluation.kinds),
        overfitting=about.overfitting,
        memorisation=about.result.memorisation and memorisation_text(about.result.memorisation),
        learned_by_heart=about.result.memorisation
        and memorisation_warning(about.result.memorisation),
        suspects=about.result.suspects,
        suspects_hint=suspects_hint(about.result.suspects),
        chart=line_chart(
            _lines(about), "Loss by optimizer step", "step", about.result.summary.checkpoint_step
        ),
        **_distance(about),
        validation=validation,
        validation_sets=names,
        settings=settings(about),
        drawn_head=DRAWN_HEAD,
        artefact=artefact_text(about.evaluation.artefact),
        judge=judge_texts(about.evaluation.judge),
        data=_data_rows(json.loads(data_report)),
        previews=_previews(json.loads(data_report)),
        changes=get_args(Change),
        quota=QUOTA,
    )


def _sample_counts(about: About) -> dict[str, str]:
    """Return the number of samples of each test set, and of the groups among the answered ones."""
    judged = {
        table.name: row
        for table in about.evaluation.sets
        if (row := table.judged) and row.groups is not None
    }
    found = {}
    for score in about.result.summary.scores:
        row = judged.get(score.name)
        text = f"{score.samples:,}" if row is None else counted(row.samples, row.groups)
        more = row is not None and row.samples < score.samples
        found[score.name] = f"{text}, of {score.samples:,}" if more else text
    return found


def _lines(about: About) -> list[Line]:
    training = [(float(p.step), p.loss) for p in about.result.curve]
    checked = [
        (float(p.step), p.overall["Loss"]) for p in about.result.validation if "Loss" in p.overall
    ]
    return [Line("Training", "training", training), Line("Validation", "validation", checked, True)]


def _distance(about: About) -> dict[str, Any]:
    """Return the chart of KL(base || tuned), and its value at the published checkpoint."""
    at = {p.step: p.base_kl for p in about.result.validation if p.base_kl is not None}
    step = about.result.summary.checkpoint_step
    line = Line("KL", "validation", [(float(x), y) for x, y in at.items()], True)
    return {
        "distance": line_chart(
            [line], "KL divergence from the base model by optimizer step", "step", step
        ),
        "distance_published": at.get(step) if step is not None else None,
    }


def _data_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one table row per source and side of the split."""
    return [
        {
            "name": source["name"],
            "side": side,
            "format": source["format"],
            "samples": found["samples"],
            "tokens": found["tokens"],
            "supervised": found["supervisedShare"],
            "lengths": found["lengthPercentiles"],
            "dropped": {k: v for k, v in source["dropped"].items() if v},
            "truncated": sum(source["truncated"].values()),
            "labels": found["labels"],
        }
        for source in report["sources"]
        for side, found in source["splits"].items()
        if found["samples"]
    ]


def _previews(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the first training sample of each source, with its supervised parts marked."""
    return [
        {"name": source["name"], **found["previews"][0]}
        for source in report["sources"]
        for side, found in source["splits"].items()
        if side == "train" and found["previews"]
    ]
