"""Suspect labels: what the first losses of training samples say about their labels."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import COLOURS, Bench, records
from classifiers import LABELS, lines, write_encoder
from classifiers import records as opinions
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_classification_run import Job
from test_publish_papers import DATA_REPORT, about

from finetune_api.results import PublishSummary
from finetune_trainer.local.display import Display
from finetune_trainer.publish import report, run_facts
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.publish.suspects import suspects_hint
from finetune_trainer.storage.objects import Stores
from finetune_trainer.storage.runfiles import RunResult, SuspectLabel, SuspectLabels
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.suspects import MOST, UNLIKELY, FirstVisits, Suspects

USUAL = np.linspace(0.9, 1.1, 40)


def found(losses: Any, labels: Any = 3, sources: Any = 0, answers: Any = None) -> Suspects:
    """What one step of samples shows.

    Args:
        losses: mean loss of each.
        labels, sources: of each, or of all.
        answers: sum of the label ids of each; None: all differ.
    """
    losses = np.asarray(losses, np.float64)
    labels, sources = (np.broadcast_to(values, losses.shape) for values in (labels, sources))
    everything = range(len(losses))
    suspects = Suspects()
    suspects.add(
        FirstVisits(everything, sources.tolist(), everything, torch.zeros(0)),
        np.stack([losses * labels, labels, np.arange(len(losses)) if answers is None else answers]),
    )
    return suspects


def test_a_loss_far_above_the_usual_one_stands_out() -> None:
    suspects = found([*USUAL, 4.0, 1.0])
    (only,) = suspects.worst
    assert (only.position, only.loss) == (40, pytest.approx(4))
    assert only.usual == pytest.approx(1, abs=0.02) and only.deviation > 2 * UNLIKELY
    assert (suspects.measured, suspects.unlikely) == (42, 1)


def test_a_low_loss_and_one_that_is_not_finite_are_no_suspects() -> None:
    suspects = found([*USUAL, 0.0, math.inf, math.nan])
    assert not suspects.worst and suspects.measured == 41


def test_wrong_labels_do_not_hide_each_other() -> None:
    suspects = found([*USUAL, *[4.0] * 12])
    assert {suspect.position for suspect in suspects.worst} == set(range(40, 52))
    assert suspects.unlikely == 12


def test_the_spread_of_the_samples_counts() -> None:
    assert not found([*(3 * USUAL), 4.0]).unlikely
    assert found([*USUAL, 4.0]).unlikely


@pytest.mark.parametrize("kind", ["labels", "sources"])
def test_samples_are_compared_with_those_that_are_alike(kind: str) -> None:
    """Answers of one token have higher losses per token than long ones."""
    kinds = [1] * 40 + [100] * 40 + [1, 127 if kind == "labels" else 100]
    suspects = found([*(USUAL + 3), *USUAL, 4.0, 4.0], **{kind: kinds})
    assert [(s.position, round(s.usual)) for s in suspects.worst] == [(81, 1)]


def test_a_model_that_is_always_right_may_doubt() -> None:
    """One half is no outlier among chances of one; of many tokens, each as doubtful, it is."""
    assert not found([0.0] * 40 + [math.log(2)]).unlikely
    assert found([0.0] * 40 + [math.log(2)], labels=100).unlikely


def test_a_rare_answer_is_no_wrong_one() -> None:
    """Once the model had the chance to see that it always doubts it."""
    losses, answers = [*USUAL, *[4.0] * 6, 4.0], [*([1, 2] * 20), *[3] * 6, 1]
    suspects = found(losses, answers=answers)
    assert [(s.position, round(s.usual)) for s in suspects.worst] == [(46, 1)]
    assert {s.position for s in found(losses).worst} == set(range(40, 47)), "answers differ"


def test_few_samples_show_nothing() -> None:
    assert found([1.0] * 14 + [9.0]).measured == 0
    assert found([1.0] * 15 + [9.0]).unlikely == 1


def state_of(losses: np.ndarray, gathers: set[int], resumed: set[int]) -> LoopState:
    """A loop of steps of 8 samples of two sources, whose first losses are given.

    Args:
        gathers: steps after which the sums are gathered.
        resumed: steps after which the state comes from a checkpoint.
    """
    state = LoopState()
    for step, of_step in enumerate(losses.reshape(-1, 8)):
        positions = range(8 * step, 8 * step + 8)
        # Two samples have been seen before.
        visits = FirstVisits(
            positions[2:], [p % 2 for p in positions[2:]], range(2, 8),
            torch.tensor(np.stack([of_step * 3, np.full(8, 3), np.arange(8) % 5])),
        )  # fmt: skip
        state.advance(torch.ones(9, dtype=torch.float64), 8, visits)
        if step in gathers:
            state.gather(lambda sums: sums)
        if step in resumed:
            state.gather(lambda sums: sums)
            state = LoopState.from_json(state.to_json())
    state.gather(lambda sums: sums)
    return state


STEPS = st.sets(st.integers(0, 99))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), STEPS, STEPS)
def test_the_list_does_not_depend_on_gathers_and_restarts(
    seed: int, gathers: set[int], resumed: set[int]
) -> None:
    draw = np.random.default_rng(seed)
    losses = draw.uniform(0, 1, 800)
    losses[1::7] += 2
    losses[::50] += 20
    losses[7] = np.nan
    expected = state_of(losses, set(), set()).suspects
    found = state_of(losses, gathers, resumed).suspects
    assert found.to_json() == expected.to_json()
    deviations = [suspect.deviation for suspect in expected.worst]
    assert deviations == sorted(deviations, reverse=True) and 20 <= len(deviations) <= MOST
    assert all(losses[suspect.position] > 1 for suspect in expected.worst)
    assert not any(suspect.position % 8 < 2 for suspect in expected.worst)
    assert expected.unlikely and 500 < expected.measured < 600


def test_a_checkpoint_of_an_earlier_release_has_no_suspects() -> None:
    state = state_of(np.ones(80), set(), set())
    raw = json.loads(state.to_json())
    del raw["suspects"]
    assert LoopState.from_json(json.dumps(raw)).suspects == Suspects()
    raw = about().result.to_json()
    assert "suspects" not in raw and RunResult.model_validate(raw).suspects is None


def test_the_hint_counts_what_stands_out() -> None:
    found = SuspectLabels(measured=1200, unlikely=3, threshold=UNLIKELY, samples=[])
    hint = suspects_hint(found)
    assert hint is not None and hint.startswith("of 1,200 training samples, 3 have labels that")
    one = suspects_hint(found.model_copy(update={"unlikely": 1}))
    assert one is not None and "1 has a label that" in one
    assert suspects_hint(found.model_copy(update={"unlikely": 0})) is None
    assert suspects_hint(None) is None


@pytest.mark.parametrize("hint", [None, "of 90 training samples, 3 have labels"])
def test_the_terminal_has_the_hint(hint: str | None) -> None:
    shown = io.StringIO()
    published = PublishSummary(
        uri="s3://b/m", digest="d", formats=["adapter"], bytes=1, suspect_labels=hint
    )
    Display(Console(file=shown, width=200)).labels(published)
    assert shown.getvalue() == (f"Labels:  {hint}\n" if hint else "")


def test_papers_name_the_suspects() -> None:
    told = about()
    sample = SuspectLabel(
        data_set="support", number=3, shard="shards/a.arrow", row=2,
        where="s3://bucket/t.jsonl, line 7", prompt="is it <b>?", label="no",
        loss=4.25, usual_loss=0.5, deviation=9.5,
    )  # fmt: skip
    found = SuspectLabels(measured=40, unlikely=1, threshold=UNLIKELY, samples=[sample])
    told = dataclasses.replace(told, result=told.result.model_copy(update={"suspects": found}))
    raw = json.loads(run_facts.metrics_text(told))["suspectLabels"]
    assert (raw["measured"], raw["unlikely"]) == (40, 1)
    assert raw["samples"] == [sample.to_json()] and "1 has a label" in raw["hint"]
    assert raw["samples"][0]["where"] == "s3://bucket/t.jsonl, line 7"
    page = report.render(told, json.dumps(DATA_REPORT).encode())
    assert "<td>s3://bucket/t.jsonl, line 7</td><td>support</td>" in page
    assert "is it &lt;b&gt;?" in page and "<b>Suspect labels</b>: of 40" in page
    assert "Labels to check" not in report.render(about(), json.dumps(DATA_REPORT).encode())


def lines_of(found: SuspectLabels | None) -> list[int]:
    assert found is not None
    return [int(str(sample.where).rpartition(", line ")[2]) for sample in found.samples]


def check_equal(one: SuspectLabels | None, other: SuspectLabels | None) -> None:
    """The same list, but for rounding: a sample at the threshold may be missing in one."""
    assert one is not None and other is not None
    assert one.measured == other.measured
    there = {sample.number: sample for sample in other.samples}
    for sample in one.samples:
        if sample.number in there:
            assert sample.where == there[sample.number].where
            assert sample.deviation == pytest.approx(there[sample.number].deviation, rel=0.02)
        else:
            assert sample.deviation < 2.1
    assert abs(len(one.samples) - len(other.samples)) <= 2


def wrong_lines(made: list[dict[str, Any]], labels: Sequence[str]) -> set[int]:
    """Give 5 % of the records another label; return their lines."""
    draw = np.random.default_rng(0)
    wrong = draw.choice(len(made), len(made) // 20, replace=False).tolist()
    for i in wrong:
        made[i]["label"] = str(draw.choice([x for x in labels if x != made[i]["label"]]))
    return {i + 1 for i in wrong}


@pytest.mark.slow
def test_wrong_answers_of_a_language_model_are_found(bench: Bench, tmp_path: Path) -> None:
    """On one process and on two, and published with their lines."""
    made = [json.loads(line) for line in records(1200).splitlines()]
    wrong = wrong_lines(made, list(COLOURS.values()))
    for i in wrong:
        made[i - 1]["text"] = f"to me@example.com: {made[i - 1]['text']}"
    bench.store.put(f"{bench.bucket}/noisy.jsonl", lines(made))
    spec: dict[str, Any] = {
        "data": {"train": [{"name": "colours", "source": f"{bench.bucket}/noisy.jsonl"}],
                 "split": {"validation": "0", "test": "0"}, "quality": {"deduplicate": False}},
        "method": {"type": "Full"}, "checkpoint": {"everySteps": 1000},
        "training": {"epochs": None, "maxSteps": 90, "batchSize": 16, "learningRate": "1e-2",
                     "dropout": "0", "microBatchTokens": 512, "labelSmoothing": "0.05"},
    }  # fmt: skip
    run_spec = bench.run_spec("1-one", **spec)
    found = bench.finish(run_spec, 1, "one").suspects
    hits = [line in wrong for line in lines_of(found)]
    print(f"{len(hits)} listed, {sum(hits)} of {len(wrong)} wrong ones; first 20: {sum(hits[:20])}")
    assert found is not None and found.unlikely >= 10
    assert sum(hits[:20]) >= 18 and np.mean(hits) >= 0.8
    assert 1100 < found.measured <= 1200, "later visits do not count"
    check_equal(found, bench.finish(bench.run_spec("2-two", **spec), 2, "two").suspects)

    summary = publish(run_spec, Stores(run_spec), tmp_path / "publish")
    assert summary.suspect_labels == suspects_hint(found)
    worst = found.samples[0]
    assert worst.label.strip() in COLOURS.values() and "to [EMAIL]: " in worst.prompt
    page = bench.store.get(f"{run_spec.output_uri}/report.html").decode()
    assert f"<td>{bench.bucket}/noisy.jsonl, line {lines_of(found)[0]}</td>" in page
    assert "me@example.com" not in page


@pytest.mark.slow
def test_wrong_classes_are_found_also_by_a_run_that_was_killed(
    run_spec_for: Any, s3: Any, bucket: str, tmp_path: Path
) -> None:
    job = Job(run_spec_for, s3, bucket, write_encoder(tmp_path / "base"), tmp_path)
    made = opinions(1200)
    wrong = wrong_lines(made, LABELS)
    job.store.put(f"{job.bucket}/train.jsonl", lines(made))
    spec: dict[str, Any] = {
        "method": {"type": "Full"},
        "training": {"epochs": 1, "learningRate": "3e-3", "neftuneAlpha": "0"},
    }
    whole = job.finish(job.run_spec("1-whole", **spec), 1, "whole").suspects
    hits = [line in wrong for line in lines_of(whole)]
    print(f"{len(hits)} listed, {sum(hits)} of {len(wrong)} wrong ones")
    assert len(hits) >= 8 and np.mean(hits) >= 0.8
    assert whole is not None and {sample.label for sample in whole.samples} <= set(LABELS)
    assert all(made[line - 1]["text"].endswith(sample.prompt[-20:].strip())
               for line, sample in zip(lines_of(whole), whole.samples, strict=True))  # fmt: skip

    broken = job.run_spec("2-broke", **spec)
    job.kill_after_checkpoint(broken, 2, "lost", 40)
    resumed = job.finish(broken, 1, "resumed")
    assert resumed.summary.restarts == 1
    check_equal(whole, resumed.suspects)
