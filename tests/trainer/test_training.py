"""Training by worker processes, from prepared data to a result, on real storage."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import urllib.request
from typing import Any

import pytest
from bench import COLOURS, Bench, curve
from worlds import worker_folder

from finetune_trainer.failures import UserError
from finetune_trainer.storage import runfiles

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 1, "FullShard", 1), (1, 2, "NoShard", 1), (2, 2, "NoShard", 2)],
        pytest.param(
            [(1, 1, "NoShard", 1), (2, 1, "NoShard", 1), (1, 2, "FullShard", 1)],
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one_at_any_size(
    bench: Bench, sizes: list[tuple[int, int, str, int]]
) -> None:
    """With a data mixture that changes between stages."""
    data = {
        "train": [
            {"name": "colours", "source": f"{bench.bucket}/train.jsonl", "weight": "3"},
            {"name": "loud", "source": f"{bench.bucket}/more.jsonl", "weight": "1"},
        ],
        "stages": [
            {"name": "first", "steps": "1", "weights": [{"name": "colours", "weight": "1"}]},
            {"name": "then", "steps": "4"},
        ],
        "split": {"validation": "0.1", "test": "0.1"},
        "quality": {"deduplicate": False},
    }
    run_spec = bench.run_spec("1-whole", data=data)
    whole = bench.finish(run_spec, 1, "whole")
    assert whole.curve[-1].loss < whole.curve[0].loss
    assert whole.curve[0].by_source.keys() == {"colours"}
    assert {name for point in whole.curve for name in point.by_source} == {"colours", "loud"}
    planned = runfiles.read_prepared(bench.store, run_spec.run_uri).stages
    assert [stage.mixture for stage in planned] == [{"colours": 1}, {"colours": 0.75, "loud": 0.25}]
    named = [name for stage in planned for name in [stage.name] * stage.steps]
    assert [point.data_stage for point in whole.curve] == named
    said = (bench.tmp_path / "whole" / "log").read_text()
    assert f"step 1/{len(named)} (first) loss" in said and f"/{len(named)} (then) loss" in said
    for before, after, sharding, sharing in sizes:
        name = f"{before}to{after}-{sharding.lower()}-{sharing}"
        compute = {
            "sharding": sharding, "contextParallel": sharing,
            "gpusPerNode": 0, "processesPerNode": after,
        }  # fmt: skip
        run_spec = bench.run_spec(f"1-{name}", data=data, compute=compute)
        bench.kill_after_checkpoint(run_spec, before, f"lost-{name}", step=6)
        resumed = bench.finish(run_spec, after, f"resumed-{name}")
        assert (resumed.summary.attempt, resumed.summary.restarts) == (2, 1)
        assert resumed.summary.startup is not None and resumed.summary.startup.from_step >= 6
        assert curve(resumed).keys() == curve(whole).keys()
        for step, loss in curve(whole).items():
            found = curve(resumed)[step]
            assert found == pytest.approx(loss, rel=1e-4), (name, step)
        for ours, theirs in zip(resumed.curve, whole.curve, strict=True):
            assert ours.data_stage == theirs.data_stage
            assert ours.by_source == pytest.approx(theirs.by_source, rel=1e-4)
        for ours, theirs in zip(resumed.validation, whole.validation, strict=True):
            assert ours.overall["Loss"] == pytest.approx(theirs.overall["Loss"], rel=1e-4)
            assert ours.base_kl == pytest.approx(theirs.base_kl, rel=1e-3, abs=1e-7)
        for ours, theirs in zip(resumed.summary.scores, whole.summary.scores, strict=True):
            assert ours.tuned == pytest.approx(theirs.tuned, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "method", "sharding", "anchor"),
    [
        ("Muon", "Full", "FullShard", {"klCoefficient": "0.5", "l2Coefficient": "5"}),
        pytest.param(
            "Adafactor", "LoRA", "NoShard", {"klCoefficient": "0.5"}, marks=pytest.mark.long
        ),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one_with_other_optimizers_and_anchors(
    bench: Bench, optimizer: str, method: str, sharding: str, anchor: dict[str, str]
) -> None:
    """Anchors use the base model's weights, also in an attempt that restores a checkpoint."""
    data = {
        "train": [
            {"name": "colours", "source": f"{bench.bucket}/train.jsonl"},
            {"name": "loud", "source": f"{bench.bucket}/more.jsonl", "replay": True},
        ],
        "split": {"validation": "0.1", "test": "0.1"},
        "quality": {"deduplicate": False},
    }
    spec = {
        "data": data, "method": {"type": method}, "compute": {"sharding": sharding},
        "training": {"optimizer": optimizer, "anchor": anchor},
    }  # fmt: skip
    whole = bench.finish(bench.run_spec("1-whole", **spec), 2, "whole")
    drifts = [point.anchor_kl for point in whole.curve]
    assert drifts[0] == pytest.approx(0, abs=1e-3), "from dropout only"
    assert max(drift or 0 for drift in drifts) > 10 * (drifts[0] or 0)
    distances = [point.base_kl or 0 for point in whole.validation]
    assert distances[-1] > distances[0] > 0
    run_spec = bench.run_spec("1-again", **spec)
    bench.kill_after_checkpoint(run_spec, 2, "lost", step=6)
    again = bench.finish(run_spec, 2, "resumed")
    assert again.summary.restarts == 1
    for ours, theirs in zip(again.curve, whole.curve, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4), ours.step
        assert ours.anchor_kl == pytest.approx(theirs.anchor_kl, rel=1e-3, abs=1e-7), ours.step
    found = [point.base_kl for point in again.validation]
    assert found == pytest.approx([point.base_kl for point in whole.validation], rel=1e-3)


