"""Rows of the base model that runs of a workspace share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Attempt, Bench

from finetune_api.evaluation_results import BASE
from finetune_api.identity import base_row_uri
from finetune_api.sources import ModelLocation
from finetune_api.spec import parse_spec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.evaluate.base_row_key import (
    AskedSet,
    computation_of,
    model_digest,
    row_key,
    sets_as_they_are,
    sets_of_questions,
)
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.prepared.halves import Halves
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.base_rows import read_shared_row, write_shared_row
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.published import Base
from finetune_trainer.storage.runfiles import RowAnswers, SetAnswers
from finetune_trainer.train.final import BaseResults, measure_base

ASKED = AskedSet("intent", "9f", 8, {"yes": [1]})


def test_a_key_is_a_function_of_all_that_it_is_made_of() -> None:
    computed = {"device": "cpu", "bf16": False}
    keys = [
        row_key("model", computed, [ASKED]),
        row_key("another", computed, [ASKED]),
        row_key("model", computed | {"bf16": True}, [ASKED]),
        row_key("model", computed | {"fp8": False}, [ASKED]),
        row_key("model", computed, [ASKED, replace(ASKED, name="other")]),
        *(
            row_key("model", computed, [replace(ASKED, **change)])
            for change in (
                {"name": "other"}, {"samples": "9e"}, {"answers": 7}, {"labels": {"yes": [2]}},
                {"labels": {}},
            )
        ),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert keys[0] == row_key("model", dict(reversed(computed.items())), [ASKED])
    assert len(keys[0]) == 32 and int(keys[0], 16)


def test_a_model_is_known_by_its_content(tiny_model: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        base = Base(ModelLocation(source="s3://bucket/model"), ())
        return model_digest(BaseFiles(base, folder, None))

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README").write_text("not read")
    assert digest(copy) == digest(tiny_model)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        assert digest(copy) != digest(tiny_model), name
        (copy / name).write_bytes(before)


@pytest.mark.slow
def test_what_matters_to_the_figures_changes_what_is_asked(bench: Bench, tmp_path: Path) -> None:
    session = Attempt(bench.run_spec("1-first", evaluation={}), tmp_path / "scratch").session
    evaluator, spec = session.evaluator, session.spec
    raw = spec.to_json()

    def computed(evaluator: Evaluator = evaluator, **training: Any) -> dict[str, Any]:
        changed = raw | {"training": raw["training"] | training}
        return computation_of(parse_spec(changed), evaluator)

    same = computed()
    assert "bitsandbytes" not in same["libraries"], "an image may be without it"
    assert same == computed(learningRate="1e-4", batchSize=2, epochs=7, microBatchTokens=32)
    assert same == computed(replace(evaluator, micro_batch_tokens=32, max_samples=1))
    others = [
        same,
        computed(precision="BF16"),
        computed(replace(evaluator, max_new_tokens=3)),
        computed(replace(evaluator, virtual_tokens=3)),
    ]
    assert all(a != b for n, a in enumerate(others) for b in others[:n])

    def asked(
        evaluator: Evaluator = evaluator, metrics: list[str] | None = None,
        halves: Halves | None = None,
    ) -> list[AskedSet]:  # fmt: skip
        evaluation = raw["evaluation"] | ({"metrics": metrics} if metrics else {})
        changed = parse_spec(raw | {"evaluation": evaluation})
        return sets_as_they_are(evaluator, changed, halves)

    first = asked()
    assert first == asked(replace(evaluator, micro_batch_tokens=32)) and first[0].answers
    assert first == asked(metrics=["Accuracy", "ChrF"]), "metrics are computed from the answers"
    assert first != asked(replace(evaluator, max_samples=2))
    assert [each.answers for each in asked(metrics=["Loss"])] == [0]
    assert asked(metrics=["LabelAccuracy"])[0].labels.keys() == {
        *session.data.manifest.sets[-1].labels
    }

    (one, *_) = session.questions.values()
    questions = sets_of_questions(evaluator, spec, one)
    swapped = [one[1], one[0], *one[2:]]
    longer = [replace(one[0], ids=np.append(one[0].ids, np.int32(5))), *one[1:]]
    elsewhere = [replace(one[0], position=one[0].position + 1), *one[1:]]
    for others_asked in (swapped, longer, elsewhere, one[1:]):
        assert sets_of_questions(evaluator, spec, others_asked) != questions


ANSWERS = RowAnswers(
    row=BASE,
    sets=[
        SetAnswers(
            name="intent", metrics={"Loss": 0.1}, losses=[0.1, float("nan")], labels=[1, 2],
            answers=["ä", "b"], tokens=[1, 2],
        )
    ],
    process_seconds=1.5,
)  # fmt: skip


def test_an_entry_that_is_not_whole_is_none(store: ObjectStore, bucket: str) -> None:
    workspace, key = f"s3://{bucket}/work", "0" * 32
    uri = base_row_uri(workspace, key)
    assert read_shared_row(store, workspace, key) is None
    write_shared_row(store, workspace, key, "job 1-first", ANSWERS)
    found = read_shared_row(store, workspace, key)
    assert found is not None and found.run == "job 1-first"
    (answered,) = found.answers.sets
    assert answered.metrics == {} and answered.answers == ["ä", "b"]
    assert found.answers.process_seconds == 1.5

    text = store.get(uri)
    for damaged in (b"", b"{}", text[: len(text) // 2], text.replace(b'"b"', b'"c"'),
                    text.replace(b"0.1", b"0.2")):  # fmt: skip
        store.put(uri, damaged)
        assert read_shared_row(store, workspace, key) is None
    store.put(base_row_uri(workspace, "1" * 32), text)
    assert read_shared_row(store, workspace, "1" * 32) is None


class Counted:
    """Counts what a model is asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.samples = self.prompts = 0
        measure: Callable[..., Any] = Evaluator._measure
        generate: Callable[..., Any] = Evaluator.generate

        def counted_measure(evaluator: Evaluator, split: Any, positions: Any, *rest: Any) -> Any:
            self.samples += len(positions)
            return measure(evaluator, split, positions, *rest)

        def counted_generate(evaluator: Evaluator, prompts: Any) -> Any:
            self.prompts += len(prompts)
            return generate(evaluator, prompts)

        patch.setattr(Evaluator, "_measure", counted_measure)
        patch.setattr(Evaluator, "generate", counted_generate)

    def since(self) -> tuple[int, int]:
        found = self.samples, self.prompts
        self.samples = self.prompts = 0
        return found


