"""``method.type: None``: real runs that measure a base model, and the published model of a run, as
the training run itself measured them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_remedy_run import conversations
from worlds import start_world

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.local.current import current, to
from finetune_trainer.local.results import compare, report
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.publish.predictions import Prediction
from finetune_trainer.publish.published_results import (
    PublishedResults,
    read_all_predictions,
    read_results,
)
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectNotFound, Stores

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

METRICS = ["Loss", "Perplexity", "Accuracy", "F1", "LabelAccuracy", "ExactMatch"]
EVALUATION: dict[str, Any] = {
    "maxNewTokens": 4, "maxSamples": 12, "metrics": METRICS, "slices": ["label"],
    "baselines": {"shots": [2], "draws": 1, "prompts": [{"name": "hint", "text": "Say a label."}]},
}  # fmt: skip
ALONE = {"method": {"type": "None"}, "training": {"precision": "FP32"}}


class Runs:
    """Runs on one bucket, with the quickstart's smallest base model."""

    def __init__(self, run_spec_for: Any, bucket: str, base: Path, folder: Path) -> None:
        self._run_spec_for, self._bucket, self.folder = run_spec_for, bucket, folder
        self.stores = Stores(run_spec_for())
        self.store = self.stores.default
        for path in (base / "model").iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        for name in ("intent-train", "intent-test"):
            self.store.upload(base / "data" / f"{name}.jsonl", f"s3://{bucket}/{name}.jsonl")
        self.store.put(f"s3://{bucket}/reply.jsonl", conversations(8).encode())
        self.data = {
            "train": [self.source("intent", "intent-train")],
            "test": [self.source("intent", "intent-test")],
            "retention": [self.source("reply", "reply")],
            "quality": {"contamination": "Ignore"},
        }

    def source(self, name: str, of: str) -> dict[str, str]:
        return {"name": name, "source": f"s3://{self._bucket}/{of}.jsonl"}

    def prepared(self, run: str, **spec: Any) -> RunSpec:
        spec = {"data": self.data, "evaluation": EVALUATION, **spec}
        spec.setdefault("output", {"destination": f"s3://{self._bucket}/out"})
        # Each measures for itself: a workspace shares the base model's rows.
        spec.setdefault("storage", {"workspace": f"s3://{self._bucket}/work-{run}"})
        run_spec: RunSpec = self._run_spec_for(run=run, **spec)
        prepare(run_spec, self.stores, self.folder / f"prepare-{run}")
        return run_spec

    def gang(self, run_spec: RunSpec, size: int = 1) -> runfiles.RunResult:
        path = self.folder / f"run-spec-{run_spec.run}.json"
        path.write_text(run_spec.to_text())
        environment = dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}
        world = start_world(environment, size, self.folder / run_spec.run)
        assert world.wait() == [0] * size, world.log.read_text()
        return runfiles.read_result(self.store, run_spec.run_uri)

    def published(self, run_spec: RunSpec) -> PublishSummary:
        return publish(run_spec, self.stores, self.folder / f"publish-{run_spec.run}")

    def done(self, run: str, size: int = 1, **spec: Any) -> tuple[RunSpec, PublishedResults]:
        run_spec = self.prepared(run, **spec)
        self.gang(run_spec, size)
        self.published(run_spec)
        return run_spec, read_results(self.store, run_spec.output_uri)

    def lines(self, results: PublishedResults) -> list[Prediction]:
        return read_all_predictions(self.store, results)

    def text(self, run_spec: RunSpec, name: str) -> str:
        return self.store.get(f"{run_spec.output_uri}/{name}").decode()