SERIES = (
    "finetune_train_loss", "finetune_learning_rate", "finetune_gradient_norm", "finetune_step",
    "finetune_total_steps", "finetune_tokens_per_second", "finetune_tokens_total",
    "finetune_samples_total", 'finetune_step_seconds_total{part="compute"}',
    'finetune_step_seconds_total{part="data_wait"}', "finetune_step_duration_seconds_count",
)  # fmt: skip


def test_metrics_and_progress_pages_show_the_training(bench: Bench) -> None:
    data = {
        "train": [{"source": f"{bench.bucket}/train.jsonl"}],
        "split": {"validation": "0.1", "test": "0.1"},
        "quality": {"deduplicate": False},
        "stages": [{"name": "only", "steps": "1"}],
    }
    run_spec = bench.run_spec("1-pages", training={"epochs": 200}, checkpoint={"everySteps": 2},
                        evaluation={"everySteps": 3}, data=data)  # fmt: skip
    world = bench.start(run_spec, 1, "pages")
    page = f"http://127.0.0.1:{world.metrics_port}"
    told: dict[str, Any] = {}
    deadline = time.monotonic() + 90
    while told.get("loss") is None or told.get("step", 0) < 25:
        assert time.monotonic() < deadline, world.log.read_text()
        assert world.processes[0].is_alive(), world.log.read_text()
        with contextlib.suppress(OSError):
            told = json.loads(urllib.request.urlopen(f"{page}/progress").read())
    values = dict(
        line.rsplit(" ", 1)
        for line in urllib.request.urlopen(f"{page}/metrics").read().decode().splitlines()
        if not line.startswith("#")
    )
    world.kill()
    assert (told["run"], told["attempt"], told["restarts"]) == ("1-pages", 1, 0)
    assert (told["totalSteps"], told["dataStage"]) == (bench.total_steps(run_spec), "only")
    assert told["latestCheckpoint"].startswith(run_spec.run_uri)
    assert told["saveSeconds"] > 0
    for name in SERIES:
        assert float(values[name]) > 0, name
    for part in ("checkpoint", "evaluation"):
        assert float(values[f'finetune_step_seconds_total{{part="{part}"}}']) > 0
    for part, seconds in told["startup"]["seconds"].items():
        assert float(values[f'finetune_startup_seconds{{part="{part}"}}']) == seconds, part
    assert told["startup"]["seconds"]["step"] > 0
    assert float(values['finetune_validation_loss{data_set="train-0"}']) > 0
    assert "finetune_gpu_memory_peak_bytes" not in values