@pytest.mark.slow
def test_a_run_takes_over_the_base_rows_that_another_has_measured(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    evaluation = {"baselines": {"shots": [1], "draws": 2}, "maxSamples": 4}

    def measured(run: str, **spec: Any) -> tuple[BaseResults, list[RowAnswers], tuple[int, int]]:
        run_spec = bench.run_spec(run, **{"evaluation": evaluation} | spec)
        session = Attempt(run_spec, tmp_path / run).session
        found = measure_base(session, 0)
        rows = [runfiles.read_row(bench.store, run_spec.run_uri, row) for row in found.rows]
        return found, rows, counted.since()

    base, rows, asked = measured("1-first")
    assert [row.row.key for row in rows] == ["base-0-shot-0", "base-1-shot-0", "base-1-shot-1"]
    assert asked[0] > 4 and asked[1] == 3 * 4
    assert not any(row.measured_by for row in rows)

    again, others, asked = measured(
        "2-other", training={"learningRate": "1e-3", "batchSize": 4}, method={"type": "IA3"}
    )
    assert asked == (0, 0)
    assert {row.measured_by for row in others} == {"job 1-first"}
    assert [row.model_copy(update={"measured_by": None}) for row in others] == rows
    assert again.answers.sets == base.answers.sets

    # What is asked otherwise is measured; so is what was damaged, and it is left whole again.
    _, fewer, asked = measured("3-fewer", evaluation=evaluation | {"maxSamples": 3})
    assert asked[1] == 3 * 3 and not any(row.measured_by for row in fewer)
    workspace = f"{bench.bucket}/out/.workspace"
    for info in bench.store.list(f"{workspace}/base-rows/"):
        bench.store.put(info.uri, bench.store.get(info.uri)[:-9])
    _, _, asked = measured("4-again")
    assert asked[1] == 3 * 4
    assert measured("5-after")[2] == (0, 0)

    # Answers are masked only where they are published.
    quality = {"deduplicate": False, "personalData": "Redact"}
    redacted = {"data": _data(bench) | {"quality": quality}}
    before = {info.uri for info in bench.store.list(f"{workspace}/base-rows/")}
    assert measured("6-redac", **redacted)[2][1] == 3 * 4
    assert {info.uri for info in bench.store.list(f"{workspace}/base-rows/")} == before


def _data(bench: Bench) -> dict[str, Any]:
    return {
        "train": [{"source": f"{bench.bucket}/train.jsonl"}],
        "split": {"validation": "0.1", "test": "0.1"},
    }
