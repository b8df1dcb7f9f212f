"""``predictions.jsonl`` beside a published model: what each model answered to each test sample.

    answers of all rows + references ──► lines ──► a later run's row Current, on equal samples

A sample is known by the digest of its text, so that a later run finds it again in other data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import Field

from finetune_api.base import Record
from finetune_api.evaluation_results import CURRENT, TUNED
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.personal import redacted
from finetune_trainer.publish.measured_sets import MeasuredSet

PREDICTIONS = "predictions.jsonl"


class Prediction(Record):
    """One line: a sample, and what the models answered."""

    data_set: str
    """Name of the test or retention set."""
    sample: str
    """Digest of prompt, reference and label."""
    prompt: str | None = None
    """Text of the prompt; None: the sample has no answers."""
    reference: str | None = None
    """The correct answer."""
    label: str | None = None
    """The correct label, for classification."""
    answers: dict[str, str] = Field(default={})
    """Answer by row; of several draws, the first."""
    loss: float | None = None
    """Loss of the tuned model on the sample, in nats, summed over its labels."""
    labels: int = 0
    """Number of labels summed in ``loss``: supervised tokens, or one class."""


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
    tuned = found.tuned
    for number, digest in enumerate(found.digests):
        answers = said[number] if number < len(said) else {}
        reference = found.references[number] if answers else None
        known = number < len(tuned.losses)
        yield Prediction(
            data_set=found.name,
            sample=digest,
            prompt=reference.prompt if reference else None,
            reference=reference.completion if reference else None,
            label=reference.label if reference else None,
            answers=answers,
            loss=float(tuned.losses[number]) if known else None,
            labels=int(tuned.labels[number]) if known else 0,
        )


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for each in predictions:
            file.write(json.dumps(each.to_json(), ensure_ascii=False) + "\n")


def read_predictions(text: bytes, sets: Iterable[MeasuredSet]) -> dict[tuple[str, str], Prediction]:
    """Return the lines of a file about samples of some sets, by set and sample. Of lines about
    equal samples, the first with an answer counts.

    Raises:
        ValueError: a line is not a prediction.
    """
    wanted = {(each.name, digest) for each in sets for digest in each.digests}
    found: dict[tuple[str, str], Prediction] = {}
    for line in text.splitlines():
        raw = json.loads(line)
        key = (raw.get("dataSet"), raw.get("sample")) if isinstance(raw, dict) else None
        if key in wanted and not (key in found and found[key].answers):
            read = Prediction.model_validate(raw)
            if key not in found or read.answers:
                found[key] = read
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
    ours = found.tuned.labels.tolist() or [0.0] * len(there)
    comparable = [
        each if each and each.labels == count else None
        for each, count in zip(there, ours, strict=True)
    ]
    labels = np.array([each.labels if each else 0 for each in comparable], np.float64)
    if not answers and not labels.any():
        return None
    return Answered(
        row=CURRENT,
        samples=list(answers),
        answers=list(answers.values()),
        losses=np.array([each.loss or 0.0 if each else 0.0 for each in comparable], np.float64),
        labels=labels,
    )
