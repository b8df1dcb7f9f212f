"""``evaluation.remedy``, ``finetune interpolate`` and replay on real runs that forget: without them
they are held by their gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from intent_runs import REMEDY, Runs, conversations
from run_specs import run_specs

from finetune_api.remedy import RemedyResult
from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.cli import main
from finetune_trainer.failures import UserError
from finetune_trainer.local.runner import HELD, MANIFEST_FAULT
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves
from finetune_trainer.publish.point import PublishedPoint
from finetune_trainer.publish.published_results import read_all_predictions, read_results
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def runs(run_spec_for: Any, bucket: str, tiny_base: Path, tmp_path: Path) -> Runs:
    return Runs(run_spec_for, bucket, tiny_base, tmp_path)


@dataclass(frozen=True)
class Forgotten:
    """A run that forgets, and the same one with the remedy; published."""

    runs: Runs
    plain: RunSpec
    held: str | None
    remedied: RunSpec
    summary: PublishSummary


@pytest.fixture(scope="module")
def forgotten(
    s3: EmbeddedS3, store: ObjectStore, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Forgotten]:
    store.create_bucket("forgotten")
    with pytest.MonkeyPatch.context() as patch:
        keys_of(s3, patch)
        folder = tmp_path_factory.mktemp("forgotten")
        runs = Runs(run_specs(s3, "forgotten", patch), "forgotten", tiny_base, folder)
        plain = runs.prepared("1-plain", {})
        runs.train(plain)
        held = runs.publish(plain).held
        remedied = runs.prepared("2-remdy", {"remedy": REMEDY})
        runs.train(remedied)
        yield Forgotten(runs, plain, held, remedied, runs.publish(remedied))


def test_a_run_that_forgets_passes_its_gate_by_the_remedy(forgotten: Forgotten) -> None:
    runs, plain, run_spec = forgotten.runs, forgotten.plain, forgotten.remedied
    assert forgotten.held is not None
    assert "reply Loss WorsensAtMost: against Base" in forgotten.held
    result = runs.result(run_spec)
    found = result.remedy
    assert found is not None and found.chosen == 0.25 and found.limits == {"reply": 1.0}
    changes = [point.retention[0].change or 0 for point in found.points]
    assert changes == sorted(changes, reverse=True) and changes[-1] == 0
    assert [point.qualifies for point in found.points] == [False, False, False, True, True, True]
    head = runs.head(run_spec)
    assert head.point is not None and head.point.source == head.best
    assert result.summary.checkpoint == head.point.uri

    # The gate passes on the half that has not chosen, which is all that is reported.
    summary = forgotten.summary
    assert summary.held is None and summary.remedy is not None
    assert summary.remedy.startswith("Interpolation: point 0.25, with the lowest validation loss")
    data = PreparedData.open(
        runs.store, runfiles.read_prepared(runs.store, run_spec.run_uri).uri, runs.folder / "read"
    )
    halves = retention_halves(data, run_spec.spec)
    assert halves is not None
    ((choosing, reported),) = zip(halves.choosing.values(), halves.reported.values(), strict=True)
    assert len(choosing) + len(reported) == 80
    published = read_results(runs.store, run_spec.output_uri)
    lines = [p for p in read_all_predictions(runs.store, published) if p.data_set == "reply"]
    prompts = {r.prompt for r in data.references("retention", reported.tolist())}
    assert len(lines) == len(reported)
    assert {line.prompt for line in lines if line.prompt} <= prompts
    (scores,) = (each for each in published.scores if each.name == "reply")
    assert scores.samples == len(reported)
    worsened = scores.tuned["Loss"] - scores.base["Loss"]
    assert worsened == pytest.approx(found.points[3].retention[0].change, abs=0.2)

    # What is published is the model at the point, and was loaded again from storage.
    tuned, chosen = runs.weights(plain), runs.weights(run_spec)
    for name, value in tuned.items():
        expected = 0.25 * value if ".lora_B." in name else value
        torch.testing.assert_close(chosen[name], expected, rtol=1e-5, atol=1e-7)
    assert published.evaluation.artefact is not None
    assert published.evaluation.artefact.formats == ["adapter", "merged"]
    assert published.evaluation.remedy == found
    page = runs.store.get(f"{run_spec.output_uri}/report.html").decode()
    assert "Remedy: between the base and the tuned model" in page
    card = runs.store.get(f"{run_spec.output_uri}/README.md").decode()
    assert "Remedy: Interpolation: point 0.25" in card
    assert "point 0.25 from the base model (Interpolation)" in card


def close(found: RemedyResult | None, expected: RemedyResult | None) -> None:
    assert found is not None and expected is not None
    assert found.chosen == expected.chosen
    for ours, theirs in zip(found.points, expected.points, strict=True):
        assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-3)
        assert ours.qualifies == theirs.qualifies


def keys_of(s3: EmbeddedS3, patch: pytest.MonkeyPatch) -> None:
    """Put a server's keys into the environment, as a user does."""
    for name, key in (("ACCESS_KEY_ID", s3.access_key), ("SECRET_ACCESS_KEY", s3.secret_key)):
        patch.setenv(f"AWS_{name}", key)


