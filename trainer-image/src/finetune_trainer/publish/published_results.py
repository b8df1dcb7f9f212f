"""The results of a published model, read again from its metrics.json and predictions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from finetune_api.custom_metrics import CustomMetric, with_declared
from finetune_api.evaluation_results import BASE, TUNED, DataSetScores, EvaluationResult
from finetune_api.methods import METHODS
from finetune_api.tasks import Kinds
from finetune_trainer.failures import UserError
from finetune_trainer.publish.predictions import PREDICTIONS, Prediction
from finetune_trainer.publish.run_facts import METRICS_FILE, TABLE_KEYS
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.published import MANIFEST, Manifest, published_file, read_published

_OUTCOMES: Final = ("gates", "current", "artefact", "remedy", "matrix", "judge")
"""What metrics.json has of an ``EvaluationResult`` besides its sets."""


@dataclass(frozen=True)
class PublishedResults:
    """What a run has published about its model."""

    uri: str
    manifest: Manifest
    scores: list[DataSetScores]
    """Base and tuned model on each set, with their comparisons."""
    evaluation: EvaluationResult
    overfitting: str | None
    """Warning of overfitting in words."""
    suspect_labels: str | None
    """Hint at suspect labels in words."""
    kinds: Kinds
    """All metrics of the run."""

    @property
    def name(self) -> str:
        """``support-bot 2-abcde``; of an evaluation alone with the model that it measured."""
        run = f"{self.manifest.job.name} {self.manifest.run}"
        trained = self.judged == TUNED.name
        return run if trained else f"{self.manifest.lineage[-1].uri} (measured by {run})"

    @property
    def judged(self) -> str:
        """Name of the row that the results are about (``SetTable.judged``)."""
        return (TUNED if METHODS[self.manifest.method].trains else BASE).name


def read_results(store: ObjectStore, uri: str) -> PublishedResults:
    """Read the results of a published model.

    Args:
        uri: folder of the model: spec.output.destination, and the run.

    Raises:
        UserError: 'ModelNotFound', no model was published there; 'PublishedFileGone', a file has
            changed, or is of a release whose results have another form.
    """
    uri = uri.rstrip("/")
    found = read_published(store, uri)
    if found is None:
        raise UserError(
            "ModelNotFound",
            f"{uri}/{MANIFEST} does not exist: no run published a model there. The folder of a"
            " model is spec.output.destination and the run's ID (status.run.id)",
        )
    manifest = found[0]
    try:
        raw = _without_nulls(json.loads(published_file(store, uri, manifest, METRICS_FILE)))
        return PublishedResults(
            uri,
            manifest,
            scores=[_scores(each) for each in raw["test"]],
            evaluation=EvaluationResult.model_validate(
                {
                    "sets": [
                        {key: each[key] for key in TABLE_KEYS if key in each}
                        | {"name": each["dataSet"]}
                        for each in raw["test"]
                    ],
                    **{key: raw[key] for key in _OUTCOMES if key in raw},
                }
            ),
            overfitting=raw.get("overfitting", {}).get("warning"),
            suspect_labels=raw.get("suspectLabels", {}).get("hint"),
            kinds=_kinds(raw.get("spec", {}).get("evaluation", {})),
        )
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _other_form(f"{uri}/{METRICS_FILE}", error) from None


def read_all_predictions(store: ObjectStore, results: PublishedResults) -> list[Prediction]:
    """Read all lines of ``predictions.jsonl``.

    Raises:
        UserError: as ``read_results``.
    """
    text = published_file(store, results.uri, results.manifest, PREDICTIONS)
    try:
        return [Prediction.model_validate_json(line) for line in text.splitlines()]
    except ValidationError as error:
        raise _other_form(f"{results.uri}/{PREDICTIONS}", error) from None


def _scores(raw: Mapping[str, Any]) -> DataSetScores:
    base: Mapping[str, Any] = next((row for row in raw.get("rows", ()) if row["row"] == "Base"), {})
    return DataSetScores.model_validate(
        {
            "name": raw["dataSet"],
            "samples": raw["samples"],
            "base": raw["base"],
            "tuned": raw["tuned"],
            "comparisons": base.get("comparisons", {}),
        }
    )


def _kinds(evaluation: Mapping[str, Any]) -> Kinds:
    declared = map(CustomMetric.model_validate, evaluation.get("customMetrics", ()))
    return with_declared(declared, judged="judge" in evaluation)


def _without_nulls(raw: Any) -> Any:
    """Leave out what is null: metrics.json has null for what is absent, and for a figure that is
    not finite. An estimate or comparison without its value is left out as a whole."""
    if isinstance(raw, dict):
        return {key: _without_nulls(each) for key, each in raw.items() if _is_known(each)}
    return [_without_nulls(each) for each in raw] if isinstance(raw, list) else raw


def _is_known(raw: Any) -> bool:
    if isinstance(raw, dict):
        return None not in (raw.get("value", 0), raw.get("effect", 0))
    return raw is not None


def _other_form(uri: str, error: Exception) -> UserError:
    line = ": ".join(str(error).splitlines()[1:3]) or str(error)
    return UserError(
        "PublishedFileGone",
        f"{uri}: not the results that this release knows ({type(error).__name__}: {line});"
        " read it with the release that published the model",
    )
