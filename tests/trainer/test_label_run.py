"""Labels by their likelihood in a run: from the records to the results, alike in any world."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from bench import COLOURS, Bench

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_trainer.evaluate.label_scores import CHOOSING
from finetune_trainer.publish.lm_eval_export import export
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores

pytestmark = pytest.mark.slow

METRICS = [*CHOOSING, "CalibrationError"]
LABELS = sorted(COLOURS.values())


def test_labels_are_scored_from_the_records_to_the_results(bench: Bench) -> None:
    evaluation: dict[str, Any] = {
        "metrics": ["Accuracy", *METRICS],
        "baselines": {"shots": [1], "draws": 2, "maxSamples": 6},
        "gates": [{"metric": "LabelAccuracy", "operator": "AtLeast", "value": "0"}],
    }
    spec: dict[str, Any] = {
        "evaluation": evaluation, "training": {"maxSteps": 6, "epochs": None},
        "method": {"type": "LoRA", "lora": {"rank": 4}},
    }  # fmt: skip
    found = {}
    for size in (1, 2):
        storage = {"workspace": f"{bench.bucket}/work-{size}"}  # base rows are measured by each
        run_spec = bench.run_spec(f"{size}-world", **spec, storage=storage)
        bench.finish(run_spec, size, f"world-{size}")
        few = [Row(model="Base", prompt="1-shot", draw=draw) for draw in range(2)]
        found[size] = [
            runfiles.read_row(bench.store, run_spec.run_uri, row).sets[0].label_scores
            for row in (BASE, TUNED, *few)
        ]
    for one, two in zip(found[1], found[2], strict=True):
        assert one is not None and two is not None
        # Characters, and the space in front.
        assert (one.labels, one.tokens) == (LABELS, [len(x) + 1 for x in LABELS])
        np.testing.assert_allclose(one.values, two.values, atol=1e-4)

    publish(run_spec, Stores(run_spec), bench.tmp_path / "publish")
    results = read_results(bench.store, run_spec.output_uri)
    (table,) = results.evaluation.sets
    assert [row.row for row in table.rows] == ["Base", "Base 1-shot", "Tuned"]
    lines = read_all_predictions(bench.store, results)
    for row in table.rows:
        assert {"Accuracy", *METRICS} <= set(row.metrics)
    base, _, tuned = table.rows
    assert base.comparisons["LabelAccuracy"].test in ("McNemar", "SignFlip")
    assert base.comparisons["CalibrationError"].test == "PairedBootstrap"
    for metric in CHOOSING:
        right = [(line.chosen_labels or {})["Tuned"][metric] == line.label for line in lines]
        assert tuned.metrics[metric].value == pytest.approx(np.mean(right))
    for line in lines:
        of_base, rules = (line.log_likelihoods or {})["Base"], (line.chosen_labels or {})["Base"]
        assert max(of_base, key=lambda label: of_base[label]) == rules["LabelAccuracy"]
    assert results.evaluation.gates[0].passed
    assert (
        "LabelAccuracyPerCharacter"
        in bench.store.get(f"{run_spec.output_uri}/report.html").decode()
    )

    files = export(results, lines, bench.tmp_path / "harness")
    (samples,) = [f for f in files if f.parent.name == "tuned" and f.suffix == ".jsonl"]
    told = [json.loads(line)["label_accuracy"] for line in samples.read_text().splitlines()]
    assert np.mean(told) == pytest.approx(tuned.metrics["LabelAccuracy"].value)