def interpolate(runs: Runs, s3: EmbeddedS3, uri: str, *options: str) -> int:
    folder = str(runs.folder / "state")
    return main(
        ["interpolate", uri, *options, "--endpoint", str(s3.endpoint), "--state-dir", folder]
    )


POINTS = ("--points", *REMEDY["points"])


def test_interpolate_makes_the_model_that_the_remedy_would_have_made(
    forgotten: Forgotten, s3: EmbeddedS3, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, remedied = forgotten.runs, forgotten.remedied
    before = runs.store.get(f"{runs.destination}/latest.json")
    assert interpolate(runs, s3, forgotten.plain.output_uri, *POINTS) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Interpolation: point 0.25, with the lowest validation loss" in said
    point = forgotten.plain.model_copy(update={"run": "1-plain-point-0.25"})
    assert f"Model: {point.output_uri}" in said

    theirs, ours = runs.weights(remedied), runs.weights(point)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-8)
    expected = read_results(runs.store, remedied.output_uri)
    found = read_results(runs.store, point.output_uri)
    assert (found.manifest.point_of, found.manifest.held) == ("1-plain", None)
    assert found.manifest.files.keys() == expected.manifest.files.keys()
    close(found.evaluation.remedy, expected.evaluation.remedy)
    assert found.evaluation.gates[0].passed
    assert found.evaluation.artefact is not None
    assert found.evaluation.artefact.formats == ["adapter", "merged"]
    for mine, other in zip(found.scores, expected.scores, strict=True):
        assert (mine.name, mine.samples) == (other.name, other.samples)
        assert mine.base["Loss"] == pytest.approx(other.base["Loss"], rel=1e-4)
        assert mine.tuned["Loss"] == pytest.approx(other.tuned["Loss"], rel=1e-4)
    answers = {
        (line.data_set, line.sample, line.answers.get("Tuned"))
        for line in read_all_predictions(runs.store, found)
    }
    assert answers == {
        (line.data_set, line.sample, line.answers.get("Tuned"))
        for line in read_all_predictions(runs.store, expected)
    }
    assert runs.store.get(f"{runs.destination}/latest.json") == before

    # It is shown, and a next job can start from it; but it is no run whose points are scanned.
    assert main(["report", point.output_uri, "--endpoint", str(s3.endpoint)]) == 0
    assert "point 0.25" in " ".join(capsys.readouterr().out.split())
    following = runs.prepared(
        "4-follo", {}, model={"source": point.output_uri},
        training={"maxSteps": 2, "batchSize": 8, "precision": "FP32"},
    )  # fmt: skip
    result = runs.train(following)
    assert [(a.run, a.job) for a in result.lineage][-1] == (point.run, "job")
    assert interpolate(runs, s3, point.output_uri) != 0
    assert "is a point between two models already" in capsys.readouterr().out


