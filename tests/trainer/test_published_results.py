"""Results of published models, read again: ``finetune report`` and ``finetune compare``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_predictions import measured as measured_set
from test_predictions import text_of
from test_publish_papers import about, remedied

from finetune_api.run_spec import JobIdentity
from finetune_api.tasks import kinds_of
from finetune_trainer.cli import main
from finetune_trainer.evaluate.comparisons import compare_outcomes
from finetune_trainer.evaluate.table import rows_of
from finetune_trainer.failures import UserError
from finetune_trainer.publish import run_facts
from finetune_trainer.publish.lm_eval_export import export
from finetune_trainer.publish.model_comparison import ComparedSet, Model, compare_models
from finetune_trainer.publish.predictions import PREDICTIONS, Prediction, by_sample
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.storage.published import MANIFEST, Manifest, PublishedFile
from finetune_trainer.storage.s3server import EmbeddedS3


def lines(
    rights: Mapping[str, bool], losses: Mapping[str, tuple[float, int]] | None = None,
    groups: Mapping[str, int] | None = None, name: str = "support",
) -> list[Prediction]:  # fmt: skip
    """Lines of a model that answers some samples right."""
    found = []
    for at, (sample, right) in enumerate(rights.items()):
        loss, labels = (losses or {}).get(sample, (None, 0))
        found.append(
            Prediction(
                data_set=name, sample=sample, prompt="?", reference="yes",
                group=(groups or {}).get(sample, at), answers={"Tuned": "yes" if right else "no"},
                loss=loss, labels=labels,
            )
        )  # fmt: skip
    return found


def compared(*models: Sequence[Prediction]) -> list[ComparedSet]:
    metrics = {name: ["Loss", "ExactMatch"] for name in ("support", "tone")}
    made = [Model(f"m{n}", by_sample(m), metrics) for n, m in enumerate(models)]
    return compare_models(made, 2.0)


def test_models_are_compared_on_equal_samples() -> None:
    a = lines({"x": True, "gone": True, "y": False}, {"x": (1.0, 2), "y": (2.0, 2)})
    b = lines({"y": True, "x": True, "new": False}, {"x": (3.0, 2), "y": (3.0, 4)})
    (found,) = compared(a, b)
    assert (found.samples, found.of, found.groups) == (2, 3, None)
    before, after = found.models
    assert (before.estimates["ExactMatch"].value, after.estimates["ExactMatch"].value) == (0.5, 1.0)
    assert not before.comparisons and after.comparisons["ExactMatch"].effect == 0.5
    # "y" has other labels in the other model: only the losses of "x" are comparable.
    assert after.comparisons["Loss"].effect == 1.0


def test_a_comparison_is_that_of_the_same_answers_within_one_run() -> None:
    random = np.random.default_rng(3)
    names = [f"s{n}" for n in range(300)]
    sides = [dict(zip(names, random.random(300) < p, strict=True)) for p in (0.6, 0.75)]
    groups = {name: n // 3 for n, name in enumerate(names)}
    (found,) = compared(*(lines(side, groups=groups) for side in sides))
    assert found.groups == 100
    outcomes = []
    for side in sides:
        one = measured_set(names, ["yes" if side[n] else "no" for n in names], [], [])
        by_three = np.repeat(np.arange(100), 3)
        (_, row) = rows_of(one.answered, one.references, by_three)
        outcomes.append(row.outcome(row.samples))
    expected = compare_outcomes(*outcomes, kinds_of("ExactMatch"), 2.0)
    assert found.models[1].comparisons == expected
    assert expected["ExactMatch"].verdict == "Better"


def test_of_several_models_each_is_compared_with_the_first() -> None:
    """Only sets that all know count, and samples that all answered."""
    a = lines({"x": True, "y": True}) + lines({"z": True}, name="tone")
    b = lines({"x": False, "y": True}) + lines({"z": True}, name="tone")
    c = lines({"x": False})
    (found,) = compared(a, b, c)
    assert (found.name, found.samples) == ("support", 1)
    assert [m.comparisons["ExactMatch"].effect for m in found.models[1:]] == [-1.0, -1.0]
    support, tone = compared(a, lines({"other": True}) + lines({"z": False}, name="tone"))
    assert (support.samples, support.models) == (0, [])
    assert tone.models[1].comparisons["ExactMatch"].effect == -1.0


# --- read again ----------------------------------------------------------------------------------

JOB = JobIdentity(namespace="team", name="support-bot", uid="u")


def publish(store: Any, uri: str, files: Mapping[str, bytes], run: str = "1-a") -> None:
    """What a run leaves at the address of its model."""
    known = {
        name: PublishedFile(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        for name, text in files.items()
    }
    manifest = Manifest(
        run=run, job=JOB, base_model="s3://b/base", method="LoRA", lineage=[], checkpoint="c",
        formats=["adapter"], files=known, held="support F1 AtLeast: 80.1 %, at least 85.0 %",
    )  # fmt: skip
    for name, text in files.items():
        store.put(f"{uri}/{name}", text)
    store.put(f"{uri}/{MANIFEST}", manifest.to_text())


def metrics() -> bytes:
    return run_facts.metrics_text(remedied(0.5)).encode()


def test_results_are_read_as_they_were_written(s3: Any, bucket: str, tmp_path: Path) -> None:
    store, uri = s3.store(), f"s3://{bucket}/out/1-a"
    answered = text_of(measured_set(["a", "b"], ["yes", "no"], [1.0, 2.0], [2, 2]), tmp_path)
    publish(store, uri, {"metrics.json": metrics(), PREDICTIONS: answered})
    found = read_results(store, f"{uri}/")
    assert found.evaluation.sets == about().evaluation.sets
    assert found.evaluation.remedy == remedied(0.5).evaluation.remedy
    assert found.name == "support-bot 1-a"
    (score,) = found.scores
    assert score.tuned["Accuracy"] == 0.975 and score.comparisons["Accuracy"].verdict == "Better"
    assert [line.answers["Tuned"] for line in read_all_predictions(store, found)] == ["yes", "no"]
    assert [line.group for line in read_all_predictions(store, found)] == [0, 1]


def test_figures_that_were_not_finite_are_left_out(s3: Any, bucket: str) -> None:
    raw = json.loads(metrics())
    raw["test"][0]["tuned"]["Loss"] = None
    raw["test"][0]["rows"][0]["metrics"]["Accuracy"]["value"] = None
    store, uri = s3.store(), f"s3://{bucket}/out/2-a"
    publish(store, uri, {"metrics.json": json.dumps(raw).encode()})
    found = read_results(store, uri)
    assert "Loss" not in found.scores[0].tuned
    assert "Accuracy" not in found.evaluation.sets[0].rows[0].metrics


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "no run published a model there"),
        ("changed", "is not the file that run 1-a published"),
        ("other", "read it with the release that published the model"),
    ],
)
def test_what_is_no_result_is_named(s3: Any, bucket: str, change: str, said: str) -> None:
    store, uri = s3.store(), f"s3://{bucket}/{change}/1-a"
    if change != "nothing":
        publish(store, uri, {"metrics.json": b'{"test": 1}' if change == "other" else metrics()})
    if change == "changed":
        store.put(f"{uri}/metrics.json", b"{}")
    with pytest.raises(UserError, match=said):
        read_results(store, uri)


def test_the_files_of_the_harness(s3: Any, bucket: str, tmp_path: Path) -> None:
    """Figures of each model, and each answer with its scores; the mean of a sample's scores is the
    metric of the same answers."""
    store, uri = s3.store(), f"s3://{bucket}/out/1-a"
    said = ["yes", "no", "yes ", "maybe"]
    answered = measured_set(list("abcd"), said, [1.0] * 4, [2] * 4)
    raw = json.loads(metrics())
    for row in raw["test"][0]["rows"]:
        row["metrics"] = {"ExactMatch": {"value": 0.5, "low": 0.3, "high": 0.7}, "F1": {"value": 1}}
    publish(store, uri, {"metrics.json": json.dumps(raw).encode(),
                         PREDICTIONS: text_of(answered, tmp_path)})  # fmt: skip
    found = read_results(store, uri)
    paths = export(found, read_all_predictions(store, found), tmp_path / "out")
    assert [str(p.relative_to(tmp_path / "out")) for p in paths] == [
        "base/results.json", "base/samples_support.jsonl", "tuned/results.json",
        "tuned/samples_support.jsonl",
    ]  # fmt: skip
    told = json.loads(paths[2].read_text())
    figures = told["results"]["support"]
    assert (figures["exact_match,none"], figures["f1_stderr,none"]) == (0.5, "N/A")
    assert figures["exact_match_stderr,none"] == pytest.approx(0.102, abs=1e-3)
    assert told["higher_is_better"]["support"] == {"exact_match": True, "f1": True}
    assert told["config"]["model_args"] == f"pretrained=s3://b/base,peft={uri}/adapter"
    samples = [json.loads(line) for line in paths[3].read_text().splitlines()]
    assert [s["filtered_resps"] for s in samples] == [[each] for each in said]
    assert [s["exact_match"] for s in samples] == [1, 0, 1, 0]
    assert samples[1]["doc"]["prompt"] == "b" and samples[1]["target"] == "yes"
    assert len({s["doc_hash"] for s in samples}) == 4
    assert len({s["target_hash"] for s in samples}) == 1


def test_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = {"1-a": ["yes", "no", "yes"], "2-a": ["yes", "yes", "yes"]}
    with EmbeddedS3(tmp_path / "s3") as server:
        server.ensure_bucket("models")
        for run, answers in said.items():
            found = measured_set(["a", "b", "c"], answers, [1.0] * 3, [2] * 3)
            raw = json.loads(metrics())
            raw["test"][0]["tuned"]["ExactMatch"] = 0.5
            raw["suspectLabels"] = {"hint": "of 90 training samples, 3" if run == "1-a" else None}
            files = {
                "metrics.json": json.dumps(raw).encode(),
                PREDICTIONS: text_of(found, tmp_path),
            }
            publish(server.store(), f"s3://models/out/{run}", files, run)
    where = ["--local-storage", "--state-dir", str(tmp_path)]
    assert main(["report", "s3://models/out/1-a", *where]) == 0
    shown = capsys.readouterr().out
    assert "Held:    support F1 AtLeast: 80.1 %" in shown and "97.5 %" in shown
    assert "Remedy:  LayerLinear: the figures" in shown and "+0.5 (0.4, 0.6)" in shown
    assert "Labels:  of 90 training samples, 3" in shown
    folder = tmp_path / "lm-eval"
    assert main(["report", "s3://models/out/2-a", "--lm-eval", str(folder), *where]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"{folder / 'tuned/results.json'}" in shown and "Labels:" not in shown
    assert main(["compare", "s3://models/out/1-a", "s3://models/out/2-a", *where]) == 0
    shown = capsys.readouterr().out
    assert "support: 3 samples in common" in shown and "+33.3 %" in shown
    assert "B: support-bot 2-a, s3://models/out/2-a" in shown
    assert main(["compare", "s3://models/out/1-a", *where]) == 10
    assert "2 to 8 can be compared" in capsys.readouterr().out
    assert main(["report", "s3://models/out/3-a", *where]) == 10
