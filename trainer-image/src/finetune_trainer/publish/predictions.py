"""``predictions.jsonl`` beside a published model: what each model answered to each test sample.

    answers of all rows + references ──► lines ──► a later run's row Current, on equal samples

A sample is known by the digest of its text, so that a later run finds it again in other data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import Field

from finetune_api.base import Record
from finetune_api.evaluation_results import CURRENT, TUNED
from finetune_trainer.evaluate.label_scores import CHOOSING, chosen
from finetune_trainer.evaluate.scores import Scores
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.failures import UserError
from finetune_trainer.personal import redacted
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.storage.current import UsedModel
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.published import published_file, read_published
from finetune_trainer.storage.runfiles import LabelScores

PREDICTIONS: Final = "predictions.jsonl"
log = logging.getLogger(__name__)


class Prediction(Record):
    """One line: a sample, and what the models answered."""

    data_set: str
    """Name of the test or retention set."""
    sample: str
    """Digest of prompt, reference and label."""
    group: int | None = None
    """Number of the sample's group within the set: the samples of a group are one unit of the
    statistics. None: an earlier release wrote the line."""
    prompt: str | None = None
    """Text of the prompt; None: the sample has no answers."""
    reference: str | None = None
    """The correct answer."""
    label: str | None = None
    """The correct label, for classification."""
    answers: dict[str, str] = Field(default={})
    """Answer by row; of several draws, the first."""
    loss: float | None = None
    """Loss of the tuned model (without training, of the base model) on the sample, in nats, summed
    over its labels; None: not finite, or not measured."""
    labels: int = 0
    """Number of labels summed in ``loss``: supervised tokens, or one class."""
    log_likelihoods: dict[str, dict[str, float]] | None = None
    """Log-likelihood in nats of each label of the set after the prompt, by row and label, if a
    metric asked for them and all are finite; of several draws, of the first."""
    label_tokens: dict[str, int] | None = None
    """Tokens of each label whose log-likelihoods are summed."""
    chosen_labels: dict[str, dict[str, str]] | None = None
    """Label that is chosen by them, by row and metric."""
    scores: dict[str, dict[str, float]] | None = None
    """Score of the answer by row and metric of evaluation.customMetrics, and WinRate of
    evaluation.judge; of several draws, of the first."""


def predictions_of(found: MeasuredSet, redact: bool) -> Iterator[Prediction]:
    """Yield the lines of one set.

    Args:
        redact: replace personal data in the answers (``data.quality.personalData: Redact``, which
            has replaced it in prompts and references).
    """
    said: list[dict[str, str]] = [{} for _ in found.references]
    for row in found.answered:
        for number, answer in zip(row.samples, row.answers, strict=True):
            text = redacted(answer) if redact else answer
            said[number].setdefault(row.row.name, text)
    likelihoods, picked = _labels_of(found)
    judged = found.judged
    scores_by_row, scores = _scores_of(found), judged.label_scores
    for number, digest in enumerate(found.digests):
        answers = said[number] if number < len(said) else {}
        reference = found.references[number] if answers else None
        known = number < len(judged.losses) and math.isfinite(judged.losses[number])
        yield Prediction(
            data_set=found.name,
            sample=digest,
            group=int(found.groups[number]),
            prompt=reference.prompt if reference else None,
            reference=reference.completion if reference else None,
            label=reference.label if reference else None,
            answers=answers,
            loss=float(judged.losses[number]) if known else None,
            labels=int(judged.labels[number]) if known else 0,
            log_likelihoods=(likelihoods[number] or None) if answers else None,
            label_tokens=(
                dict(zip(scores.labels, scores.tokens, strict=True)) if answers and scores else None
            ),
            chosen_labels=(picked[number] or None) if answers else None,
            scores=(scores_by_row[number] or None) if answers else None,
        )


def _labels_of(
    found: MeasuredSet,
) -> tuple[list[dict[str, dict[str, float]]], list[dict[str, dict[str, str]]]]:
    """For each sample with a reference, ``Prediction.log_likelihoods`` and ``chosen_labels``."""
    likelihoods: list[dict[str, dict[str, float]]] = [{} for _ in found.references]
    labels: list[dict[str, dict[str, str]]] = [{} for _ in found.references]
    for row in found.answered:
        if row.label_scores is None:
            continue
        by_rule = {str(metric): chosen(row.label_scores, metric) for metric in CHOOSING}
        for at, number in enumerate(row.samples):
            values = row.label_scores.values[at]
            if all(map(math.isfinite, values)):
                of_labels = dict(zip(row.label_scores.labels, values, strict=True))
                likelihoods[number].setdefault(row.row.name, of_labels)
                picked = {rule: said[at] for rule, said in by_rule.items()}
                labels[number].setdefault(row.row.name, picked)
    return likelihoods, labels


def _scores_of(found: MeasuredSet) -> list[dict[str, dict[str, float]]]:
    """For each sample with a reference, ``Prediction.scores``."""
    scores: list[dict[str, dict[str, float]]] = [{} for _ in found.references]
    for row in found.answered:
        for at, number in enumerate(row.samples):
            of_row = {m: s for m, given in row.scores.items() if (s := given[at]) is not None}
            if of_row:
                scores[number].setdefault(row.row.name, of_row)
    return scores


def label_scores_of(
    lines: Iterable[Prediction], labels: Sequence[str], row: str = TUNED.name
) -> LabelScores | None:
    """The log-likelihoods that a row has published about some samples.

    Args:
        lines: of the samples.
        labels: all labels of the set, in the wanted order.

    Returns:
        None: a line has not these labels, or there is none.
    """
    found, wanted = list(lines), set(labels)
    known = [(line.log_likelihoods or {}).get(row, {}) for line in found]
    counts = (found[0].label_tokens if found else None) or {}
    if not found or set(counts) != wanted or any(set(each) != wanted for each in known):
        return None
    return LabelScores(
        labels=list(labels),
        tokens=[counts[label] for label in labels],
        values=[[each[label] for label in labels] for each in known],
    )


def scores_given(
    lines: Sequence[Prediction], metrics: Iterable[str], row: str = TUNED.name
) -> Scores:
    """The scores that a row has published about some samples, of metrics that the trainer does not
    compute.

    Args:
        metrics: those of interest.
    """
    given = [(line.scores or {}).get(row, {}) for line in lines]
    return {m: [each.get(m) for each in given] for m in metrics if any(m in each for each in given)}


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for each in predictions:
            file.write(json.dumps(each.to_json(), ensure_ascii=False) + "\n")


def read_predictions(text: bytes, sets: Iterable[MeasuredSet]) -> dict[tuple[str, str], Prediction]:
    """Return the lines of a file about samples of some sets, by set and sample (``by_sample``).

    Raises:
        ValueError: a line is not a prediction.
    """
    wanted = {(each.name, digest) for each in sets for digest in each.digests}
    read = map(json.loads, text.splitlines())
    return by_sample(
        Prediction.model_validate(raw)
        for raw in read
        if isinstance(raw, dict) and (raw.get("dataSet"), raw.get("sample")) in wanted
    )


def by_sample(lines: Iterable[Prediction]) -> dict[tuple[str, str], Prediction]:
    """Lines by set and sample. Of lines about equal samples, the first with an answer counts."""
    found: dict[tuple[str, str], Prediction] = {}
    for line in lines:
        before = found.get((line.data_set, line.sample))
        if before is None or (line.answers and not before.answers):
            found[line.data_set, line.sample] = line
    return found


def row_of_current(
    found: MeasuredSet, known: Mapping[tuple[str, str], Prediction]
) -> Answered | None:
    """The row of the current model on a set: what it answered to equal samples when it was
    published. None: it knows none of them.

    The loss of a sample is comparable if it has as many labels for both models: that of another
    tokenizer may not be.

    Args:
        known: predictions of the current model.
    """
    there = [known.get((found.name, digest)) for digest in found.digests]
    answers = {
        number: each.answers[TUNED.name]
        for number, each in enumerate(there[: len(found.references)])
        if each and TUNED.name in each.answers
    }
    scores = found.judged.label_scores
    ours = found.judged.labels.tolist() or [0.0] * len(there)
    losses = [
        (each.loss, each.labels) if each and each.loss is not None and each.labels == count
        else (0.0, 0)
        for each, count in zip(there, ours, strict=True)
    ]  # fmt: skip
    labels = np.array([count for _, count in losses], np.float64)
    if not answers and not labels.any():
        return None
    return Answered(
        row=CURRENT,
        samples=list(answers),
        answers=list(answers.values()),
        losses=np.array([loss for loss, _ in losses], np.float64),
        labels=labels,
        label_scores=scores
        and label_scores_of(
            (each for number, each in enumerate(there) if each and number in answers), scores.labels
        ),
    )


@dataclass(frozen=True)
class InUse:
    """The current model, with what it answered when it was published."""

    model: UsedModel
    predictions: Mapping[tuple[str, str], Prediction]
    """By set and sample; empty if they are gone, or are not those that it was published with."""


def in_use(
    store: ObjectStore, model: UsedModel, destination: str, sets: Sequence[MeasuredSet]
) -> InUse:
    """The current model with its predictions about samples of some sets.

    Args:
        destination: ``spec.output.destination``. Others may write CURRENT.json, so nothing outside
            of it is read.
    """
    return InUse(model, _predictions(store, model, destination, sets))


def _predictions(
    store: ObjectStore, model: UsedModel, destination: str, sets: Sequence[MeasuredSet]
) -> Mapping[tuple[str, str], Prediction]:
    if not model.uri.startswith(f"{destination.rstrip('/')}/") or "/../" in f"{model.uri}/":
        log.warning("the current model %s is not below %s: not compared", model.uri, destination)
        return {}
    try:
        found = read_published(store, model.uri)
        if found is None or hashlib.sha256(found[1]).hexdigest() != model.digest:
            raise ValueError("its manifest.json is gone, or another one")
        return read_predictions(published_file(store, model.uri, found[0], PREDICTIONS), sets)
    except (UserError, ValueError) as error:
        log.warning("the current model %s is not compared: %s", model.uri, error)
        return {}