@pytest.fixture(scope="module")
def runs(s3: Any, store: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from run_specs import run_specs

    bucket = "untrained"
    store.create_bucket(bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
        folder = tmp_path_factory.mktemp("untrained")
        yield Runs(run_specs(s3, bucket, patch), bucket, tiny_base, folder)


@pytest.fixture(scope="module")
def tuned(runs: Runs) -> tuple[RunSpec, PublishedResults]:
    return runs.done(
        "1-tuned",
        training={"maxSteps": 24, "batchSize": 8, "learningRate": "4e-3", "precision": "FP32"},
        output={"destination": "s3://untrained/out", "format": "Both"},
    )


@pytest.fixture(scope="module")
def base(runs: Runs) -> tuple[RunSpec, PublishedResults]:
    return runs.done("2-base0", **ALONE)


def test_the_base_model_has_the_figures_of_the_training_runs_base_rows(
    runs: Runs, tuned: tuple[RunSpec, PublishedResults], base: tuple[RunSpec, PublishedResults]
) -> None:
    theirs, ours = tuned[1], base[1]
    assert [s.name for s in ours.scores] == ["intent", "reply"]
    for trained, alone in zip(theirs.scores, ours.scores, strict=True):
        assert alone.tuned == {} and alone.samples == trained.samples
        assert alone.base == pytest.approx(trained.base, rel=1e-5)
    for before, after in zip(theirs.evaluation.sets, ours.evaluation.sets, strict=True):
        rows = {row.row: row for row in before.rows}
        assert [row.row for row in after.rows] == [r for r in rows if r.startswith("Base")]
        for row in after.rows:
            expected = rows[row.row]
            assert (row.samples, row.draws) == (expected.samples, expected.draws)
            for metric, found in row.metrics.items():
                assert found.value == pytest.approx(expected.metrics[metric].value, rel=1e-5)
    intent, reply = ours.evaluation.sets
    assert [row.row for row in intent.rows] == ["Base", "Base 2-shot", "Base hint"]
    assert [row.row for row in reply.rows] == ["Base"]
    assert intent.judged is not None and intent.judged.row == "Base"
    assert not intent.judged.comparisons and intent.rows[1].comparisons
    assert all(part.base and not part.tuned for part in intent.slices) and intent.slices


def test_a_published_model_has_the_figures_of_the_training_runs_tuned_row(
    runs: Runs, tuned: tuple[RunSpec, PublishedResults]
) -> None:
    """Of the adapter, merged into the base model, and of the merged model."""
    theirs = tuned[1]
    _, ours = runs.done("3-again", model={"source": tuned[0].output_uri}, **ALONE)
    for trained, alone in zip(theirs.scores, ours.scores, strict=True):
        assert alone.base == pytest.approx(trained.tuned, rel=1e-4)
    said = {(x.data_set, x.sample): x for x in runs.lines(theirs)}
    for line in runs.lines(ours):
        before = said[line.data_set, line.sample]
        assert line.loss == pytest.approx(before.loss, rel=1e-4)
        if "Base" in line.answers:
            assert line.answers["Base"] == before.answers["Tuned"]
    assert ours.manifest.lineage[-1].uri == tuned[0].output_uri
    assert ours.evaluation.matrix is None


@pytest.mark.parametrize("sharding", ["NoShard", "FullShard"])
def test_two_processes_equal_one(
    runs: Runs, base: tuple[RunSpec, PublishedResults], sharding: str
) -> None:
    run = f"4-{sharding[:5].lower()}"
    run_spec, ours = runs.done(run, 2, **ALONE, compute={"sharding": sharding})
    for one, two in zip(base[1].scores, ours.scores, strict=True):
        assert two.base == pytest.approx(one.base, rel=1e-5)
    assert runfiles.read_result(runs.store, run_spec.run_uri).processes == 2
    said = [line.answers for line in runs.lines(ours)]
    assert said == [line.answers for line in runs.lines(base[1])]


def test_what_is_published_is_no_model(
    runs: Runs, base: tuple[RunSpec, PublishedResults], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], s3: Any,
) -> None:  # fmt: skip
    run_spec, results = base
    names = {
        i.uri.removeprefix(f"{run_spec.output_uri}/") for i in runs.store.list(run_spec.output_uri)
    }
    assert names == {"manifest.json", "metrics.json", "predictions.jsonl", "report.html"}
    assert results.manifest.formats == [] and results.manifest.checkpoint == ""
    again = runs.published(run_spec)
    assert again.formats == [] and again.main_result is not None
    assert again.main_result.verdict is None and again.main_result.gain is None
    assert re.fullmatch(r"\d+\.\d % \(\S+, \S+\)", again.main_result.value or "")
    latest = json.loads(runs.store.get("s3://untrained/out/latest.json"))
    assert latest["run"] == "1-tuned", "an evaluation is not the newest model"

    with pytest.raises(
        UserError, match=r"has evaluated s3://untrained/model and published its"
    ) as e:
        runs.prepared("9-after", model={"source": run_spec.output_uri})
    assert e.value.reason == "NoModelPublished"
    where = {"endpoint": s3.endpoint, "local_storage": False}
    capsys.readouterr()
    assert current("s3://untrained/out", tmp_path, change=to("2-base0"), **where) != 0
    assert "NoModelPublished" in capsys.readouterr().out
    with pytest.raises(ObjectNotFound):
        runs.store.get("s3://untrained/out/CURRENT.json")


TUNING = r"[Tt]un(ed|ing)|[Tt]rain(ed|ing)|[Ff]org|[Cc]heckpoint|[Ss]teps"


def test_the_report_has_no_words_of_a_training(
    runs: Runs, tuned: tuple[RunSpec, PublishedResults], base: tuple[RunSpec, PublishedResults],
    tmp_path: Path, capsys: pytest.CaptureFixture[str], s3: Any,
) -> None:  # fmt: skip
    page = runs.text(base[0], "report.html")
    shown = re.sub(r"<style>.*?</style>", "", page, flags=re.S).split("<h2>Data</h2>")[0]
    shown = re.sub(r"s3://\S+", "", shown)
    assert re.findall(TUNING, re.sub(r"<[^>]*>", " ", shown)) == []
    assert "Evaluation of" in page and "All ways to ask" in page and "Value (95 % interval)" in page
    assert "Retention sets" in page and "Slices of the test sets" in page
    assert "Gain of Base" in page and "<h2>Loss</h2>" not in page
    assert "Gain of Tuned" in runs.text(tuned[0], "report.html")

    where = {"endpoint": s3.endpoint, "local_storage": False}
    capsys.readouterr()
    assert report(base[0].output_uri, tmp_path, lm_eval=tmp_path / "harness", **where) == 0
    said = capsys.readouterr().out
    assert "base is ahead by" in said and "Base 2-shot" in said and "Retention sets" in said
    assert re.findall(TUNING, re.sub(r"s3://\S+", "", said)) == []
    assert [path.name for path in (tmp_path / "harness").iterdir()] == ["base"]
    figures = json.loads((tmp_path / "harness" / "base" / "results.json").read_text())
    assert figures["results"]["intent"]["acc,none"] == base[1].scores[0].base["Accuracy"]


def test_an_evaluated_model_is_compared_with_a_trained_one(
    tuned: tuple[RunSpec, PublishedResults], base: tuple[RunSpec, PublishedResults],
    tmp_path: Path, capsys: pytest.CaptureFixture[str], s3: Any,
) -> None:  # fmt: skip
    """The comparison is that of the training run."""
    uris = [base[0].output_uri, tuned[0].output_uri]
    capsys.readouterr()
    code = compare(uris, tmp_path, endpoint=s3.endpoint, local_storage=False, min_effect=2)
    said = capsys.readouterr().out
    assert code == 0 and "s3://untrained/model (measured by job 2-base0)" in said
    known = tuned[1].evaluation.sets[0].rows[0].comparisons["Loss"]
    assert f"{known.effect:+.3f}" in said


def test_what_the_split_holds_out_is_measured_without_test_sets(runs: Runs) -> None:
    data = {"train": runs.data["train"], "split": {"test": "0.05"}}
    shared = {"data": data, "storage": {"workspace": "s3://untrained/work"}}
    trained = runs.prepared("5-train", **shared)
    alone = runs.prepared("6-alone", **shared, **ALONE)
    prepared = [runfiles.read_prepared(runs.store, each.run_uri) for each in (trained, alone)]
    assert prepared[0].digest == prepared[1].digest and prepared[1].reused
    assert prepared[1].total_steps == 0
    with pytest.raises(DataError, match=r"test 0\.000000001 holds no record of data\.train out"):
        runs.prepared("7-none0", data={**data, "split": {"test": "0.000000001"}}, **ALONE)


def test_without_training_sets(runs: Runs) -> None:
    """Default shots are left out, gates are by value, and a run that misses one is held."""
    data = {"test": runs.data["test"]}
    gate = {"metric": "Accuracy", "operator": "AtLeast", "value": "0.99"}
    run_spec = runs.prepared(
        "8-tests", data=data, evaluation={"maxSamples": 4, "gates": [gate]}, **ALONE
    )
    runs.gang(run_spec)
    summary = runs.published(run_spec)
    assert summary.held is not None and "at least 99.0 % wanted" in summary.held
    found = read_results(runs.store, run_spec.output_uri)
    assert [row.row for row in found.evaluation.sets[0].rows] == ["Base"]
    assert found.evaluation.sets[0].recommendation is None


def test_a_classifier_is_measured_by_the_classes_of_its_head(runs: Runs) -> None:
    task: dict[str, Any] = {
        "task": "SequenceClassification",
        "evaluation": {"metrics": ["Loss", "Accuracy", "F1"]},
        "output": {"destination": "s3://untrained/classes", "format": "Merged"},
    }
    data = {"train": runs.data["train"], "test": runs.data["test"]}
    training = {"maxSteps": 4, "batchSize": 8, "learningRate": "1e-3", "precision": "FP32"}
    trained, theirs = runs.done(
        "1-class", data=data, method={"type": "Full"}, training=training, **task
    )
    alone = ALONE | task | {"output": {"destination": "s3://untrained/classes"}}
    _, ours = runs.done(
        "2-alone", model={"source": trained.output_uri}, data={"test": data["test"]}, **alone
    )
    assert ours.scores[0].base == pytest.approx(theirs.scores[0].tuned, rel=1e-4)

    with pytest.raises(UserError, match=r"has no classification head that spec\.task") as caught:
        runs.prepared("3-nohed", data={"test": data["test"]}, **alone)
    assert caught.value.reason == "UnsupportedModel"
    runs.store.put("s3://untrained/other.jsonl", b'{"text": "a", "label": "unheard of"}\n')
    test = {"test": [runs.source("other", "other")]}
    with pytest.raises(DataError, match=r"no class .unheard of.; it has .*Correct the rec"):
        runs.prepared("4-label", model={"source": trained.output_uri}, data=test, **alone)