def test_the_same_manifest_and_seed_give_the_same_metrics(bench: Bench) -> None:
    one = bench.finish(bench.run_spec("1-first"), 1, "one")
    storage = {"workspace": f"{bench.bucket}/another"}  # its base rows are measured, too
    two = bench.finish(bench.run_spec("2-secnd", storage=storage), 1, "two")
    assert one.summary.scores == two.summary.scores
    assert curve(one) == curve(two)


def test_training_uses_the_memory_profile_of_prepare(bench: Bench) -> None:
    """The logged table shows a size from the stored profile that profiling would not find."""
    training = {"maxSteps": 1, "epochs": None}
    run_spec = bench.run_spec("1-known", training=training, compute={"gpusPerNode": 0})
    kept = json.loads(runfiles.read_memory_profiles(bench.store, run_spec.run_uri) or b"{}")
    (facts,) = kept.values()
    facts["weights"]["held"] = 77 << 20
    runfiles.write_memory_profiles(bench.store, run_spec.run_uri, json.dumps(kept).encode())
    world = bench.start(run_spec, 1, "known")
    assert world.wait() == [0], world.log.read_text()
    assert re.search(r"\b77 MiB  parameters", world.log.read_text())


def test_full_tuning_learns_and_reports_both_models(bench: Bench) -> None:
    run_spec = bench.run_spec(
        "1-fullx",
        method={"type": "Full"},
        training={"epochs": 6, "learningRate": "1e-2"},
        evaluation={},
    )
    began = time.time()
    result = bench.finish(run_spec, 2, "full")
    (scores,) = result.summary.scores
    assert scores.tuned["Loss"] < scores.base["Loss"]
    assert scores.tuned["Accuracy"] > scores.base["Accuracy"]
    assert set(scores.tuned) == {"Loss", "Perplexity", "Accuracy", "Precision", "Recall", "F1"}
    assert scores.tuned["Perplexity"] == pytest.approx(math.exp(scores.tuned["Loss"]))
    assert result.summary.trainable_parameters == result.summary.total_parameters > 0
    startup = result.summary.startup
    assert startup is not None and startup.from_step == 0
    assert list(startup.seconds) == [
        "import", "rendezvous", "data", "model", "restore", "baseline", "step"]  # fmt: skip
    slack = 1.0  # difference of the two clocks
    assert began - slack < startup.first_step - startup.total, (
        "the total covers the start of the process"
    )
    assert startup.first_step < time.time() + slack
    assert f"first step after {startup.text}" in (bench.tmp_path / "full" / "log").read_text()
    assert [row.key for row in result.rows] == [
        "base-0-shot-0", "base-1-shot-0", "base-1-shot-1", "base-4-shot-0", "base-4-shot-1",
        "tuned-0-shot-0"]  # fmt: skip
    last = runfiles.read_row(bench.store, run_spec.run_uri, result.rows[-1])
    assert last.sets[0].answers[0].strip() in COLOURS.values()


def test_compiled_training_is_the_same_and_compiles_once(bench: Bench) -> None:
    """With inductor, the compiler that GPUs use too."""
    training = {"microBatchTokens": 256, "compile": False}
    plain = bench.finish(bench.run_spec("1-plain", training=training), 1, "plain")
    run_spec = bench.run_spec("1-compiled", training=training | {"compile": True})
    world = bench.start(run_spec, 2, "compiled")
    assert world.wait(300) == [0, 0], world.log.read_text()
    compiled = runfiles.read_result(bench.store, run_spec.run_uri)
    assert compiled.summary.startup is not None
    assert compiled.summary.startup.seconds["compile"] > 0
    for step, loss in curve(plain).items():
        assert curve(compiled)[step] == pytest.approx(loss, rel=1e-3)
    counts = re.findall(r"^step .* (\d+) graphs compiled$", world.log.read_text(), re.MULTILINE)
    assert len(counts) == len(compiled.curve) > 2
    assert len(set(counts)) == 1 and int(counts[0]) > 0, counts