def test_interpolate_tells_what_is_missing(
    forgotten: Forgotten, s3: EmbeddedS3, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, plain = forgotten.runs, forgotten.plain
    there = {info.uri for info in runs.store.list(f"{runs.destination}/")}

    def said() -> str:
        return " ".join(capsys.readouterr().out.split())

    assert interpolate(runs, s3, plain.output_uri, "--points", "0.9") == HELD
    assert "no point qualifies, so the tuned model is kept" in said()
    assert interpolate(runs, s3, plain.output_uri, "--points", "1") == MANIFEST_FAULT
    assert "give numbers above 0 and below 1" in said()
    assert interpolate(runs, s3, f"{runs.destination}/7-none") == 10
    assert "7-none/manifest.json does not exist" in said()
    data = f"{runfiles.read_prepared(runs.store, plain.run_uri).uri}/manifest.json"
    for uri, because in (
        (data, "holds no prepared data any more; give spec.rerunToken a new value"),
        (f"{plain.run_uri}/HEAD.json", "is not among the checkpoints of"),
        (f"{plain.run_uri}/answers/base-0-shot-0.json", "the working files of run 1-plain"),
    ):
        text = runs.store.get(uri)
        runs.store.delete([uri])
        assert interpolate(runs, s3, plain.output_uri) == 10
        assert because in said()
        runs.store.put(uri, text)
    assert {info.uri for info in runs.store.list(f"{runs.destination}/")} == there


@pytest.mark.parametrize(
    ("chosen", "uri", "held", "code", "said"),
    [
        (0.5, "s3://b/1-point-0.5", None, 0, "Model: s3://b/1-point-0.5"),
        (0.5, "s3://b/1-point-0.5", "reply Loss", HELD, "Held: reply Loss"),
        (1.0, None, None, 0, "as it is; nothing was published"),
        (1.0, None, "reply Loss", HELD, "Held: reply Loss"),
        (None, None, None, HELD, "as it is; nothing was published"),
    ],
)
def test_the_exit_code_of_interpolate_is_that_of_a_run(
    forgotten: Forgotten, s3: EmbeddedS3, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, chosen: float | None, uri: str | None, held: str | None,
    code: int, said: str,
) -> None:  # fmt: skip
    remedy = RemedyResult(scan="Interpolation", limits={}, points=[], chosen=chosen, because="")
    found = PublishedPoint(remedy, uri, held)
    monkeypatch.setattr("finetune_trainer.local.interpolate.publish_point", lambda *_: found)
    assert interpolate(forgotten.runs, s3, forgotten.plain.output_uri) == code
    assert said in " ".join(capsys.readouterr().out.split())


def test_replay_lets_the_run_that_forgets_pass_its_gate(forgotten: Forgotten) -> None:
    runs = forgotten.runs
    run_spec = runs.prepared("3-repla", {}, replay=True)
    runs.train(run_spec)
    assert runs.publish(run_spec).held is None
    found = read_results(runs.store, run_spec.output_uri)
    held = read_results(runs.store, forgotten.plain.output_uri)
    (gate,), (missed,) = found.evaluation.gates, held.evaluation.gates
    assert gate.passed and not missed.passed

    # The base model is the same, and was asked the same: its row is the other run's.
    for mine, other in zip(found.evaluation.sets, held.evaluation.sets, strict=True):
        assert mine.rows[0].measured_by == "job 1-plain" and other.rows[0].measured_by is None
        assert mine.rows[0].metrics == other.rows[0].metrics


def test_a_sharded_run_that_is_lost_chooses_as_one_process_does(
    runs: Runs, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost during the scan, it scans again; lost later, it has chosen. Moved again afterwards, its
    tuned model is moved, not the point."""
    spec: dict[str, Any] = {
        "method": {"type": "Full"}, "output": {"destination": runs.destination},
        "training": {"maxSteps": 12, "batchSize": 8, "learningRate": "1e-3", "precision": "FP32"},
    }  # fmt: skip
    remedy = {"remedy": REMEDY | {"scan": "LayerLinear"}}
    one = runs.prepared("1-alone", remedy, **spec)
    alone = runs.train(one)
    assert alone.remedy is not None and alone.remedy.chosen == 0.5
    run_spec = runs.prepared("2-shard", remedy, **spec, compute={"sharding": "FullShard"})
    sharded = runs.train(run_spec, 2, lost_at="point 0.5:")
    assert sharded.summary.restarts == 1
    close(sharded.remedy, alone.remedy)

    runs.store.delete([f"{run_spec.run_uri}/result.json"])
    again = runs.train(run_spec)
    assert again.remedy == sharded.remedy
    assert again.summary.checkpoint == sharded.summary.checkpoint
    assert "point 0.5:" not in (runs.folder / "2-shard-1-0" / "log").read_text()
    for ours, theirs in zip(again.summary.scores, sharded.summary.scores, strict=True):
        assert ours.tuned["Loss"] == pytest.approx(theirs.tuned["Loss"], rel=1e-5)

    runs.publish(one)
    keys_of(s3, monkeypatch)
    assert interpolate(runs, s3, one.output_uri) == 0  # by the scan and the points of the run
    point = one.model_copy(update={"run": "1-alone-layer-linear-0.5"})
    moved = read_results(runs.store, point.output_uri)
    close(moved.evaluation.remedy, alone.remedy)
    ours, theirs = (runs.weights(each, "merged/model") for each in (point, one))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("count", "validation", "because"),
    [
        (30, "0.1", "reply has .* and fewer than 20 decide nothing; give it about 60"),
        (80, "0.0001", "no validation sample is there"),
    ],
)
def test_a_remedy_that_could_choose_nothing_is_refused(
    runs: Runs, count: int, validation: str, because: str
) -> None:
    runs.store.put(runs.reply, conversations(count).encode())
    with pytest.raises(UserError, match=because) as caught:
        runs.prepared("1-fewer", {"remedy": REMEDY}, validation)
    assert caught.value.reason == "RemedyNotMeasured"
