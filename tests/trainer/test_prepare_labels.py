"""Labels of a Classification set in the manifest of prepared data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench import Bench

from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.manifest import DataSet
from finetune_trainer.storage import runfiles

END = 128


def labelled(bench: Bench, name: str, labels: list[Any]) -> dict[str, str]:
    """A source of records with labels."""
    made = [{"text": f"number {n}", "label": label} for n, label in enumerate(labels)]
    text = "".join(json.dumps(record) + "\n" for record in made)
    bench.store.put(f"{bench.bucket}/{name}.jsonl", text.encode())
    return {"source": f"{bench.bucket}/{name}.jsonl"}


def sets_of(bench: Bench, run: str, data: dict[str, Any]) -> list[DataSet]:
    split = {"validation": "0", "test": "0"}
    quality = {"deduplicate": False, "contamination": "Ignore"}
    run_spec = bench.run_spec(
        run, data={"split": split, "quality": quality} | data,
        evaluation={"baselines": {"shots": []}, "metrics": ["LabelAccuracy"]},
    )  # fmt: skip
    prepared = runfiles.read_prepared(bench.store, run_spec.run_uri)
    return PreparedData.open(bench.store, prepared.uri, bench.tmp_path / run).manifest.sets


def test_labels_are_those_of_all_sets_of_a_name(bench: Bench) -> None:
    train = labelled(bench, "train-labels", ["no", "yes", "no", 10] * 3)
    test = labelled(bench, "test-labels", ["yes", "new", "no"])
    other = labelled(bench, "other-labels", ["no", "no"])
    sets = sets_of(
        bench, "1-labels",
        {
            "train": [{**train, "name": "votes"}],
            "test": [{**test, "name": "votes"}, {**other, "name": "other"}],
        },
    )  # fmt: skip
    tokens = {label: [*map(ord, f" {label}"), END] for label in ("10", "new", "no", "yes")}
    found = {(each.split, each.name): each.labels for each in sets}
    assert found["test", "votes"] == tokens and list(tokens) == sorted(tokens)
    assert found["test", "other"] == {"no": tokens["no"]}


def test_more_labels_than_are_scored_are_refused(bench: Bench) -> None:
    train = labelled(bench, "many-labels", list(range(65)))
    with pytest.raises(UserError, match=r"LabelAccuracy needs .* with at most 64 labels"):
        sets_of(bench, "1-many", {"train": [train], "test": [{**train, "name": "test"}]})
