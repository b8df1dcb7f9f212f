"""predictions.jsonl: what a later run finds of the current model's answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.evaluation_results import BASE, TUNED
from finetune_api.run_spec import JobIdentity
from finetune_api.tasks import kinds_of
from finetune_trainer.evaluate.table import Answered, rows_of, table_of
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.prepared.halves import sample_digest
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.publish.predictions import (
    PREDICTIONS,
    in_use,
    predictions_of,
    read_predictions,
    row_of_current,
    write_predictions,
)
from finetune_trainer.storage.current import UsedModel
from finetune_trainer.storage.published import Manifest, PublishedFile
from finetune_trainer.storage.runfiles import LabelScores

JOB = JobIdentity(namespace="team", name="bot", uid="u")


def measured(
    texts: Sequence[str], said: Sequence[str], losses: Sequence[float], labels: Sequence[int]
) -> MeasuredSet:
    """A set whose first samples have answers, as many as ``said``."""
    references = [Reference(np.zeros(1, np.int32), text, "yes", None) for text in texts]
    rows = [
        Answered(row, range(len(said)), said, losses=np.array(losses), labels=np.array(labels))
        for row in (BASE, TUNED)
    ]
    digests = [sample_digest(reference) for reference in references]
    return MeasuredSet(
        name="support", retention=False, metrics=kinds_of("Loss", "ExactMatch"), answered=rows,
        references=references, groups=np.arange(len(texts)), slices={}, digests=digests,
    )  # fmt: skip


def text_of(found: MeasuredSet, folder: Path) -> bytes:
    write_predictions(predictions_of(found, redact=False), folder / PREDICTIONS)
    return (folder / PREDICTIONS).read_bytes()


def test_equal_samples_are_found_in_other_data(tmp_path: Path) -> None:
    before = measured(["a", "b", "c"], ["yes", "no", "yes"], [1.0, 2.0, 3.0], [2, 2, 2])
    # "b" is gone, "d" is new, the order differs, and "c" has other labels than before.
    now = measured(["c", "d", "a"], ["yes", "yes", "yes"], [0.5, 0.5, 0.5], [3, 2, 2])
    row = row_of_current(now, read_predictions(text_of(before, tmp_path), [now]))
    assert row is not None
    assert (list(row.samples), list(row.answers)) == ([0, 2], ["yes", "yes"])
    assert row.labels.tolist() == [0, 0, 2] and row.losses.tolist() == [0, 0, 1.0]
    rows = rows_of([*now.answered, row], now.references, now.groups)
    table = table_of("support", rows, TUNED, now.metrics, 2.0)
    current = table.rows[-1]
    assert (current.row, current.samples) == ("Current", 2)
    # The loss is compared over "a" alone: 0.25 against 0.5 nats per label.
    assert current.comparisons["Loss"].effect == pytest.approx(-0.25)
    assert current.metrics["Loss"].value == pytest.approx(0.5)


def scored(found: MeasuredSet, labels: Sequence[str], leads: Sequence[float]) -> MeasuredSet:
    """The set with log-likelihoods of labels: those of the last one are ahead by ``leads``."""
    values = [[*[0.0] * (len(labels) - 1), lead] for lead in leads]
    scores = LabelScores(labels=list(labels), tokens=[1] * len(labels), values=values)
    return replace(
        found, metrics=kinds_of("LabelAccuracy"), references=[replace(r, label="yes") for r in
        found.references], answered=[replace(row, label_scores=scores) for row in found.answered],
    )  # fmt: skip


def test_log_likelihoods_of_labels_are_found_again(tmp_path: Path) -> None:
    before = scored(measured(["a", "b"], ["yes", "no"], [], []), ["no", "yes"], [1.0, -1.0])
    text = text_of(before, tmp_path)
    line = json.loads(text.splitlines()[1])
    assert line["logLikelihoods"]["Tuned"] == {"no": 0.0, "yes": -1.0}
    assert line["chosenLabels"]["Tuned"]["LabelAccuracy"] == "no"
    now = scored(measured(["b", "a"], ["yes", "yes"], [], []), ["no", "yes"], [1.0, 1.0])
    row = row_of_current(now, read_predictions(text, [now]))
    assert row is not None and row.label_scores is not None
    assert row.label_scores.values == [[0.0, -1.0], [0.0, 1.0]]
    table = table_of("support", rows_of([*now.answered, row], now.references, now.groups), TUNED,
                     now.metrics, 2.0)  # fmt: skip
    assert table.rows[-1].comparisons["LabelAccuracy"].effect == 0.5
    # Among other labels another one may be the likeliest.
    other = scored(measured(["b"], ["yes"], [], []), ["maybe", "no", "yes"], [1.0])
    row = row_of_current(other, read_predictions(text, [other]))
    assert row is not None and row.label_scores is None
    assert "logLikelihoods" not in text_of(measured(["a"], ["yes"], [1.0], [2]), tmp_path).decode()


def test_a_set_without_answers_is_compared_by_its_losses(tmp_path: Path) -> None:
    before = measured(["a", "b"], [], [1.0, 2.0], [2, 2])
    now = measured(["b", "new"], [], [1.0, 1.0], [2, 2])
    row = row_of_current(now, read_predictions(text_of(before, tmp_path), [now]))
    assert row is not None and row.labels.tolist() == [2, 0]
    other = measured(["x"], [], [1.0], [2])
    assert row_of_current(other, read_predictions(text_of(before, tmp_path), [other])) is None


def test_a_loss_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    before = measured(["a", "b"], [], [math.nan, 2.0], [2, 2])
    text = text_of(before, tmp_path)
    assert b"NaN" not in text
    row = row_of_current(before, read_predictions(text, [before]))
    assert row is not None and row.labels.tolist() == [0, 2]


def test_of_equal_samples_the_answered_one_counts(tmp_path: Path) -> None:
    before = measured(["a", "b", "a"], ["yes", "no"], [1.0, 2.0, 1.0], [2, 2, 2])
    row = row_of_current(before, read_predictions(text_of(before, tmp_path), [before]))
    assert row is not None and list(row.answers) == ["yes", "no", "yes"]


@pytest.mark.parametrize(
    ("uri", "change", "known"),
    [
        ("{out}/1-a", {}, True),
        ("{out}/1-a", {"predictions": b"{}"}, False),
        ("{out}/1-a", {"digest": "other"}, False),
        ("{out}/gone", {}, False),
        ("{out}/../secret/1-a", {}, False),
        ("s3://other-bucket/1-a", {}, False),
        ("not an address", {}, False),
    ],
)
def test_only_what_the_current_model_was_published_with_is_believed(
    s3: Any, bucket: str, tmp_path: Path, uri: str, change: dict[str, Any], known: bool
) -> None:
    store, out = s3.store(), f"s3://{bucket}/out"
    found = measured(["a"], ["yes"], [1.0], [2])
    text = text_of(found, tmp_path)
    file = PublishedFile(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    manifest = Manifest(
        run="1-a", job=JOB, base_model="s3://b/base", method="LoRA", lineage=[], checkpoint="c",
        formats=["adapter"], files={PREDICTIONS: file},
    ).to_text()  # fmt: skip
    store.put(f"{out}/1-a/manifest.json", manifest)
    store.put(f"{out}/1-a/{PREDICTIONS}", change.get("predictions", text))
    digest = change.get("digest", hashlib.sha256(manifest).hexdigest())
    model = UsedModel(run="1-a", job=JOB, uri=uri.format(out=out), digest=digest, since="t")
    used = in_use(store, model, out, [found])
    assert bool(used.predictions) is known