def test_a_non_finite_loss_ends_the_run_with_its_reason(bench: Bench) -> None:
    run_spec = bench.run_spec("1-naned", method={"type": "Full"},
                        training={"learningRate": "1e25", "warmupRatio": "0", "maxGradNorm": "0"},
                        checkpoint={"everySteps": 1})  # fmt: skip
    world = bench.start(run_spec, 2, "nan")
    assert world.wait() == [13, 13], world.log.read_text()
    failure = json.loads((worker_folder(world.folder, 0) / "failure-0.json").read_text())
    assert failure["class"] == "Diverged"
    assert failure["reason"] == "LossNotFinite"
    assert "learningRate" in failure["message"] and "of 'train-0'" in failure["message"]
    for checkpoint in bench.head(run_spec).checkpoints:  # type: ignore[union-attr]
        state = json.loads(bench.store.get(f"{checkpoint.uri}/state.json"))
        assert all(math.isfinite(loss) for loss in state["pending"])


def test_gradient_checkpointing_gives_the_same_training(bench: Bench) -> None:
    results = {}
    for again in ("Never", "Always"):
        training = {"epochs": 1, "gradientCheckpointing": again}
        run_spec = bench.run_spec(f"1-{again.lower()}", training=training)
        results[again] = bench.finish(run_spec, 1, again)
        said = "NoShard, gradient checkpointing" if again == "Always" else "NoShard)"
        assert said in (bench.tmp_path / again / "log").read_text()
    never, always = (results[again].curve for again in ("Never", "Always"))
    assert [p.loss for p in always] == pytest.approx([p.loss for p in never], rel=1e-5)


def test_early_stopping_ends_training(bench: Bench) -> None:
    run_spec = bench.run_spec(
        "1-early",
        training={"epochs": 50, "learningRate": "0",
                  "earlyStopping": {"metric": "Loss", "patience": 2}},
        evaluation={"everySteps": 2},
    )  # fmt: skip
    result = bench.finish(run_spec, 1, "early")
    assert result.summary.stopped_early
    assert (
        result.summary.steps == 6
    )  # the first evaluation sets the best value, two do not improve it


def test_a_stale_attempt_is_fenced(bench: Bench) -> None:
    run_spec = bench.run_spec("1-stale", training={"epochs": 200}, checkpoint={"everySteps": 1})
    stale = bench.start(run_spec, 1, "stale")
    deadline = time.monotonic() + 90
    while not ((head := bench.head(run_spec)) and head.checkpoints):
        assert time.monotonic() < deadline, stale.log.read_text()
        time.sleep(0.02)
    newer = bench.start(run_spec, 1, "newer")
    assert stale.wait() == [16], stale.log.read_text()
    newer.kill()
    head = bench.head(run_spec)
    assert head is not None
    assert head.attempt == 2


def test_the_base_model_is_asked_in_other_ways_too(bench: Bench) -> None:
    """Rows of examples, of a user's prompt and of passages; what does not fit is refused."""
    passages = "".join(json.dumps({"text": f"the {n} sky is {c}"}) + "\n" for n, c in
                       COLOURS.items())  # fmt: skip
    bench.store.put(f"{bench.bucket}/passages.jsonl", passages.encode())
    evaluation = {
        "baselines": {
            "shots": [2], "draws": 1, "maxSamples": 5,
            "prompts": [{"name": "listed", "text": "say one colour", "shots": 1}],
        },
        "passages": {"source": f"{bench.bucket}/passages.jsonl", "top": 1},
    }  # fmt: skip
    run_spec = bench.run_spec("1-rows", evaluation=evaluation)
    result = bench.finish(run_spec, 2, "rows")
    assert [row.name for row in result.rows] == [
        "Base",
        "Base 2-shot",
        "Base listed",
        "Base retrieval",
        "Tuned",
        "Tuned retrieval",
    ]
    for row in result.rows[1:4]:
        found = runfiles.read_row(bench.store, run_spec.run_uri, row)
        assert len(found.sets[0].answers) == 5
        assert found.process_seconds > 0 and not found.sets[0].losses
    for wrong, word in (
        ({"baselines": {"shots": [64]}}, "baselines.shots"),
        ({"metrics": ["Loss"], "baselines": {"shots": [1]}}, "baselines.shots"),
        ({"metrics": ["Loss"], "passages": evaluation["passages"]}, "evaluation.passages"),
    ):
        with pytest.raises(UserError, match=word):
            bench.run_spec("2-wrong", evaluation=wrong)
